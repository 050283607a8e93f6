//! The corpus: from the archive's tables to rows of text, and to rated rows for the example.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use peft::tensor::RngKey;
use serde_json::json;

use crate::{process, workspace};

/// Mean rating, in -4..4, from which a snippet counts as clear.
const CLEAR: f64 = 1.0;
const EVAL_ROWS: usize = 400;
const TRAIN_ROWS: usize = 2000;
/// Texts held out to measure the base on.
const TEXT_EVAL_ROWS: usize = 300;
/// Characters up to which sentences of one article or review are joined.
const JOINED: usize = 400;
const ARCHIVE: &str = "models/downloads/vaderSentiment-3.3.2.tar.gz";
const UNPACKED: &str = "out/quickstart-base/corpus";

/// A snippet and whether people found it positive.
pub(super) struct Rated {
    text: String,
    positive: bool,
}

/// What the example and its base model are made of.
pub(super) struct Corpus {
    /// The example's training rows.
    pub(super) train: Vec<Rated>,
    /// The example's held-out rows.
    pub(super) eval: Vec<Rated>,
    /// What the base learns from.
    pub(super) text: Vec<String>,
    /// What the base is measured on.
    pub(super) text_eval: Vec<String>,
}

/// Unpacks the tables and gives their folder.
pub(super) fn unpack(root: &Path) -> Result<PathBuf> {
    let inner =
        format!("{UNPACKED}/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz");
    let python = process::python()?;
    for archive in [ARCHIVE, &inner] {
        process::run(root, python, &["-m", "tarfile", "-e", archive, UNPACKED])?;
    }
    Ok(root.join(UNPACKED).join("hutto_ICWSM_2014"))
}

/// Reads and splits the tables. The split is drawn by the project's own counter-based generator, seed 0.
pub(super) fn read(folder: &Path) -> Result<Corpus> {
    let table = |name: &str| {
        rows(&workspace::read(
            &folder.join(format!("{name}_GroundTruth.txt")),
        )?)
        .context(name.to_owned())
    };
    let key = RngKey::new(0).fork("quickstart");
    let movies = table("movieReviewSnippets")?;
    let mut seen = HashSet::new();
    let clear: Vec<&Row> = movies
        .iter()
        .filter(|row| row.rating.abs() >= CLEAR && seen.insert(&row.text))
        .collect();
    ensure!(
        clear.len() >= EVAL_ROWS + TRAIN_ROWS,
        "only {} clear snippets",
        clear.len()
    );
    let mut drawn = key
        .fork("rows")
        .permutation(clear.len())
        .into_iter()
        .map(|i| clear[i]);
    let rated = |row: &Row| Rated {
        text: row.text.clone(),
        positive: row.rating > 0.0,
    };
    let eval: Vec<Rated> = drawn.by_ref().take(EVAL_ROWS).map(rated).collect();
    let train: Vec<Rated> = drawn.take(TRAIN_ROWS).map(rated).collect();

    let held_out: HashSet<&str> = eval.iter().map(|row| row.text.as_str()).collect();
    let mut text: Vec<String> = movies
        .iter()
        .map(|row| row.text.clone())
        .filter(|text| !held_out.contains(text.as_str()))
        .collect();
    text.extend(table("tweets")?.into_iter().map(|row| row.text));
    text.extend(joined(&table("amazonReviewSnippets")?));
    text.extend(joined(&table("nytEditorialSnippets")?));
    let order = key.fork("text").permutation(text.len());
    let mut text: Vec<String> = order.into_iter().map(|i| text[i].clone()).collect();
    let text_eval = text.split_off(text.len().saturating_sub(TEXT_EVAL_ROWS));
    Ok(Corpus {
        train,
        eval,
        text,
        text_eval,
    })
}

struct Row {
    id: String,
    rating: f64,
    text: String,
}

/// Lines of `id <tab> mean rating <tab> text`; ids of sentences are `document_sentence`.
fn rows(table: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (at, line) in table.lines().enumerate() {
        let mut columns = line.splitn(3, '\t');
        let (Some(id), Some(rating), Some(text)) = (columns.next(), columns.next(), columns.next())
        else {
            anyhow::bail!("line {}: expected three columns", at + 1);
        };
        let rating = rating
            .trim()
            .parse()
            .with_context(|| format!("line {}: the rating {rating:?}", at + 1))?;
        let text = text
            .trim()
            .replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", "\"")
            .replace("&amp;", "&");
        if !text.is_empty() {
            rows.push(Row {
                id: id.to_owned(),
                rating,
                text,
            });
        }
    }
    Ok(rows)
}

/// Sentences of one document, as paragraphs.
fn joined(rows: &[Row]) -> Vec<String> {
    let document = |row: &Row| row.id.split('_').next().unwrap_or_default().to_owned();
    let mut paragraphs: Vec<String> = Vec::new();
    let mut last = None;
    for row in rows {
        let this = Some(document(row));
        match paragraphs.last_mut() {
            Some(paragraph) if last == this && paragraph.len() + row.text.len() < JOINED => {
                paragraph.push(' ');
                paragraph.push_str(&row.text);
            }
            _ => paragraphs.push(row.text.clone()),
        }
        last = this;
    }
    paragraphs
}

/// JSON lines: the review as prompt, one word as completion.
pub(super) fn as_prompts(rows: &[Rated]) -> String {
    let line = |row: &Rated| {
        let word = if row.positive {
            " positive"
        } else {
            " negative"
        };
        format!(
            "{}\n",
            json!({"prompt": format!("Review: {}\nSentiment:", row.text), "completion": word})
        )
    };
    rows.iter().map(line).collect()
}

/// JSON lines of plain text.
pub(super) fn as_texts(rows: &[String]) -> String {
    rows.iter()
        .map(|text| format!("{}\n", json!({ "text": text })))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_of_one_document_are_joined_up_to_a_length() {
        let table = format!(
            "1_1\t0.5\tOne &amp; two.\r\n1_2\t-1\tThree.\n1_3\t0\t{}\n2_1\t1\tFour.\n2_2\t1\t\n",
            "x".repeat(JOINED)
        );
        let rows = rows(&table).unwrap();
        assert_eq!(rows.len(), 4);
        assert_eq!(
            joined(&rows),
            [
                "One & two. Three.".to_owned(),
                "x".repeat(JOINED),
                "Four.".to_owned()
            ]
        );
        assert!(super::rows("1\tx\ty\n").is_err());
        assert!(super::rows("1 2 3\n").is_err());
    }

    #[test]
    fn no_held_out_snippet_is_learned_from() {
        let folder = std::env::temp_dir().join(format!("peft-quickstart-{}", std::process::id()));
        let movies: String = (0..3000)
            .map(|i| format!("{i}\t{}\tsnippet number {i}\n", (i % 9) as f64 - 4.0))
            .collect();
        let other = |name: &str| {
            (0..50)
                .map(|i| format!("{i}_1\t0\t{name} {i}\n"))
                .collect::<String>()
        };
        workspace::write(&folder.join("movieReviewSnippets_GroundTruth.txt"), &movies).unwrap();
        for name in ["tweets", "amazonReviewSnippets", "nytEditorialSnippets"] {
            workspace::write(
                &folder.join(format!("{name}_GroundTruth.txt")),
                &other(name),
            )
            .unwrap();
        }
        let corpus = read(&folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            (
                corpus.train.len(),
                corpus.eval.len(),
                corpus.text_eval.len()
            ),
            (TRAIN_ROWS, EVAL_ROWS, TEXT_EVAL_ROWS)
        );
        let eval: HashSet<&str> = corpus.eval.iter().map(|row| row.text.as_str()).collect();
        assert!(
            corpus
                .train
                .iter()
                .all(|row| !eval.contains(row.text.as_str()))
        );
        assert!(
            corpus
                .text
                .iter()
                .chain(&corpus.text_eval)
                .all(|text| !eval.contains(text.as_str()))
        );
        assert_eq!(
            corpus.text.len() + corpus.text_eval.len(),
            3000 - EVAL_ROWS + 150
        );
        // A rating of 0 is not clear.
        let number = |row: &Rated| {
            row.text
                .rsplit(' ')
                .next()
                .and_then(|n| n.parse::<i32>().ok())
                .unwrap()
        };
        assert!(
            corpus
                .train
                .iter()
                .all(|row| (number(row) % 9 != 4) && ((number(row) % 9 > 4) == row.positive))
        );
    }
}
