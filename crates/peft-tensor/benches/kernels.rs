//! Rates of the kernels that training and generation spend their time in, beside what the machine can do, measured in the
//! same run: `cargo bench -p peft-tensor --bench kernels [-- FILTER]`.
//!
//! Each line is the best of several runs on all threads, with the share of the peak of fused multiply-adds or of the
//! bandwidth of reading. The sizes are SmolLM2-135M's: 576 wide, 1536 in the feed-forward layer, 9 query heads on 3
//! key heads of 64, 49152 tokens.

mod peak;

use std::cell::Cell;
use std::sync::Arc;
use std::time::Instant;

use peft_tensor::{
    Attention, BaseWeight, Bytes, Device, FrozenWeight, Glu, Mask, Result, RngKey, Rope, Tensor,
    WeightFormat, encode,
};

/// Bytes of weights that products of few rows go through in turn: more than caches hold.
const COLD: usize = 512 << 20;

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let bench = Bench {
        filter: filter.unwrap_or_default(),
        flops: peak::flops(),
        bandwidth: peak::bandwidth(),
    };
    println!(
        "{} threads: {:.0} GFLOP/s of fused multiply-adds, {:.1} GB/s of reading\n",
        rayon::current_num_threads(),
        bench.flops * 1e-9,
        bench.bandwidth * 1e-9
    );
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(rates) = peak::tiles::flops(&[16 << 10, 512 << 10]) {
        println!(
            "products of tiles of bfloat16: {:.0} GFLOP/s, {:.0} from the first-level cache, {:.0} from the second\n",
            rates[0] * 1e-9,
            rates[1] * 1e-9,
            rates[2] * 1e-9
        );
    }
    large_products(&bench)?;
    few_rows(&bench)?;
    attention(&bench)?;
    passes(&bench)
}

fn normal(seed: u64, shape: &[usize]) -> Result<Tensor> {
    Tensor::normal(RngKey::new(seed), 0.0, 1.0, shape, &Device::cpu())
}

/// The products of a training step, forward (`x Wt`) and backward (`dy W`).
fn large_products(bench: &Bench) -> Result<()> {
    let formats = [WeightFormat::F32, WeightFormat::BF16, WeightFormat::NF4];
    let shapes = [
        (1024, 576, 576),
        (1024, 576, 1536),
        (1024, 1536, 576),
        (256, 576, 49152),
    ];
    for (m, k, n) in shapes {
        let (x, dy) = (normal(1, &[m, k])?, normal(2, &[m, n])?);
        let work = 2.0 * m as f64 * k as f64 * n as f64;
        for format in formats {
            let base = frozen(format, n, k)?;
            let name = format!("{m} x {k} x {n} {}", format.name());
            bench.flops(&format!("{name} forward"), work, || base.linear(&x))?;
            bench.flops(&format!("{name} backward"), work, || base.linear_t(&dy))?;
        }
    }
    let (x, a) = (normal(1, &[1024, 576])?, normal(4, &[8, 576])?);
    let work = 2.0 * 1024.0 * 8.0 * 576.0;
    bench.flops("1024 x 576 x 8 (LoRA's A)", work, || x.matmul_t(&a))
}

/// One to sixteen rows with the feed-forward layer's weight, another one each time.
fn few_rows(bench: &Bench) -> Result<()> {
    for format in WeightFormat::all() {
        // Rows of K-quants are multiples of 256.
        let (rows, cols) = (1536, 576usize.next_multiple_of(format.block_len().max(64)));
        let bytes = format.matrix_bytes(rows, cols)?;
        let one = frozen(*format, rows, cols)?;
        let copies: Result<Vec<BaseWeight>> =
            (0..COLD.div_ceil(bytes)).map(|_| copy(&one)).collect();
        let (copies, next) = (copies?, Cell::new(0));
        for m in [1, 4, 16] {
            let x = normal(1, &[m, cols])?;
            bench.bytes(&format!("{} x Wt, {m} rows", format.name()), bytes, || {
                next.set((next.get() + 1) % copies.len());
                copies[next.get()].linear(&x)
            })?;
        }
    }
    let (base, y) = (
        frozen(WeightFormat::BF16, 49152, 576)?,
        normal(1, &[1, 49152])?,
    );
    bench.bytes("BF16 y W, 1 row of 49152", 49152 * 576 * 2, || {
        base.linear_t(&y)
    })
}

fn attention(bench: &Bench) -> Result<()> {
    let spec = Attention {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        causal: true,
        window: None,
        prefix: 0,
        shared: 0,
        softcap: None,
        mask: Mask::default(),
    };
    let (q, k, v) = (
        normal(9, &[4, 512, 576])?,
        normal(10, &[4, 512, 192])?,
        normal(11, &[4, 512, 192])?,
    );
    // Half of the scores are hidden; a product of two for the forward pass, of five for the backward pass.
    let scores = 2.0 * 4.0 * 9.0 * 512.0 * 512.0 * 64.0 / 2.0;
    bench.flops("attention, 4 x 512", 2.0 * scores, || {
        q.attention(&k, &v, &spec)
    })?;
    let (ql, kl, vl) = (q.leaf(), k.leaf(), v.leaf());
    bench.flops("attention and gradient, 4 x 512", 7.0 * scores, || {
        let mut grads = ql.attention(&kl, &vl, &spec)?.sum_all()?.backward()?;
        Ok(grads.take(&ql).unwrap_or_else(|| q.clone()))
    })?;
    let (q, k, v) = (
        normal(9, &[1, 1, 576])?,
        normal(10, &[1, 1024, 192])?,
        normal(11, &[1, 1024, 192])?,
    );
    bench.bytes(
        "attention, 1 query of 1024 keys",
        2 * 1024 * 192 * 4,
        || q.attention(&k, &v, &spec),
    )
}

/// Passes over values: norms, activations, the loss.
fn passes(bench: &Bench) -> Result<()> {
    let n = 4 * 2048 * 1536;
    let (gate, up) = (normal(5, &[2048, 1536])?, normal(6, &[2048, 1536])?);
    let norm = normal(7, &[1536])?;
    bench.bytes("rms norm", 2 * n, || gate.rms_norm(&norm, 1e-5))?;
    bench.bytes("layer norm", 2 * n, || gate.layer_norm(&norm, None, 1e-5))?;
    bench.bytes("softmax", 2 * n, || gate.softmax())?;
    bench.bytes("add", 3 * n, || gate.add(&up))?;
    bench.bytes("silu", 2 * n, || gate.silu())?;
    bench.bytes("gelu", 2 * n, || gate.gelu())?;
    bench.bytes("silu glu", 3 * n, || gate.glu(Glu::Silu, &up))?;
    bench.bytes("dropout", 2 * n, || gate.dropout(0.1, RngKey::new(1)))?;
    bench.bytes("transpose", 2 * n, || gate.t())?;
    bench.bytes("sum of rows", n, || gate.sum_to(&[1536]))?;
    let table = Arc::new(vec![0.5; 512 * 32]);
    let rope = Arc::new(Rope {
        heads: 24,
        head_dim: 64,
        half: 32,
        cos: table.clone(),
        sin: table,
        positions: Arc::new((0..2048).map(|i| i % 512).collect()),
    });
    bench.bytes("rope", 2 * n, || gate.rope(&rope))?;
    let logits = normal(8, &[256, 49152])?;
    let targets: Vec<i64> = (0..256).collect();
    bench.bytes("cross entropy, 256 x 49152", 2 * 4 * 256 * 49152, || {
        logits.cross_entropy(&targets)
    })
}

fn frozen(format: WeightFormat, rows: usize, cols: usize) -> Result<BaseWeight> {
    let mut values = vec![0.0; rows * cols];
    RngKey::new(3).fill_normal(0.0, 1.0, &mut values);
    // There is no encoder of K-quants, but any bytes are blocks of them and take as long to decode.
    let bytes = encode(format, &values, cols)
        .or_else(|_| Ok(vec![0x11; format.matrix_bytes(rows, cols)?]))?;
    let weight = FrozenWeight::new(rows, cols, format, Bytes::from_vec(bytes))?;
    Ok(BaseWeight::frozen(weight, false, &Device::cpu()))
}

/// The same values in memory of their own.
fn copy(weight: &BaseWeight) -> Result<BaseWeight> {
    let Some(w) = weight.as_frozen() else {
        return Ok(weight.clone());
    };
    let bytes = Bytes::from_vec(w.bytes().to_vec());
    let weight = FrozenWeight::new(w.rows(), w.cols(), w.format(), bytes)?;
    Ok(BaseWeight::frozen(weight, false, &Device::cpu()))
}

/// What is run, and what the machine can do.
struct Bench {
    filter: String,
    /// Floating-point operations a second.
    flops: f64,
    /// Bytes read a second.
    bandwidth: f64,
}

impl Bench {
    fn flops(&self, name: &str, work: f64, f: impl FnMut() -> Result<Tensor>) -> Result<()> {
        self.line(name, work, "GFLOP/s", self.flops, f)
    }

    fn bytes(&self, name: &str, bytes: usize, f: impl FnMut() -> Result<Tensor>) -> Result<()> {
        self.line(name, bytes as f64, "GB/s", self.bandwidth, f)
    }

    fn line(
        &self,
        name: &str,
        work: f64,
        unit: &str,
        peak: f64,
        mut f: impl FnMut() -> Result<Tensor>,
    ) -> Result<()> {
        if !name.contains(&self.filter) {
            return Ok(());
        }
        let (start, mut runs, mut best) = (Instant::now(), 0, f64::INFINITY);
        while runs < 5 || (start.elapsed().as_secs_f64() < 0.3 && runs < 2000) {
            let at = Instant::now();
            f()?;
            best = best.min(at.elapsed().as_secs_f64());
            runs += 1;
        }
        let rate = work / best;
        println!(
            "{name:36} {:9.3} ms {:8.1} {unit:7} {:4.0} %",
            best * 1e3,
            rate * 1e-9,
            100.0 * rate / peak
        );
        Ok(())
    }
}
