// c = add c + scale op(a) op(b) on a software driver, where a read by eight lanes costs as much as a hundred multiplications,
// shared memory no less than a buffer, and barriers more: a subgroup of eight makes ROWS x 8 COLS values in registers. Each
// value of a is read once, by one lane, and sent to the others; neighbouring lanes have neighbouring columns of b.

@compute @workgroup_size(8)
fn wide(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let row0 = group.y * ROWS;
    let col0 = group.x * 8u * COLS + lane;
    let entry = group.z / p.splits;
    let split = group.z % p.splits;
    let a0 = p.a_at + entry * p.a_step;
    let b0 = p.b_at + entry * p.b_step;
    let first = split * p.chunk;
    let last = min(p.k, first + p.chunk);
    //:for i in ROWS
    //:for j in COLS
    var acc_$i_$j = 0.0;
    //:end
    //:end
    for (var l = first; l < last; l += 8u) {
        //:for i in ROWS
        let x_$i = left(a0, row0 + $iu, l + lane, last);
        //:end
        //:for u in 8
        {
            //:for j in COLS
            let y_$j = right(b0, l + $uu, col0 + 8u * $ju, last);
            //:end
            //:for i in ROWS
            {
                let x = subgroupBroadcast(x_$i, $uu);
                //:for j in COLS
                acc_$i_$j = fma(x, y_$j, acc_$i_$j);
                //:end
            }
            //:end
        }
        //:end
    }
    let c0 = p.c_at + group.z * p.c_step;
    //:for j in COLS
    if col0 + 8u * $ju < p.n {
        //:for i in ROWS
        if row0 + $iu < p.m {
            let at = c0 + (row0 + $iu) * p.ldc + col0 + 8u * $ju;
            let v = p.scale * acc_$i_$j;
            if p.add == 1u { c[at] += v; } else { c[at] = v; }
        }
        //:end
    }
    //:end
}
