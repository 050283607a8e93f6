//! Being told to end: nothing half-written stays.

/// From here on, Ctrl-C and `kill` clear away what is being written before the process ends as by default, and a file
/// larger than allowed (`ulimit -f`) is an error of its write instead of the end.
#[cfg(unix)]
pub(crate) fn watch() {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::emulate_default_handler;

    // Nobody asks for the flag: that there is a handler keeps the process alive.
    let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let wanted = [SIGINT, SIGTERM].into_iter().filter(|s| !is_ignored(*s));
    let Ok(mut signals) = Signals::new(wanted) else {
        return;
    };
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            peft::io::abandon_writes();
            let _ = emulate_default_handler(signal);
            std::process::exit(128 + signal);
        }
    });
}

/// Whether whoever began the process wants it to go on in spite of this signal, as a shell does for what it starts in the
/// background of a script. Where that cannot be seen, it is taken not to be so.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = peft::io::read_text(std::path::Path::new("/proc/self/status")).unwrap_or_default();
    let mut lines = status.lines();
    let mask =
        lines.find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Elsewhere the process ends at once, and hidden `.tmp` files can stay.
#[cfg(not(unix))]
pub(crate) fn watch() {}
