// Functions whose accuracy WGSL leaves open (its exp may be off by 3 + 2|x| units in the last place, its sin by 2^-11):
// written out, so that every driver gives the same few roundings. The polynomials of exp, ln, tanh, sin and cos are
// those of Cephes' single-precision library (Moshier); erf is the pair that the processor's kernels use.

fn exp_f(x: f32) -> f32 {
    let c = clamp(x, -104.0, 89.0);
    let n = round(c * 1.44269504);
    var r = fma(n, -0.693359375, c);
    r = fma(n, 2.12194440e-4, r);
    var p = fma(1.9875691500e-4, r, 1.3981999507e-3);
    p = fma(p, r, 8.3334519073e-3);
    p = fma(p, r, 4.1665795894e-2);
    p = fma(p, r, 1.6666665459e-1);
    p = fma(p, r, 5.0000001201e-1);
    let y = fma(p, r * r, r) + 1.0;
    // In two factors: 2^128 and 2^-150 are no floats, and what overflows has to become infinite by itself.
    let e = i32(n);
    let half = e >> 1u;
    return y * power_of_two(half) * power_of_two(e - half);
}

fn power_of_two(e: i32) -> f32 {
    return bitcast<f32>(u32(e + 127) << 23u);
}

fn ln_f(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    // The mantissa in [sqrt(1/2), sqrt(2)) and the exponent that goes with it.
    let shifted = bits - 0x3f3504f3u;
    let e = f32(bitcast<i32>(shifted) >> 23u);
    let m = bitcast<f32>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0;
    let z = m * m;
    var p = fma(7.0376836292e-2, m, -1.1514610310e-1);
    p = fma(p, m, 1.1676998740e-1);
    p = fma(p, m, -1.2420140846e-1);
    p = fma(p, m, 1.4249322787e-1);
    p = fma(p, m, -1.6668057665e-1);
    p = fma(p, m, 2.0000714765e-1);
    p = fma(p, m, -2.4999993993e-1);
    p = fma(p, m, 3.3333331174e-1);
    var y = p * m * z;
    y = fma(e, -2.12194440e-4, y);
    y = fma(-0.5, z, y);
    return fma(e, 0.693359375, m + y);
}

fn tanh_f(x: f32) -> f32 {
    let z = x * x;
    var p = fma(-5.70498872745e-3, z, 2.06390887954e-2);
    p = fma(p, z, -5.37397155531e-2);
    p = fma(p, z, 1.33314422036e-1);
    p = fma(p, z, -3.33332819422e-1);
    let near = fma(p * z, x, x);
    let far = 1.0 - 2.0 / (exp_f(2.0 * min(abs(x), 20.0)) + 1.0);
    return select(select(far, -far, x < 0.0), near, abs(x) < 0.625);
}

fn sigmoid_f(x: f32) -> f32 {
    return 1.0 / (1.0 + exp_f(-max(x, -88.0)));
}

fn erf_f(x: f32) -> f32 {
    let t = abs(x);
    let s = x * x;
    var r = fma(-1.7285347e-5, t, 3.8319713e-4);
    let u = fma(-3.8839644e-3, t, 2.4254622e-2);
    r = fma(r, s, u);
    r = fma(r, t, -1.0677788e-1);
    r = fma(r, t, -6.348467e-1);
    r = fma(r, t, -1.2871751e-1);
    r = fma(r, t, -t);
    let far = select(1.0 - exp_f(r), 1.0, t > 4.0);
    var p = fma(-5.967617e-4, s, 4.9911942e-3);
    p = fma(p, s, -2.6768135e-2);
    p = fma(p, s, 1.1281992e-1);
    p = fma(p, s, -3.7612534e-1);
    p = fma(p, s, 1.2837917e-1);
    let near = fma(p, x, x);
    return select(near, select(far, -far, x < 0.0), t > 0.921875);
}

// The standard normal distribution function.
fn phi_f(x: f32) -> f32 {
    return 0.5 * (1.0 + erf_f(x * 0.70710678));
}

fn gelu_inner(x: f32) -> f32 {
    return tanh_f(0.7978846 * fma(0.044715 * x * x, x, x));
}

// sin (shift 0) or cos (shift 1, a quarter turn) of x.
fn turn(x: f32, cosine: bool) -> f32 {
    let a = abs(x);
    var j = u32(a * 1.27323954);
    j = (j + 1u) & 0xfffffffeu;
    let y = f32(j);
    var r = fma(y, -0.78515625, a);
    r = fma(y, -2.4187564849853515625e-4, r);
    r = fma(y, -3.77489497744594108e-8, r);
    let z = r * r;
    var s = fma(-1.9515295891e-4, z, 8.3321608736e-3);
    s = fma(s, z, -1.6666654611e-1);
    s = fma(s * z, r, r);
    var c = fma(2.443315711809948e-5, z, -1.388731625493765e-3);
    c = fma(c, z, 4.166664568298827e-2);
    c = fma(c, z * z, fma(-0.5, z, 1.0));
    let quarter = (j >> 1u) & 3u;
    var negative: bool;
    if cosine {
        negative = quarter == 1u || quarter == 2u;
    } else {
        negative = (quarter >= 2u) != (x < 0.0);
    }
    let value = select(s, c, ((quarter & 1u) == 1u) != cosine);
    return select(value, -value, negative);
}
