// Value `i` of a packed chunk, in row `row`. FORMAT is a constant, so that one branch is left.

const F32 = 0u;
const BF16 = 1u;
const F16 = 2u;
const FOUR = 3u;
const INT8 = 4u;
const Q4_0 = 5u;
const Q4_1 = 6u;
const Q8_0 = 7u;

fn half_scale(block: u32) -> f32 {
    let both = unpack2x16float(scales[block / 2u]);
    return select(both.x, both.y, (block & 1u) == 1u);
}

fn code_byte(i: u32) -> u32 {
    return (codes[i / 4u] >> (8u * (i & 3u))) & 255u;
}

fn signed_byte(i: u32) -> f32 {
    return f32(bitcast<i32>(codes[i / 4u] << (24u - 8u * (i & 3u))) >> 24u);
}

// A block of 32: low halves of 16 bytes, then the high ones.
fn ggml_nibble(i: u32) -> f32 {
    let at = i & 31u;
    let byte = code_byte(i / 32u * 16u + (at & 15u));
    return f32(select(byte & 15u, byte >> 4u, at > 15u));
}

fn weight(row: u32, i: u32) -> f32 {
    if FORMAT == F32 {
        return bitcast<f32>(codes[i]);
    } else if FORMAT == BF16 {
        let word = codes[i / 2u];
        return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
    } else if FORMAT == F16 {
        let both = unpack2x16float(codes[i / 2u]);
        return select(both.x, both.y, (i & 1u) == 1u);
    } else if FORMAT == FOUR {
        // Two codes a byte, the first in the high half; the 16 numbers they mean, then a scale for each 64 values.
        let byte = code_byte(i / 2u);
        let code = select(byte >> 4u, byte & 15u, (i & 1u) == 1u);
        return bitcast<f32>(scales[code]) * bitcast<f32>(scales[16u + i / 64u]);
    } else if FORMAT == INT8 {
        // In this order: what it is rounded to is the processor's value. A factor that is a constant would be moved.
        return signed_byte(i) * bitcast<f32>(scales[1u + row]) * bitcast<f32>(scales[0]);
    } else if FORMAT == Q4_0 {
        return half_scale(i / 32u) * (ggml_nibble(i) - 8.0);
    } else if FORMAT == Q4_1 {
        let both = unpack2x16float(scales[i / 32u]);
        return both.x * ggml_nibble(i) + both.y;
    } else {
        return half_scale(i / 32u) * signed_byte(i);
    }
}
