// Attention in tiles of 32 queries and 32 keys: no matrix of scores is ever whole, neither forward (the softmax is kept
// up to date as keys come) nor backward (scores are made again from their log-sum-exp). 256 threads; thread (x, y) has
// the rows y and y + 16 and the columns x and x + 16 of a tile. In front of this file: D, the width of a head.

struct P {
    s: u32, t: u32, heads: u32, kv_heads: u32,
    prefix: u32, causal: u32, window: u32, marked: u32,
    scale: f32, softcap: f32,
}
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> k: array<f32>;
@group(0) @binding(2) var<storage, read> v: array<f32>;
// Of each key: 2 times the number of its run, plus 1 if it may be seen.
@group(0) @binding(3) var<storage, read> marks: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(0) @binding(5) var<storage, read_write> lse_out: array<f32>;
@group(0) @binding(4) var<storage, read> dout: array<f32>;
@group(0) @binding(5) var<storage, read> lse: array<f32>;
@group(0) @binding(6) var<storage, read> delta: array<f32>;
@group(0) @binding(7) var<storage, read_write> grad_a: array<f32>;
@group(0) @binding(8) var<storage, read_write> grad_b: array<f32>;

const TILE = 32u;
const DEPTH = 16u;
const LEAST = -3.0e38;

var<workgroup> tile_x: array<f32, TILE * (DEPTH + 1u)>;
var<workgroup> tile_y: array<f32, TILE * (DEPTH + 1u)>;
var<workgroup> square: array<f32, TILE * (TILE + 1u)>;
var<workgroup> partial: array<f32, 256>;
var<workgroup> row_max: array<f32, TILE>;
var<workgroup> row_sum: array<f32, TILE>;
var<workgroup> row_factor: array<f32, TILE>;

// The key that stands where the query does.
fn own(i: u32) -> u32 { return i + p.t - p.s; }

fn sees(entry: u32, i: u32, j: u32) -> bool {
    if i >= p.s || j >= p.t { return false; }
    let at = own(i);
    var here = 1u;
    var there = 1u;
    if p.marked == 1u {
        here = marks[entry * p.t + j];
        there = marks[entry * p.t + at];
    }
    if (here & 1u) == 0u { return false; }
    if j < p.prefix { return true; }
    if (here >> 1u) != (there >> 1u) { return false; }
    let late = p.causal == 1u && j > at;
    let far = p.window > 0u && j + p.window <= at;
    return !late && !far;
}

// Whether some query from i0 on may see some key from j0 on.
fn meet(i0: u32, j0: u32) -> bool {
    let last_query = own(min(i0 + TILE, p.s) - 1u);
    let last_key = min(j0 + TILE, p.t) - 1u;
    let late = p.causal == 1u && j0 > last_query;
    let far = p.window > 0u && last_key + p.window <= own(i0);
    return j0 < p.prefix || (!late && !far);
}

fn q_at(entry: u32, i: u32, h: u32) -> u32 { return ((entry * p.s + i) * p.heads + h) * D; }
fn kv_at(entry: u32, j: u32, h: u32) -> u32 { return ((entry * p.t + j) * p.kv_heads + h) * D; }
fn lse_at(entry: u32, i: u32, h: u32) -> u32 { return (entry * p.heads + h) * p.s + i; }

struct Score { value: f32, slope: f32 }

fn score(product: f32) -> Score {
    let plain = p.scale * product;
    if p.softcap == 0.0 { return Score(plain, p.scale); }
    let bent = tanh_f(plain / p.softcap);
    return Score(p.softcap * bent, p.scale * (1.0 - bent * bent));
}

// Which array a tile is taken from.
const Q = 0u;
const K = 1u;
const V = 2u;
const DOUT = 3u;

fn element(which: u32, at: u32) -> f32 {
    switch which {
        case Q: { return q[at]; }
        case K: { return k[at]; }
        case V: { return v[at]; }
        default: { return element_of_dout(at); }
    }
}

// One value of rows first.. of an array, columns d0..
fn load(which: u32, entry: u32, h: u32, first: u32, row: u32, d: u32) -> f32 {
    let i = first + row;
    if d >= D { return 0.0; }
    if which == Q || which == DOUT {
        if i >= p.s { return 0.0; }
        return element(which, q_at(entry, i, h) + d);
    }
    if i >= p.t { return 0.0; }
    return element(which, kv_at(entry, i, h / (p.heads / p.kv_heads)) + d);
}

fn fill_x(t: u32, which: u32, entry: u32, h: u32, first: u32, d0: u32) {
    for (var e = t; e < TILE * DEPTH; e += 256u) {
        let row = e / DEPTH;
        let d = e % DEPTH;
        tile_x[row * (DEPTH + 1u) + d] = load(which, entry, h, first, row, d0 + d);
    }
}

fn fill_y(t: u32, which: u32, entry: u32, h: u32, first: u32, d0: u32) {
    for (var e = t; e < TILE * DEPTH; e += 256u) {
        let row = e / DEPTH;
        let d = e % DEPTH;
        tile_y[row * (DEPTH + 1u) + d] = load(which, entry, h, first, row, d0 + d);
    }
}

// The four products of this thread's rows of x with its rows of y, over the width of a head.
fn products(t: u32, entry: u32, h: u32, x: u32, i0: u32, y: u32, j0: u32) -> vec4<f32> {
    let lx = t % 16u;
    let ly = t / 16u;
    var sum = vec4<f32>(0.0);
    for (var d0 = 0u; d0 < D; d0 += DEPTH) {
        fill_x(t, x, entry, h, i0, d0);
        fill_y(t, y, entry, h, j0, d0);
        workgroupBarrier();
        for (var d = 0u; d < DEPTH; d += 4u) {
            //:for u in 4
            {
                let a = tile_x[ly * (DEPTH + 1u) + d + $uu];
                let b = tile_x[(ly + 16u) * (DEPTH + 1u) + d + $uu];
                let c = tile_y[lx * (DEPTH + 1u) + d + $uu];
                let e = tile_y[(lx + 16u) * (DEPTH + 1u) + d + $uu];
                sum = fma(vec4<f32>(a, a, b, b), vec4<f32>(c, e, c, e), sum);
            }
            //:end
        }
        workgroupBarrier();
    }
    return sum;
}
