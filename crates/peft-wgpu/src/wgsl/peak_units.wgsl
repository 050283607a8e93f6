// What matrix units can do: products of blocks in registers. In front: the types, SIDE and THREADS, as in `coop.wgsl`.

struct P { rounds: u32, n: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

var<workgroup> block: array<f16, SIDE * SIDE>;
var<workgroup> sums: array<f32, SIDE * SIDE>;

@compute @workgroup_size(THREADS)
fn peak_units(@builtin(local_invocation_index) t: u32) {
    for (var e = t; e < SIDE * SIDE; e += THREADS) { block[e] = f16(x[0].x); }
    workgroupBarrier();
    let at = 0u;
    let a = coopLoadT<Left>(&block[at], SIDE);
    let b = coopLoadT<Right>(&block[at], SIDE);
    //:for i in 4
    var acc_$i = Sum();
    //:end
    for (var r = 0u; r < p.rounds; r++) {
        //:for i in 4
        acc_$i = coopMultiplyAdd(a, b, acc_$i);
        //:end
    }
    //:for i in 4
    coopStoreT(acc_$i, &sums[at], SIDE);
    workgroupBarrier();
    if t == 0u && sums[0] == 1.2345 { y[0] = sums[1]; }
    workgroupBarrier();
    //:end
}
