// A few rows times a packed matrix's rows, as generation has them: bound by reading the weights, so each is read once. 32
// threads share a row of weights, four values at a time, with sums for ROWS rows of x; eight rows of weights a group. In
// front: FORMAT and ROWS. Rows of weights have a multiple of 32 values.

struct P {
    m: u32, n: u32, k: u32, lda: u32, ldb: u32, ldc: u32, a_at: u32, b_at: u32, c_at: u32,
    a_step: u32, b_step: u32, c_step: u32, splits: u32, chunk: u32, scale: f32, add: u32,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;

const LANES = 32u;
// Rows of weights that a group has.
const OUT = 8u;
var<workgroup> parts: array<f32, ROWS * 256u>;

// Bytes of a word as whole numbers with a sign.
fn signed_bytes(word: u32) -> vec4<f32> {
    let bytes = vec4<u32>(word << 24u, word << 16u, word << 8u, word);
    return vec4<f32>(bitcast<vec4<i32>>(bytes) >> vec4<u32>(24u));
}

// The low halves of a word's bytes after a shift.
fn nibbles(word: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(15u));
}

// Values i to i + 3 of the chunk, i a multiple of four; see `formats.wgsl`.
fn four(row: u32, i: u32) -> vec4<f32> {
    if FORMAT == F32 {
        return bitcast<vec4<f32>>(vec4<u32>(codes[i], codes[i + 1u], codes[i + 2u], codes[i + 3u]));
    } else if FORMAT == BF16 {
        let low = codes[i / 2u];
        let high = codes[i / 2u + 1u];
        return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
    } else if FORMAT == F16 {
        return vec4<f32>(unpack2x16float(codes[i / 2u]), unpack2x16float(codes[i / 2u + 1u]));
    } else if FORMAT == FOUR {
        let half = codes[i / 8u] >> (4u * (i & 4u));
        let means = vec4<f32>(
            bitcast<f32>(scales[(half >> 4u) & 15u]), bitcast<f32>(scales[half & 15u]),
            bitcast<f32>(scales[(half >> 12u) & 15u]), bitcast<f32>(scales[(half >> 8u) & 15u]),
        );
        return means * bitcast<f32>(scales[16u + i / 64u]);
    } else if FORMAT == INT8 {
        return signed_bytes(codes[i / 4u]) * bitcast<f32>(scales[1u + row]) * bitcast<f32>(scales[0]);
    } else if FORMAT == Q4_0 || FORMAT == Q4_1 {
        // Of a block's 16 bytes the low halves are its first 16 values, the high halves the others.
        let word = codes[i / 32u * 4u + (i & 15u) / 4u];
        let whole = nibbles(word >> ((i & 16u) / 4u));
        if FORMAT == Q4_0 { return half_scale(i / 32u) * (whole - 8.0); }
        let both = unpack2x16float(scales[i / 32u]);
        return both.x * whole + both.y;
    } else {
        return half_scale(i / 32u) * signed_bytes(codes[i / 4u]);
    }
}

@compute @workgroup_size(256)
fn few(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) w: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let out0 = (group.x + group.y * w.x) * OUT;
    // Rows beyond the last are worked on again, without a result: all have to meet at the barrier.
    let row = min(out0 + t / LANES, p.n - 1u);
    //:for i in ROWS
    var acc_$i = vec4<f32>(0.0);
    let from_$i = (p.a_at + min($iu, p.m - 1u) * p.lda) / 4u;
    //:end
    for (var word = t % LANES; word < p.k / 4u; word += LANES) {
        let weights = four(row, row * p.ldb + 4u * word);
        //:for i in ROWS
        acc_$i = fma(weights, x[from_$i + word], acc_$i);
        //:end
    }
    //:for i in ROWS
    parts[$iu * 256u + t] = dot(acc_$i, vec4<f32>(1.0));
    //:end
    workgroupBarrier();
    if t < OUT * ROWS {
        let i = t / OUT;
        let mine = t % OUT;
        var sum = 0.0;
        for (var lane = 0u; lane < LANES; lane++) { sum += parts[i * 256u + mine * LANES + lane]; }
        if i < p.m && out0 + mine < p.n {
            let at = p.c_at + i * p.ldc + out0 + mine;
            let v = p.scale * sum;
            if p.add == 1u { c[at] += v; } else { c[at] = v; }
        }
    }
}
