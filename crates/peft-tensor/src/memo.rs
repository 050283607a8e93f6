//! What a checkpointed function made and need not make again, in the order it was made: attention's outputs, which take time
//! that grows with the square of a text's length and memory that does not.

use std::cell::RefCell;
use std::thread::LocalKey;

use crate::kept::{Keeping, Kept};
use crate::{Buffer, Result};

/// An attention's output in the form activations are kept in, and its scores' log-sum-exp.
#[derive(Clone)]
struct Made {
    /// Rows, queries and keys of a row.
    sizes: (usize, usize, usize),
    out: Kept,
    lse: Buffer,
}

/// What the first run of a function made.
#[derive(Clone, Default)]
pub(crate) struct Memo(Vec<Made>);

thread_local! {
    /// What the function that runs now makes, where it will run again.
    static NOW: RefCell<Option<Memo>> = const { RefCell::new(None) };
    /// What the function that runs now made before and has not asked for, last first.
    static BEFORE: RefCell<Memo> = const { RefCell::new(Memo(Vec::new())) };
    /// Whether a function runs again.
    static AGAIN: RefCell<bool> = const { RefCell::new(false) };
}

/// Puts back what a thread had, also on early return.
struct Restore<T: Default + 'static>(&'static LocalKey<RefCell<T>>, T);

impl<T: Default> Restore<T> {
    fn after(key: &'static LocalKey<RefCell<T>>, value: T) -> Self {
        Self(key, key.replace(value))
    }
}

impl<T: Default> Drop for Restore<T> {
    fn drop(&mut self) {
        self.0.set(std::mem::take(&mut self.1));
    }
}

/// Runs `f`, which will run again, for the first time.
pub(crate) fn first<R>(f: impl FnOnce() -> R) -> (R, Memo) {
    let _restore = Restore::after(&NOW, Some(Memo::default()));
    let result = f();
    (result, NOW.take().unwrap_or_default())
}

/// Runs `f` again.
pub(crate) fn again<R>(memo: &Memo, f: impl FnOnce() -> R) -> R {
    let mut made = memo.clone();
    made.0.reverse();
    let _now = Restore::after(&NOW, None);
    let _before = Restore::after(&BEFORE, made);
    let _again = Restore::after(&AGAIN, true);
    f()
}

/// Whether a function runs again on this thread.
pub(crate) fn runs_again() -> bool {
    AGAIN.with_borrow(|again| *again)
}

/// An attention's output with how it is kept, and its log-sum-exp: from the first run of the function this is part of, else
/// made by `make` and turned by `keep` into what the second run will have.
pub(crate) fn attention(
    sizes: (usize, usize, usize),
    make: impl FnOnce() -> Result<(Buffer, Buffer)>,
    keep: impl FnOnce(&Buffer, &Keeping) -> Kept,
) -> Result<(Buffer, Buffer, Keeping)> {
    let before = BEFORE.with_borrow_mut(|before| before.0.pop());
    let (out, lse, keeping) = match &before {
        Some(made) if made.sizes == sizes => {
            (made.out.data()?, made.lse.clone(), made.out.keeping())
        }
        _ => {
            let (out, lse) = make()?;
            (out, lse, Keeping::default())
        }
    };
    NOW.with_borrow_mut(|now| {
        if let Some(now) = now {
            let (out, lse) = (keep(&out, &keeping), lse.clone());
            now.0.push(Made { sizes, out, lse });
        }
    });
    Ok((out, lse, keeping))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{Device, Tensor};

    fn values(value: f32) -> Tensor {
        Tensor::full(value, &[2], &Device::cpu()).unwrap()
    }

    /// An attention whose output is that number, and what came out of it.
    fn attention_of(value: f32, sizes: (usize, usize, usize), made: &Cell<usize>) -> f32 {
        let x = values(value);
        let make = || {
            made.set(made.get() + 1);
            Ok((x.data.clone(), x.data.clone()))
        };
        let keep = |out: &Buffer, keeping: &Keeping| Kept::result(out, keeping, &x);
        let (out, _, _) = attention(sizes, make, keep).unwrap();
        Tensor::from_buffer(out, vec![2], x.device())
            .to_vec()
            .unwrap()[0]
    }

    #[test]
    fn the_second_run_gets_what_the_first_made_in_its_order() {
        let made = Cell::new(0);
        let run = |add: f32| {
            [(1.0, (1, 2, 3)), (2.0, (1, 2, 3)), (3.0, (4, 5, 6))]
                .map(|(value, sizes)| attention_of(value + add, sizes, &made))
        };
        let (got, memo) = first(|| run(0.0));
        assert_eq!((got, made.get()), ([1.0, 2.0, 3.0], 3));
        // The values of the first run, however often.
        for _ in 0..2 {
            assert_eq!(again(&memo, || run(10.0)), [1.0, 2.0, 3.0]);
            assert_eq!(made.get(), 3);
        }
        // Outside of both everything is made.
        assert_eq!(run(20.0), [21.0, 22.0, 23.0]);
        assert_eq!(made.get(), 6);
        assert!(NOW.take().is_none() && BEFORE.take().0.is_empty());
    }

    #[test]
    fn what_has_another_shape_is_made() {
        let made = Cell::new(0);
        let (_, memo) = first(|| attention_of(1.0, (1, 2, 3), &made));
        let other = || attention_of(5.0, (1, 2, 4), &made);
        assert_eq!(again(&memo, other), 5.0);
        assert_eq!(made.get(), 2);
    }

    /// A function within one: the inner one's memo is made from the outer one's.
    #[test]
    fn functions_within_functions_remember_too() {
        let made = Cell::new(0);
        let inner = |add: f32| attention_of(2.0 + add, (1, 1, 1), &made);
        let outer = |add: f32| {
            let before = attention_of(1.0 + add, (1, 1, 1), &made);
            let (middle, memo) = first(|| inner(add));
            (
                [before, middle, attention_of(3.0 + add, (1, 1, 1), &made)],
                memo,
            )
        };
        // Run for the outer function's memo alone, as without a graph.
        let plain = |add: f32| [1.0, 2.0, 3.0].map(|v| attention_of(v + add, (1, 1, 1), &made));
        let (_, memo) = first(|| plain(0.0));
        let (got, of_inner) = again(&memo, || outer(10.0));
        assert_eq!((got, made.get()), ([1.0, 2.0, 3.0], 3));
        assert_eq!(again(&of_inner, || inner(20.0)), 2.0);
        assert_eq!(made.get(), 3);
    }
}
