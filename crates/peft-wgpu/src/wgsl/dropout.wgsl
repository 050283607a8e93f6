// Dropout with the stream of `RngKey::uniform_at`: Philox4x32-10, four elements a block and a thread.

struct P { n: u32, first: u32, k0: u32, k1: u32, p: f32, scale: f32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// The 64-bit product as (high, low), from 16-bit halves.
fn wide(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let low = a0 * b0;
    let mid = a1 * b0 + (low >> 16u);
    let mid2 = a0 * b1 + (mid & 0xffffu);
    return vec2<u32>(a1 * b1 + (mid >> 16u) + (mid2 >> 16u), a * b);
}

@compute @workgroup_size(256)
fn dropout(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let at = g.x + g.y * w.x * 256u;
    if at * 4u >= p.n { return; }
    // Elements are counted in 32 bits, so blocks are too.
    var c = vec4<u32>(p.first + at, 0u, 0u, 0u);
    var key = vec2<u32>(p.k0, p.k1);
    for (var round = 0u; round < 10u; round++) {
        let a = wide(c.x, 0xd2511f53u);
        let b = wide(c.z, 0xcd9e8d57u);
        c = vec4<u32>(b.x ^ c.y ^ key.x, b.y, a.x ^ c.w ^ key.y, a.y);
        key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    for (var j = 0u; j < 4u; j++) {
        let i = at * 4u + j;
        if i < p.n {
            let uniform_number = f32(c[j] >> 8u) * (1.0 / 16777216.0);
            y[i] = select(0.0, x[i] * p.scale, uniform_number >= p.p);
        }
    }
}
