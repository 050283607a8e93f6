// c = add c + scale op(a) op(b), row-major, in tiles of 16 TM x 16 TN values: 256 threads, TM x TN values each, both
// operands brought to shared memory 16 deep, four values a word of it: reading shared memory is what bounds the speed.
// In front of this file: TM and TN (1, 4 or 8), and `operands.wgsl`.
//
// Axis z of the groups is the batch, and within it the splits of k; where there are several splits, each writes its own
// part of c, to be summed up by `join`.

const BK = 16u;
const BM = 16u * TM;
const BN = 16u * TN;
// Word w of step l has the rows (columns) 4 w to 4 w + 3.
var<workgroup> tile_a: array<vec4<f32>, BK * BM / 4u>;
var<workgroup> tile_b: array<vec4<f32>, BK * BN / 4u>;

// Four of this thread's rows of step l. Of eight, the second four are half a tile further, so that neighbours read
// neighbouring words.
fn rows_of(l: u32, y: u32, four: u32) -> vec4<f32> {
    if TM == 1u { return vec4<f32>(tile_a[l * (BM / 4u) + y / 4u][y % 4u]); }
    return tile_a[l * (BM / 4u) + y + 16u * four];
}

// Four of this thread's columns of step l.
fn columns_of(l: u32, x: u32, four: u32) -> vec4<f32> {
    if TN == 1u { return vec4<f32>(tile_b[l * (BN / 4u) + x / 4u][x % 4u]); }
    return tile_b[l * (BN / 4u) + x + 16u * four];
}

// Where in the tile the thread's value i of `count` is.
fn place(thread: u32, i: u32, count: u32) -> u32 {
    if count == 1u { return thread; }
    return 64u * (i / 4u) + 4u * thread + i % 4u;
}

@compute @workgroup_size(16, 16)
fn matmul(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let row0 = group.y * BM;
    let col0 = group.x * BN;
    let entry = group.z / p.splits;
    let split = group.z % p.splits;
    let a0 = p.a_at + entry * p.a_step;
    let b0 = p.b_at + entry * p.b_step;
    let first = split * p.chunk;
    let last = min(p.k, first + p.chunk);
    //:for i in TM
    //:for j in TN
    var acc_$i_$j = 0.0;
    //:end
    //:end

    for (var k0 = first; k0 < last; k0 += BK) {
        // Neighbouring threads read neighbouring values.
        for (var e = t; e < BK * BM / 4u; e += 256u) {
            var word = e / BK;
            var l = e % BK;
            if TA { word = e % (BM / 4u); l = e / (BM / 4u); }
            let row = row0 + 4u * word;
            let at = k0 + l;
            tile_a[l * (BM / 4u) + word] = vec4<f32>(
                left(a0, row, at, last), left(a0, row + 1u, at, last),
                left(a0, row + 2u, at, last), left(a0, row + 3u, at, last),
            );
        }
        for (var e = t; e < BK * BN / 4u; e += 256u) {
            var word = e % (BN / 4u);
            var l = e / (BN / 4u);
            if TB { word = e / BK; l = e % BK; }
            let col = col0 + 4u * word;
            let at = k0 + l;
            tile_b[l * (BN / 4u) + word] = vec4<f32>(
                right(b0, at, col, last), right(b0, at, col + 1u, last),
                right(b0, at, col + 2u, last), right(b0, at, col + 3u, last),
            );
        }
        workgroupBarrier();
        for (var l = 0u; l < BK; l += 4u) {
            //:for u in 4
            {
                //:for f in FM
                let x_$f = rows_of(l + $uu, local.y, $fu);
                //:end
                //:for f in FN
                let y_$f = columns_of(l + $uu, local.x, $fu);
                //:end
                //:for i in TM
                //:for j in TN
                acc_$i_$j = fma(x_$i/4[$i%4], y_$j/4[$j%4], acc_$i_$j);
                //:end
                //:end
            }
            //:end
        }
        workgroupBarrier();
    }

    let c0 = p.c_at + group.z * p.c_step;
    //:for i in TM
    //:for j in TN
    {
        let row = row0 + place(local.y, $iu, TM);
        let col = col0 + place(local.x, $ju, TN);
        if row < p.m && col < p.n {
            let at = c0 + row * p.ldc + col;
            let v = p.scale * acc_$i_$j;
            if p.add == 1u { c[at] += v; } else { c[at] = v; }
        }
    }
    //:end
    //:end
}
