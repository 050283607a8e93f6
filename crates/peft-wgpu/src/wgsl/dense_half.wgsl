// b of a product of matrix units as plain floats.
@group(0) @binding(1) var<storage, read> b: array<f32>;
@group(0) @binding(2) var<storage, read> most_a: array<u32>;
@group(0) @binding(3) var<storage, read> most_b: array<u32>;
@group(0) @binding(4) var<storage, read_write> c: array<f32>;

fn fetch(base: u32, row: u32, col: u32) -> f32 {
    return b[base + row * p.ldb + col];
}
