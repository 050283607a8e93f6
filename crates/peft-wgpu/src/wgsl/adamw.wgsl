// AdamW over flat arrays, and the norm of all gradients, which never leaves the device.

struct P {
    n: u32,
    // The slot of every element, or MANY: then `places` has it.
    slot: u32,
    // The first entry of `partials` that is written.
    out: u32,
    towards: f32,
    keep: f32,
    add: f32,
    eps: f32,
    max_norm: f32,
}
var<immediate> p: P;

const MANY = 0xffffffffu;
// No gradient that is not finite.
const NONE = 0xffffffffu;
// Elements that belong to one slot.
const UNIT = 64u;
// Elements that a group sums.
const CHUNK = 4096u;

// Of each slot: decay, size, root, and whether it moves.
@group(0) @binding(0) var<storage, read> squares_grad: array<f32>;
@group(0) @binding(1) var<storage, read> squares_places: array<u32>;
@group(0) @binding(2) var<storage, read> squares_rates: array<vec4<f32>>;
// A sum's bits, and the first slot with a gradient that is not finite.
@group(0) @binding(3) var<storage, read_write> squares_out: array<vec2<u32>>;

@group(0) @binding(0) var<storage, read> norm_in: array<vec2<u32>>;
@group(0) @binding(1) var<storage, read_write> norm_out: array<u32>;

@group(0) @binding(0) var<storage, read> old: array<f32>;
@group(0) @binding(1) var<storage, read> grad: array<f32>;
@group(0) @binding(2) var<storage, read> places: array<u32>;
@group(0) @binding(3) var<storage, read> rates: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> facts: array<u32>;
@group(0) @binding(5) var<storage, read_write> moved: array<f32>;
@group(0) @binding(6) var<storage, read_write> mean: array<f32>;
@group(0) @binding(7) var<storage, read_write> square: array<f32>;

@group(0) @binding(0) var<storage, read> used_in: array<f32>;
@group(0) @binding(1) var<storage, read> used_facts: array<u32>;
@group(0) @binding(2) var<storage, read_write> used_out: array<f32>;

var<workgroup> sums: array<f32, 256>;
var<workgroup> firsts: array<u32, 256>;

// By the bits: WGSL lets a compiler take for granted that there are no such numbers.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

fn reduce(t: u32) {
    workgroupBarrier();
    for (var half = 128u; half > 0u; half /= 2u) {
        if t < half {
            sums[t] += sums[t + half];
            firsts[t] = min(firsts[t], firsts[t + half]);
        }
        workgroupBarrier();
    }
}

@compute @workgroup_size(256)
fn adamw_squares(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) w: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let at = group.x + group.y * w.x;
    let begin = min(at * CHUNK, p.n);
    let end = min(begin + CHUNK, p.n);
    var sum = 0.0;
    var first = NONE;
    for (var i = begin + t; i < end; i += 256u) {
        var slot = p.slot;
        if slot == MANY { slot = squares_places[i / UNIT]; }
        if squares_rates[slot].w > 0.0 {
            let x = squares_grad[i];
            sum += x * x;
            if !is_finite(x * x) { first = min(first, slot); }
        }
    }
    sums[t] = sum;
    firsts[t] = first;
    reduce(t);
    if t == 0u && begin < end { squares_out[p.out + at] = vec2<u32>(bitcast<u32>(sums[0]), firsts[0]); }
}

@compute @workgroup_size(256)
fn adamw_norm(@builtin(local_invocation_index) t: u32) {
    var sum = 0.0;
    var first = NONE;
    for (var i = t; i < p.n; i += 256u) {
        sum += bitcast<f32>(norm_in[i].x);
        first = min(first, norm_in[i].y);
    }
    sums[t] = sum;
    firsts[t] = first;
    reduce(t);
    if t == 0u {
        let norm = sqrt(sums[0]);
        let bad = firsts[0] != NONE || !is_finite(sums[0]);
        var factor = 1.0;
        if p.max_norm > 0.0 { factor = min(p.max_norm / (norm + 1e-6), 1.0); }
        norm_out[0] = select(bitcast<u32>(norm), 0x7f800000u, bad);
        norm_out[1] = bitcast<u32>(factor);
        // A sum beyond f32 of numbers within it is nobody's in particular: -1.
        let whose = select(f32(firsts[0]) + 1.0, -1.0, firsts[0] == NONE);
        norm_out[2] = bitcast<u32>(select(0.0, whose, bad));
    }
}

@compute @workgroup_size(256)
fn adamw_move(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    var slot = p.slot;
    if slot == MANY { slot = places[i / UNIT]; }
    let rate = rates[slot];
    var value = old[i];
    if rate.w > 0.0 && facts[2] == 0u {
        let x = grad[i] * bitcast<f32>(facts[1]);
        let m = mean[i] + (x - mean[i]) * p.towards;
        let v = square[i] * p.keep + p.add * x * x;
        mean[i] = m;
        square[i] = v;
        value = value * rate.x - rate.y * (m / (sqrt(v) / rate.z + p.eps));
    }
    moved[i] = value;
}

// Gradients as they were used.
@compute @workgroup_size(256)
fn adamw_used(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i < p.n { used_out[i] = used_in[i] * bitcast<f32>(used_facts[1]); }
}
