// Sums and maxima over the WIDTH threads of a group, a power of two, by a tree in shared memory. Every thread has to come
// here. The same functions over subgroups are in `group_by_subgroup.wgsl`.

// Where a thread is.
struct At {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
}

var<workgroup> group_values: array<f32, WIDTH>;

fn group_sum(at: At, mine: f32) -> f32 {
    let t = at.t;
    group_values[t] = mine;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if t < half { group_values[t] += group_values[t + half]; }
        workgroupBarrier();
    }
    let sum = group_values[0];
    workgroupBarrier();
    return sum;
}

fn group_max(at: At, mine: f32) -> f32 {
    let t = at.t;
    group_values[t] = mine;
    workgroupBarrier();
    for (var half = WIDTH / 2u; half > 0u; half /= 2u) {
        if t < half { group_values[t] = larger(group_values[t], group_values[t + half]); }
        workgroupBarrier();
    }
    let most = group_values[0];
    workgroupBarrier();
    return most;
}
