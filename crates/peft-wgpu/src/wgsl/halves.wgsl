// f32 to bfloat16 and back, two values a word, rounded to the nearest, ties to even.

struct P { n: u32, op: u32, mul: f32, add: f32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> wide_in: array<u32>;
@group(0) @binding(1) var<storage, read_write> narrow_out: array<u32>;
@group(0) @binding(0) var<storage, read> narrow_in: array<u32>;
@group(0) @binding(1) var<storage, read_write> wide_out: array<u32>;

fn rounded(bits: u32) -> u32 {
    // A NaN must not round to an infinity.
    if (bits & 0x7fffffffu) > 0x7f800000u { return (bits >> 16u) | 0x40u; }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

@compute @workgroup_size(256)
fn to_halves(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if 2u * i >= p.n { return; }
    var word = rounded(wide_in[2u * i]);
    if 2u * i + 1u < p.n { word |= rounded(wide_in[2u * i + 1u]) << 16u; }
    narrow_out[i] = word;
}

@compute @workgroup_size(256)
fn from_halves(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    if 2u * i >= p.n { return; }
    let word = narrow_in[i];
    wide_out[2u * i] = word << 16u;
    if 2u * i + 1u < p.n { wide_out[2u * i + 1u] = word & 0xffff0000u; }
}
