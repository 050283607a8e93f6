//! LoftQ's start: a quantised weight and a low-rank pair that together are nearest to the weight before.

use peft_core::ndarray::{Array2, Axis, Ix2, s};
use peft_core::peft_tensor::{FrozenWeight, WeightFormat, linalg};
use peft_core::serde_json::Value;
use peft_core::{Attach, BaseWeight, Error, Init, Result, Tensor};

use crate::init::{Shape, Start};

/// LoftQ (arXiv 2310.08659, algorithm 1): Q = quantised (W - B A), then B A the best approximation of W - Q, `loftq_iter`
/// times. Where the model was quantised like this while it loaded and one round is asked for, Q is the base's own weight;
/// else Q stands in for it while the adapter acts, and is made again from W when the adapter is loaded (which takes one
/// decomposition less, so none in the usual case).
///
/// # Errors
/// If a field is out of range, or the weight before the quantisation is not to be had.
pub(crate) fn start(
    config: &Value,
    shape: Shape,
    cx: &mut Attach<'_>,
    module: &str,
) -> Result<Start> {
    let (format, rounds) = settings(config)?;
    if shape.scaling <= 0.0 {
        return Err(Error::config("lora_alpha", "has to be above 0 for loftq"));
    }
    let original = cx.original_weight()?;
    let base = cx.base_weight()?;
    let stored = base.as_frozen().map(FrozenWeight::format);
    let float = [WeightFormat::F32, WeightFormat::F16, WeightFormat::BF16];
    if original.is_none() && stored.is_some_and(|f| !float.contains(&f)) {
        let detail = format!(
            "\"loftq\" at `{module}` starts from the weight before it was quantised, and the model has it only as {}; \
             give the model from before, with `quantize` in the run's [model] to train on 4 bits",
            stored.map_or("floats", WeightFormat::name)
        );
        return Err(Error::config("init_lora_weights", detail));
    }
    let w = dense(original.as_ref().unwrap_or(base))?;
    let own = rounds == 1 && original.is_some() && stored == Some(format);
    let mut standing = None;
    let mut left = w.clone();
    let (mut b, mut a) = (Array2::zeros((0, 0)), Array2::zeros((0, 0)));
    for round in 0..rounds {
        let q = if own {
            dense(base)?
        } else {
            let values: Vec<f32> = left.iter().copied().collect();
            let q = FrozenWeight::quantize(shape.out, shape.inside, &values, format)?;
            let values = q.to_f32();
            standing = Some(q);
            Array2::from_shape_vec((shape.out, shape.inside), values)
                .map_err(|e| Error::other(e.to_string()))?
        };
        if cx.loading() && round + 1 == rounds {
            // The pair comes from the file; only Q had to be found.
            b = Array2::zeros((shape.out, shape.rank));
            a = Array2::zeros((shape.rank, shape.inside));
            break;
        }
        let svd = linalg::svd(&(&w - &q))?;
        let root = svd.s.slice(s![..shape.rank]).mapv(|v| v.max(0.0).sqrt());
        b = &svd.u.slice(s![.., ..shape.rank]) * &root;
        a = &svd.vt.slice(s![..shape.rank, ..]) * &root.insert_axis(Axis(1));
        if round + 1 < rounds {
            left = &w - &b.dot(&a);
        }
    }
    let device = cx.device();
    if let Some(q) = standing {
        cx.replace_weight(BaseWeight::frozen(q, false, &device));
    }
    let part = shape.scaling.sqrt();
    let init = |m: Array2<f32>| Ok::<_, Error>(Init::Value(Tensor::from_array(m / part, &device)?));
    Ok(Start {
        a: init(a)?,
        b: init(b)?,
        removed: None,
    })
}

/// The format and the number of rounds that `loftq_config` asks for.
fn settings(config: &Value) -> Result<(WeightFormat, u64)> {
    let number = |key: &str, default: u64| match &config[key] {
        Value::Null => Ok(default),
        value => value.as_u64().ok_or_else(|| {
            let detail = format!("expected a whole number, got {value}");
            Error::config(format!("loftq_config.{key}"), detail)
        }),
    };
    let format = match number("loftq_bits", 4)? {
        4 => WeightFormat::NF4,
        8 => WeightFormat::INT8,
        other => {
            let detail = format!("{other} is not one of 4 (NF4) and 8 (INT8)");
            return Err(Error::config("loftq_config.loftq_bits", detail));
        }
    };
    match number("loftq_iter", 1)? {
        0 => Err(Error::config(
            "loftq_config.loftq_iter",
            "has to be at least 1",
        )),
        rounds => Ok((format, rounds)),
    }
}

fn dense(weight: &BaseWeight) -> Result<Array2<f32>> {
    let values = weight.to_dense()?.to_array()?;
    values
        .into_dimensionality::<Ix2>()
        .map_err(|e| Error::other(e.to_string()))
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, RngKey, Tensor};

    const OUT: usize = 24;
    const IN: usize = 40;

    fn weight() -> Array2<f32> {
        let mut values = vec![0.0; OUT * IN];
        RngKey::new(3).fill_normal(0.0, 0.1, &mut values);
        Array2::from_shape_vec((OUT, IN), values).expect("the shape fits")
    }

    fn network(rounds: u64, fields: Value) -> peft_core::Result<Network> {
        let base = Base::custom().linear("fc", weight(), None)?;
        let mut network = Network::new(base);
        let mut config = json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["fc"], "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4, "loftq_iter": rounds},
        });
        for (key, value) in fields.as_object().expect("an object") {
            config[key] = value.clone();
        }
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// What the module computes, as a matrix.
    fn acting(network: &Network) -> Array2<f32> {
        let eye = Tensor::from_array(Array2::<f32>::eye(IN), network.device()).expect("a tensor");
        let id = network.tree().get("fc").expect("the module");
        let y = network.linear(id, &eye, &Pass::eval()).expect("runs");
        let y = y.to_array().expect("values");
        y.into_dimensionality()
            .map(|y: Array2<f32>| y.t().to_owned())
            .expect("a matrix")
    }

    fn error(network: &Network) -> f32 {
        (acting(network) - weight()).mapv(|v| v * v).sum().sqrt()
    }

    /// Quantisation alone is worse than with the pair, and more rounds are better still (the paper's table 6).
    #[test]
    fn the_error_falls_with_rounds() {
        let mut quantised = network(1, json!({})).expect("attaches");
        let with = error(&quantised);
        for param in quantised.parameters() {
            let zeros = Tensor::zeros(&param.shape(), quantised.device()).expect("zeros");
            param.set(zeros).expect("the shape fits");
        }
        let without = error(&quantised);
        let more = error(&network(5, json!({})).expect("attaches"));
        assert!(
            more < with && with < 0.9 * without,
            "{more} {with} {without}"
        );
        quantised.delete("a").expect("is attached");
        assert_eq!(error(&quantised), 0.0, "the base is as it was");
    }

    /// The merged weight is what acts, on the stand-in and not on the base.
    #[test]
    fn merging_keeps_the_function() {
        let mut network = network(2, json!({})).expect("attaches");
        let before = acting(&network);
        network.merge().expect("merges");
        let worst = (acting(&network) - before)
            .mapv(f32::abs)
            .fold(0.0f32, |a, b| a.max(*b));
        assert!(worst < 1e-5, "{worst}");
    }

    /// The stand-in is found again, the pair is the file's.
    #[test]
    fn a_saved_one_acts_as_before() {
        for rounds in [1, 3] {
            let network = network(rounds, json!({})).expect("attaches");
            let (config, tensors) = network.export("a").expect("exports");
            let base = Base::custom().linear("fc", weight(), None);
            let mut again = Network::new(base.expect("a base"));
            again.load("a", &config, tensors, false).expect("loads");
            assert_eq!(acting(&again), acting(&network), "{rounds} rounds");
        }
    }

    #[test]
    fn wrong_fields_are_refused() {
        for (fields, says) in [
            (json!({"loftq_config": {"loftq_bits": 2}}), "loftq_bits"),
            (json!({"loftq_config": {"loftq_iter": 0}}), "loftq_iter"),
            (json!({"loftq_config": {"loftq_iter": "x"}}), "loftq_iter"),
            (json!({"lora_alpha": 0}), "lora_alpha"),
            (json!({"r": 25}), "needs 1 to 24"),
        ] {
            let text = network(1, fields).expect_err("is refused").to_string();
            assert!(text.contains(says), "{says}: {text}");
        }
    }
}
