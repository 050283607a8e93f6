//! What all attention layers share: keys and values of earlier tokens, prefixes, padding.

use std::sync::Arc;

use peft_core::{AttentionCall, Error, ModuleId, Network, Pass, ProjectFn, Result, Tokens};
use peft_tensor::{Attention, Mask, Tensor, concat};

/// Keys and values of the tokens a model has seen, one entry per layer.
#[derive(Default)]
pub(crate) struct KvCache {
    layers: Vec<Option<LayerCache>>,
    /// Tokens seen, virtual ones included, prefixes not.
    pub(crate) seen: usize,
}

pub(crate) struct LayerCache {
    k: Tensor,
    v: Tensor,
    prefix: usize,
}

impl KvCache {
    /// The place of a layer's keys and values.
    pub(crate) fn layer(&mut self, i: usize) -> &mut Option<LayerCache> {
        if self.layers.len() <= i {
            self.layers.resize_with(i + 1, || None);
        }
        &mut self.layers[i]
    }
}

/// Token ids of one run with what the model needs to know of them.
#[derive(Clone)]
pub(crate) struct Rows {
    pub(crate) batch: usize,
    /// Tokens of a row, virtual ones included.
    pub(crate) seq: usize,
    /// Which may be seen, `[B * (seen + seq)]`; None = all.
    pub(crate) keys: Option<Arc<Vec<bool>>>,
    /// Positions run before and cached.
    pub(crate) seen: usize,
    /// Virtual tokens in front.
    pub(crate) virtual_tokens: usize,
    /// Which text of its row each position belongs to, `[B * seq]`; None = one text a row.
    pub(crate) segments: Option<Arc<Vec<u32>>>,
    /// Positions at the beginning of a row that all its texts begin with.
    pub(crate) shared: usize,
}

impl Rows {
    /// The pass with what adapters may want to know of the rows.
    pub(crate) fn pass(&self, pass: &Pass) -> Pass {
        let tokens = Tokens {
            batch: self.batch,
            seq: self.seq,
            seen: self.seen,
            virtual_tokens: self.virtual_tokens,
            mask: self.keys.clone(),
            segments: self.segments.clone(),
        };
        Pass {
            tokens: Some(Arc::new(tokens)),
            ..pass.clone()
        }
    }

    /// The mask with `prefix` keys in front of each row.
    fn mask(&self, prefix: usize) -> Mask {
        let keys = self.keys.as_ref().map(|keys| {
            if prefix == 0 {
                return keys.clone();
            }
            let len = keys.len() / self.batch.max(1);
            let row = |r: &[bool]| {
                std::iter::repeat_n(true, prefix)
                    .chain(r.iter().copied())
                    .collect::<Vec<_>>()
            };
            Arc::new(keys.chunks(len.max(1)).flat_map(row).collect())
        });
        let segments = self.segments.as_ref().map(|segments| {
            if prefix == 0 {
                return segments.clone();
            }
            // Keys of the prefix are seen by all texts, whatever their number.
            let row = |r: &[u32]| {
                std::iter::repeat_n(u32::MAX, prefix)
                    .chain(r.iter().copied())
                    .collect::<Vec<_>>()
            };
            Arc::new(segments.chunks(self.seq.max(1)).flat_map(row).collect())
        });
        Mask { keys, segments }
    }
}

/// What a layer's attention module is to adapters: its id, the sublayer's input `[B, S, hidden]`, and its keys and values
/// for any hidden states.
#[derive(Clone, Copy)]
pub(crate) struct Sublayer<'a> {
    pub(crate) module: ModuleId,
    pub(crate) hidden: &'a Tensor,
    pub(crate) project: ProjectFn<'a>,
}

/// Why rows with a prefix are not shared where a window slides.
const SLIDES: &str = "this model's attention has a window, and how far a text is from the prefix is not known in a row of several";

/// Attention of `q` over the layer's prefix, the cached keys and `k`, `v`; all `[B, S, width]`, keys rotated already.
pub(crate) fn attend(
    network: &Network,
    sublayer: Sublayer<'_>,
    (q, k, v): (&Tensor, Tensor, Tensor),
    spec: &Attention,
    rows: &Rows,
    mut cache: Option<&mut Option<LayerCache>>,
    pass: &Pass,
) -> Result<Tensor> {
    // Taken out, so that nobody else holds it and it grows in place.
    let earlier = cache.as_mut().and_then(|c| c.take());
    let (k, v, prefix) = match earlier {
        Some(seen) => (seen.k.append(&k, 1)?, seen.v.append(&v, 1)?, seen.prefix),
        None => match network.prefix(sublayer.module, sublayer.hidden, pass)? {
            Some(p) => {
                let (pk, pv) = (per_row(&p.k, rows.batch)?, per_row(&p.v, rows.batch)?);
                let prefix = pk.shape()[1];
                (concat(&[&pk, &k], 1)?, concat(&[&pv, &v], 1)?, prefix)
            }
            None => (k, v, 0),
        },
    };
    // A window slides over the prefix as over any keys in front, as it does in HF's caches.
    let slides = spec.window.is_some() && prefix > 0;
    if slides && rows.segments.is_some() {
        return Err(Error::config("segments", SLIDES));
    }
    let spec = Attention {
        prefix: if slides { 0 } else { prefix },
        shared: rows.shared,
        mask: rows.mask(prefix),
        ..spec.clone()
    };
    let call = AttentionCall {
        q: q.clone(),
        k: k.clone(),
        v: v.clone(),
        spec: &spec,
        hidden: sublayer.hidden,
        project: sublayer.project,
    };
    let out = network.attention(sublayer.module, &call, pass)?;
    if let Some(place) = cache {
        *place = Some(LayerCache { k, v, prefix });
    }
    Ok(out)
}

/// `[n, width]` for every row of a batch; `[B, n, width]` as it is.
pub(crate) fn per_row(x: &Tensor, batch: usize) -> Result<Tensor> {
    match *x.shape() {
        [n, width] => Ok(x
            .reshape(&[1, n, width])?
            .broadcast_to(&[batch, n, width])?),
        _ => Ok(x.clone()),
    }
}
