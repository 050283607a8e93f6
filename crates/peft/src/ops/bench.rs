//! How fast a device multiplies.

use std::time::Instant;

use peft_core::Result;
use peft_tensor::{
    BaseWeight, Device, FrozenWeight, KernelSpeed, RngKey, Tensor, WeightFormat, no_grad,
};

/// One measured product.
#[derive(Clone, Debug)]
pub struct Speed {
    /// What is multiplied: `dense`, or a frozen weight's format and the direction.
    pub product: String,
    /// Billions of multiplications and additions a second, the best of several rounds.
    pub gflops: f64,
}

/// Rounds, and products a round; the first product of all is not counted, as kernels are compiled there.
const ROUNDS: u32 = 3;
const TIMES: u32 = 4;

/// Formats of frozen weights that are measured.
const FORMATS: [WeightFormat; 7] = [
    WeightFormat::F32,
    WeightFormat::BF16,
    WeightFormat::F16,
    WeightFormat::NF4,
    WeightFormat::INT8,
    WeightFormat::Q4_0,
    WeightFormat::Q8_0,
];

/// Products of `size x size` matrices on a device. `size` has to be a multiple of 64.
///
/// # Errors
/// Whatever the device says.
pub fn bench(device: &Device, size: usize) -> Result<Vec<Speed>> {
    let random = |seed| {
        let shape = [size, size];
        Tensor::uniform(RngKey::new(seed), -1.0, 1.0, &shape, device)
    };
    let (x, y) = (random(1)?, random(2)?);
    let values = y.to_vec()?;
    let mut all = Vec::new();
    let mut say = |product: String, seconds: f64| {
        let gflops = 2.0 * (size as f64).powi(3) / seconds / 1e9;
        all.push(Speed { product, gflops });
    };
    no_grad(|| {
        say("dense".to_owned(), best(device, || Ok(x.matmul(&y)?))?);
        for (name, product) in [
            ("dense, second transposed", Tensor::matmul_t as Product),
            ("dense, first transposed", Tensor::t_matmul),
        ] {
            say(name.to_owned(), best(device, || Ok(product(&x, &y)?))?);
        }
        for format in FORMATS {
            let weight = FrozenWeight::quantize(size, size, &values, format)?;
            let weight = BaseWeight::frozen(weight, false, device);
            let name = format.name();
            let forward = best(device, || Ok(weight.linear(&x)?))?;
            say(format!("{name} weight, forward"), forward);
            let backward = best(device, || Ok(weight.linear_t(&x)?))?;
            say(format!("{name} weight, backward"), backward);
        }
        Ok(())
    })
    .map(|()| all)
}

/// Speeds of the kernels that a device's products have to choose from, beside the most it did in the same run; none where
/// there is nothing to choose.
///
/// # Errors
/// Whatever the device says.
pub fn kernels(device: &Device, size: usize) -> Result<Vec<KernelSpeed>> {
    Ok(device.backend().kernel_speeds(size)?)
}

type Product = fn(&Tensor, &Tensor) -> peft_tensor::Result<Tensor>;

/// Seconds of one call, of the best round.
fn best(device: &Device, f: impl Fn() -> Result<Tensor>) -> Result<f64> {
    // Reading a value back waits for all that was asked for before.
    let wait = || -> Result<()> {
        Tensor::zeros(&[1], device)?.to_vec()?;
        Ok(())
    };
    f()?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_no_kernels_to_choose_from() {
        assert!(kernels(&Device::cpu(), 64).unwrap().is_empty());
    }

    #[test]
    fn every_product_is_measured() {
        let all = bench(&Device::cpu(), 64).unwrap();
        assert_eq!(all.len(), 3 + 2 * FORMATS.len());
        assert!(all.iter().all(|s| s.gflops.is_finite() && s.gflops > 0.0));
    }
}
