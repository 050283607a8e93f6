// The output and its log-sum-exp: a group for 32 queries of a head.

// Only the backward kernels have this array.
fn element_of_dout(at: u32) -> f32 { return 0.0; }

// This thread's rows of `square` times its column of `tile_y`.
fn weighted(lx: u32, ly: u32) -> vec2<f32> {
    var sum = vec2<f32>(0.0);
    for (var j = 0u; j < TILE; j += 4u) {
        //:for u in 4
        sum = fma(
            vec2<f32>(square[ly * (TILE + 1u) + j + $uu], square[(ly + 16u) * (TILE + 1u) + j + $uu]),
            vec2<f32>(tile_y[(j + $uu) * (DEPTH + 1u) + lx]),
            sum,
        );
        //:end
    }
    return sum;
}

@compute @workgroup_size(256)
fn attention(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i0 = group.x * TILE;
    let h = group.y;
    let entry = group.z;
    let lx = t % 16u;
    let ly = t / 16u;
    //:for n in STEPS
    var sums_$n = vec2<f32>(0.0);
    //:end
    if t < TILE {
        row_max[t] = LEAST;
        row_sum[t] = 0.0;
    }
    for (var j0 = 0u; j0 < p.t; j0 += TILE) {
        if !meet(i0, j0) { continue; }
        let products = products(t, entry, h, Q, i0, K, j0);
        //:for n in 4
        {
            let row = ly + 16u * ($nu / 2u);
            let col = lx + 16u * ($nu % 2u);
            square[row * (TILE + 1u) + col] = select(LEAST, score(products[$n]).value, sees(entry, i0 + row, j0 + col));
        }
        //:end
        workgroupBarrier();
        // Eight threads a row, four columns each.
        let row = t / 8u;
        let first = row * (TILE + 1u) + t % 8u * 4u;
        var most = LEAST;
        for (var c = 0u; c < 4u; c++) { most = max(most, square[first + c]); }
        partial[t] = most;
        workgroupBarrier();
        let before = row_max[row];
        most = before;
        for (var c = 0u; c < 8u; c++) { most = max(most, partial[row * 8u + c]); }
        var sum = 0.0;
        for (var c = 0u; c < 4u; c++) {
            let s = square[first + c];
            let weight = select(exp_f(s - most), 0.0, s == LEAST);
            square[first + c] = weight;
            sum += weight;
        }
        workgroupBarrier();
        partial[t] = sum;
        workgroupBarrier();
        if t % 8u == 0u {
            let factor = exp_f(before - most);
            sum = row_sum[row] * factor;
            for (var c = 0u; c < 8u; c++) { sum += partial[row * 8u + c]; }
            row_sum[row] = sum;
            row_max[row] = most;
            row_factor[row] = factor;
        }
        workgroupBarrier();
        let factors = vec2<f32>(row_factor[ly], row_factor[ly + 16u]);
        //:for n in STEPS
        fill_y(t, V, entry, h, j0, $nu * DEPTH);
        workgroupBarrier();
        sums_$n = fma(sums_$n, factors, weighted(lx, ly));
        workgroupBarrier();
        //:end
    }
    workgroupBarrier();
    for (var half = 0u; half < 2u; half++) {
        let row = ly + 16u * half;
        let i = i0 + row;
        if i >= p.s { continue; }
        let sum = row_sum[row];
        //:for n in STEPS
        if $nu * DEPTH + lx < D {
            out[q_at(entry, i, h) + $nu * DEPTH + lx] = select(select(sums_$n.x, sums_$n.y, half == 1u) / sum, 0.0, sum == 0.0);
        }
        //:end
        if lx == 0u {
            var value = LEAST;
            if sum > 0.0 { value = row_max[row] + ln_f(sum); }
            lse_out[lse_at(entry, i, h)] = value;
        }
    }
}
