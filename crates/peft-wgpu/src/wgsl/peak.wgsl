// What a device can do: multiply-adds of values in registers, and reading.

struct P { rounds: u32, n: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// 64 multiply-adds a round and thread, in sixteen chains.
@compute @workgroup_size(256)
fn peak_fma(@builtin(global_invocation_id) g: vec3<u32>) {
    let by = x[0];
    //:for i in 4
    var acc_$i = by + vec4<f32>(f32(g.x) + f32($iu));
    //:end
    for (var r = 0u; r < p.rounds; r++) {
        //:for u in 4
        //:for i in 4
        acc_$i = fma(acc_$i, by, by);
        //:end
        //:end
    }
    // A result that never comes: nothing may be left out for want of a use.
    let sum = acc_0 + acc_1 + acc_2 + acc_3;
    if sum.x == 1.2345 && sum.y == 5.4321 { y[0] = sum.z + sum.w; }
}

@compute @workgroup_size(256)
fn peak_read(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    var sum = vec4<f32>(0.0);
    for (var i = g.x; i < p.n; i += w.x * 256u) { sum += x[i]; }
    if sum.x == 1.2345 && sum.y == 5.4321 { y[0] = sum.z + sum.w; }
}
