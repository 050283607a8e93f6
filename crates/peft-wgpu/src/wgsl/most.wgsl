// The largest size of the values of an array, as bits: for numbers of one sign their order is that of the floats, NaNs
// above all. The largest of several is the same in whatever order they come.

struct P { n: u32, at: u32, cols: u32 }
var<immediate> p: P;

var<workgroup> group_most: atomic<u32>;

@compute @workgroup_size(256)
fn most(
    @builtin(global_invocation_id) g: vec3<u32>,
    @builtin(num_workgroups) w: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    if t == 0u { atomicStore(&group_most, 0u); }
    workgroupBarrier();
    var mine = 0u;
    for (var i = g.x; i < p.n; i += w.x * 256u) { mine = max(mine, bitcast<u32>(value(i)) & 0x7fffffffu); }
    atomicMax(&group_most, mine);
    workgroupBarrier();
    if t == 0u { atomicMax(&most_out[0], atomicLoad(&group_most)); }
}
