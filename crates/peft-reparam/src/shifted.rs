//! Shifted sparse attention: half of the heads see groups of neighbouring tokens, the other half groups shifted by half.

use std::ops::Range;
use std::sync::Arc;

use peft_core::peft_tensor::{Attention, Mask, concat};
use peft_core::{Call, Result, Tensor};

/// The groups of one half of the heads, covering `0..seq`: `size` wide, the first one `first`.
fn groups(seq: usize, size: usize, first: usize) -> Vec<Range<usize>> {
    let mut all = Vec::new();
    let (mut start, mut end) = (0, first.min(seq));
    while start < seq {
        all.push(start..end);
        (start, end) = (end, (end + size).min(seq));
    }
    all
}

/// Some heads of `x [B, n, heads * width]`.
fn heads(x: &Tensor, some: &Range<usize>, width: usize) -> Result<Tensor> {
    if some.len() * width == x.last_dim() {
        return Ok(x.clone());
    }
    Ok(x.narrow(2, some.start * width, some.len() * width)?)
}

/// Each key and value head as often as it has query heads.
fn repeated(x: &Tensor, spec: &Attention) -> Result<Tensor> {
    let (batch, n, _) = x.dims3()?;
    let times = spec.heads / spec.kv_heads.max(1);
    let split = x.reshape(&[batch, n, spec.kv_heads, 1, spec.head_dim])?;
    let wide = split.broadcast_to(&[batch, n, spec.kv_heads, times, spec.head_dim])?;
    Ok(wide.reshape(&[batch, n, spec.heads * spec.head_dim])?)
}

/// Attention in groups of `ratio` of the sequence: for the first half of the heads from its start on, for the second
/// half shifted by half a group, with a half-group of its own at either end, so that nobody sees the other end. Keys of
/// prefixes are in every group. Gives what the module's own attention gives if the sequence is one group.
///
/// # Errors
/// Whatever the attention below returns.
pub(crate) fn attention(call: &Call<'_>, ratio: f64) -> Result<Tensor> {
    let at = call.attention()?;
    call.pass().whole_rows()?;
    let mut spec = at.spec.clone();
    let (_, seq, _) = at.q.dims3()?;
    let total = at.k.shape()[1];
    let size = ((seq as f64 * ratio).round() as usize).max(2);
    // Where earlier tokens are cached there are no groups to speak of.
    if size >= seq || total != spec.prefix + seq || !spec.heads.is_multiple_of(2) {
        return call.base();
    }
    let (mut k, mut v) = (at.k.clone(), at.v.clone());
    if !spec.kv_heads.is_multiple_of(2) {
        (k, v) = (repeated(&k, &spec)?, repeated(&v, &spec)?);
        spec.kv_heads = spec.heads;
    }
    let half = (spec.heads / 2, spec.kv_heads / 2);
    let mut halves = Vec::new();
    for (which, first) in [size, size / 2].into_iter().enumerate() {
        let own = |n: usize| which * n..(which + 1) * n;
        let q = heads(&at.q, &own(half.0), spec.head_dim)?;
        let (k, v) = (
            heads(&k, &own(half.1), spec.head_dim)?,
            heads(&v, &own(half.1), spec.head_dim)?,
        );
        let mut parts = Vec::new();
        for group in groups(seq, size, first) {
            let some = |x: &Tensor| {
                let own = x.narrow(1, spec.prefix + group.start, group.len())?;
                match spec.prefix {
                    0 => Ok(own),
                    prefix => concat(&[&x.narrow(1, 0, prefix)?, &own], 1),
                }
            };
            let inside = Attention {
                heads: half.0,
                kv_heads: half.1,
                mask: within(&spec.mask, total, spec.prefix, &group),
                ..spec.clone()
            };
            let q = q.narrow(1, group.start, group.len())?;
            parts.push(call.base_attention(&q, &some(&k)?, &some(&v)?, &inside)?);
        }
        halves.push(concat(&parts.iter().collect::<Vec<_>>(), 1)?);
    }
    Ok(concat(&halves.iter().collect::<Vec<_>>(), 2)?)
}

/// Which of a group's keys may be seen, those of prefixes first.
fn within(mask: &Mask, total: usize, prefix: usize, group: &Range<usize>) -> Mask {
    let rows = mask.keys.as_ref().map(|keys| {
        let row = |row: &[bool]| {
            let own = row.iter().skip(prefix + group.start).take(group.len());
            let all = row.iter().take(prefix).chain(own);
            all.copied().collect::<Vec<bool>>()
        };
        Arc::new(keys.chunks(total.max(1)).flat_map(row).collect())
    });
    Mask {
        keys: rows,
        segments: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixteen tokens in groups of four; the second half of the heads has half-groups at both ends.
    #[test]
    fn groups_cover_the_sequence() {
        assert_eq!(groups(16, 4, 4), [0..4, 4..8, 8..12, 12..16]);
        assert_eq!(groups(16, 4, 2), [0..2, 2..6, 6..10, 10..14, 14..16]);
        assert_eq!(groups(9, 4, 2), [0..2, 2..6, 6..9]);
        let alone = groups(3, 4, 4);
        assert_eq!((alone.len(), &alone[0]), (1, &(0..3)));
    }

    #[test]
    fn masks_keep_prefixes() {
        let keys: Vec<bool> = (0..12).map(|i| i % 5 != 0).collect();
        let mask = within(
            &Mask {
                keys: Some(Arc::new(keys)),
                segments: None,
            },
            6,
            2,
            &(1..3),
        );
        // Row 0: F T T T T F, its prefix and positions 3 and 4; row 1: T T T T F T.
        assert_eq!(
            mask.keys.expect("a mask")[..],
            [false, true, true, true, true, true, true, false]
        );
    }
}
