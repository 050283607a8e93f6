// c = add c + scale op(a) op(b) on matrix units: both operands as f16, sums in f32. Tiles of BM x BN values by four subgroups,
// each a quarter of them in blocks of SIDE x SIDE. In front of this file: TA, TB, BM, BN, SIDE, THREADS and SUBGROUP (the
// most threads that a subgroup has: where it has fewer, several do the same work), the types Left, Right and Sum, and the
// file that declares b, c and `fetch`.
//
// f16 ends at 65504 and loses digits below 6e-5, which gradients are: so each operand is multiplied by the power of two
// that takes its largest value to between 2^14 and 2^15, and the sum by the inverse. What is lost is 2^-11 of each value, as
// f16 has it, and what is below 2^-39 of an operand's largest. Infinities and NaNs stay what they are.

struct P {
    m: u32, n: u32, k: u32, lda: u32, ldb: u32, ldc: u32, a_at: u32, b_at: u32, c_at: u32,
    a_step: u32, b_step: u32, c_step: u32, splits: u32, chunk: u32, scale: f32, add: u32,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> a: array<f32>;

const BK = 32u;
// Rows are longer than what is in them, so that they do not all begin in one bank.
const ROW_A = BK + 8u;
const ROW_B = BN + 8u;
var<workgroup> tile_a: array<f16, BM * ROW_A>;
var<workgroup> tile_b: array<f16, BK * ROW_B>;
var<workgroup> tile_c: array<f32, 4u * SIDE * SIDE>;

// op(a) at (row, at); 0 outside.
fn left(base: u32, row: u32, at: u32) -> f32 {
    if row >= p.m || at >= p.k { return 0.0; }
    if TA { return a[base + at * p.lda + row]; }
    return a[base + row * p.lda + at];
}

// op(b) at (at, col); 0 outside.
fn right(base: u32, at: u32, col: u32) -> f32 {
    if col >= p.n || at >= p.k { return 0.0; }
    if TB { return fetch(base, col, at); }
    return fetch(base, at, col);
}

// The exponent of the largest value, kept to where both powers of two below are floats.
fn exponent(most: u32) -> u32 { return clamp(most >> 23u, 15u, 253u); }
fn shrink(e: u32) -> f32 { return bitcast<f32>((268u - e) << 23u); }
fn grow(e: u32) -> f32 { return bitcast<f32>((e - 14u) << 23u); }

@compute @workgroup_size(THREADS)
fn coop(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row0 = group.y * BM;
    let col0 = group.x * BN;
    let a0 = p.a_at + group.z * p.a_step;
    let b0 = p.b_at + group.z * p.b_step;
    let sub = t / SUBGROUP;
    let quarter_row = sub / 2u * (BM / 2u);
    let quarter_col = sub % 2u * (BN / 2u);
    let exponent_a = exponent(most_a[0]);
    let exponent_b = exponent(most_b[0]);
    let scale_a = shrink(exponent_a);
    let scale_b = shrink(exponent_b);
    //:for i in WM
    //:for j in WN
    var acc_$i_$j = Sum();
    //:end
    //:end
    for (var k0 = 0u; k0 < p.k; k0 += BK) {
        // Neighbouring threads read neighbouring values.
        for (var e = t; e < BM * BK; e += THREADS) {
            var row = e / BK;
            var l = e % BK;
            if TA { row = e % BM; l = e / BM; }
            tile_a[row * ROW_A + l] = f16(left(a0, row0 + row, k0 + l) * scale_a);
        }
        for (var e = t; e < BK * BN; e += THREADS) {
            var col = e % BN;
            var l = e / BN;
            if TB { col = e / BK; l = e % BK; }
            tile_b[l * ROW_B + col] = f16(right(b0, k0 + l, col0 + col) * scale_b);
        }
        workgroupBarrier();
        //:for s in STEPS
        {
            //:for i in WM
            let at_a_$i = (quarter_row + $iu * SIDE) * ROW_A + $su * SIDE;
            let x_$i = coopLoadT<Left>(&tile_a[at_a_$i], ROW_A);
            //:end
            //:for j in WN
            let at_b_$j = $su * SIDE * ROW_B + quarter_col + $ju * SIDE;
            let y_$j = coopLoadT<Right>(&tile_b[at_b_$j], ROW_B);
            //:end
            //:for i in WM
            //:for j in WN
            acc_$i_$j = coopMultiplyAdd(x_$i, y_$j, acc_$i_$j);
            //:end
            //:end
        }
        //:end
        workgroupBarrier();
    }
    let c0 = p.c_at + group.z * p.c_step;
    let mine = sub * SIDE * SIDE;
    //:for i in WM
    //:for j in WN
    coopStoreT(acc_$i_$j, &tile_c[mine], SIDE);
    workgroupBarrier();
    for (var e = t % SUBGROUP; e < SIDE * SIDE; e += SUBGROUP) {
        let row = row0 + quarter_row + $iu * SIDE + e / SIDE;
        let col = col0 + quarter_col + $ju * SIDE + e % SIDE;
        if row < p.m && col < p.n {
            let at = c0 + row * p.ldc + col;
            // One power after the other: their product may be no float where the result is.
            let v = p.scale * (tile_c[mine + e] * grow(exponent_a) * grow(exponent_b));
            if p.add == 1u { c[at] += v; } else { c[at] = v; }
        }
    }
    workgroupBarrier();
    //:end
    //:end
}
