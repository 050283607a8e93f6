//! Several texts in a row, and rows of which little is learned.

use super::*;

/// Two texts in one row are the two texts in rows of their own, and padding behind them changes nothing.
#[test]
fn texts_that_share_a_row_do_not_see_each_other() {
    for (seed, name) in CAUSAL.iter().enumerate() {
        let model = fresh(name, 40 + seed as u64);
        let (one, two) = (ids(1, 6, 53), ids(2, 4, 53));
        let packed = Batch {
            batch: 1,
            seq: 12,
            mask: Some([vec![true; 10], vec![false; 2]].concat()),
            shared: 0,
            segments: Some([vec![7; 6], vec![0; 4], vec![7; 2]].concat()),
            ids: [&one[..], &two[..], &[0, 0]].concat(),
            task_ids: None,
        };
        let all = model.logits(&packed, &Pass::eval()).unwrap();
        for (first, text) in [(0, one), (6, two)] {
            let packed = all.narrow(1, first, text.len()).unwrap();
            let alone = model.logits(&Batch::single(text), &Pass::eval()).unwrap();
            // Sums over other blocks of keys.
            let far = worst(&packed.to_vec().unwrap(), &alone.to_vec().unwrap());
            assert!(far < 1e-5, "{name}: {far}");
        }
    }
}

/// What texts begin with, run once for all of them, gives each text's own logits, and positions go on behind it; a model
/// whose attention has a window refuses.
#[test]
fn texts_may_have_their_beginning_in_common() {
    for (seed, name) in CAUSAL.iter().enumerate() {
        let model = fresh(name, 60 + seed as u64);
        let (begin, one, two) = (ids(1, 5, 53), ids(2, 6, 53), ids(3, 4, 53));
        let shared = Batch {
            segments: Some([vec![9; 5], vec![1; 6], vec![2; 4]].concat()),
            shared: 5,
            ..Batch::single([&begin[..], &one, &two].concat())
        };
        let Ok(all) = model.logits(&shared, &Pass::eval()) else {
            assert!(!model.shares_beginnings(), "{name}");
            continue;
        };
        for (first, text) in [(5, one), (11, two)] {
            let got = all.narrow(1, first, text.len()).unwrap();
            let whole = Batch::single([&begin[..], &text].concat());
            let alone = model.logits(&whole, &Pass::eval()).unwrap();
            let want = alone.narrow(1, 5, text.len()).unwrap();
            // Sums over other blocks of keys.
            let far = worst(&got.to_vec().unwrap(), &want.to_vec().unwrap());
            assert!(far < 1e-5, "{name}: {far}");
        }
    }
    let sharing = |name: &&&str| fresh(name, 1).shares_beginnings();
    assert!(CAUSAL.iter().filter(sharing).count() >= 4);
    // Only as the first run, and with nothing masked.
    let wrong = Batch {
        segments: Some(vec![1, 1, 2, 2]),
        shared: 1,
        ..Batch::single(vec![1, 2, 3, 4])
    };
    let why = fresh("llama", 1).logits(&wrong, &Pass::eval()).unwrap_err();
    assert!(why.to_string().contains("first run"), "{why}");
}

/// Where few positions have labels the last block ends for these alone: their loss is that of all logits.
#[test]
fn the_loss_of_few_labels_is_that_of_the_whole_last_block() {
    for (seed, name) in CAUSAL.iter().enumerate() {
        let model = fresh(name, 80 + seed as u64);
        let batch = Batch {
            batch: 2,
            seq: 8,
            ..Batch::single(ids(5, 16, 53))
        };
        let mut labels = vec![IGNORE; 16];
        for (at, label) in [(3, 7), (7, 50), (12, 7)] {
            labels[at] = label;
        }
        let logits = model.logits(&batch, &Pass::eval()).unwrap();
        let logits = logits.to_vec().unwrap();
        let mut want = 0.0;
        for (at, label) in labels.iter().enumerate().filter(|(_, l)| **l != IGNORE) {
            let row = &logits[(at - 1) * 53..at * 53];
            let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
            want += sum.ln() - f64::from(row[*label as usize]);
        }
        let out = model.loss(&batch, &Labels::Tokens(labels), &Pass::eval());
        let got = out.unwrap().sum().unwrap();
        // Products of fewer rows are summed in another order.
        assert!((got - want).abs() < 1e-5 * want, "{name}: {got} for {want}");
    }
}
