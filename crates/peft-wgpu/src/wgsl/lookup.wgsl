// Rows by their numbers, and rotary positions.

struct P { n: u32, cols: u32, heads: u32, half: u32, sign: f32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> starts: array<u32>;
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(2) var<storage, read_write> gathered: array<f32>;
@group(0) @binding(4) var<storage, read_write> scattered: array<f32>;
@group(0) @binding(1) var<storage, read> cosines: array<f32>;
@group(0) @binding(2) var<storage, read> sines: array<f32>;
@group(0) @binding(3) var<storage, read> positions: array<u32>;
@group(0) @binding(4) var<storage, read_write> turned: array<f32>;

fn index(g: vec3<u32>, w: vec3<u32>) -> u32 {
    return g.x + g.y * w.x * 256u;
}

@compute @workgroup_size(256)
fn gather(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { gathered[i] = x[ids[i / p.cols] * p.cols + i % p.cols]; }
}

// Row ids[u] of the result is the sum of the rows order[starts[u]..starts[u + 1]], in that order: the same every time.
@compute @workgroup_size(256)
fn scatter_rows(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i >= p.n { return; }
    let u = i / p.cols;
    let c = i % p.cols;
    var sum = 0.0;
    for (var at = starts[u]; at < starts[u + 1u]; at++) { sum += x[order[at] * p.cols + c]; }
    scattered[ids[u] * p.cols + c] = sum;
}

// A head is `cols` wide; element j of its first half turns with element j + half.
@compute @workgroup_size(256)
fn rope(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i >= p.n { return; }
    let j = i % p.cols;
    if j >= 2u * p.half {
        turned[i] = x[i];
        return;
    }
    let token = i / (p.cols * p.heads);
    let lower = j < p.half;
    let at = positions[token] * p.half + select(j - p.half, j, lower);
    let other = x[select(i - p.half, i + p.half, lower)];
    let sine = p.sign * select(sines[at], -sines[at], lower);
    turned[i] = x[i] * cosines[at] + other * sine;
}
