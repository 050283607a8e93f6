// Elements looked up by strides: broadcasting arithmetic, and every copy that moves axes or parts of them. Up to eight
// axes; the outermost comes first, and unused ones in front have size 1.

struct P { n: u32, op: u32, a_at: u32, b_at: u32, dims: array<u32, 8>, a: array<u32, 8>, b: array<u32, 8> }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x0: array<f32>;
@group(0) @binding(1) var<storage, read> x1: array<f32>;
@group(0) @binding(1) var<storage, read_write> copy_out: array<f32>;
@group(0) @binding(2) var<storage, read_write> binary_out: array<f32>;

// Where element i of the common shape lies in either array.
fn places(i: u32) -> vec2<u32> {
    var rest = i;
    var at = vec2<u32>(p.a_at, p.b_at);
    for (var d = 7i; d >= 0i; d--) {
        let size = p.dims[d];
        if size == 1u { continue; }
        let c = rest % size;
        rest /= size;
        at += c * vec2<u32>(p.a[d], p.b[d]);
    }
    return at;
}

@compute @workgroup_size(256)
fn binary(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    let at = places(i);
    let a = x0[at.x];
    let b = x1[at.y];
    var y: f32;
    switch p.op {
        case 0u: { y = a + b; }
        case 1u: { y = a - b; }
        case 2u: { y = a * b; }
        default: { y = a / b; }
    }
    binary_out[i] = y;
}

// out[b-place] = x[a-place]
@compute @workgroup_size(256)
fn strided_copy(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if i >= p.n { return; }
    let at = places(i);
    copy_out[at.y] = x0[at.x];
}
