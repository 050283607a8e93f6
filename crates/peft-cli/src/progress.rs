//! Progress on stderr: a bar on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::out::{Out, seconds};

/// Seconds between two lines where stderr is no terminal.
const EVERY: Duration = Duration::from_secs(10);

/// One piece of work that takes a while.
pub(crate) struct Progress {
    out: Out,
    bar: Option<ProgressBar>,
    label: String,
    total: u64,
    begun: Instant,
    said: Option<Instant>,
    /// When the last of what is done was.
    last: Instant,
    pace: Pace,
}

impl Progress {
    /// Work of `total` units, of which `first` are done.
    pub(crate) fn new(out: &Out, label: &str, first: u64, total: u64) -> Self {
        let bar = visible(out).then(|| {
            let style = "{prefix} [{bar:30}] {pos}/{len}{msg}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total)
                .with_style(style.progress_chars("=> "))
                .with_prefix(label.to_owned());
            bar.set_position(first);
            bar
        });
        Self::with(out, bar, label, first, total)
    }

    /// Work whose length is not known.
    pub(crate) fn spinner(out: &Out, label: &str) -> Self {
        let bar = visible(out).then(|| {
            let bar = ProgressBar::new_spinner().with_message(label.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self::with(out, bar, label, 0, 0)
    }

    fn with(out: &Out, bar: Option<ProgressBar>, label: &str, first: u64, total: u64) -> Self {
        Self {
            out: *out,
            bar,
            label: label.to_owned(),
            total,
            begun: Instant::now(),
            said: None,
            last: Instant::now(),
            pace: Pace::new(first),
        }
    }

    /// `done` units are done.
    pub(crate) fn set(&mut self, done: u64, message: &str) {
        let spent = self.last.elapsed().as_secs_f64();
        self.set_after(done, spent, message);
    }

    /// `done` units are done, the last of them after `spent` seconds of work: whatever else happened in between does not
    /// count for the time that is left.
    pub(crate) fn set_after(&mut self, done: u64, spent: f64, message: &str) {
        self.last = Instant::now();
        self.pace.add(done, spent);
        let mut text = match message {
            "" => String::new(),
            message => format!(", {message}"),
        };
        if let Some(left) = self.pace.left(self.total) {
            text += &format!(", {} left", seconds(left));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(text);
            return;
        }
        let quiet_since = self.said.unwrap_or(self.begun).elapsed();
        if quiet_since >= EVERY || (done == self.total && self.said.is_some()) {
            self.said = Some(Instant::now());
            let line = format!("{} {done}/{}{text}", self.label, self.total);
            self.out.note(&line);
        }
    }

    /// A line for people above the bar.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.out.note(text)),
            None => self.out.note(text),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// How fast it goes: what is done first pays for warming up and is left out.
#[derive(Debug)]
struct Pace {
    done: u64,
    /// Whether something has been done since the start.
    warm: bool,
    units: u64,
    seconds: f64,
}

impl Pace {
    /// Of work of which `first` units were done before.
    fn new(first: u64) -> Self {
        Self {
            done: first,
            warm: false,
            units: 0,
            seconds: 0.0,
        }
    }

    /// `done` units are done by now, the last after so many seconds of work.
    fn add(&mut self, done: u64, seconds: f64) {
        let units = done.saturating_sub(self.done);
        if units == 0 {
            return;
        }
        if self.warm {
            self.units += units;
            self.seconds += seconds;
        }
        self.warm = true;
        self.done = done;
    }

    /// Seconds until `total` are done; None before there is something to tell it from, and behind the end.
    fn left(&self, total: u64) -> Option<f64> {
        let left = total.saturating_sub(self.done);
        (self.units > 0 && left > 0).then(|| left as f64 * self.seconds / self.units as f64)
    }
}

fn visible(out: &Out) -> bool {
    !out.quiet && std::io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_from_the_second_step_on() {
        let mut pace = Pace::new(0);
        assert_eq!(pace.left(100), None);
        // The first step is slow, and nothing is said of what is left.
        pace.add(1, 60.0);
        assert_eq!(pace.left(100), None);
        pace.add(2, 4.0);
        assert_eq!(pace.left(100), Some(98.0 * 4.0));
        // The mean of steps 2 to 4.
        pace.add(3, 4.0);
        pace.add(4, 1.0);
        assert_eq!(pace.left(100), Some(96.0 * 3.0));
        assert_eq!(pace.left(4), None);
    }

    #[test]
    fn steps_before_a_resume_and_steps_that_come_together() {
        let mut pace = Pace::new(50);
        pace.add(50, 9.0);
        pace.add(51, 9.0);
        assert_eq!(pace.left(100), None);
        // Eight units in four seconds.
        pace.add(59, 4.0);
        assert_eq!(pace.left(99), Some(20.0));
    }

    #[test]
    fn time_beside_the_work_does_not_count() {
        let out = Out::new(false, true);
        let mut steps = Progress::new(&out, "step", 0, 10);
        steps.set_after(1, 0.5, "");
        std::thread::sleep(Duration::from_millis(20));
        steps.set_after(2, 2.0, "");
        assert_eq!(steps.pace.left(10), Some(16.0));
    }
}
