// b of a product of matrix units as a packed matrix; see `packed.wgsl`.
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> most_a: array<u32>;
@group(0) @binding(4) var<storage, read> most_b: array<u32>;
@group(0) @binding(5) var<storage, read_write> c: array<f32>;

fn fetch(base: u32, row: u32, col: u32) -> f32 {
    return weight(row, row * p.ldb + col);
}
