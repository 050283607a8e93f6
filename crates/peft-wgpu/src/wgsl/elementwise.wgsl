// Functions of one and two arguments over flat arrays. Which function is a number in `p.op`: it is the same for the
// whole dispatch, so the branch costs nothing beside the memory.

struct P { n: u32, op: u32, mul: f32, add: f32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x0: array<f32>;
@group(0) @binding(1) var<storage, read> x1: array<f32>;
@group(0) @binding(2) var<storage, read> x2: array<f32>;
@group(0) @binding(0) var<storage, read_write> fill_out: array<f32>;
@group(0) @binding(1) var<storage, read_write> one_out: array<f32>;
@group(0) @binding(2) var<storage, read_write> two_out: array<f32>;
@group(0) @binding(3) var<storage, read_write> three_out: array<f32>;
@group(0) @binding(4) var<storage, read_write> three_more: array<f32>;

const WIDTH = 256u;

fn index(g: vec3<u32>, groups: vec3<u32>) -> u32 {
    return g.x + g.y * groups.x * WIDTH;
}

fn value(op: u32, x: f32) -> f32 {
    switch op {
        case 0u: { return -x; }
        case 1u: { return exp_f(x); }
        case 2u: { return ln_f(x); }
        case 3u: { return sqrt(x); }
        case 4u: { return 1.0 / sqrt(x); }
        case 5u: { return 1.0 / x; }
        case 6u: { return x * x; }
        case 7u: { return abs(x); }
        case 8u: { return tanh_f(x); }
        case 9u: { return sigmoid_f(x); }
        case 10u: { return max(x, 0.0); }
        case 11u: { return x * sigmoid_f(x); }
        case 12u: { return x * phi_f(x); }
        case 13u: { return 0.5 * x * (1.0 + gelu_inner(x)); }
        case 14u: { return turn(x, false); }
        default: { return turn(x, true); }
    }
}

fn slope(op: u32, x: f32, y: f32) -> f32 {
    switch op {
        case 0u: { return -1.0; }
        case 1u: { return y; }
        case 2u: { return 1.0 / x; }
        case 3u: { return 0.5 / y; }
        case 4u: { return -0.5 * y * y * y; }
        case 5u: { return -y * y; }
        case 6u: { return 2.0 * x; }
        case 7u: { return sign(x); }
        case 8u: { return 1.0 - y * y; }
        case 9u: { return y * (1.0 - y); }
        case 10u: { return select(0.0, 1.0, x > 0.0); }
        case 11u: {
            let s = sigmoid_f(x);
            return s * (1.0 + x * (1.0 - s));
        }
        case 12u: { return phi_f(x) + x * exp_f(-0.5 * x * x) * 0.39894228; }
        case 13u: {
            let t = gelu_inner(x);
            let inner = 0.7978846 * (1.0 + 0.134145 * x * x);
            return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
        }
        case 14u: { return turn(x, true); }
        default: { return -turn(x, false); }
    }
}

@compute @workgroup_size(256)
fn fill(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { fill_out[i] = p.add; }
}

@compute @workgroup_size(256)
fn unary(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { one_out[i] = value(p.op, x0[i]); }
}

@compute @workgroup_size(256)
fn affine(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { one_out[i] = fma(p.mul, x0[i], p.add); }
}

@compute @workgroup_size(256)
fn accumulate(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { one_out[i] += x0[i]; }
}

// dy f'(x); x, y, dy
@compute @workgroup_size(256)
fn unary_grad(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { three_out[i] = x2[i] * slope(p.op, x0[i], x1[i]); }
}

// act(gate) * up
@compute @workgroup_size(256)
fn glu(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n { two_out[i] = value(p.op, x0[i]) * x1[i]; }
}

// (d gate, d up) of gate, up, dy
@compute @workgroup_size(256)
fn glu_grad(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = index(g, w);
    if i < p.n {
        let gate = x0[i];
        three_out[i] = x2[i] * x1[i] * slope(p.op, gate, 0.0);
        three_more[i] = x2[i] * value(p.op, gate);
    }
}
