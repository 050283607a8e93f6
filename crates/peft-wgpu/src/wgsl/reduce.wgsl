// Sums over some axes of an array. Output o lies at the place that the kept axes give it; element r of its sum at
// another, by the axes that are summed. A sum may be cut into `splits` parts, written one after another.

struct P {
    outputs: u32, length: u32, splits: u32, chunk: u32,
    kept: array<u32, 4>, kept_step: array<u32, 4>, summed: array<u32, 4>, summed_step: array<u32, 4>,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

fn kept_place(o: u32) -> u32 {
    var rest = o;
    var at = 0u;
    for (var d = 3i; d >= 0i; d--) {
        if p.kept[d] == 1u { continue; }
        at += rest % p.kept[d] * p.kept_step[d];
        rest /= p.kept[d];
    }
    return at;
}

fn summed_place(r: u32) -> u32 {
    var rest = r;
    var at = 0u;
    for (var d = 3i; d >= 0i; d--) {
        if p.summed[d] == 1u { continue; }
        at += rest % p.summed[d] * p.summed_step[d];
        rest /= p.summed[d];
    }
    return at;
}

// A thread for each part: neighbouring threads have neighbouring outputs.
@compute @workgroup_size(256)
fn sum_by_thread(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.outputs * p.splits { return; }
    let base = kept_place(i % p.outputs);
    let first = i / p.outputs * p.chunk;
    let last = min(p.length, first + p.chunk);
    var sum = 0.0;
    for (var r = first; r < last; r++) { sum += x[base + summed_place(r)]; }
    y[i] = sum;
}

// A group of WIDTH threads for each part: neighbouring threads have neighbouring elements of it.
@compute @workgroup_size(WIDTH)
fn sum_by_group(at: At) {
    let i = at.group.x + at.group.y * at.groups.x;
    let inside = i < p.outputs * p.splits;
    let base = kept_place(i % p.outputs);
    let first = i / p.outputs * p.chunk;
    let last = select(0u, min(p.length, first + p.chunk), inside);
    var mine = 0.0;
    for (var r = first + at.t; r < last; r += WIDTH) { mine += x[base + summed_place(r)]; }
    let sum = group_sum(at, mine);
    if at.t == 0u && inside { y[i] = sum; }
}
