//! Attention, whose output is made again for the backward pass where that is cheap.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::shape_err;
use crate::kept::{Keeping, Kept, Recipe};
use crate::tape::{record, record_again};
use crate::{Attention, Buffer, Grads, Result, Tensor, memo};

/// Most keys in sight of a query with which attention's output is made again, if it is large. With as many its products are a twentieth of
/// what a block of SmolLM2-135M multiplies forward, and the output is a tenth of what such a block keeps.
const AGAIN: usize = 512;

/// Most values of an output that is kept however cheap it is: for SmolLM2-135M's 30 blocks in bfloat16 a ninth of its weights.
const FEW: usize = 1 << 19;

impl Attention {
    /// Whether an output of that many values, of queries that see at most `keys` keys, waits for the backward pass, also in
    /// a [`checkpoint`](crate::checkpoint), or is made again.
    #[must_use]
    pub fn is_kept(keys: usize, values: usize) -> bool {
        keys > AGAIN || values <= FEW
    }

    /// Most keys that a query sees, of rows of `keys`.
    fn sight(&self, keys: usize) -> usize {
        let longest = |numbers: &[u32]| {
            let runs = numbers.chunk_by(|a, b| a == b);
            runs.map(<[u32]>::len).max().unwrap_or(0)
        };
        let text = match &self.mask.segments {
            Some(numbers) => {
                let rows = numbers.chunks(keys.max(1));
                let front = self.prefix + self.shared;
                let own = rows.map(|row| longest(&row[front.min(row.len())..]));
                own.max().unwrap_or(0) + front
            }
            None => keys,
        };
        text.min(
            self.window
                .map_or(usize::MAX, |window| window + self.prefix),
        )
    }
}

impl Tensor {
    /// Attention of `self` (queries `[B, S, heads * head_dim]`) over keys and values `[B, T, kv_heads * head_dim]`.
    ///
    /// # Errors
    /// If the shapes do not fit the specification.
    pub fn attention(&self, k: &Tensor, v: &Tensor, spec: &Attention) -> Result<Tensor> {
        let (b, s, width) = self.dims3()?;
        let (kb, t, kv_width) = k.dims3()?;
        let fits = width == spec.heads * spec.head_dim
            && kv_width == spec.kv_heads * spec.head_dim
            && v.shape() == k.shape()
            && kb == b
            && t >= s
            && spec.kv_heads > 0
            && spec.heads.is_multiple_of(spec.kv_heads)
            && spec.prefix + spec.shared <= t
            && (spec.shared == 0 || spec.window.is_none())
            && spec.mask.keys.as_ref().is_none_or(|m| m.len() == b * t)
            && spec.mask.segments.as_ref().is_none_or(|m| m.len() == b * t);
        if !fits {
            let detail = format!(
                "q {:?}, k {:?}, v {:?} with {} heads, {} key heads of {}, prefix {} and {}, window {:?}, mask of {:?}, segments of {:?}",
                self.shape(),
                k.shape(),
                v.shape(),
                spec.heads,
                spec.kv_heads,
                spec.head_dim,
                spec.prefix,
                spec.shared,
                spec.window,
                spec.mask.keys.as_ref().map(|m| m.len()),
                spec.mask.segments.as_ref().map(|m| m.len())
            );
            return shape_err("attention", detail);
        }
        self.same_device(k, "attention")?;
        self.same_device(v, "attention")?;
        let run = || Run {
            sides: [self, k, v].map(Kept::new),
            sizes: (b, s, t),
            spec: spec.clone(),
        };
        let device = self.device();
        let (backend, data) = (device.backend(), [self, k, v].map(|x| &x.data));
        let make = || backend.attention(data[0], data[1], data[2], b, s, t, spec);
        let shape = self.shape().to_vec();
        if Attention::is_kept(spec.sight(t), self.numel()) {
            let keep = |out: &Buffer, keeping: &Keeping| Kept::result(out, keeping, self);
            let (out, lse, keeping) = memo::attention((b, s, t), make, keep)?;
            let (own, kept) = (keeping.clone(), out.clone());
            let mut out = record(out, shape, device, &[self, k, v], || {
                let (run, out) = (run(), Kept::result(&kept, &own, self));
                Box::new(move |dy, sink| run.grad(&out.data()?, &lse, dy, sink))
            });
            out.keeping = keeping;
            return Ok(out);
        }
        let (out, _) = make()?;
        let shared = OnceCell::new();
        let again = || -> Arc<Again> {
            let new = || Arc::new(Again::of(run()));
            shared.get_or_init(new).clone()
        };
        let recipe = || -> Recipe {
            let again = again();
            Arc::new(move || again.output())
        };
        Ok(record_again(
            out,
            shape,
            device,
            &[self, k, v],
            recipe,
            || {
                let again = again();
                Box::new(move |dy, sink| {
                    let (out, lse) = again.made()?;
                    again.run.grad(&out, &lse, dy, sink)
                })
            },
        ))
    }
}

/// What attention was made of.
struct Run {
    /// Queries, keys and values.
    sides: [Kept; 3],
    /// Rows, queries and keys of a row.
    sizes: (usize, usize, usize),
    spec: Attention,
}

impl Run {
    /// The output, and the scores' log-sum-exp.
    fn make(&self) -> Result<(Buffer, Buffer)> {
        let ([q, k, v], (b, s, t)) = (&self.sides, self.sizes);
        let backend = q.device().backend();
        backend.attention(&q.data()?, &k.data()?, &v.data()?, b, s, t, &self.spec)
    }

    /// Passes the output's gradient on.
    fn grad(&self, out: &Buffer, lse: &Buffer, dy: &Tensor, sink: &mut Grads) -> Result<()> {
        let ([q, k, v], (b, s, t)) = (&self.sides, self.sizes);
        let (dq, dk, dv) = q.device().backend().attention_grad(
            &q.data()?,
            &k.data()?,
            &v.data()?,
            out,
            lse,
            &dy.data,
            b,
            s,
            t,
            &self.spec,
        )?;
        for (of, grad) in [(q, dq), (k, dk), (v, dv)] {
            sink.add(&of.target, of.wrap(grad))?;
        }
        Ok(())
    }
}

/// Attention that is run again in the backward pass, once for all who want its output.
struct Again {
    run: Run,
    /// From the first who wants them to its own gradient, which is asked for when everyone behind it has been.
    made: Mutex<Option<(Buffer, Buffer)>>,
}

impl Again {
    fn of(run: Run) -> Self {
        Self {
            run,
            made: Mutex::default(),
        }
    }

    fn made(&self) -> Result<(Buffer, Buffer)> {
        let made = self
            .made
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        made.map_or_else(|| self.run.make(), Ok)
    }

    fn output(&self) -> Result<Buffer> {
        let (out, lse) = self.made()?;
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some((out.clone(), lse));
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Mask, Precision, RngKey};

    fn random(seed: u64, shape: &[usize]) -> Tensor {
        let values = Tensor::normal(RngKey(seed), 0.0, 1.0, shape, &Device::cpu()).unwrap();
        values.leaf()
    }

    fn one_head() -> Attention {
        Attention {
            heads: 1,
            kv_heads: 1,
            head_dim: 8,
            scale: 2.0,
            causal: false,
            window: None,
            prefix: 0,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        }
    }

    /// Gradients are those of the products and the softmax it is made of; the output is held by the graph.
    #[test]
    fn gradients_are_those_of_its_parts() {
        for keys in [AGAIN, AGAIN + 1] {
            let sides = [1, 2, 3].map(|seed| random(seed, &[1, keys, 8]));
            let [q, k, v] = &sides;
            let weight = random(4, &[1, keys, 8]).detach();
            let out = q.attention(k, v, &one_head()).unwrap();
            assert!(out.data.holders() > 1);
            let got = twice_wanted(out, &weight);
            let flat = |x: &Tensor| x.reshape(&[keys, 8]).unwrap();
            let scores = flat(q).matmul_t(&flat(k)).unwrap().scale(2.0).unwrap();
            let out = scores.softmax().unwrap().matmul(&flat(v)).unwrap();
            let want = twice_wanted(out, &flat(&weight));
            for side in &sides {
                let [got, want] = [&got, &want].map(|g| g.get(side).unwrap().to_vec().unwrap());
                // Sums over 512 keys of a softmax whose scores reach ten, in another order.
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() < 1e-4, "{got} for {want}");
                }
                assert!(want.iter().any(|v| v.abs() > 0.1));
            }
        }
    }

    /// Gradients where two want the output: itself, and a product with what is trained.
    fn twice_wanted(out: Tensor, weight: &Tensor) -> Grads {
        let loss = out.mul(weight).unwrap().mul(&out).unwrap();
        drop(out);
        loss.sum_all().unwrap().backward().unwrap()
    }

    /// Many values and few keys: what is not kept is made again, in one row as in two, of which each would be kept.
    #[test]
    fn gradients_do_not_depend_on_what_is_kept() {
        let spec = Attention {
            heads: 128,
            kv_heads: 128,
            ..one_head()
        };
        let (row, both) = ([1, FEW / 1024, 1024], [2, FEW / 1024, 1024]);
        let parts = [1, 2, 3].map(|seed| [0, 10].map(|more| random(seed + more, &row)));
        let weights = [4, 14].map(|seed| random(seed, &row).detach());
        let whole = |parts: &[Tensor; 2]| {
            let values = parts.iter().flat_map(|x| x.to_vec().unwrap()).collect();
            Tensor::from_vec(values, &both, &Device::cpu())
                .unwrap()
                .leaf()
        };
        let sides = parts.each_ref().map(whole);
        let out = sides[0].attention(&sides[1], &sides[2], &spec).unwrap();
        assert_eq!(out.data.holders(), 1);
        let got = twice_wanted(out, &whole(&weights).detach());
        for (row, weight) in weights.iter().enumerate() {
            let [q, k, v] = parts.each_ref().map(|side| &side[row]);
            let out = q.attention(k, v, &spec).unwrap();
            assert!(out.data.holders() > 1);
            let want = twice_wanted(out, weight);
            for (part, side) in parts.iter().zip(&sides) {
                let want = want.get(&part[row]).unwrap().to_vec().unwrap();
                let got = got.get(side).unwrap().to_vec().unwrap();
                assert_eq!(got[row * want.len()..][..want.len()], want);
                assert!(want.iter().any(|v| v.abs() > 0.1));
            }
        }
    }

    /// In a function that runs again the output is the first run's, and gradients are what they are without it.
    #[test]
    fn a_checkpoint_keeps_the_output() {
        for precision in [Precision::F32, Precision::Bf16] {
            let device = Device::cpu_in(precision);
            let shape = [1, AGAIN + 5, 32];
            let normal = |seed| Tensor::normal(RngKey(seed), 0.0, 1.0, &shape, &device).unwrap();
            let x = normal(1).leaf();
            let spec = Attention {
                head_dim: 32,
                scale: 0.2,
                causal: true,
                ..one_head()
            };
            let (weight, scale) = (normal(2), normal(3).leaf());
            let run = move |x: &[Tensor]| {
                let q = x[0].mul(&scale)?;
                let first = q.attention(&x[0], &x[0], &spec)?;
                first.mul(&x[0])?.attention(&q, &first, &spec)
            };
            let out = run(std::slice::from_ref(&x)).unwrap();
            let want = out.mul(&weight).unwrap().sum_all().unwrap();
            let out = crate::checkpoint(&[&x], run).unwrap();
            let got = out.mul(&weight).unwrap().sum_all().unwrap();
            let [got, want] = [got, want].map(|loss| {
                let grads = loss.backward().unwrap();
                assert_eq!(grads.len(), 2);
                grads.get(&x).unwrap().to_vec().unwrap()
            });
            // What is kept in bfloat16 goes on rounded in the second run, and as it was in the first.
            let bound = match precision {
                Precision::F32 => 0.0,
                Precision::Bf16 => 2e-2,
            };
            let norm = |of: &dyn Fn(usize) -> f32| {
                let squares = (0..want.len()).map(|i| of(i).powi(2));
                squares.sum::<f32>().sqrt()
            };
            let (apart, all) = (norm(&|i| got[i] - want[i]), norm(&|i| want[i]));
            assert!(apart <= bound * all, "{apart} of {all}");
            assert!(all > 1.0);
        }
    }

    #[test]
    fn what_a_query_sees_is_what_its_text_and_window_show() {
        let mut spec = one_head();
        assert_eq!(spec.sight(700), 700);
        spec.window = Some(100);
        assert_eq!(spec.sight(700), 100);
        spec.prefix = 2;
        assert_eq!(spec.sight(700), 102);
        spec.window = None;
        let numbers = [
            u32::MAX,
            u32::MAX,
            0,
            0,
            0,
            1,
            u32::MAX,
            u32::MAX,
            0,
            1,
            1,
            1,
        ];
        spec.mask.segments = Some(Arc::new(numbers.to_vec()));
        assert_eq!(spec.sight(6), 5);
    }
}
