// sum(dout out) of each query of each head, laid out as the log-sum-exp is.

struct P { n: u32, s: u32, heads: u32, width: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> out: array<f32>;
@group(0) @binding(1) var<storage, read> dout: array<f32>;
@group(0) @binding(2) var<storage, read_write> delta: array<f32>;

@compute @workgroup_size(256)
fn attention_delta(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    let query = i % p.s;
    let head = i / p.s % p.heads;
    let entry = i / (p.s * p.heads);
    let at = ((entry * p.s + query) * p.heads + head) * p.width;
    var sum = 0.0;
    for (var d = 0u; d < p.width; d++) { sum = fma(out[at + d], dout[at + d], sum); }
    delta[i] = sum;
}
