@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> most_out: array<atomic<u32>>;

fn value(i: u32) -> f32 { return x[p.at + i]; }
