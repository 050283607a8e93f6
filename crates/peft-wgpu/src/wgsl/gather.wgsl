// Several arrays into one, each up to a multiple of 64 elements, the rest of them zeros. A row of groups for each.

struct P {
    begin: array<u32, 8>,
    len: array<u32, 8>,
}
var<immediate> p: P;

//:for i in 8
@group(0) @binding($i) var<storage, read> x_$i: array<f32>;
//:end
@group(0) @binding(8) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(256)
fn gather_flat(@builtin(global_invocation_id) g: vec3<u32>) {
    let i = g.x;
    let len = p.len[g.y];
    if i >= (len + 63u) / 64u * 64u { return; }
    var value = 0.0;
    if i < len {
        switch g.y {
//:for i in 8
            case $iu: { value = x_$i[i]; }
//:end
            default: {}
        }
    }
    y[p.begin[g.y] + i] = value;
}
