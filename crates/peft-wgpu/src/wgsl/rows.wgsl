// Rows of a packed chunk in f32: those that `ids` names and that are in it, or all.

struct P { n: u32, cols: u32, first: u32, rows: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> all_out: array<f32>;
@group(0) @binding(3) var<storage, read_write> rows_out: array<f32>;

@compute @workgroup_size(256)
fn packed_rows(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    let row = ids[i / p.cols] - p.first;
    if row < p.rows { rows_out[i] = weight(row, row * p.cols + i % p.cols); }
}

@compute @workgroup_size(256)
fn packed_all(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    all_out[i] = weight(i / p.cols, i);
}
