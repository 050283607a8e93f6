// c = add c + scale op(a) op(b), row-major, in tiles of 16 TM x 16 TN values: 256 threads, TM x TN values each, both
// operands brought to shared memory 16 deep. In front of this file: TM, TN, TA, TB and `fetch`, which reads b's row and
// column as stored, whatever it is stored in.
//
// Axis z of the groups is the batch, and within it the splits of k; where there are several splits, each writes its own
// part of c, to be summed up by `join`.

struct P {
    m: u32, n: u32, k: u32, lda: u32, ldb: u32, ldc: u32, a_at: u32, b_at: u32, c_at: u32,
    a_step: u32, b_step: u32, c_step: u32, splits: u32, chunk: u32, scale: f32, add: u32,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> a: array<f32>;

const BK = 16u;
const BM = 16u * TM;
const BN = 16u * TN;
// One more than the tile is wide, so that threads that write a column do not meet in one bank.
var<workgroup> tile_a: array<f32, BK * (BM + 1u)>;
var<workgroup> tile_b: array<f32, BK * (BN + 1u)>;

@compute @workgroup_size(16, 16)
fn matmul(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let row0 = group.y * BM;
    let col0 = group.x * BN;
    let entry = group.z / p.splits;
    let split = group.z % p.splits;
    let a0 = p.a_at + entry * p.a_step;
    let b0 = p.b_at + entry * p.b_step;
    let first = split * p.chunk;
    let last = min(p.k, first + p.chunk);
    var acc: array<f32, TM * TN>;
    for (var i = 0u; i < TM * TN; i++) { acc[i] = 0.0; }

    for (var k0 = first; k0 < last; k0 += BK) {
        for (var e = t; e < BM * BK; e += 256u) {
            // Neighbouring threads read neighbouring values.
            var i = e / BK;
            var l = e % BK;
            if TA { i = e % BM; l = e / BM; }
            let row = row0 + i;
            let at = k0 + l;
            var v = 0.0;
            if row < p.m && at < last {
                if TA { v = a[a0 + at * p.lda + row]; } else { v = a[a0 + row * p.lda + at]; }
            }
            tile_a[l * (BM + 1u) + i] = v;
        }
        for (var e = t; e < BN * BK; e += 256u) {
            var j = e % BN;
            var l = e / BN;
            if TB { j = e / BK; l = e % BK; }
            let col = col0 + j;
            let at = k0 + l;
            var v = 0.0;
            if col < p.n && at < last {
                if TB { v = fetch(b0, col, at); } else { v = fetch(b0, at, col); }
            }
            tile_b[l * (BN + 1u) + j] = v;
        }
        workgroupBarrier();
        for (var l = 0u; l < BK; l++) {
            var x: array<f32, TM>;
            for (var i = 0u; i < TM; i++) { x[i] = tile_a[l * (BM + 1u) + local.y + 16u * i]; }
            for (var j = 0u; j < TN; j++) {
                let y = tile_b[l * (BN + 1u) + local.x + 16u * j];
                for (var i = 0u; i < TM; i++) { acc[i * TN + j] = fma(x[i], y, acc[i * TN + j]); }
            }
        }
        workgroupBarrier();
    }

    let c0 = p.c_at + group.z * p.c_step;
    for (var i = 0u; i < TM; i++) {
        let row = row0 + local.y + 16u * i;
        for (var j = 0u; j < TN; j++) {
            let col = col0 + local.x + 16u * j;
            if row < p.m && col < p.n {
                let at = c0 + row * p.ldc + col;
                let v = p.scale * acc[i * TN + j];
                if p.add == 1u { c[at] += v; } else { c[at] = v; }
            }
        }
    }
}
