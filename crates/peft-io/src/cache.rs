//! Kernels that backends have compiled, kept for the next process: `PEFT_CACHE`, else `peft` in the folder where the
//! cache of downloaded models is looked for (`XDG_CACHE_HOME` or `~/.cache`).

use std::path::PathBuf;

use peft_tensor::KernelStore;

use crate::files::{atomic_write, create_folder};

/// Larger files are not read: kernels are a few MiB.
const LARGEST: u64 = 256 << 20;

peft_tensor::inventory::submit!(KernelStore { load, save });

fn folder() -> Option<PathBuf> {
    folder_from(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
}

fn folder_from(var: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let path = |name: &str| var(name).map(PathBuf::from);
    let home = || path("HOME").or_else(|| path("USERPROFILE"));
    let own = path("PEFT_CACHE")
        .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("peft")))
        .or_else(|| home().map(|p| p.join(".cache/peft")))?;
    Some(own.join("kernels"))
}

/// The file of a name; None for one that is more than a name.
fn file(name: &str) -> Option<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let is_name = !name.is_empty() && name.chars().all(plain);
    folder().filter(|_| is_name).map(|folder| folder.join(name))
}

fn load(name: &str) -> Option<Vec<u8>> {
    let file = file(name)?;
    let meta = std::fs::metadata(&file).ok()?;
    if !meta.is_file() || meta.len() > LARGEST {
        return None;
    }
    std::fs::read(&file).ok()
}

fn save(name: &str, bytes: &[u8]) -> bool {
    let Some((file, folder)) = file(name).zip(folder()) else {
        return false;
    };
    create_folder(&folder).is_ok() && atomic_write(&file, bytes).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_follows_the_variables() {
        let vars = |pairs: &'static [(&'static str, &'static str)]| {
            folder_from(|name| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(vars(&[]), None);
        assert_eq!(vars(&[("HOME", "/h")]), path("/h/.cache/peft/kernels"));
        let both = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(
            folder_from(|n| both.iter().find(|p| p.0 == n).map(|p| p.1.to_owned())),
            path("/x/peft/kernels")
        );
        assert_eq!(
            vars(&[("HOME", "/h"), ("PEFT_CACHE", "/c")]),
            path("/c/kernels")
        );
    }

    #[test]
    fn only_names_are_files() {
        assert!(file("").is_none() && file("../a").is_none() && file("a/b").is_none());
        assert!(load("no_such_kernels_0").is_none());
    }
}
