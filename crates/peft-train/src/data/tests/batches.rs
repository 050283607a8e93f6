//! Batches without padding.

use super::*;

#[test]
fn rows_of_different_lengths_become_one() {
    let row = |ids: &[u32], goal: Goal| Example::new(ids.to_vec(), goal);
    let goal = |labels: &[i64]| Goal::Tokens {
        labels: labels.to_vec(),
        prompt: None,
    };
    let (a, b) = (
        row(&[5, 6, 7], goal(&[5, 6, 7])),
        row(&[8, 9], goal(&[8, 9])),
    );
    let joined = join(&[&a, &b, &a], 0, false);
    assert_eq!(
        (joined.batch.batch, joined.batch.seq, joined.tokens),
        (1, 8, 8)
    );
    assert_eq!(joined.batch.ids, [5, 6, 7, 8, 9, 5, 6, 7]);
    assert_eq!(joined.batch.segments, Some(vec![0, 0, 0, 1, 1, 2, 2, 2]));
    assert_eq!(joined.batch.mask, None);
    // No text's first token is asked of the text before it.
    let want = [IGNORE, 6, 7, IGNORE, 9, IGNORE, 6, 7];
    assert_eq!(joined.labels, Labels::Tokens(want.to_vec()));
    let (c, d) = (row(&[1, 2], Goal::Class(1)), row(&[3], Goal::Class(0)));
    let joined = join(&[&c, &d], 0, false);
    assert_eq!(joined.batch.segments, Some(vec![0, 0, 1]));
    assert_eq!(joined.labels, Labels::Classes(vec![1, 0]));
    // Equal lengths have no padding; tasks belong to rows.
    assert_eq!(join(&[&a, &a], 0, false).batch.batch, 2);
    let mut task = b.clone();
    task.task = Some(1);
    assert_eq!(join(&[&a, &task], 0, false).batch.batch, 2);
    let mut unseen = b.clone();
    unseen.mask = Some(vec![false; 2]);
    assert_eq!(join(&[&a, &unseen], 0, false).batch.batch, 2);
}

#[test]
fn what_texts_begin_with_comes_once() {
    let row = |ids: &[u32], answer: usize| {
        let labels = (0..ids.len()).map(|i| match i < answer {
            true => IGNORE,
            false => i64::from(ids[i]),
        });
        let goal = Goal::Tokens {
            labels: labels.collect(),
            prompt: None,
        };
        Example::new(ids.to_vec(), goal)
    };
    let (a, b) = (row(&[1, 2, 3, 4, 5], 4), row(&[1, 2, 3, 6, 7, 8], 4));
    let shared = join(&[&a, &b], 0, true);
    assert_eq!((shared.batch.batch, shared.batch.shared), (1, 3));
    assert_eq!(shared.batch.ids, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(shared.batch.segments, Some(vec![0, 0, 0, 1, 1, 2, 2, 2]));
    let want = [IGNORE, IGNORE, IGNORE, IGNORE, 5, IGNORE, 7, 8];
    assert_eq!(shared.labels, Labels::Tokens(want.to_vec()));
    // All tokens count, those that are there once too.
    assert_eq!(shared.tokens, 11);
    // The same text twice: a label has to be asked for behind a token of its own text.
    let twice = join(&[&a, &a], 0, true);
    assert_eq!(twice.batch.shared, 3);
    assert_eq!(twice.batch.ids, [1, 2, 3, 4, 5, 4, 5]);
    // What is learned from early is not shared, nor is what is masked, of another task, alone or of a class.
    let early = row(&[1, 2, 3, 9], 1);
    assert_eq!(join(&[&a, &early], 0, true).batch.shared, 0);
    assert_eq!(join(&[&a, &row(&[1, 2, 9], 2)], 0, true).batch.shared, 1);
    let (mut masked, mut task) = (b.clone(), b.clone());
    masked.mask = Some(vec![false, true, true, true, true, true]);
    task.task = Some(1);
    for other in [&masked, &task, &row(&[9, 2, 3], 2)] {
        assert_eq!(join(&[&a, other], 0, true).batch.shared, 0);
    }
    assert_eq!(join(&[&a], 0, true).batch.shared, 0);
    let class = Example::new(vec![1, 2, 3], Goal::Class(0));
    assert_eq!(join(&[&class, &class], 0, true).batch.shared, 0);
}
