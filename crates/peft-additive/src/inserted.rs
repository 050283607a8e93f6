//! A bottleneck at its place: its parameters and its arithmetic.

use peft_core::{Adapter, Attach, Call, Init, Param, Result, RngKey, Site, Tensor};

use crate::activation::{Activation, activation};
use crate::bottleneck::{Bottleneck, ResidualFrom, Scaling, Start, TrainedScaling};
use crate::phm::Phm;

/// Makes parameters at one site, seeded as the configuration says.
pub(crate) struct Place<'a, 'b> {
    cx: &'a mut Attach<'b>,
    site: &'a Site,
    seed: Option<u64>,
}

impl<'a, 'b> Place<'a, 'b> {
    /// At `site`; with a seed, initial values depend on that and a parameter's name alone.
    pub(crate) fn new(cx: &'a mut Attach<'b>, site: &'a Site, seed: Option<u64>) -> Self {
        Self { cx, site, seed }
    }

    /// The site's path.
    pub(crate) fn path(&self) -> &str {
        &self.site.path
    }

    fn seeded(&self, name: &str, shape: &[usize], init: &Init) -> Result<Init> {
        Ok(match self.seed {
            Some(seed) => {
                Init::Value(init.tensor(shape, RngKey::new(seed).fork(name), &self.cx.device())?)
            }
            None => init.clone(),
        })
    }

    pub(crate) fn param(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let init = self.seeded(name, shape, init)?;
        self.cx.param(name, shape, &init)
    }

    pub(crate) fn frozen(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let init = self.seeded(name, shape, init)?;
        self.cx.frozen(name, shape, &init)
    }

    pub(crate) fn shared(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let init = self.seeded(name, shape, init)?;
        self.cx.shared(name, shape, &init)
    }

    pub(crate) fn shared_frozen(
        &mut self,
        name: &str,
        shape: &[usize],
        init: &Init,
    ) -> Result<Param> {
        let init = self.seeded(name, shape, init)?;
        self.cx.shared_frozen(name, shape, &init)
    }

    /// A linear layer `{name}.weight [out, in]`, `{name}.bias [out]`; the bias starts at zero unless `init` is PyTorch's.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        inside: usize,
        out: usize,
        init: &Init,
    ) -> Result<Linear> {
        let bias = match init {
            Init::LinearDefault { .. } => init,
            _ => &Init::Zeros,
        };
        Ok(Linear {
            weight: self.param(&format!("{name}.weight"), &[out, inside], init)?,
            bias: self.param(&format!("{name}.bias"), &[out], bias)?,
        })
    }

    /// A norm `{name}.weight [dim]` of ones, `{name}.bias [dim]` of zeros.
    fn norm(&mut self, name: &str, dim: usize) -> Result<Norm> {
        Ok(Norm {
            weight: self.param(&format!("{name}.weight"), &[dim], &Init::Constant(1.0))?,
            bias: self.param(&format!("{name}.bias"), &[dim], &Init::Zeros)?,
        })
    }

    /// Normal with that deviation, cut off at two of it.
    fn truncated(&self, name: &str, shape: &[usize], std: f32) -> Result<Init> {
        let key = match self.seed {
            Some(seed) => RngKey::new(seed).fork(name),
            None => self.cx.key(name),
        };
        let mut values = vec![0.0; shape.iter().product()];
        key.fill_normal(0.0, std, &mut values);
        for (i, value) in values.iter_mut().enumerate() {
            // One in twenty is drawn again, from a stream of its own.
            let mut draws = key.fork_n(i as u64);
            while value.abs() > 2.0 * std {
                draws = draws.fork_n(0);
                draws.fill_normal(0.0, std, std::slice::from_mut(value));
            }
        }
        Ok(Init::Value(Tensor::from_vec(
            values,
            shape,
            &self.cx.device(),
        )?))
    }
}

/// A linear layer of an adapter's own.
pub(crate) struct Linear {
    weight: Param,
    bias: Param,
}

impl Linear {
    /// `[.., in] -> [.., out]`
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul_t(&self.weight.tensor())?
            .add(&self.bias.tensor())?)
    }
}

/// A LayerNorm of an adapter's own.
struct Norm {
    weight: Param,
    bias: Param,
}

impl Norm {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        // PyTorch's default epsilon.
        Ok(x.layer_norm(&self.weight.tensor(), Some(&self.bias.tensor()), 1e-5)?)
    }
}

enum Projection {
    Linear(Linear),
    Phm(Phm),
}

impl Projection {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear(linear) => linear.apply(x),
            Self::Phm(phm) => phm.apply(x),
        }
    }
}

/// A bottleneck at its place.
pub(crate) struct Inserted {
    fields: Bottleneck,
    path: String,
    norm_before: Option<Norm>,
    down: Projection,
    activation: Activation,
    up: Projection,
    norm_after: Option<Norm>,
    /// `[1]` or `[d]`
    scaling: Option<Param>,
    /// `[d] -> [1]`
    gate: Option<Linear>,
}

impl Inserted {
    pub(crate) fn new(fields: &Bottleneck, site: &Site, cx: &mut Attach<'_>) -> Result<Self> {
        let (dim, width) = (site.out_features, fields.width(site)?);
        let at = &mut Place::new(cx, site, fields.init_weights_seed);
        let bert = Init::Normal { std: 0.02 };
        let norm_before = match fields.ln_before {
            true => Some(at.norm("adapters.adapter_down.0", dim)?),
            false => None,
        };
        // AdapterHub counts what is in front of the projection.
        let down = format!("adapters.adapter_down.{}", usize::from(fields.ln_before));
        let mut project = |name: &str, position: &str, inside: usize, out: usize| {
            if fields.phm_layer {
                return Phm::attach(fields, at, name, position, (inside, out)).map(Projection::Phm);
            }
            let init = match (fields.init_weights, position) {
                (Start::Bert, _) => bert.clone(),
                (Start::ZeroUp, "up") => Init::Zeros,
                (Start::ZeroUp, _) => Init::Uniform {
                    bound: 1.0 / (inside as f32).sqrt(),
                },
                (Start::Truncated, _) => {
                    at.truncated(&format!("{name}.weight"), &[out, inside], 0.01)?
                }
            };
            at.linear(name, inside, out, &init).map(Projection::Linear)
        };
        let down = project(&down, "down", dim, width)?;
        let up = project("adapters.adapter_up", "up", width, dim)?;
        let mut scale = |size: usize| {
            at.param("adapters.scaling", &[size], &Init::Constant(1.0))
                .map(Some)
        };
        let scaling = match fields.scaling {
            Scaling::Factor(_) => None,
            Scaling::Trained(TrainedScaling::Learned) => scale(1)?,
            Scaling::Trained(TrainedScaling::Channel) => scale(dim)?,
        };
        let gate = match (fields.use_gating, fields.init_weights) {
            (false, _) => None,
            (true, Start::Truncated) => Some(Init::LinearDefault { fan_in: dim }),
            (true, _) => Some(bert),
        };
        Ok(Self {
            norm_after: match fields.ln_after {
                true => Some(at.norm("adapters.adapter_norm_after", dim)?),
                false => None,
            },
            gate: gate
                .map(|init| at.linear("adapters.gate", dim, 1, &init))
                .transpose()?,
            activation: activation("non_linearity", &fields.non_linearity)?,
            fields: fields.clone(),
            path: site.path.clone(),
            norm_before,
            down,
            up,
            scaling,
        })
    }

    /// What the bottleneck reads: the residual, the sublayer's output, or both and the model's norm of them.
    fn reading(&self, call: &Call<'_>) -> Result<Tensor> {
        let (h, x) = (call.x()?, call.residual()?);
        if self.fields.is_parallel {
            return Ok(x.clone());
        }
        if !self.fields.original_ln_before {
            return Ok(h.clone());
        }
        if !self.fields.original_ln_after {
            // The last of the sum: whatever else is on this place is in it.
            return call.base();
        }
        let sum = h.add(x)?;
        Ok(call.norm(&sum)?.unwrap_or(sum))
    }

    /// What it adds for `z`, before any norm of its own.
    fn inner(&self, call: &Call<'_>, z: &Tensor) -> Result<Tensor> {
        let inside = match &self.norm_before {
            Some(norm) => self.down.apply(&norm.apply(z)?)?,
            None => self.down.apply(z)?,
        };
        let mut up = self.up.apply(&(self.activation)(&inside)?)?;
        if call.pass().train && self.fields.stochastic_depth > 0.0 {
            let mut rows = vec![1; up.rank()];
            if let (Some(to), Some(from)) = (rows.first_mut(), up.shape().first()) {
                *to = *from;
            }
            let key = call.pass().key.fork(&self.path).fork("stochastic_depth");
            let kept = Tensor::full(1.0, &rows, up.device())?;
            up = up.mul(&kept.dropout(self.fields.stochastic_depth, key)?)?;
        }
        up = match (&self.scaling, &self.fields.scaling) {
            (Some(factor), _) => up.mul(&factor.tensor())?,
            (None, Scaling::Factor(factor)) if *factor != 1.0 => up.scale(*factor as f32)?,
            _ => up,
        };
        let out = call.dropout(&up, self.fields.dropout)?;
        let Some(gate) = &self.gate else {
            return Ok(out);
        };
        let gate = gate.apply(z)?.sigmoid()?;
        // One value a row: the mean over its positions, padding included.
        match *gate.shape() {
            [_, seq, _] => {
                call.pass().whole_rows()?;
                Ok(out.mul(&gate.sum_axis(1)?.scale(1.0 / seq.max(1) as f32)?)?)
            }
            _ => Ok(out.mul(&gate)?),
        }
    }

    fn normed(&self, x: Tensor) -> Result<Tensor> {
        match &self.norm_after {
            Some(norm) => norm.apply(&x),
            None => Ok(x),
        }
    }

    /// The bottleneck's own residual.
    fn residual(&self, call: &Call<'_>, z: &Tensor) -> Result<Tensor> {
        let h = call.x()?;
        Ok(match self.fields.residual_before_ln {
            ResidualFrom::Norm(true) => h.clone(),
            ResidualFrom::Norm(false) => z.clone(),
            ResidualFrom::Sum(_) => h.add(call.residual()?)?,
        })
    }
}

impl Adapter for Inserted {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let z = self.reading(call)?;
        let a = self.inner(call, &z)?;
        let out = if self.fields.is_parallel {
            self.normed(a)?.add(call.x()?)?
        } else if self.fields.adapter_residual_before_ln {
            self.normed(a.add(&self.residual(call, &z)?)?)?
        } else {
            self.normed(a)?.add(&self.residual(call, &z)?)?
        };
        if self.fields.original_ln_after {
            call.base_with(&out)
        } else {
            Ok(out)
        }
    }

    fn reads(&self, call: &Call<'_>) -> Result<Tensor> {
        self.reading(call)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        let fields = &self.fields;
        let from_output =
            fields.is_parallel || fields.residual_before_ln == ResidualFrom::Norm(true);
        // Without a norm at the junction, what the bottleneck reads is the whole sum as well.
        let from_sum = fields.residual_before_ln == ResidualFrom::Norm(false)
            && fields.original_ln_before
            && !fields.original_ln_after
            && call.norm(call.x()?)?.is_none();
        let adds = (fields.original_ln_after && from_output) || from_sum;
        if !adds || fields.ln_after {
            return Ok(None);
        }
        self.inner(call, &self.reading(call)?).map(Some)
    }
}
