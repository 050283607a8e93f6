//! Movie-review snippets as training data: from a table of rated snippets to a fixed split in two forms.

use anyhow::{Context, Result, ensure};
use serde_json::json;

/// Rows held out for evaluation.
const EVAL_ROWS: usize = 2000;

/// A snippet and whether it is positive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Review {
    pub(crate) text: String,
    pub(crate) positive: bool,
}

/// Reads lines of `id <tab> mean rating in -4..4 <tab> text`; a rating above 0 is positive.
pub(crate) fn read(table: &str) -> Result<Vec<Review>> {
    let mut rows = Vec::new();
    for (at, line) in table.lines().enumerate() {
        let mut columns = line.splitn(3, '\t');
        let (Some(_), Some(rating), Some(text)) = (columns.next(), columns.next(), columns.next())
        else {
            anyhow::bail!("line {}: expected three columns", at + 1);
        };
        let rating: f64 = rating
            .trim()
            .parse()
            .with_context(|| format!("line {}: the rating {rating:?}", at + 1))?;
        rows.push(Review {
            text: text.trim().to_owned(),
            positive: rating > 0.0,
        });
    }
    Ok(rows)
}

/// Training and evaluation rows. The rows are shuffled by Fisher-Yates from the last one down, each swapped with the
/// row at `splitmix64() % (i + 1)`, seed 0; the last 2000 are for evaluation.
pub(crate) fn split(mut rows: Vec<Review>) -> Result<(Vec<Review>, Vec<Review>)> {
    ensure!(rows.len() > EVAL_ROWS, "only {} reviews", rows.len());
    let mut state = 0u64;
    for i in (1..rows.len()).rev() {
        let j = splitmix64(&mut state) % (i as u64 + 1);
        rows.swap(i, j as usize);
    }
    let eval = rows.split_off(rows.len() - EVAL_ROWS);
    Ok((rows, eval))
}

/// Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// JSON lines for a causal model: the review as prompt, one word as completion.
pub(crate) fn as_prompts(rows: &[Review]) -> String {
    lines(rows, |row| {
        let word = if row.positive {
            " positive"
        } else {
            " negative"
        };
        json!({"prompt": format!("Review: {}\nSentiment:", row.text), "completion": word})
    })
}

/// JSON lines for a classifier: 1 is positive.
pub(crate) fn as_labels(rows: &[Review]) -> String {
    lines(
        rows,
        |row| json!({"text": row.text, "label": u8::from(row.positive)}),
    )
}

fn lines(rows: &[Review], form: impl Fn(&Review) -> serde_json::Value) -> String {
    rows.iter().map(|row| format!("{}\n", form(row))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_written() {
        let rows = read("1\t2.5\tGood\tone. \r\n2\t-0.1\tBad \"one\".\n3\t0\tNeither\n").unwrap();
        assert_eq!(
            rows.iter().map(|r| r.positive).collect::<Vec<_>>(),
            [true, false, false]
        );
        assert_eq!(rows[0].text, "Good\tone.");
        let prompts = as_prompts(&rows[1..2]);
        assert_eq!(
            prompts,
            "{\"prompt\":\"Review: Bad \\\"one\\\".\\nSentiment:\",\"completion\":\" negative\"}\n"
        );
        assert_eq!(
            as_labels(&rows[..1]),
            "{\"text\":\"Good\\tone.\",\"label\":1}\n"
        );
        assert!(read("1\tx\ty\n").is_err());
        assert!(read("1 2 3\n").is_err());
    }

    #[test]
    fn the_split_is_fixed_and_loses_nothing() {
        let rows: Vec<Review> = (0..2100)
            .map(|i| Review {
                text: i.to_string(),
                positive: i % 2 == 0,
            })
            .collect();
        let (train, eval) = split(rows.clone()).unwrap();
        assert_eq!((train.len(), eval.len()), (100, 2000));
        assert_eq!(
            (&train, &eval),
            (
                &split(rows.clone()).unwrap().0,
                &split(rows.clone()).unwrap().1
            )
        );
        let mut all: Vec<usize> = train
            .iter()
            .chain(&eval)
            .map(|r| r.text.parse().unwrap())
            .collect();
        assert_ne!(all, (0..2100).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..2100).collect::<Vec<_>>());
        let too_few = rows[..2000].to_vec();
        assert!(split(too_few).is_err());
        // The published first outputs for seed 0.
        let mut state = 0;
        assert_eq!(splitmix64(&mut state), 0xE220_A839_7B1D_CDAF);
        assert_eq!(splitmix64(&mut state), 0x6E78_9E6A_A1B9_65F4);
    }
}
