//! Encoded rows.

use peft_core::{Error, Result};
use peft_tensor::{IGNORE, RngKey};
use rayon::prelude::*;

use super::encode::{Cut, RowEncoder};
use super::{EncodeOptions, Encoder, LabelNames, RawData};
use crate::config::Files;

/// One row as the model sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Which of them are looked at; all if None.
    pub mask: Option<Vec<bool>>,
    /// What is to be learned.
    pub goal: Goal,
    /// The row's line in its file.
    pub line: usize,
    /// Its file, by number.
    pub file: usize,
    /// The task it belongs to, where there are several.
    pub task: Option<u32>,
    /// The texts it is made of, in order, where it is several ([`Dataset::packed`]); otherwise empty.
    pub texts: Vec<Text>,
}

/// One of several texts in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Its tokens.
    pub len: usize,
    /// Its line in its file.
    pub line: usize,
    /// Its file, by number.
    pub file: usize,
}

/// What a row teaches.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// Its tokens, each from those before.
    Tokens {
        /// A label for each token, [`IGNORE`] for none, not shifted.
        labels: Vec<i64>,
        /// Where the completion begins, for rows that have one.
        prompt: Option<usize>,
    },
    /// Its class.
    Class(u32),
}

impl Example {
    pub(super) fn new(ids: Vec<u32>, goal: Goal) -> Self {
        Self {
            ids,
            mask: None,
            goal,
            line: 0,
            file: 0,
            task: None,
            texts: Vec::new(),
        }
    }

    /// How many predictions are learned from it: labels after the first token, or the one class. With virtual tokens
    /// in front, the first token is predicted too.
    pub fn labelled(&self, virtual_tokens: bool) -> usize {
        let first = usize::from(!virtual_tokens);
        match &self.goal {
            Goal::Tokens { labels, .. } => {
                labels.iter().skip(first).filter(|&&l| l != IGNORE).count()
            }
            Goal::Class(_) => 1,
        }
    }

    /// How many tokens are looked at.
    pub fn tokens(&self) -> usize {
        self.mask
            .as_ref()
            .map_or(self.ids.len(), |mask| mask.iter().filter(|&&m| m).count())
    }
}

/// Encoded rows of one file, or of several.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The files.
    pub files: Files,
    /// Its rows.
    pub examples: Vec<Example>,
    /// The token that fills rows up.
    pub pad: u32,
    /// Longest row allowed, in tokens.
    pub max_length: usize,
    /// What a user should know: rows that were cut, rows that teach nothing.
    pub notes: Vec<String>,
}

impl Dataset {
    /// Encodes rows, in parallel; `tokenizer` may be absent where all rows are `input_ids`.
    ///
    /// # Errors
    /// The first row that cannot be encoded, by its line; no row teaches anything.
    pub fn encode(
        raw: &RawData,
        tokenizer: Option<&dyn Encoder>,
        labels: Option<&LabelNames>,
        options: &EncodeOptions,
    ) -> Result<Self> {
        let encoder = RowEncoder::new(tokenizer, options, labels)?;
        let encoded: Vec<_> = raw.rows.par_iter().map(|row| encoder.row(row)).collect();
        let mut examples = Vec::with_capacity(encoded.len());
        let mut cuts = [0usize; 3];
        // Looked through in order, so that the error is the same on every run.
        for (row, encoded) in raw.rows.iter().zip(encoded) {
            let (example, cut) = encoded.map_err(|detail| raw.at(row, detail))?;
            match cut {
                Cut::None => {}
                Cut::End => cuts[0] += 1,
                Cut::Prompt => cuts[1] += 1,
                Cut::Completion => cuts[2] += 1,
            }
            examples.push(example);
        }
        let silent = examples.iter().filter(|e| e.labelled(false) == 0).count();
        if examples.iter().all(|e| e.labelled(true) == 0) {
            return Err(Error::file(
                raw.files.to_string(),
                "no row has a token to learn; are all labels -100 or all texts one token?",
            ));
        }
        let max = options.max_length;
        let what = [
            format!("rows were cut at their end to data.max_length = {max}"),
            format!("prompts were cut at their beginning to fit data.max_length = {max}"),
            format!("completions were cut at their end to fit data.max_length = {max}"),
            "rows have no token to learn".to_owned(),
        ];
        let counts = cuts.into_iter().chain([silent]);
        let of = examples.len();
        let name = &raw.files;
        let notes = counts
            .zip(what)
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| format!("{name}: {n} of {of} {what}"));
        let pad = tokenizer
            .and_then(|t| t.pad().or_else(|| t.eos()))
            .filter(|&id| (id as usize) < options.vocab_size);
        Ok(Self {
            files: raw.files.clone(),
            pad: pad.unwrap_or(0),
            max_length: max,
            notes: notes.collect(),
            examples,
        })
    }

    /// Where these rows stand, by file, for messages; of many only the first.
    pub fn places(&self, examples: &[&Example]) -> String {
        const SHOWN: usize = 32;
        let mut places: Vec<String> = Vec::new();
        let mut last = None;
        let texts = examples.iter().flat_map(|e| match e.texts.is_empty() {
            true => vec![(e.file, e.line)],
            false => e.texts.iter().map(|t| (t.file, t.line)).collect(),
        });
        let texts: Vec<(usize, usize)> = texts.collect();
        for &(file, line) in texts.iter().take(SHOWN) {
            match places.last_mut().filter(|_| last == Some(file)) {
                Some(place) => *place += &format!(", {line}"),
                None => {
                    let path = self.files.0.get(file).map(|p| p.display());
                    let path = path.map_or(String::new(), |p| p.to_string());
                    places.push(format!("{path} line {line}"));
                }
            }
            last = Some(file);
        }
        if texts.len() > SHOWN {
            places.push(format!("and {} more", texts.len() - SHOWN));
        }
        places.join("; ")
    }

    /// Lengths of the rows in tokens.
    pub fn lengths(&self) -> Vec<usize> {
        self.examples.iter().map(|e| e.ids.len()).collect()
    }

    /// Sets rows aside: a share of them below 1, a number of them from 1, drawn by `key`; both parts keep the file's order.
    ///
    /// # Errors
    /// When one part would be empty.
    pub fn split(mut self, share: f64, key: RngKey) -> Result<(Self, Self)> {
        let n = self.examples.len();
        let aside = if share < 1.0 {
            (share * n as f64).round()
        } else {
            share
        } as usize;
        if aside == 0 || aside >= n {
            let detail = format!(
                "{share} of {n} rows leaves nothing to {}",
                if aside == 0 {
                    "evaluate on"
                } else {
                    "train on"
                }
            );
            return Err(Error::config("data.eval_split", detail));
        }
        let mut chosen = vec![false; n];
        for &i in &key.permutation(n)[..aside] {
            chosen[i] = true;
        }
        let mut train = Vec::with_capacity(n - aside);
        let mut eval = Vec::with_capacity(aside);
        for (example, chosen) in self.examples.into_iter().zip(chosen) {
            if chosen {
                eval.push(example)
            } else {
                train.push(example)
            }
        }
        self.examples = train;
        let eval = Self {
            files: self.files.clone(),
            examples: eval,
            pad: self.pad,
            max_length: self.max_length,
            notes: Vec::new(),
        };
        Ok((self, eval))
    }

    /// A number that changes with any token, label or the order of rows: FNV-1a.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut put = |n: u64| {
            for byte in n.to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        for example in &self.examples {
            put(example.ids.len() as u64);
            example.ids.iter().for_each(|&id| put(u64::from(id)));
            match &example.goal {
                Goal::Tokens { labels, .. } => labels.iter().for_each(|&l| put(l as u64)),
                Goal::Class(class) => put(1 << 40 | u64::from(*class)),
            }
            if let Some(task) = example.task {
                put(3 << 40 | u64::from(task));
            }
            for text in &example.texts {
                put(4 << 40 | text.len as u64);
            }
            for &m in example.mask.iter().flatten() {
                put(2 << 40 | u64::from(m));
            }
        }
        hash
    }
}
