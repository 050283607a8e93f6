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

/// A batch and what is to come of it.
#[derive(Clone)]
pub struct Collated {
    /// What goes into the model.
    pub batch: Batch,
    /// What is to come out.
    pub labels: Labels,
    /// Tokens that are looked at.
    pub tokens: usize,
}

/// Makes a batch: rows filled up on the right with `pad` to the longest of them. Rows without a class in a batch of classes
/// (which [`super::Dataset::encode`] does not make) count as class 0.
pub fn collate(examples: &[&Example], pad: u32) -> Collated {
    collected(examples, pad, false, 0)
}

/// Makes a batch of one row without padding, if the rows differ in length and none has a task of its own; else as
/// [`collate`]. A model keeps the texts apart by their segments. With `share`, what all of them begin with comes once.
pub fn join(examples: &[&Example], pad: u32, share: bool) -> Collated {
    let shared = if share { beginning(examples) } else { 0 };
    collected(examples, pad, shared > 0 || joins(examples), shared)
}

/// Whether [`join`] makes one row of these.
pub(crate) fn joins(examples: &[&Example]) -> bool {
    let lengths = || examples.iter().map(|e| e.ids.len());
    lengths().min() != lengths().max() && can_join(examples)
}

fn can_join(examples: &[&Example]) -> bool {
    // A text of which nothing is looked at would be taken for padding.
    let seen = |e: &Example| e.mask.as_ref().is_none_or(|mask| mask.contains(&true));
    let plain = |e: &&Example| e.task.is_none() && !e.ids.is_empty() && seen(e);
    examples.iter().all(plain)
}

/// Tokens that all of these begin with, and from which nothing is learned: the first label of each text is asked for behind
/// a token of its own.
pub(crate) fn beginning(examples: &[&Example]) -> usize {
    let [first, others @ ..] = examples else {
        return 0;
    };
    let whole = |e: &&Example| e.mask.is_none() && e.texts.is_empty();
    if others.is_empty() || !can_join(examples) || !examples.iter().all(whole) {
        return 0;
    }
    let alike = |e: &&Example| {
        let both = first.ids.iter().zip(&e.ids);
        both.take_while(|(a, b)| a == b).count()
    };
    let free = |e: &&Example| match &e.goal {
        Goal::Tokens { labels, .. } => {
            let first = labels.iter().position(|label| *label != IGNORE);
            first.unwrap_or(labels.len()).saturating_sub(1)
        }
        Goal::Class(_) => 0,
    };
    let alike = others.iter().map(alike).min().unwrap_or(0);
    examples.iter().map(free).fold(alike, usize::min)
}

fn collected(examples: &[&Example], pad: u32, joined: bool, shared: usize) -> Collated {
    let longest = examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
    let total: usize = examples.iter().map(|e| e.ids.len()).sum();
    let total = total - shared * examples.len().saturating_sub(1);
    // Rows of the batch, and how far each example is filled up.
    let (rows, seq) = if joined {
        (1, total)
    } else {
        (examples.len(), longest)
    };
    let filled = |len: usize| if joined { 0 } else { longest - len };
    let mut ids = Vec::with_capacity(rows * seq);
    let mut mask = Vec::with_capacity(rows * seq);
    let packed = joined || examples.iter().any(|e| !e.texts.is_empty());
    let mut segments: Vec<u32> = Vec::new();
    let mut token_labels = Vec::new();
    let mut classes = Vec::new();
    if let Some(first) = examples.first().filter(|_| shared > 0) {
        ids.extend(&first.ids[..shared]);
        mask.resize(shared, true);
        segments.resize(shared, 0);
        token_labels.resize(shared, IGNORE);
    }
    for example in examples {
        // `shared` of a text are there already, and none of the others has a mask or texts of its own then.
        let len = example.ids.len() - shared;
        let padding = filled(len);
        ids.extend(&example.ids[shared..]);
        ids.resize(ids.len() + padding, pad);
        match &example.mask {
            Some(given) => mask.extend(given),
            None => mask.resize(mask.len() + len, true),
        }
        mask.resize(mask.len() + padding, false);
        if packed {
            // Texts are runs of equal numbers: neighbours in a row have to differ.
            let before = segments.last().filter(|_| joined);
            let mut next = before.map_or(0, |last| (last + 1) % u32::MAX);
            let alone = [len];
            let texts: Vec<usize> = example.texts.iter().map(|text| text.len).collect();
            for text in if texts.is_empty() { &alone[..] } else { &texts } {
                segments.resize(segments.len() + text, next);
                next = (next + 1) % u32::MAX;
            }
            segments.resize(segments.len() + padding, u32::MAX);
        }
        match &example.goal {
            Goal::Tokens { labels, .. } => {
                let first = token_labels.len();
                token_labels.extend(&labels[shared..]);
                token_labels.resize(token_labels.len() + padding, IGNORE);
                if joined && let Some(label) = token_labels.get_mut(first) {
                    // The first token of a text follows from nothing, least of all from the text before.
                    *label = IGNORE;
                }
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
            batch: rows,
            seq,
            mask,
            task_ids: match joined {
                true => None,
                false => examples.iter().map(|e| e.task).collect(),
            },
            segments: packed.then_some(segments),
            shared,
        },
        labels,
        tokens: examples.iter().map(|e| e.tokens()).sum(),
    }
}
