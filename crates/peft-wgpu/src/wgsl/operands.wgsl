// What kernels of products take. In front: TA and TB; beside it the file that declares b, c and `fetch`, which reads b's row
// and column as stored, whatever it is stored in.

struct P {
    m: u32, n: u32, k: u32, lda: u32, ldb: u32, ldc: u32, a_at: u32, b_at: u32, c_at: u32,
    a_step: u32, b_step: u32, c_step: u32, splits: u32, chunk: u32, scale: f32, add: u32,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> a: array<f32>;

// op(a) at (row, at); 0 outside.
fn left(base: u32, row: u32, at: u32, last: u32) -> f32 {
    if row >= p.m || at >= last { return 0.0; }
    if TA { return a[base + at * p.lda + row]; }
    return a[base + row * p.lda + at];
}

// op(b) at (at, col); 0 outside.
fn right(base: u32, at: u32, col: u32, last: u32) -> f32 {
    if col >= p.n || at >= last { return 0.0; }
    if TB { return fetch(base, col, at); }
    return fetch(base, at, col);
}
