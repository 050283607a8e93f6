// Sums and maxima over the WIDTH threads of a group, a power of two. Every thread has to come here.

var<workgroup> group_values: array<f32, WIDTH>;

fn group_sum(t: u32, mine: f32) -> f32 {
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

// Whether the bits are those of a NaN: a compiler may take x != x for false.
fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

fn larger(a: f32, b: f32) -> f32 {
    return select(a, b, b > a || is_nan(b));
}

fn group_max(t: u32, mine: f32) -> f32 {
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
