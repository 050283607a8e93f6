// Attention in tiles of 32 queries and 32 keys: no matrix of scores is ever whole, neither forward (the softmax is kept
// up to date as keys come) nor backward (scores are made again from their log-sum-exp). 256 threads. Of the scores of a
// tile, thread (x, y) has the rows y and y + 16 and the columns x and x + 16; of 32 columns of a result, thread t has
// four, of row t / 8. `STEPS` rounds of 32 columns cover a head.

struct P {
    s: u32, t: u32, heads: u32, kv_heads: u32,
    prefix: u32, causal: u32, window: u32, marked: u32,
    scale: f32, softcap: f32, width: u32, open_end: u32,
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
const LEAST = -3.0e38;

// Tiles of 32 rows of 32 values, in words of four; see `word`.
var<workgroup> tile_x: array<vec4<f32>, 256>;
var<workgroup> tile_y: array<vec4<f32>, 256>;
var<workgroup> square: array<vec4<f32>, 256>;

// Where word w of a row is: turned by the row, so that threads that read one word of many rows do not meet in one bank.
fn word(row: u32, w: u32) -> u32 { return row * 8u + (w ^ (row & 7u)); }

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
    if (here >> 1u) != (there >> 1u) && j >= p.open_end { return false; }
    let late = p.causal == 1u && j > at;
    let far = p.window > 0u && j + p.window <= at;
    return !late && !far;
}

// The run of the text that key j is in; runs count up along a row.
fn run_of(entry: u32, j: u32) -> u32 { return marks[entry * p.t + j] >> 1u; }

// Whether some query from i0 on may see some key from j0 on.
fn meet(entry: u32, i0: u32, j0: u32) -> bool {
    let first_query = own(i0);
    let last_query = own(min(i0 + TILE, p.s) - 1u);
    let last_key = min(j0 + TILE, p.t) - 1u;
    if j0 < p.prefix { return true; }
    let late = p.causal == 1u && j0 > last_query;
    let far = p.window > 0u && last_key + p.window <= first_query;
    if late || far { return false; }
    if p.marked == 0u || j0 < p.open_end { return true; }
    // Of texts one after another in a row, most tiles are of two texts that do not see each other.
    return run_of(entry, j0) <= run_of(entry, last_query) && run_of(entry, last_key) >= run_of(entry, first_query);
}

fn q_at(entry: u32, i: u32, h: u32) -> u32 { return ((entry * p.s + i) * p.heads + h) * p.width; }
fn kv_at(entry: u32, j: u32, h: u32) -> u32 { return ((entry * p.t + j) * p.kv_heads + h) * p.width; }
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

// Four values of a row of an array from column d on.
fn load(which: u32, entry: u32, h: u32, i: u32, d: u32) -> vec4<f32> {
    var at: u32;
    if which == Q || which == DOUT {
        if i >= p.s { return vec4<f32>(0.0); }
        at = q_at(entry, i, h) + d;
    } else {
        if i >= p.t { return vec4<f32>(0.0); }
        at = kv_at(entry, i, h / (p.heads / p.kv_heads)) + d;
    }
    var four = vec4<f32>(0.0);
    //:for u in 4
    if d + $uu < p.width { four[$u] = element(which, at + $uu); }
    //:end
    return four;
}

// 32 rows from `first` on, 32 columns from d0 on.
fn fill_x(t: u32, which: u32, entry: u32, h: u32, first: u32, d0: u32) {
    tile_x[word(t / 8u, t % 8u)] = load(which, entry, h, first + t / 8u, d0 + t % 8u * 4u);
}

fn fill_y(t: u32, which: u32, entry: u32, h: u32, first: u32, d0: u32) {
    tile_y[word(t / 8u, t % 8u)] = load(which, entry, h, first + t / 8u, d0 + t % 8u * 4u);
}

// The four products of this thread's rows of x with its rows of y, over the width of a head.
fn products(t: u32, entry: u32, h: u32, x: u32, i0: u32, y: u32, j0: u32) -> vec4<f32> {
    let lx = t % 16u;
    let ly = t / 16u;
    var sum = vec4<f32>(0.0);
    for (var d0 = 0u; d0 < p.width; d0 += 32u) {
        fill_x(t, x, entry, h, i0, d0);
        fill_y(t, y, entry, h, j0, d0);
        workgroupBarrier();
        for (var w = 0u; w < 8u; w++) {
            let a = tile_x[word(ly, w)];
            let b = tile_x[word(ly + 16u, w)];
            let c = tile_y[word(lx, w)];
            let e = tile_y[word(lx + 16u, w)];
            sum += vec4<f32>(dot(a, c), dot(a, e), dot(b, c), dot(b, e));
        }
        workgroupBarrier();
    }
    return sum;
}
