@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> most_out: array<atomic<u32>>;

fn value(i: u32) -> f32 { return weight(i / p.cols, i); }
