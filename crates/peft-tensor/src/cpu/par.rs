//! Splitting work over threads so that a result never depends on how many there are: chunk sizes come from the
//! shapes alone, and what is reduced across chunks is reduced in their order.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::team;

/// Elements of work below which a thread is not worth waking.
pub(super) const GRAIN: usize = 32 * 1024;

/// Rows of a chunk when one row costs `cost` elements of work.
pub(super) fn rows_per_chunk(cost: usize) -> usize {
    (GRAIN / cost.max(1)).max(1)
}

/// Calls `f(first row, chunk)` on chunks of whole rows of `out`; a row costs about `cost` elements of work.
pub(super) fn rows(out: &mut [f32], row: usize, cost: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let step = rows_per_chunk(cost);
    if out.len() <= step * row {
        return f(0, out);
    }
    chunks(out, step * row, |i, chunk| f(i * step, chunk));
}

/// As [`rows`] over two outputs with rows of their own widths.
pub(super) fn rows2(
    a: &mut [f32],
    row_a: usize,
    b: &mut [f32],
    row_b: usize,
    cost: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    if a.is_empty() || b.is_empty() {
        return;
    }
    let step = rows_per_chunk(cost);
    if a.len() <= step * row_a {
        return f(0, a, b);
    }
    let chunks = a.chunks_mut(step * row_a).zip(b.chunks_mut(step * row_b));
    share(chunks.enumerate().collect(), |(i, (a, b))| {
        f(i * step, a, b)
    });
}

/// Calls `f(number, chunk)` on chunks of `size` values, the last perhaps shorter.
pub(super) fn chunks<T: Send>(out: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let all = out.chunks_mut(size.max(1)).enumerate().collect();
    share(all, |(i, chunk)| f(i, chunk));
}

/// The results of `0..n`, in order.
pub(super) fn collect<R: Send>(n: usize, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let mut all: Vec<Option<R>> = std::iter::repeat_with(|| None).take(n).collect();
    chunks(&mut all, 1, |i, place| place[0] = Some(f(i)));
    all.into_iter().flatten().collect()
}

/// Calls `f(first element, chunk)` on chunks of `out`, each element about one unit of work.
pub(super) fn elements(out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    rows(out, 1, 1, f);
}

/// Part `i` of `0..n` in `parts` of nearly the same length, the longer ones first: threads that take them in order are
/// done at nearly the same time.
pub(super) fn part(n: usize, parts: usize, i: usize) -> Range<usize> {
    let at = |i: usize| n / parts * i + (n % parts).min(i);
    at(i)..at(i + 1)
}

/// Calls `run` with each of `0..n` on all threads. Each begins with a part of its own, the same part each time, in order:
/// what it wrote in the step before may still be in its cache. One that is done takes from the parts of others, so that
/// slow threads do less.
pub(super) fn pieces(n: usize, run: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(n);
    if threads < 2 {
        return (0..n).for_each(run);
    }
    let parts: Vec<_> = (0..threads)
        .map(|i| part(n, threads, i))
        .map(|part| (AtomicUsize::new(part.start), part.end))
        .collect();
    let work = || {
        let own = team::seat() % threads;
        for (next, end) in parts[own..].iter().chain(&parts[..own]) {
            let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| i < end);
            std::iter::from_fn(take).for_each(&run);
        }
    };
    team::help(threads, &work);
}

/// [`pieces`] that have something of their own, such as a part of a result.
pub(super) fn share<P: Send>(all: Vec<P>, run: impl Fn(P) + Sync) {
    let all: Vec<_> = all.into_iter().map(|p| Mutex::new(Some(p))).collect();
    pieces(all.len(), |i| {
        let mut place = all[i].lock().unwrap_or_else(PoisonError::into_inner);
        place.take().into_iter().for_each(&run);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also where work is handed over inside of work, and by threads at once.
    #[test]
    fn every_piece_is_run_once() {
        let count = |n: usize| {
            let runs: Vec<_> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            pieces(n, |i| {
                pieces(3, |_| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 3));
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..70).for_each(count));
            }
        });
    }
}
