//! Which rows share a batch, and the batch itself.

use peft_models::{Batch, Labels};
use peft_tensor::{IGNORE, RngKey};

use super::{Example, Goal};

/// Batches whose rows are sorted by length together.
const BUCKET: usize = 50;

/// The batches of one epoch, as row numbers: a function of its arguments alone, so a resumed run finds its place by
/// counting. There are always `ceil(rows / batch_size)`.
///
/// Without `shuffle` rows come in order. With `shuffle` and `bucket`, rows are shuffled, sorted by length within groups
/// of fifty batches, cut into batches, and the batches are shuffled, as `group_by_length` of transformers does.
pub fn plan_epoch(
    lengths: &[usize],
    batch_size: usize,
    shuffle: bool,
    bucket: bool,
    seed: RngKey,
    epoch: u64,
) -> Vec<Vec<usize>> {
    let size = batch_size.max(1);
    let key = seed.fork("epoch").fork_n(epoch);
    let mut order: Vec<usize> = if shuffle {
        key.fork("rows").permutation(lengths.len())
    } else {
        (0..lengths.len()).collect()
    };
    if !(shuffle && bucket) {
        return order.chunks(size).map(<[usize]>::to_vec).collect();
    }
    for group in order.chunks_mut(size * BUCKET) {
        // The sort is stable: rows of one length stay shuffled.
        group.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
    }
    let batches: Vec<&[usize]> = order.chunks(size).collect();
    let places = key.fork("batches").permutation(batches.len());
    places.into_iter().map(|i| batches[i].to_vec()).collect()
}

/// Rows filled up on the right to the longest of them.
#[derive(Clone)]
pub struct Collated {
    /// What goes into the model.
    pub batch: Batch,
    /// What is to come out.
    pub labels: Labels,
    /// Tokens that are looked at.
    pub tokens: usize,
}

/// Makes a batch. Rows without a class in a batch of classes (which [`super::Dataset::encode`] does not make) count as
/// class 0.
pub fn collate(examples: &[&Example], pad: u32) -> Collated {
    let seq = examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(examples.len() * seq);
    let mut mask = Vec::with_capacity(examples.len() * seq);
    let packed = examples.iter().any(|e| !e.texts.is_empty());
    let mut segments = Vec::new();
    let mut token_labels = Vec::new();
    let mut classes = Vec::new();
    for example in examples {
        let len = example.ids.len();
        ids.extend(&example.ids);
        ids.resize(ids.len() + seq - len, pad);
        match &example.mask {
            Some(given) => mask.extend(given),
            None => mask.resize(mask.len() + len, true),
        }
        mask.resize(mask.len() + seq - len, false);
        if packed {
            let texts = example.texts.iter().map(|text| text.len);
            for (number, text) in texts.enumerate() {
                segments.resize(segments.len() + text, number as u32);
            }
            // A row of one text, and padding at the end, are runs of their own.
            if example.texts.is_empty() {
                segments.resize(segments.len() + len, 0);
            }
            segments.resize(segments.len() + seq - len, u32::MAX);
        }
        match &example.goal {
            Goal::Tokens { labels, .. } => {
                token_labels.extend(labels);
                token_labels.resize(token_labels.len() + seq - len, IGNORE);
            }
            Goal::Class(class) => classes.push(*class),
        }
    }
    let mask = Some(mask).filter(|m| m.contains(&false));
    let labels = if classes.is_empty() {
        Labels::Tokens(token_labels)
    } else {
        Labels::Classes(classes)
    };
    Collated {
        batch: Batch {
            ids,
            batch: examples.len(),
            seq,
            mask,
            task_ids: examples.iter().map(|e| e.task).collect(),
            segments: packed.then_some(segments),
        },
        labels,
        tokens: examples.iter().map(|e| e.tokens()).sum(),
    }
}
