// Gradients. With P the weights, dP = dout v', dS = P (dP - delta) slope, where delta = sum(dout out) of a query:
// dq = dS k, dk = dS' q, dv = P' dout.

fn element_of_dout(at: u32) -> f32 { return dout[at]; }

var<workgroup> square_b: array<f32, TILE * (TILE + 1u)>;

// P to `square`, dS to `square_b`, for queries from i0 on and keys from j0 on.
fn weights(t: u32, entry: u32, h: u32, i0: u32, j0: u32) {
    let lx = t % 16u;
    let ly = t / 16u;
    let raw = products(t, entry, h, Q, i0, K, j0);
    let slopes = products(t, entry, h, DOUT, i0, V, j0);
    //:for n in 4
    {
        let row = ly + 16u * ($nu / 2u);
        let col = lx + 16u * ($nu % 2u);
        var weight = 0.0;
        var ds = 0.0;
        if sees(entry, i0 + row, j0 + col) {
            let at = lse_at(entry, i0 + row, h);
            let s = score(raw[$n]);
            weight = exp_f(s.value - lse[at]);
            ds = weight * (slopes[$n] - delta[at]) * s.slope;
        }
        square[row * (TILE + 1u) + col] = weight;
        square_b[row * (TILE + 1u) + col] = ds;
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
    let lx = t % 16u;
    let ly = t / 16u;
    //:for n in STEPS
    var sums_$n = vec2<f32>(0.0);
    //:end
    for (var j0 = 0u; j0 < p.t; j0 += TILE) {
        if !meet(i0, j0) { continue; }
        weights(t, entry, h, i0, j0);
        //:for n in STEPS
        fill_y(t, K, entry, h, j0, $nu * DEPTH);
        workgroupBarrier();
        for (var j = 0u; j < TILE; j++) {
            let ds = vec2<f32>(square_b[ly * (TILE + 1u) + j], square_b[(ly + 16u) * (TILE + 1u) + j]);
            sums_$n = fma(ds, vec2<f32>(tile_y[j * (DEPTH + 1u) + lx]), sums_$n);
        }
        workgroupBarrier();
        //:end
    }
    for (var half = 0u; half < 2u; half++) {
        let i = i0 + ly + 16u * half;
        if i >= p.s { continue; }
        //:for n in STEPS
        if $nu * DEPTH + lx < D {
            grad_a[q_at(entry, i, h) + $nu * DEPTH + lx] = select(sums_$n.x, sums_$n.y, half == 1u);
        }
        //:end
    }
}

// (dk, dv): a group for 32 keys of a key head, over all query heads that share it.
@compute @workgroup_size(256)
fn attention_dkv(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let j0 = group.x * TILE;
    let kv = group.y;
    let entry = group.z;
    let lx = t % 16u;
    let ly = t / 16u;
    let shared_by = p.heads / p.kv_heads;
    //:for n in STEPS
    var dk_$n = vec2<f32>(0.0);
    var dv_$n = vec2<f32>(0.0);
    //:end
    for (var h = kv * shared_by; h < (kv + 1u) * shared_by; h++) {
        for (var i0 = 0u; i0 < p.s; i0 += TILE) {
            if !meet(i0, j0) { continue; }
            weights(t, entry, h, i0, j0);
            //:for n in STEPS
            fill_x(t, Q, entry, h, i0, $nu * DEPTH);
            fill_y(t, DOUT, entry, h, i0, $nu * DEPTH);
            workgroupBarrier();
            for (var i = 0u; i < TILE; i++) {
                let ds = vec2<f32>(square_b[i * (TILE + 1u) + ly], square_b[i * (TILE + 1u) + ly + 16u]);
                let weight = vec2<f32>(square[i * (TILE + 1u) + ly], square[i * (TILE + 1u) + ly + 16u]);
                dk_$n = fma(ds, vec2<f32>(tile_x[i * (DEPTH + 1u) + lx]), dk_$n);
                dv_$n = fma(weight, vec2<f32>(tile_y[i * (DEPTH + 1u) + lx]), dv_$n);
            }
            workgroupBarrier();
            //:end
        }
    }
    for (var half = 0u; half < 2u; half++) {
        let j = j0 + ly + 16u * half;
        if j >= p.t { continue; }
        let at = ((entry * p.t + j) * p.kv_heads + kv) * D + lx;
        //:for n in STEPS
        if $nu * DEPTH + lx < D {
            grad_a[at + $nu * DEPTH] = select(dk_$n.x, dk_$n.y, half == 1u);
            grad_b[at + $nu * DEPTH] = select(dv_$n.x, dv_$n.y, half == 1u);
        }
        //:end
    }
}
