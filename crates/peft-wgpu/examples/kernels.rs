//! Speed of the products on the device that is opened by default: `cargo run --release -p peft-wgpu --example kernels`.
//!
//! GFLOP/s of the best of several rounds, the wait for the device included.

use std::time::Instant;

use peft_tensor::{
    BaseWeight, Device, FrozenWeight, Result, RngKey, Tensor, WeightFormat, no_grad,
};
use peft_wgpu as _;

/// Seconds of the best round of `f`, which is recorded several times a round and waited for once.
fn best(device: &Device, f: impl Fn() -> Result<Tensor>) -> Result<f64> {
    const TIMES: u32 = 2;
    let wait = || Tensor::zeros(&[1], device)?.to_vec();
    f()?.to_vec()?;
    let mut best = f64::INFINITY;
    for _ in 0..2 {
        wait()?;
        let begun = Instant::now();
        for _ in 0..TIMES {
            f()?;
        }
        wait()?;
        best = best.min(begun.elapsed().as_secs_f64() / f64::from(TIMES));
    }
    Ok(best)
}

fn main() -> Result<()> {
    let device = Device::by_name("wgpu")?;
    let random =
        |seed, shape: &[usize]| Tensor::uniform(RngKey::new(seed), -1.0, 1.0, shape, &device);
    let (m, n, k) = (256, 256, 256);
    let flops = 2.0 * (m * n * k) as f64;
    let x = random(1, &[m, k])?;
    let (b, bt) = (random(2, &[k, n])?, random(3, &[n, k])?);
    let say = |name: &str, seconds: f64| {
        println!("{name:<28} {:8.2} GFLOP/s", flops / seconds / 1e9);
    };
    no_grad(|| {
        say("dense", best(&device, || x.matmul(&b))?);
        say("dense, b transposed", best(&device, || x.matmul_t(&bt))?);
        say("dense, a transposed", best(&device, || x.t_matmul(&b))?);
        for format in [
            WeightFormat::F32,
            WeightFormat::BF16,
            WeightFormat::F16,
            WeightFormat::NF4,
            WeightFormat::INT8,
            WeightFormat::Q4_0,
            WeightFormat::Q8_0,
        ] {
            let values = bt.to_vec()?;
            let w = FrozenWeight::quantize(n, k, &values, format)?;
            let w = BaseWeight::frozen(w, false, &device);
            let name = format.name();
            say(&format!("{name} forward"), best(&device, || w.linear(&x))?);
            say(
                &format!("{name} backward"),
                best(&device, || w.linear_t(&x))?,
            );
        }
        Ok(())
    })
}
