//! Rotary position embedding (RoFormer, arXiv 2104.09864) with the ways there are of stretching it: position
//! interpolation (arXiv 2306.15595), dynamic NTK, Llama 3's bands, YaRN (arXiv 2309.00071), LongRoPE (2402.13753).
//!
//! Frequencies and angles are rounded to f32 where PyTorch rounds them, so that tables agree with `transformers`.

use std::f64::consts::PI;
use std::sync::{Arc, Mutex, PoisonError};

use peft_core::{Error, Result};
use peft_tensor::Rope;
use serde_json::Value;

use crate::fields::Fields;

/// How frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by the factor.
    Linear {
        /// How much longer the context is.
        factor: f64,
    },
    /// The base grows once the sequence is longer than the model's positions.
    Dynamic {
        /// How fast.
        factor: f64,
    },
    /// Low frequencies divided by the factor, high ones kept, between them a blend.
    Llama3 {
        /// Division of the low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low: f64,
        /// Above this many it is high.
        high: f64,
        /// Context length of the pre-training.
        original: f64,
    },
    /// A linear ramp over dimensions between divided and kept frequencies.
    Yarn {
        /// Division of the low frequencies.
        factor: f64,
        /// Turns at which the ramp begins.
        beta_fast: f64,
        /// Turns at which it ends.
        beta_slow: f64,
        /// Context length of the pre-training.
        original: f64,
        /// Factor on cosine and sine.
        attention: f64,
        /// Whether the ramp's ends are whole dimensions.
        truncate: bool,
    },
    /// A division per dimension, one set for short and one for long sequences.
    LongRope {
        /// Divisions up to the original context length.
        short: Vec<f64>,
        /// Divisions beyond it.
        long: Vec<f64>,
        /// Context length of the pre-training.
        original: f64,
        /// Factor on cosine and sine.
        attention: f64,
    },
    /// A division per dimension (GGUF's `rope_freqs.weight`).
    Factors(Vec<f64>),
}

/// A model's rotation.
#[derive(Clone, Debug)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated part of a head.
    pub dim: usize,
    /// How frequencies are stretched.
    pub scaling: RopeScaling,
    /// Positions the model was made for.
    pub max_positions: usize,
}

const KINDS: &str = "default, linear, dynamic, llama3, yarn, longrope";

impl RopeConfig {
    /// From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    pub(crate) fn from_fields(
        f: &Fields<'_>,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self> {
        let empty = Value::Object(serde_json::Map::new());
        let found = f.get("rope_parameters").or_else(|| f.get("rope_scaling"));
        let r = Fields::new(found.unwrap_or(&empty))?;
        let theta = match r.opt_float("rope_theta")? {
            Some(theta) => theta,
            None => f.float_or("rope_theta", 10_000.0)?,
        };
        if !(theta.is_finite() && theta > 0.0) {
            return Err(Error::config(
                "rope_theta",
                format!("{theta} is not a positive number"),
            ));
        }
        let partial = match r.opt_float("partial_rotary_factor")? {
            Some(partial) => partial,
            None => f.float_or("partial_rotary_factor", 1.0)?,
        };
        let dim = (head_dim as f64 * partial + 1e-9) as usize;
        let kind = r
            .opt_text("rope_type")?
            .or(r.opt_text("type")?)
            .unwrap_or("default");
        // Some configurations keep the original length beside the scaling rather than in it.
        let original = |default: Option<usize>| -> Result<f64> {
            match r.opt_float("original_max_position_embeddings")? {
                Some(n) => Ok(n),
                None => match (f.opt_float("original_max_position_embeddings")?, default) {
                    (Some(n), _) => Ok(n),
                    (None, Some(n)) => Ok(n as f64),
                    (None, None) => r.float("original_max_position_embeddings"),
                },
            }
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: r.float("factor")?,
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: r.float("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: r.float("factor")?,
                low: r.float("low_freq_factor")?,
                high: r.float("high_freq_factor")?,
                original: original(None)?,
            },
            "yarn" => {
                let original = original(Some(max_positions))?;
                let factor = r.float_or("factor", max_positions as f64 / original)?;
                let grown = |m: f64| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * m * factor.ln() + 1.0
                    }
                };
                let by_mscale = match (r.opt_float("mscale")?, r.opt_float("mscale_all_dim")?) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => grown(m) / grown(all),
                    _ => grown(1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    beta_fast: r.float_or("beta_fast", 32.0)?,
                    beta_slow: r.float_or("beta_slow", 1.0)?,
                    original,
                    attention: r.float_or("attention_factor", by_mscale)?,
                    truncate: r.flag_or("truncate", true)?,
                }
            }
            "longrope" | "su" => {
                let original = original(Some(max_positions))?;
                let factor = r.float_or("factor", max_positions as f64 / original)?;
                let default = if factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + factor.ln() / original.ln()).sqrt()
                };
                let list = |field: &str| -> Result<Vec<f64>> {
                    let list = r.floats(field)?;
                    if list.len() != dim / 2 {
                        return Err(Error::config(
                            field,
                            format!("{} entries, {} are needed", list.len(), dim / 2),
                        ));
                    }
                    Ok(list)
                };
                RopeScaling::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original,
                    attention: r.float_or("attention_factor", default)?,
                }
            }
            other => {
                return Err(Error::config(
                    "rope_type",
                    format!("{other:?} is not known; known are {KINDS}"),
                ));
            }
        };
        Ok(Self {
            theta,
            dim,
            scaling,
            max_positions,
        })
    }

    /// Frequencies of the pairs for a sequence that reaches position `len - 1`, and the factor on cosine and sine.
    fn frequencies(&self, len: usize) -> (Vec<f32>, f32) {
        let dim = self.dim as f64;
        let exponents =
            || (0..self.dim / 2).map(move |i| ((2 * i) as f32 / self.dim as f32) as f64);
        let plain = |theta: f64| exponents().map(move |e| 1.0 / (theta.powf(e) as f32));
        match &self.scaling {
            RopeScaling::Default => (plain(self.theta).collect(), 1.0),
            RopeScaling::Linear { factor } => {
                (plain(self.theta).map(|f| f / *factor as f32).collect(), 1.0)
            }
            RopeScaling::Factors(factors) => (
                plain(self.theta)
                    .zip(factors)
                    .map(|(f, d)| f / *d as f32)
                    .collect(),
                1.0,
            ),
            RopeScaling::Dynamic { factor } => {
                let limit = self.max_positions as f64;
                let stretch = factor * (len as f64).max(limit) / limit - (factor - 1.0);
                // A head of one pair has a single frequency, which the base does not change.
                let power = if self.dim > 2 { dim / (dim - 2.0) } else { 1.0 };
                (plain(self.theta * stretch.powf(power)).collect(), 1.0)
            }
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => {
                let bands = plain(self.theta).map(|f| {
                    let wave = (2.0 * PI) as f32 / f;
                    let blend = (*original as f32 / wave - *low as f32) / (high - low) as f32;
                    if wave < (original / high) as f32 {
                        f
                    } else if wave > (original / low) as f32 {
                        f / *factor as f32
                    } else {
                        (1.0 - blend) * f / *factor as f32 + blend * f
                    }
                });
                (bands.collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original,
                attention,
                truncate,
            } => {
                let at = |turns: f64| {
                    dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (at(*beta_fast), at(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let ramp = exponents().enumerate().map(|(i, e)| {
                    let divided = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let frequency = self.theta.powf(e) as f32;
                    let kept = 1.0 - divided;
                    1.0 / (*factor as f32 * frequency) * (1.0 - kept) + 1.0 / frequency * kept
                });
                (ramp.collect(), *attention as f32)
            }
            RopeScaling::LongRope {
                short,
                long,
                original,
                attention,
            } => {
                let factors = if len as f64 > *original { long } else { short };
                let scaled = exponents()
                    .zip(factors)
                    .map(|(e, d)| 1.0 / (*d as f32 * self.theta.powf(e) as f32));
                (scaled.collect(), *attention as f32)
            }
        }
    }

    /// What besides the length of a table decides its values: sequences of one class share tables.
    fn class(&self, len: usize) -> usize {
        match &self.scaling {
            RopeScaling::Dynamic { .. } => len.max(self.max_positions),
            RopeScaling::LongRope { original, .. } => usize::from(len as f64 > *original),
            _ => 0,
        }
    }
}

struct Tables {
    class: usize,
    scale: f32,
    len: usize,
    cos: Arc<Vec<f32>>,
    sin: Arc<Vec<f32>>,
}

/// The rotation of a model with the tables made so far.
pub(crate) struct RopeTables {
    config: RopeConfig,
    head_dim: usize,
    made: Mutex<Option<Tables>>,
}

impl RopeTables {
    pub(crate) fn new(config: RopeConfig, head_dim: usize) -> Self {
        Self {
            config,
            head_dim,
            made: Mutex::new(None),
        }
    }

    /// Rotations of queries and keys for tokens at `positions` (one per row of `[B * S]`), which are divided by `scale`;
    /// `heads` are those of queries and of keys.
    pub(crate) fn at(
        &self,
        positions: &Arc<Vec<u32>>,
        scale: f32,
        heads: (usize, usize),
    ) -> (Arc<Rope>, Arc<Rope>) {
        let len = positions.iter().max().map_or(0, |&p| p as usize + 1);
        let (cos, sin) = self.tables(len, scale);
        let rope = |heads: usize| {
            Arc::new(Rope {
                heads,
                head_dim: self.head_dim,
                half: self.config.dim / 2,
                cos: cos.clone(),
                sin: sin.clone(),
                positions: positions.clone(),
            })
        };
        (rope(heads.0), rope(heads.1))
    }

    fn tables(&self, len: usize, scale: f32) -> (Arc<Vec<f32>>, Arc<Vec<f32>>) {
        let class = self.config.class(len);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |t: &&Tables| t.class == class && t.scale == scale && t.len >= len;
        if let Some(t) = made.as_ref().filter(same) {
            return (t.cos.clone(), t.sin.clone());
        }
        // Room to grow, so that generation does not make a table per token.
        let rows = len.next_power_of_two().max(64);
        let (mut frequencies, factor) = self.config.frequencies(len);
        if scale != 1.0 {
            frequencies.iter_mut().for_each(|f| *f /= scale);
        }
        let angles =
            (0..rows).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles
            .map(|a| (a.sin() as f32 * factor, a.cos() as f32 * factor))
            .unzip();
        let (cos, sin) = (Arc::new(cos), Arc::new(sin));
        *made = Some(Tables {
            class,
            scale,
            len: rows,
            cos: cos.clone(),
            sin: sin.clone(),
        });
        (cos, sin)
    }
}
