// b of a product as a packed matrix. In front: FORMAT and the names of the formats. A chunk of whole rows, flat; how the
// values lie in `codes` and `scales` is said at each format.
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;

fn fetch(base: u32, row: u32, col: u32) -> f32 {
    return weight(row, row * p.ldb + col);
}
