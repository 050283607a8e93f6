//! What the system says of this process's memory.

/// Resident memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Memory of its own.
    pub anonymous: u64,
    /// Pages of files: the program, mapped weights.
    pub mapped: u64,
    /// The most that both together have been.
    pub peak: u64,
}

/// The resident memory of this process, from `/proc/self/status`; None where there is no such file.
pub fn resident_memory() -> Option<Resident> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    parse(&text)
}

fn parse(status: &str) -> Option<Resident> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib << 10)
    };
    Some(Resident {
        anonymous: field("RssAnon:")?,
        mapped: field("RssFile:")?,
        peak: field("VmHWM:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_kibibytes() {
        let text =
            "VmHWM:\t    5000 kB\nVmRSS:\t 40 kB\nRssAnon:\t    3000 kB\nRssFile:\t     12 kB\n";
        let want = Resident {
            anonymous: 3000 << 10,
            mapped: 12 << 10,
            peak: 5000 << 10,
        };
        assert_eq!(parse(text), Some(want));
        assert_eq!(parse("VmHWM: many kB"), None);
        if let Some(now) = resident_memory() {
            assert!(now.peak >= now.anonymous);
        }
    }
}
