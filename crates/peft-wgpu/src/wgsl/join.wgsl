// out = add out + scale (sum of the parts), parts one after another.

struct P { n: u32, parts: u32, scale: f32, add: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn join(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    var sum = 0.0;
    for (var s = 0u; s < p.parts; s++) { sum += x[s * p.n + i]; }
    sum *= p.scale;
    if p.add == 1u { y[i] += sum; } else { y[i] = sum; }
}
