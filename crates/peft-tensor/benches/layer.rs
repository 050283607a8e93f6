//! A decoder layer of SmolLM2-135M with rank-8 LoRA on its seven frozen matrices, forward and backward over 4 x 512
//! tokens: `cargo bench -p peft-tensor --bench layer [-- FORMAT]`.

use std::sync::Arc;
use std::time::Instant;

use peft_tensor::{
    Attention, BaseWeight, Bytes, Device, FrozenWeight, Glu, Mask, Result, RngKey, Rope, Tensor,
    WeightFormat, encode,
};

/// A frozen matrix and its two trainable factors.
struct Lora {
    base: BaseWeight,
    a: Tensor,
    b: Tensor,
}

impl Lora {
    fn new(seed: u64, format: WeightFormat, rows: usize, cols: usize) -> Result<Self> {
        let device = Device::cpu();
        let mut values = vec![0.0; rows * cols];
        RngKey::new(seed).fill_normal(0.0, 0.04, &mut values);
        let weight = FrozenWeight::new(
            rows,
            cols,
            format,
            Bytes::from_vec(encode(format, &values, cols)?),
        )?;
        let factor = |n, shape: &[usize]| {
            Ok(Tensor::normal(RngKey::new(seed + n), 0.0, 0.04, shape, &device)?.leaf())
        };
        Ok(Self {
            base: BaseWeight::frozen(weight, false, &device),
            a: factor(1, &[8, cols])?,
            b: factor(2, &[rows, 8])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.base
            .linear(x)?
            .add(&x.matmul_t(&self.a)?.matmul_t(&self.b)?.scale(2.0)?)
    }
}

fn main() -> Result<()> {
    let wanted = std::env::args()
        .skip(1)
        .find(|a| !a.starts_with('-'))
        .unwrap_or_else(|| "F32".into());
    let format = WeightFormat::all()
        .iter()
        .copied()
        .find(|f| f.name() == wanted)
        .unwrap_or(WeightFormat::F32);
    let device = Device::cpu();
    let [q, k, v, o, gate, up, down] = [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ]
    .map(|(rows, cols)| Lora::new(rows as u64, format, rows, cols));
    let (q, k, v, o, gate, up, down) = (q?, k?, v?, o?, gate?, up?, down?);
    let norm = Tensor::full(1.0, &[576], &device)?;
    let table = Arc::new(vec![std::f32::consts::FRAC_1_SQRT_2; 512 * 32]);
    let positions = Arc::new((0..2048).map(|i| i % 512).collect::<Vec<u32>>());
    let turn = |heads| {
        Arc::new(Rope {
            heads,
            head_dim: 64,
            half: 32,
            cos: table.clone(),
            sin: table.clone(),
            positions: positions.clone(),
        })
    };
    let (turn_q, turn_k) = (turn(9), turn(3));
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
    let layer = |x: &Tensor| -> Result<Tensor> {
        let h = x.rms_norm(&norm, 1e-5)?;
        let (q, k) = (q.forward(&h)?.rope(&turn_q)?, k.forward(&h)?.rope(&turn_k)?);
        let x = x.add(&o.forward(&q.attention(&k, &v.forward(&h)?, &spec)?)?)?;
        let h = x.rms_norm(&norm, 1e-5)?;
        x.add(&down.forward(&gate.forward(&h)?.glu(Glu::Silu, &up.forward(&h)?)?)?)
    };
    let x = Tensor::normal(RngKey::new(5), 0.0, 1.0, &[4, 512, 576], &device)?.leaf();
    let mut best = [f64::INFINITY; 2];
    for _ in 0..4 {
        let start = Instant::now();
        // Four layers, so that a step keeps and frees as much at a time as training does.
        let y = layer(&layer(&layer(&layer(&x)?)?)?)?;
        best[0] = best[0].min(start.elapsed().as_secs_f64() / 4.0);
        y.sum_all()?.backward()?;
        best[1] = best[1].min(start.elapsed().as_secs_f64() / 4.0);
    }
    let [forward, both] = best.map(|s| s * 1e3);
    println!(
        "{wanted}: forward {forward:.1} ms, with backward {both:.1} ms, 30 layers at {:.0} tokens/s",
        2048.0 / 0.03 / both
    );
    Ok(())
}
