// `group.wgsl` by operations of subgroups: two barriers for each result. However many threads a subgroup has, and whichever
// they are, each writes what it has to its own place.

// Where a thread is.
struct At {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

// A subgroup has one thread at least.
var<workgroup> group_values: array<f32, WIDTH>;

fn group_sum(at: At, mine: f32) -> f32 {
    let part = subgroupAdd(mine);
    group_values[at.subgroup] = part;
    workgroupBarrier();
    var sum = group_values[0];
    for (var s = 1u; s < at.subgroups; s++) { sum += group_values[s]; }
    workgroupBarrier();
    return sum;
}

fn group_max(at: At, mine: f32) -> f32 {
    // What a driver's maximum makes of a NaN is open; a sum keeps it.
    let bad = is_nan(mine);
    let nan = subgroupAdd(select(0.0, mine, bad));
    let part = subgroupMax(select(mine, -3.4e38, bad)) + nan;
    group_values[at.subgroup] = part;
    workgroupBarrier();
    var most = group_values[0];
    for (var s = 1u; s < at.subgroups; s++) { most = larger(most, group_values[s]); }
    workgroupBarrier();
    return most;
}
