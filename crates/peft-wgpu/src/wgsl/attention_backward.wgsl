// Gradients. With P the weights, dP = dout v', dS = P (dP - delta) slope, where delta = sum(dout out) of a query:
// dq = dS k, dk = dS' q, dv = P' dout.

fn element_of_dout(at: u32) -> f32 { return dout[at]; }

var<workgroup> square_b: array<vec4<f32>, 256>;

// P to `square`, dS to `square_b`, for queries from i0 on and keys from j0 on; `turned`: a row for each key.
fn weights(t: u32, entry: u32, h: u32, i0: u32, j0: u32, turned: bool) {
    let raw = products(t, entry, h, Q, i0, K, j0);
    let slopes = products(t, entry, h, DOUT, i0, V, j0);
    //:for n in 4
    {
        let i = t / 16u + 16u * ($nu / 2u);
        let j = t % 16u + 16u * ($nu % 2u);
        var weight = 0.0;
        var ds = 0.0;
        if sees(entry, i0 + i, j0 + j) {
            let at = lse_at(entry, i0 + i, h);
            let s = score(raw[$n]);
            weight = exp_f(s.value - lse[at]);
            ds = weight * (slopes[$n] - delta[at]) * s.slope;
        }
        let row = select(i, j, turned);
        let col = select(j, i, turned);
        square[word(row, col / 4u)][col % 4u] = weight;
        square_b[word(row, col / 4u)][col % 4u] = ds;
    }
    //:end
    workgroupBarrier();
}

// dq: a group for 32 queries of a head.
@compute @workgroup_size(256)
fn attention_dq(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i0 = group.x * TILE;
    let h = group.y;
    let entry = group.z;
    let row = t / 8u;
    let part = t % 8u;
    //:for n in STEPS
    var sums_$n = vec4<f32>(0.0);
    //:end
    for (var j0 = 0u; j0 < p.t; j0 += TILE) {
        if !meet(entry, i0, j0) { continue; }
        weights(t, entry, h, i0, j0, false);
        //:for n in STEPS
        fill_y(t, K, entry, h, j0, $nu * 32u);
        workgroupBarrier();
        for (var w = 0u; w < 8u; w++) {
            let ds = square_b[word(row, w)];
            //:for u in 4
            sums_$n = fma(vec4<f32>(ds[$u]), tile_y[word(4u * w + $uu, part)], sums_$n);
            //:end
        }
        workgroupBarrier();
        //:end
    }
    let i = i0 + row;
    if i >= p.s { return; }
    //:for n in STEPS
    //:for u in 4
    if 32u * $nu + 4u * part + $uu < p.width {
        grad_a[q_at(entry, i, h) + 32u * $nu + 4u * part + $uu] = sums_$n[$u];
    }
    //:end
    //:end
}

// (dk, dv): a group for 32 keys of a key head, over all query heads that share it.
@compute @workgroup_size(256)
fn attention_dkv(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let j0 = group.x * TILE;
    let kv = group.y;
    let entry = group.z;
    let row = t / 8u;
    let part = t % 8u;
    let shared_by = p.heads / p.kv_heads;
    //:for n in STEPS
    var dk_$n = vec4<f32>(0.0);
    var dv_$n = vec4<f32>(0.0);
    //:end
    for (var h = kv * shared_by; h < (kv + 1u) * shared_by; h++) {
        for (var i0 = 0u; i0 < p.s; i0 += TILE) {
            if !meet(entry, i0, j0) { continue; }
            weights(t, entry, h, i0, j0, true);
            //:for n in STEPS
            fill_x(t, Q, entry, h, i0, $nu * 32u);
            fill_y(t, DOUT, entry, h, i0, $nu * 32u);
            workgroupBarrier();
            for (var w = 0u; w < 8u; w++) {
                let ds = square_b[word(row, w)];
                let weight = square[word(row, w)];
                //:for u in 4
                dk_$n = fma(vec4<f32>(ds[$u]), tile_x[word(4u * w + $uu, part)], dk_$n);
                dv_$n = fma(vec4<f32>(weight[$u]), tile_y[word(4u * w + $uu, part)], dv_$n);
                //:end
            }
            workgroupBarrier();
            //:end
        }
    }
    let j = j0 + row;
    if j >= p.t { return; }
    let at = ((entry * p.t + j) * p.kv_heads + kv) * p.width + 4u * part;
    //:for n in STEPS
    //:for u in 4
    if 32u * $nu + 4u * part + $uu < p.width {
        grad_a[at + 32u * $nu + $uu] = dk_$n[$u];
        grad_b[at + 32u * $nu + $uu] = dv_$n[$u];
    }
    //:end
    //:end
}
