//! Rates of the kernels that training and generation spend their time in: `cargo bench -p peft-tensor`.
//!
//! Each line is the best of several runs. The sizes are SmolLM2-135M's: 576 wide, 1536 in the feed-forward layer,
//! 9 query heads on 3 key heads of 64.

use std::sync::Arc;
use std::time::Instant;

use peft_tensor::{
    Attention, BaseWeight, Bytes, Device, FrozenWeight, Glu, Mask, Result, RngKey, Rope, Tensor,
    WeightFormat, encode,
};

fn main() -> Result<()> {
    let device = Device::cpu();
    let normal =
        |seed, shape: &[usize]| Tensor::normal(RngKey::new(seed), 0.0, 1.0, shape, &device);

    let (x, w) = (normal(1, &[1024, 576])?, normal(2, &[1536, 576])?);
    let dy = normal(3, &[1024, 1536])?;
    let work = 2.0 * 1024.0 * 1536.0 * 576.0;
    rate("gemm x Wt, m 1024", work, || x.matmul_t(&w))?;
    rate("gemm dy W, m 1024", work, || dy.matmul(&w))?;
    rate("gemm xt dy, m 1024", work, || dy.t_matmul(&x))?;
    let formats = [
        WeightFormat::F32,
        WeightFormat::BF16,
        WeightFormat::F16,
        WeightFormat::Q4_0,
        WeightFormat::Q4_1,
        WeightFormat::Q8_0,
        WeightFormat::Q4K,
        WeightFormat::Q6K,
    ];
    for format in formats {
        // Rows of K-quants are multiples of 256.
        let cols = 576usize.next_multiple_of(format.block_len().max(64));
        let base = frozen(format, 1536, cols, &device)?;
        let (x, work) = (normal(1, &[1024, cols])?, work / 576.0 * cols as f64);
        rate(&format!("{} x Wt, m 1024", format.name()), work, || {
            base.linear(&x)
        })?;
        rate(&format!("{} dy W, m 1024", format.name()), work, || {
            base.linear_t(&dy)
        })?;
        let few = x.narrow(0, 0, 32)?;
        rate(
            &format!("{} x Wt, m 32", format.name()),
            work / 32.0,
            || base.linear(&few),
        )?;
        let one = x.narrow(0, 0, 1)?;
        rate(
            &format!("{} x Wt, m 1", format.name()),
            work / 1024.0,
            || base.linear(&one),
        )?;
    }
    let lora = normal(4, &[8, 576])?;
    rate("gemm x At, rank 8", 2.0 * 1024.0 * 8.0 * 576.0, || {
        x.matmul_t(&lora)
    })?;

    let n = 2048 * 1536;
    let (gate, up) = (normal(5, &[2048, 1536])?, normal(6, &[2048, 1536])?);
    bandwidth("affine", 2 * n, || gate.affine(2.0, 1.0))?;
    bandwidth("silu", 2 * n, || gate.silu())?;
    bandwidth("gelu", 2 * n, || gate.gelu())?;
    bandwidth("add", 3 * n, || gate.add(&up))?;
    bandwidth("silu glu", 3 * n, || gate.glu(Glu::Silu, &up))?;
    bandwidth("dropout", 2 * n, || gate.dropout(0.1, RngKey::new(1)))?;
    bandwidth("softmax", 2 * n, || gate.softmax())?;
    let g = normal(7, &[1536])?;
    bandwidth("rms norm", 2 * n, || gate.rms_norm(&g, 1e-5))?;
    bandwidth("transpose", 2 * n, || gate.t())?;
    bandwidth("sum of rows", n, || gate.sum_to(&[1536]))?;
    let table = Arc::new(vec![0.5; 512 * 32]);
    let positions = Arc::new((0..2048).map(|i| i % 512).collect());
    let rope = Arc::new(Rope {
        heads: 24,
        head_dim: 64,
        half: 32,
        cos: table.clone(),
        sin: table,
        positions,
    });
    bandwidth("rope", 2 * n, || gate.rope(&rope))?;
    let logits = normal(8, &[256, 49152])?;
    let targets: Vec<i64> = (0..256).collect();
    bandwidth("cross entropy", 2 * 256 * 49152, || {
        logits.cross_entropy(&targets)
    })?;

    let spec = Attention {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        causal: true,
        window: None,
        prefix: 0,
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
    rate("attention, 4 x 512", 2.0 * scores, || {
        q.attention(&k, &v, &spec)
    })?;
    let (ql, kl, vl) = (q.leaf(), k.leaf(), v.leaf());
    rate("attention and gradient", 7.0 * scores, || {
        let mut grads = ql.attention(&kl, &vl, &spec)?.sum_all()?.backward()?;
        Ok(grads.take(&ql).unwrap_or_else(|| q.clone()))
    })?;
    let (q, k, v) = (
        normal(9, &[1, 1, 576])?,
        normal(10, &[1, 1024, 192])?,
        normal(11, &[1, 1024, 192])?,
    );
    rate(
        "attention, 1 query of 1024 keys",
        2.0 * 2.0 * 9.0 * 1024.0 * 64.0,
        || q.attention(&k, &v, &spec),
    )
}

fn frozen(format: WeightFormat, rows: usize, cols: usize, device: &Device) -> Result<BaseWeight> {
    let mut values = vec![0.0; rows * cols];
    RngKey::new(3).fill_normal(0.0, 1.0, &mut values);
    // There is no encoder of K-quants, but any bytes are blocks of them and take as long to decode.
    let bytes = encode(format, &values, cols)
        .or_else(|_| Ok(vec![0x11; rows * format.row_bytes(cols)?]))?;
    Ok(BaseWeight::frozen(
        FrozenWeight::new(rows, cols, format, Bytes::from_vec(bytes))?,
        false,
        device,
    ))
}

fn best(mut f: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut times = Vec::new();
    let start = Instant::now();
    while times.len() < 5 || (start.elapsed().as_secs_f64() < 0.5 && times.len() < 2000) {
        let at = Instant::now();
        f()?;
        times.push(at.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[0])
}

fn rate(name: &str, operations: f64, f: impl FnMut() -> Result<Tensor>) -> Result<()> {
    let seconds = best(f)?;
    println!(
        "{name:34} {:10.3} ms {:8.1} GFLOP/s",
        seconds * 1e3,
        operations / seconds * 1e-9
    );
    Ok(())
}

fn bandwidth(name: &str, elements: usize, f: impl FnMut() -> Result<Tensor>) -> Result<()> {
    let seconds = best(f)?;
    println!(
        "{name:34} {:10.3} ms {:8.1} GB/s",
        seconds * 1e3,
        elements as f64 * 4.0 / seconds * 1e-9
    );
    Ok(())
}
