// The output and its log-sum-exp: a group for 32 queries of a head.

// Only the backward kernels have this array.
fn element_of_dout(at: u32) -> f32 { return 0.0; }

var<workgroup> partial: array<f32, 256>;
var<workgroup> row_max: array<f32, TILE>;
var<workgroup> row_sum: array<f32, TILE>;

// Row `row` of `square` times four columns of `tile_y`.
fn weighted(row: u32, columns: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var w = 0u; w < 8u; w++) {
        let weights = square[word(row, w)];
        //:for u in 4
        sum = fma(vec4<f32>(weights[$u]), tile_y[word(4u * w + $uu, columns)], sum);
        //:end
    }
    return sum;
}

@compute @workgroup_size(256)
fn attention(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i0 = group.x * TILE;
    let h = group.y;
    let entry = group.z;
    // Four columns of a row: of the weights, and of each 32 columns of the output.
    let row = t / 8u;
    let part = t % 8u;
    //:for n in STEPS
    var sums_$n = vec4<f32>(0.0);
    //:end
    if t < TILE {
        row_max[t] = LEAST;
        row_sum[t] = 0.0;
    }
    for (var j0 = 0u; j0 < p.t; j0 += TILE) {
        if !meet(entry, i0, j0) { continue; }
        let raw = products(t, entry, h, Q, i0, K, j0);
        //:for n in 4
        {
            let i = t / 16u + 16u * ($nu / 2u);
            let j = t % 16u + 16u * ($nu % 2u);
            square[word(i, j / 4u)][j % 4u] = select(LEAST, score(raw[$n]).value, sees(entry, i0 + i, j0 + j));
        }
        //:end
        workgroupBarrier();
        let scores = square[word(row, part)];
        partial[t] = max(max(scores.x, scores.y), max(scores.z, scores.w));
        let before = row_max[row];
        let sum_before = row_sum[row];
        workgroupBarrier();
        var most = before;
        for (var c = 0u; c < 8u; c++) { most = max(most, partial[row * 8u + c]); }
        var weights = vec4<f32>(0.0);
        //:for u in 4
        if scores[$u] != LEAST { weights[$u] = exp_f(scores[$u] - most); }
        //:end
        workgroupBarrier();
        square[word(row, part)] = weights;
        partial[t] = weights.x + weights.y + weights.z + weights.w;
        workgroupBarrier();
        let factor = exp_f(before - most);
        if part == 0u {
            var sum = sum_before * factor;
            for (var c = 0u; c < 8u; c++) { sum += partial[row * 8u + c]; }
            row_sum[row] = sum;
            row_max[row] = most;
        }
        //:for n in STEPS
        fill_y(t, V, entry, h, j0, $nu * 32u);
        workgroupBarrier();
        sums_$n = fma(sums_$n, vec4<f32>(factor), weighted(row, part));
        workgroupBarrier();
        //:end
    }
    workgroupBarrier();
    let i = i0 + row;
    if i >= p.s { return; }
    let sum = row_sum[row];
    let inverse = select(1.0 / sum, 0.0, sum == 0.0);
    //:for n in STEPS
    //:for u in 4
    if 32u * $nu + 4u * part + $uu < p.width {
        out[q_at(entry, i, h) + 32u * $nu + 4u * part + $uu] = sums_$n[$u] * inverse;
    }
    //:end
    //:end
    if part == 0u {
        var value = LEAST;
        if sum > 0.0 { value = row_max[row] + ln_f(sum); }
        lse_out[lse_at(entry, i, h)] = value;
    }
}
