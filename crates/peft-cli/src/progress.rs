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
    said: Instant,
    /// Done before this process began; not counted in the time that is left.
    first: u64,
}

impl Progress {
    /// Work of `total` units, of which `first` are done.
    pub(crate) fn new(out: &Out, label: &str, first: u64, total: u64) -> Self {
        let bar = visible(out).then(|| {
            let style = "{prefix} [{bar:30}] {pos}/{len} {msg} eta {eta}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total)
                .with_style(style.progress_chars("=> "))
                .with_prefix(label.to_owned());
            bar.set_position(first);
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Self {
            out: *out,
            bar,
            label: label.to_owned(),
            total,
            begun: now,
            said: now,
            first,
        }
    }

    /// Work whose length is not known.
    pub(crate) fn spinner(out: &Out, label: &str) -> Self {
        let bar = visible(out).then(|| {
            let bar = ProgressBar::new_spinner().with_message(label.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let now = Instant::now();
        Self {
            out: *out,
            bar,
            label: label.to_owned(),
            total: 0,
            begun: now,
            said: now,
            first: 0,
        }
    }

    /// `done` units are done.
    pub(crate) fn set(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(message.to_owned());
            bar.set_position(done);
            return;
        }
        let due = self.said.elapsed() >= EVERY || (done == self.total && self.said != self.begun);
        if due {
            self.said = Instant::now();
            let speed =
                (done - self.first.min(done)) as f64 / self.begun.elapsed().as_secs_f64().max(1e-9);
            let left = self.total.saturating_sub(done) as f64 / speed.max(1e-9);
            let message = if message.is_empty() {
                String::new()
            } else {
                format!(", {message}")
            };
            let left = if done < self.total {
                format!(", {} left", seconds(left))
            } else {
                String::new()
            };
            self.out.note(&format!(
                "{} {done}/{}{message}{left}",
                self.label, self.total
            ));
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

fn visible(out: &Out) -> bool {
    !out.quiet && std::io::stderr().is_terminal()
}
