//! Threads that help with one piece of work at a time.
//!
//! A training step hands over thousands of pieces of some microseconds. Rayon's threads sleep after a few of them without
//! work, and waking one takes as long as many pieces do (measured: 5000 switches a step of 1024 tokens; without them
//! training takes up to a tenth less). These look for work somewhat longer, then sleep as well, so that a process that waits for something else leaves
//! the processor alone. Nobody waits for a thread that has not begun: whoever hands work over does it too, and only waits
//! for those that are in it.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a thread without work looks for some before it sleeps.
const PATIENCE: Duration = Duration::from_micros(60);

/// What all threads do, each until nothing is left of it.
type Work<'a> = &'a (dyn Fn() + Sync);

/// The work that there is to help with.
struct State {
    work: Option<Work<'static>>,
    /// Threads that may still join, and those that are in it.
    open: usize,
    inside: usize,
    /// Whether one of them panicked.
    failed: bool,
    /// Threads that were started, and that sleep.
    threads: usize,
    asleep: usize,
}

struct Team {
    state: Mutex<State>,
    /// How often work was handed over or given up: what threads look at while they do not sleep.
    turns: AtomicUsize,
    /// As `State::inside`.
    inside: AtomicUsize,
    there_is_work: Condvar,
    all_are_out: Condvar,
}

static TEAM: Team = Team {
    state: Mutex::new(State {
        work: None,
        open: 0,
        inside: 0,
        failed: false,
        threads: 0,
        asleep: 0,
    }),
    turns: AtomicUsize::new(0),
    inside: AtomicUsize::new(0),
    there_is_work: Condvar::new(),
    all_are_out: Condvar::new(),
};

thread_local! {
    static SEAT: Cell<usize> = const { Cell::new(0) };
}

/// The number of this thread among those at work: 0 is who handed it over.
pub(super) fn seat() -> usize {
    SEAT.get()
}

/// Does the work here and on up to `n - 1` other threads; alone where these are at work for somebody else.
pub(super) fn help(n: usize, work: &(impl Fn() + Sync)) {
    match (n > 1).then(|| TEAM.hand_over(n - 1, work)).flatten() {
        Some(end) => {
            work();
            drop(end);
        }
        None => work(),
    }
}

/// Ends work when it goes out of scope: what it borrows is not used any more.
struct End<'a>(&'a Team);

impl Team {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_over<'a>(&'a self, helpers: usize, work: Work<'a>) -> Option<End<'a>> {
        let mut state = self.lock();
        if state.work.is_some() || state.inside > 0 {
            return None;
        }
        // SAFETY: `End` does not let go of the borrow before the work is taken back and nobody is inside of it.
        #[allow(unsafe_code, reason = "threads that live on borrow work for a while")]
        let work = unsafe { std::mem::transmute::<Work<'a>, Work<'static>>(work) };
        state.work = Some(work);
        state.open = helpers;
        while state.threads < helpers {
            let seat = state.threads + 1;
            let started = std::thread::Builder::new().name(format!("peft-{seat}"));
            let work = move || {
                SEAT.set(seat);
                TEAM.work();
            };
            // Without another thread there is less help.
            if started.spawn(work).is_err() {
                break;
            }
            state.threads += 1;
        }
        self.turns.fetch_add(1, Ordering::Release);
        let wake = helpers.min(state.asleep);
        drop(state);
        for _ in 0..wake {
            self.there_is_work.notify_one();
        }
        Some(End(self))
    }

    /// The life of a thread.
    fn work(&self) {
        loop {
            let work = self.join();
            let result = catch_unwind(AssertUnwindSafe(work));
            let mut state = self.lock();
            state.failed |= result.is_err();
            state.inside -= 1;
            self.inside.fetch_sub(1, Ordering::Release);
            if state.inside == 0 {
                self.all_are_out.notify_one();
            }
        }
    }

    /// Waits for work.
    fn join(&self) -> Work<'static> {
        loop {
            let mut state = self.lock();
            let turn = self.turns.load(Ordering::Acquire);
            if let (Some(work), true) = (state.work, state.open > 0) {
                state.open -= 1;
                state.inside += 1;
                self.inside.fetch_add(1, Ordering::Relaxed);
                return work;
            }
            drop(state);
            if patiently(|| self.turns.load(Ordering::Acquire) != turn) {
                continue;
            }
            state = self.lock();
            while self.turns.load(Ordering::Acquire) == turn {
                state.asleep += 1;
                state = self
                    .there_is_work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.asleep -= 1;
            }
        }
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        let team = self.0;
        let mut state = team.lock();
        state.work = None;
        if state.inside > 0 {
            drop(state);
            patiently(|| team.inside.load(Ordering::Acquire) == 0);
            state = team.lock();
            while state.inside > 0 {
                state = team
                    .all_are_out
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        let failed = std::mem::take(&mut state.failed);
        drop(state);
        if failed && !std::thread::panicking() {
            resume_unwind(Box::new("a thread that helped with a product panicked"));
        }
    }
}

/// Whether something came to be while it was looked for, for a short while. Without yielding: who yields is behind everybody
/// else for a whole slice of time, which is many times what is waited for (measured: with two other busy processes on two
/// processors training was 1.7 times as slow with it).
fn patiently(there: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        for _ in 0..64 {
            if there() {
                return true;
            }
            std::hint::spin_loop();
        }
        if begun.elapsed() > PATIENCE {
            return false;
        }
    }
}
