//! Several texts in one row, with attention kept apart: rows without padding.

use std::collections::{BTreeMap, BTreeSet};

use peft_tensor::IGNORE;

use super::dataset::{Dataset, Example, Goal, Text};

impl Dataset {
    /// Puts texts together into rows of at most `max_length` tokens: each text, the longest first, goes where the least
    /// space is left for it (best fit decreasing), into a row of its own task. Texts of a row and rows come in the file's
    /// order. Nothing is cut, and nothing but the tokens of a text decides about its loss. Rows of classes stay.
    pub fn packed(mut self) -> Self {
        let texts = std::mem::take(&mut self.examples);
        let count = texts.len();
        let rows = rows(&texts, self.max_length);
        let mut texts: Vec<Option<Example>> = texts.into_iter().map(Some).collect();
        for row in rows {
            let parts: Vec<Example> = row.iter().filter_map(|&i| texts[i].take()).collect();
            self.examples.extend(joined(parts));
        }
        let tokens: usize = self.examples.iter().map(|e| e.ids.len()).sum();
        let room = self.examples.len() * self.max_length;
        self.notes.push(format!(
            "{}: {count} texts are packed into {} rows of {} tokens, {:.0} % filled",
            self.files,
            self.examples.len(),
            self.max_length,
            100.0 * tokens as f64 / room.max(1) as f64
        ));
        self
    }
}

/// Which texts share a row.
fn rows(texts: &[Example], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(texts[i].ids.len()));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // By task: (space left, row).
    let mut open: BTreeMap<Option<u32>, BTreeSet<(usize, usize)>> = BTreeMap::new();
    for i in order {
        let (text, len) = (&texts[i], texts[i].ids.len());
        if !matches!(text.goal, Goal::Tokens { .. }) {
            rows.push(vec![i]);
            continue;
        }
        let open = open.entry(text.task).or_default();
        let (space, row) = match open.range((len, 0)..).next() {
            Some(&found) => found,
            None => {
                rows.push(Vec::new());
                (max_length.max(len), rows.len() - 1)
            }
        };
        open.remove(&(space, row));
        open.insert((space - len, row));
        rows[row].push(i);
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    rows
}

/// One row of several texts; a single one stays as it is.
fn joined(mut parts: Vec<Example>) -> Option<Example> {
    if parts.len() < 2 {
        return parts.pop();
    }
    let masked = parts.iter().any(|part| part.mask.is_some());
    let first = parts.first()?;
    let mut row = Example {
        task: first.task,
        line: first.line,
        file: first.file,
        ..Example::new(Vec::new(), Goal::Class(0))
    };
    let (mut all, mut mask) = (Vec::new(), Vec::new());
    for part in parts {
        let len = part.ids.len();
        row.texts.push(Text {
            len,
            line: part.line,
            file: part.file,
        });
        if let Goal::Tokens { labels, .. } = part.goal {
            // The first token of a text follows from nothing, least of all from the text before.
            all.push(IGNORE);
            all.extend(labels.into_iter().skip(1));
        }
        mask.extend(part.mask.unwrap_or_else(|| vec![true; len]));
        row.ids.extend(part.ids);
    }
    row.mask = masked.then_some(mask);
    row.goal = Goal::Tokens {
        labels: all,
        prompt: None,
    };
    Some(row)
}
