// Functions of rows, a group for each row: softmax, norms, cross-entropy.

struct P { rows: u32, cols: u32, eps: f32, centre: u32, bias: u32, chunk: u32 }
var<immediate> p: P;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> x1: array<f32>;
@group(0) @binding(2) var<storage, read> x2: array<f32>;
@group(0) @binding(3) var<storage, read> x3: array<f32>;
@group(0) @binding(1) var<storage, read> targets: array<i32>;
@group(0) @binding(1) var<storage, read_write> y1: array<f32>;
@group(0) @binding(2) var<storage, read_write> y2: array<f32>;
@group(0) @binding(3) var<storage, read_write> y3: array<f32>;
@group(0) @binding(4) var<storage, read_write> y4: array<f32>;

// Less than any number that is a value; WGSL has no infinities.
const LEAST = -3.4e38;

fn row_of(at: At) -> u32 {
    return at.group.x + at.group.y * at.groups.x;
}

@compute @workgroup_size(WIDTH)
fn max_rows(at: At) {
    let t = at.t;
    let row = row_of(at);
    // Groups beyond the last row do its work again, without a result: all have to meet at the barriers.
    let base = min(row, p.rows - 1u) * p.cols;
    var most = x[base + min(t, p.cols - 1u)];
    for (var c = t; c < p.cols; c += WIDTH) { most = larger(most, x[base + c]); }
    most = group_max(at, most);
    if t == 0u && row < p.rows { y1[row] = most; }
}

@compute @workgroup_size(WIDTH)
fn softmax(at: At) {
    let t = at.t;
    let row = row_of(at);
    let base = min(row, p.rows - 1u) * p.cols;
    var most = LEAST;
    for (var c = t; c < p.cols; c += WIDTH) { most = max(most, x[base + c]); }
    most = group_max(at, most);
    var sum = 0.0;
    for (var c = t; c < p.cols; c += WIDTH) { sum += exp_f(x[base + c] - most); }
    sum = group_sum(at, sum);
    if row < p.rows {
        for (var c = t; c < p.cols; c += WIDTH) { y1[base + c] = exp_f(x[base + c] - most) / sum; }
    }
}

// y, dy
@compute @workgroup_size(WIDTH)
fn softmax_grad(at: At) {
    let t = at.t;
    let row = row_of(at);
    let base = min(row, p.rows - 1u) * p.cols;
    var mean = 0.0;
    for (var c = t; c < p.cols; c += WIDTH) { mean += x[base + c] * x1[base + c]; }
    mean = group_sum(at, mean);
    if row < p.rows {
        for (var c = t; c < p.cols; c += WIDTH) { y2[base + c] = x[base + c] * (x1[base + c] - mean); }
    }
}

// (mean, 1 / deviation) of a row; an RMS norm has mean 0.
fn moments(at: At, base: u32) -> vec2<f32> {
    let t = at.t;
    var mean = 0.0;
    if p.centre == 1u {
        for (var c = t; c < p.cols; c += WIDTH) { mean += x[base + c]; }
        mean = group_sum(at, mean) / f32(p.cols);
    }
    var variance = 0.0;
    for (var c = t; c < p.cols; c += WIDTH) {
        let d = x[base + c] - mean;
        variance = fma(d, d, variance);
    }
    variance = group_sum(at, variance) / f32(p.cols);
    return vec2<f32>(mean, 1.0 / sqrt(variance + p.eps));
}

// x, w, b
@compute @workgroup_size(WIDTH)
fn norm(at: At) {
    let t = at.t;
    let row = row_of(at);
    let base = min(row, p.rows - 1u) * p.cols;
    let m = moments(at, base);
    if row >= p.rows { return; }
    for (var c = t; c < p.cols; c += WIDTH) {
        var v = (x[base + c] - m.x) * m.y * x1[c];
        if p.bias == 1u { v += x2[c]; }
        y3[base + c] = v;
    }
}

// x, w, dy -> dx, (mean, 1 / deviation) of each row. Through h = (x - mean) inv, whose derivative by x is
// inv (1 - [centre] / n - h h' / n).
@compute @workgroup_size(WIDTH)
fn norm_grad(at: At) {
    let t = at.t;
    let row = row_of(at);
    let base = min(row, p.rows - 1u) * p.cols;
    let m = moments(at, base);
    var mean_dh = 0.0;
    var along = 0.0;
    for (var c = t; c < p.cols; c += WIDTH) {
        let dh = x2[base + c] * x1[c];
        mean_dh += dh;
        along = fma(dh, (x[base + c] - m.x) * m.y, along);
    }
    mean_dh = group_sum(at, mean_dh) / f32(p.cols);
    along = group_sum(at, along) / f32(p.cols);
    if p.centre == 0u { mean_dh = 0.0; }
    if row >= p.rows { return; }
    for (var c = t; c < p.cols; c += WIDTH) {
        let dh = x2[base + c] * x1[c];
        y3[base + c] = m.y * (dh - mean_dh - (x[base + c] - m.x) * m.y * along);
    }
    if t == 0u {
        y4[2u * row] = m.x;
        y4[2u * row + 1u] = m.y;
    }
}

// x, dy, moments -> dw and db over each run of `chunk` rows; a thread for each column of a run.
@compute @workgroup_size(256)
fn norm_grad_weight(@builtin(global_invocation_id) g: vec3<u32>, @builtin(num_workgroups) w: vec3<u32>) {
    let i = g.x + g.y * w.x * 256u;
    let runs = (p.rows + p.chunk - 1u) / p.chunk;
    if i >= p.cols * runs { return; }
    let c = i % p.cols;
    let first = i / p.cols * p.chunk;
    var dw = 0.0;
    var db = 0.0;
    for (var r = first; r < min(p.rows, first + p.chunk); r++) {
        let dy = x1[r * p.cols + c];
        dw = fma(dy, (x[r * p.cols + c] - x2[2u * r]) * x2[2u * r + 1u], dw);
        db += dy;
    }
    y3[i] = dw;
    y4[i] = db;
}

// x, targets -> loss of each row, dx
@compute @workgroup_size(WIDTH)
fn cross_entropy(at: At) {
    let t = at.t;
    let row = row_of(at);
    let base = min(row, p.rows - 1u) * p.cols;
    let goal = targets[min(row, p.rows - 1u)];
    var most = LEAST;
    for (var c = t; c < p.cols; c += WIDTH) { most = max(most, x[base + c]); }
    most = group_max(at, most);
    var sum = 0.0;
    for (var c = t; c < p.cols; c += WIDTH) { sum += exp_f(x[base + c] - most); }
    sum = group_sum(at, sum);
    if row >= p.rows { return; }
    if t == 0u {
        var loss = 0.0;
        if goal >= 0i { loss = ln_f(sum) + (most - x[base + u32(goal)]); }
        y2[row] = loss;
    }
    for (var c = t; c < p.cols; c += WIDTH) {
        var d = 0.0;
        if goal >= 0i {
            d = exp_f(x[base + c] - most) / sum - select(0.0, 1.0, c == u32(goal));
        }
        y3[base + c] = d;
    }
}
