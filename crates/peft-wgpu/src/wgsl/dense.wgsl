// b of a product as plain floats.
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;

fn fetch(base: u32, row: u32, col: u32) -> f32 {
    return b[base + row * p.ldb + col];
}
