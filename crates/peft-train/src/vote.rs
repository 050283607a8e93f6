//! Several adapters of one task answering together: the majority of their answers.
//!
//! Prompt ensembling (Lester et al., arXiv 2104.08691, section 6) is this with soft prompts: every row goes through the
//! model once for each prompt, all in one batch.

use peft_core::{Error, Result};
use peft_models::Model;

use crate::data::{Dataset, Example, Goal};
use crate::evaluate::{choices, score, with_completion};
use crate::{EvalOptions, Observer};

/// How often the majority is right, and each adapter alone.
#[derive(Clone, Debug, PartialEq)]
pub struct VoteReport {
    /// Rows.
    pub rows: usize,
    /// Share of rows whose most frequent answer is right; of answers that are equally frequent, the first adapter's among
    /// them counts.
    pub accuracy: f64,
    /// The same for each adapter alone.
    pub alone: Vec<f64>,
}

/// Lets the adapters named vote on every row: on its class, or on the completion among those the data has.
///
/// # Errors
/// If there are no adapters, they cannot share a batch, or rows have neither a class nor completions to choose from.
pub fn vote(
    model: &Model,
    data: &Dataset,
    adapters: &[&str],
    options: &EvalOptions,
    observer: &mut dyn Observer,
) -> Result<VoteReport> {
    if adapters.is_empty() {
        return Err(Error::config("adapter", "a vote needs adapters"));
    }
    let rows = data.examples.len();
    let classes = data
        .examples
        .iter()
        .all(|e| matches!(e.goal, Goal::Class(_)));
    let choices = if classes {
        Vec::new()
    } else {
        choices(data, Some(true))?
    };
    let total = rows * adapters.len() * choices.len().max(1);
    let mut done = 0;
    let mut ask = |examples: &[Example]| {
        let repeated: Vec<&Example> = adapters.iter().flat_map(|_| examples).collect();
        let names: Vec<&str> = adapters
            .iter()
            .flat_map(|name| std::iter::repeat_n(*name, examples.len()))
            .collect();
        let scores = score(model, data, &repeated, &names, options, &mut |n| {
            observer.eval_progress(done + n, total);
        })?;
        done += repeated.len();
        Ok::<_, Error>(scores)
    };
    // answers[adapter][row], and the right one of each row, as numbers that only have to be told apart.
    let mut answers = vec![vec![0; rows]; adapters.len()];
    let mut right = vec![0; rows];
    if classes {
        for (at, scored) in ask(&data.examples)?.into_iter().enumerate() {
            answers[at / rows.max(1)][at % rows.max(1)] = scored.predicted as usize;
        }
        for (row, example) in data.examples.iter().enumerate() {
            if let Goal::Class(class) = example.goal {
                right[row] = class as usize;
            }
        }
    } else {
        let mut best = vec![vec![f64::NEG_INFINITY; rows]; adapters.len()];
        for (number, choice) in choices.iter().enumerate() {
            let with =
                |(row, e): (usize, &Example)| match with_completion(e, choice, data.max_length) {
                    Some(other) => other,
                    None => {
                        right[row] = number;
                        e.clone()
                    }
                };
            let asked: Vec<Example> = data.examples.iter().enumerate().map(with).collect();
            for (at, scored) in ask(&asked)?.into_iter().enumerate() {
                let (adapter, row) = (at / rows.max(1), at % rows.max(1));
                if scored.log_prob > best[adapter][row] {
                    best[adapter][row] = scored.log_prob;
                    answers[adapter][row] = number;
                }
            }
        }
    }
    let share = |hits: usize| hits as f64 / rows.max(1) as f64;
    let majority = (0..rows).filter(|&row| {
        let own: Vec<usize> = answers.iter().map(|a| a[row]).collect();
        most_frequent(&own) == Some(right[row])
    });
    Ok(VoteReport {
        rows,
        accuracy: share(majority.count()),
        alone: answers
            .iter()
            .map(|a| share(a.iter().zip(&right).filter(|(a, r)| a == r).count()))
            .collect(),
    })
}

/// The answer given most often, the first of equals.
fn most_frequent(answers: &[usize]) -> Option<usize> {
    let times = |answer: usize| answers.iter().filter(|&&a| a == answer).count();
    let most = answers.iter().map(|&a| times(a)).max()?;
    answers.iter().copied().find(|&a| times(a) == most)
}

#[cfg(test)]
mod tests {
    use super::most_frequent;

    #[test]
    fn the_majority_wins_and_the_first_of_equals() {
        assert_eq!(most_frequent(&[2, 1, 1]), Some(1));
        assert_eq!(most_frequent(&[2, 1, 1, 2]), Some(2));
        assert_eq!(most_frequent(&[3]), Some(3));
        assert_eq!(most_frequent(&[]), None);
    }
}
