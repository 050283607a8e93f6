//! Parameterized hypercomplex products: a linear layer's weight as a sum of Kronecker products (arXiv 2102.08597,
//! low-rank and with shared rules arXiv 2106.04647).

use peft_core::{Error, Init, Param, Result, Tensor};

use crate::bottleneck::Bottleneck;
use crate::inserted::Place;

/// A thing that is one tensor `[n, a, b]`, or the product of two thinner ones for each of the n.
enum Factor {
    Full(Param),
    Pair(Param, Param),
}

impl Factor {
    /// `[n, a, b]`
    fn tensor(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Full(whole) => whole.tensor(),
            Self::Pair(left, right) => left.tensor().matmul(&right.tensor())?,
        })
    }
}

/// `y = x H + b` with `H = sum_i A_i (x) W_i`, `[in, out]`.
pub(crate) struct Phm {
    /// A, `[n, n, n]`
    rule: Factor,
    /// W, `[n, in / n, out / n]`
    weight: Factor,
    bias: Option<Param>,
}

impl Phm {
    /// The parameters of one projection of a bottleneck: those it shares with other places as the model's, those of its
    /// own behind `prefix`. `position` is `down` or `up`.
    ///
    /// # Errors
    /// If `phm_dim` does not divide a size, or a field has no valid value.
    pub(crate) fn attach(
        fields: &Bottleneck,
        at: &mut Place<'_, '_>,
        prefix: &str,
        position: &str,
        (inside, out): (usize, usize),
    ) -> Result<Self> {
        let n = fields.phm_dim;
        if n == 0 || inside % n != 0 || out % n != 0 {
            let both = |n: &usize| inside % n == 0 && out % n == 0;
            let valid = (1..=inside.min(out)).filter(both).map(|n| n.to_string());
            let detail = format!(
                "{n} has to divide both sides of `{}.{prefix}`, {inside} and {out}: possible are {}; reduction_factor \
                 sets the width of the bottleneck",
                at.path(),
                valid.collect::<Vec<_>>().join(", ")
            );
            return Err(Error::config("phm_dim", detail));
        }
        Ok(Self {
            rule: rule(fields, at, prefix)?,
            weight: weight(fields, at, prefix, position, (inside / n, out / n))?,
            bias: match fields.phm_bias {
                true => Some(at.param(&format!("{prefix}.b"), &[out], &Init::Zeros)?),
                false => None,
            },
        })
    }

    /// `[in, out]`
    fn matrix(&self) -> Result<Tensor> {
        let (rule, weight) = (self.rule.tensor()?, self.weight.tensor()?);
        let (n, rows, cols) = weight.dims3()?;
        // Sum over i of A_i[a, c] W_i[b, d], in the order a, c, b, d.
        let sum = rule
            .reshape(&[n, n * n])?
            .t_matmul(&weight.reshape(&[n, rows * cols])?)?;
        Ok(sum
            .reshape(&[n, n, rows, cols])?
            .permute(&[0, 2, 1, 3])?
            .reshape(&[n * rows, n * cols])?)
    }

    /// `[.., in] -> [.., out]`
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.matrix()?)?;
        match &self.bias {
            Some(b) => Ok(y.add(&b.tensor())?),
            None => Ok(y),
        }
    }
}

/// A, one for the model or one for each projection.
fn rule(fields: &Bottleneck, at: &mut Place<'_, '_>, prefix: &str) -> Result<Factor> {
    let (n, shared) = (fields.phm_dim, fields.shared_phm_rule);
    // AdapterHub's spreads: the shared rule's are its field's, a rule of one's own starts wider or narrower.
    let init = match (fields.phm_c_init.as_str(), shared) {
        ("normal", true) => Init::Normal {
            std: fields.phm_init_range,
        },
        ("normal", false) => Init::Normal { std: 0.01 },
        ("uniform", true) => Init::Uniform { bound: 1.0 },
        ("uniform", false) => Init::Uniform { bound: 0.01 },
        (other, _) => {
            let detail = format!("{other:?} is neither normal nor uniform");
            return Err(Error::config("phm_c_init", detail));
        }
    };
    let mut make = |name: &str, shape: &[usize]| match (shared, fields.learn_phm) {
        (true, true) => at.shared(&format!("shared_parameters.{name}"), shape, &init),
        (true, false) => at.shared_frozen(&format!("shared_parameters.{name}"), shape, &init),
        (false, true) => at.param(&format!("{prefix}.{name}"), shape, &init),
        (false, false) => at.frozen(&format!("{prefix}.{name}"), shape, &init),
    };
    Ok(if fields.factorized_phm_rule {
        Factor::Pair(
            make("phm_rule_left", &[n, n, 1])?,
            make("phm_rule_right", &[n, 1, n])?,
        )
    } else {
        Factor::Full(make("phm_rule", &[n, n, n])?)
    })
}

/// W, of this projection or one for all of the same position.
fn weight(
    fields: &Bottleneck,
    at: &mut Place<'_, '_>,
    prefix: &str,
    position: &str,
    (rows, cols): (usize, usize),
) -> Result<Factor> {
    let (n, rank) = (fields.phm_dim, fields.phm_rank);
    let mut make = |name: &str, shape: [usize; 3]| {
        let init = spread(fields, shape)?;
        if fields.shared_w_phm {
            let name = name.replacen('W', &format!("W_{position}"), 1);
            at.shared(&format!("shared_parameters.{name}"), &shape, &init)
        } else {
            at.param(&format!("{prefix}.{name}"), &shape, &init)
        }
    };
    if !fields.factorized_phm_w {
        return Ok(Factor::Full(make("W", [n, rows, cols])?));
    }
    if rank == 0 {
        return Err(Error::config("phm_rank", "has to be at least 1"));
    }
    Ok(Factor::Pair(
        make("W_left", [n, rows, rank])?,
        make("W_right", [n, rank, cols])?,
    ))
}

/// Initial values of each `[a, b]` by `hypercomplex_nonlinearity`: Glorot's, normal or uniform.
fn spread(fields: &Bottleneck, [_, a, b]: [usize; 3]) -> Result<Init> {
    let sides = (a + b) as f32;
    Ok(match fields.hypercomplex_nonlinearity.as_str() {
        "glorot-uniform" => Init::Uniform {
            bound: (6.0 / sides).sqrt(),
        },
        "glorot-normal" | "phm" => Init::Normal {
            std: (2.0 / sides).sqrt(),
        },
        "normal" => Init::Normal {
            std: fields.phm_init_range,
        },
        other => {
            let detail =
                format!("{other:?} is not one of glorot-uniform, glorot-normal, normal, phm");
            return Err(Error::config("hypercomplex_nonlinearity", detail));
        }
    })
}
