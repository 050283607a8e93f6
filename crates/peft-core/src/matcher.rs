//! Which modules a configuration names: Hugging Face PEFT's matching over dotted paths.
//!
//! The rules are those of `peft` 0.21.2 (`check_target_module_exists`, `get_pattern_key`), with two differences: a
//! name, pattern or layer that matches nothing is an error that says what there is (a warning where the adapter is finished
//! and its parameters follow from a file), and `modules_to_save` keeps to
//! whole dotted parts everywhere.
//!
//! A target list is literal: an entry means the module of exactly that path, or any whose path ends in `.` and the
//! entry. A target string is a regular expression for the whole path (so `"q_proj"` names no module inside another,
//! and `["q_proj"]` does), except `"all-linear"`.

mod defaults;
mod pattern;

use regex::Regex;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Error, Result, nearest};

pub use defaults::default_targets;
pub use pattern::compile;

/// What `target_modules` or `exclude_modules` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Literal names: whole paths or their last dotted parts.
    Names(Vec<String>),
    /// A regular expression for the whole path.
    Pattern(String),
    /// Every linear module except the model's head.
    AllLinear,
}

const ALL_LINEAR: &str = "all-linear";

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern(pattern) => pattern.serialize(serializer),
            Self::AllLinear => ALL_LINEAR.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Targets;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of module names, a regular expression or \"all-linear\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Targets, E> {
                Ok(if text.eq_ignore_ascii_case(ALL_LINEAR) {
                    Targets::AllLinear
                } else {
                    Targets::Pattern(text.to_owned())
                })
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Targets, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(Targets::Names(names))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

/// A module that may be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its dotted path.
    pub path: &'a str,
    /// Whether the method can adapt modules of its kind.
    pub adaptable: bool,
    /// Whether it is a linear layer.
    pub linear: bool,
    /// Whether it is the model's head, which `all-linear` leaves alone.
    pub output_head: bool,
}

/// The fields of a configuration that choose modules.
#[derive(Clone, Copy, Debug, Default)]
pub struct MatchSpec<'a> {
    /// `target_modules`
    pub targets: Option<&'a Targets>,
    /// `exclude_modules`
    pub exclude: Option<&'a Targets>,
    /// `layers_to_transform`; an empty list means all layers.
    pub layers_to_transform: Option<&'a [usize]>,
    /// `layers_pattern`: regular expressions for the name of the list that the layers are in.
    pub layers_pattern: &'a [String],
    /// `modules_to_save`
    pub modules_to_save: &'a [String],
    /// Whether parameters of a file follow: a name, pattern or layer that matches nothing beside others that do is then
    /// warned of, not refused.
    pub finished: bool,
}

/// An error, or a warning where the adapter is finished.
pub(crate) fn unused(finished: bool, error: Error) -> Result<()> {
    if !finished {
        return Err(error);
    }
    tracing::warn!("{error}; the adapter was trained without it");
    Ok(())
}

/// Whether a literal `name` means the module at `path`: the whole path or its last dotted parts.
pub fn matches_name(path: &str, name: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|parent| parent.ends_with('.') && !name.is_empty())
}

/// The modules that a configuration names, as indices into `candidates`, in their order.
///
/// # Errors
/// If a name, pattern or layer matches nothing (see [`MatchSpec::finished`]), if nothing is left to adapt, if fields
/// contradict each other, or if a chosen module is not adaptable (under `all-linear` such a module is passed over).
pub fn select(candidates: &[Candidate<'_>], spec: &MatchSpec<'_>) -> Result<Vec<usize>> {
    let Some(targets) = spec.targets else {
        return Err(Error::config("target_modules", "has to be given"));
    };
    let wanted = Wanted::new("target_modules", targets)?;
    let excluded = spec
        .exclude
        .filter(|e| !is_empty(e))
        .map(|e| Wanted::new("exclude_modules", e))
        .transpose()?;
    if matches!(spec.exclude, Some(Targets::AllLinear)) {
        return Err(Error::config(
            "exclude_modules",
            "takes names or a regular expression, not \"all-linear\"",
        ));
    }
    let saved: Vec<Regex> = spec
        .modules_to_save
        .iter()
        .map(|name| pattern::part("modules_to_save", name))
        .collect::<Result<_>>()?;
    let layers = Layers::new(spec)?;

    let paths = || candidates.iter().map(|c| c.path);
    let told = |checked: Result<()>| checked.or_else(|error| unused(spec.finished, error));
    match wanted.check(candidates) {
        Err(error) if candidates.iter().any(|c| wanted.means(c)) => unused(spec.finished, error)?,
        checked => checked?,
    }
    if let Some(excluded) = &excluded {
        told(excluded.check(candidates))?;
    }
    for (name, regex) in spec.modules_to_save.iter().zip(&saved) {
        // Of a finished adapter's, those are told of where they are attached.
        if !spec.finished && !paths().any(|path| regex.is_match(path)) {
            return Err(no_match("modules_to_save", name, candidates));
        }
    }
    if let Some(layers) = &layers {
        told(layers.check(candidates))?;
    }

    let mut left_out = LeftOut::default();
    let mut chosen = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let path = candidate.path;
        if !wanted.means(candidate) {
            continue;
        }
        if excluded.as_ref().is_some_and(|e| e.means(candidate)) {
            left_out.excluded += 1;
        } else if saved.iter().any(|regex| regex.is_match(path)) {
            left_out.saved += 1;
        } else if !wanted.names_whole(path) && layers.as_ref().is_some_and(|l| !l.contain(path)) {
            left_out.layers += 1;
        } else {
            chosen.push(index);
        }
    }
    if chosen.is_empty() {
        return Err(left_out.error());
    }
    match chosen.iter().find(|&&i| !candidates[i].adaptable) {
        Some(&i) => Err(unsupported(candidates, i)),
        None => Ok(chosen),
    }
}

/// The value of the first pattern that matches `path` (`rank_pattern`, `alpha_pattern`): a regular expression for the
/// whole path or for its last dotted parts.
///
/// # Errors
/// If a pattern before the matching one is no regular expression we can run.
pub fn pattern_value<'a, T>(patterns: &'a [(String, T)], path: &str) -> Result<Option<&'a T>> {
    for (key, value) in patterns {
        if pattern::ending("rank_pattern or alpha_pattern", key)?.is_match(path) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// HF reads an empty list or string of exclusions as none.
fn is_empty(targets: &Targets) -> bool {
    match targets {
        Targets::Names(names) => names.is_empty(),
        Targets::Pattern(pattern) => pattern.is_empty(),
        Targets::AllLinear => false,
    }
}

/// Targets made ready to be asked about many paths.
struct Wanted<'a> {
    field: &'static str,
    targets: &'a Targets,
    /// Set for [`Targets::Pattern`].
    regex: Option<Regex>,
}

impl<'a> Wanted<'a> {
    fn new(field: &'static str, targets: &'a Targets) -> Result<Self> {
        let regex = match targets {
            Targets::Pattern(pattern) => Some(compile(field, pattern)?),
            _ => None,
        };
        Ok(Self {
            field,
            targets,
            regex,
        })
    }

    fn means(&self, candidate: &Candidate<'_>) -> bool {
        match (self.targets, &self.regex) {
            (Targets::Names(names), _) => {
                names.iter().any(|name| matches_name(candidate.path, name))
            }
            (_, Some(regex)) => regex.is_match(candidate.path),
            _ => candidate.linear && candidate.adaptable && !candidate.output_head,
        }
    }

    /// Whether an entry is this whole path: HF then leaves `layers_to_transform` unasked.
    fn names_whole(&self, path: &str) -> bool {
        matches!(self.targets, Targets::Names(names) if names.iter().any(|name| name == path))
    }

    /// Every entry means something.
    fn check(&self, candidates: &[Candidate<'_>]) -> Result<()> {
        match self.targets {
            Targets::Names(names) if names.is_empty() => {
                Err(Error::config(self.field, "the list is empty"))
            }
            Targets::Names(names) => {
                match names
                    .iter()
                    .find(|name| !candidates.iter().any(|c| matches_name(c.path, name)))
                {
                    Some(name) => Err(no_match(self.field, name, candidates)),
                    None => Ok(()),
                }
            }
            _ if candidates.iter().any(|c| self.means(c)) => Ok(()),
            Targets::Pattern(pattern) => {
                let near = nearest(pattern, candidates.iter().map(|c| c.path));
                let near = if near.is_empty() {
                    String::new()
                } else {
                    format!("; nearest: {}", near.join(", "))
                };
                let what = "is a regular expression for whole paths and matches none";
                let hint = format!(
                    "to name modules by the end of their paths, write a list: [{pattern:?}]"
                );
                Err(Error::config(
                    self.field,
                    format!("{pattern:?} {what}{near}; {hint}"),
                ))
            }
            Targets::AllLinear => Err(Error::config(
                self.field,
                "\"all-linear\": the model has no linear module that can be adapted",
            )),
        }
    }
}

/// The nearest names; for targets those the method can adapt come first, if there are any.
fn no_match(field: &str, name: &str, candidates: &[Candidate<'_>]) -> Error {
    let useful = |c: &&Candidate<'_>| field != "target_modules" || c.adaptable;
    let mut near = nearest(name, candidates.iter().filter(useful).map(|c| c.path));
    if near.is_empty() {
        near = nearest(name, candidates.iter().map(|c| c.path));
    }
    if near.is_empty() {
        near = ends(candidates.iter().filter(useful).map(|c| c.path));
    }
    Error::NoMatch {
        field: field.to_owned(),
        name: name.to_owned(),
        nearest: near,
    }
}

/// The last parts of paths, each once, as far as they are few enough to read.
fn ends<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    const MOST: usize = 24;
    let mut names: Vec<String> = Vec::new();
    for path in paths {
        let name = path.rsplit('.').next().unwrap_or(path);
        if !name.is_empty() && !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    names.truncate(MOST);
    names
}

fn unsupported(candidates: &[Candidate<'_>], index: usize) -> Error {
    let path = candidates[index].path;
    let is_below = |c: &&Candidate<'_>| {
        c.adaptable
            && c.path
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('.'))
    };
    let below: Vec<&str> = candidates
        .iter()
        .filter(is_below)
        .take(4)
        .map(|c| c.path)
        .collect();
    let hint = if below.is_empty() {
        String::new()
    } else {
        format!("; below it are {}", below.join(", "))
    };
    Error::module(
        path,
        format!("is named by target_modules, but is of a kind that this method cannot adapt{hint}"),
    )
}

/// `layers_to_transform` with the ways to find a path's layer.
struct Layers<'a> {
    indices: &'a [usize],
    /// In the order they are tried; each captures the index as `idx`.
    finders: Vec<Regex>,
}

impl<'a> Layers<'a> {
    fn new(spec: &MatchSpec<'a>) -> Result<Option<Self>> {
        let listed = matches!(spec.targets, Some(Targets::Names(_)));
        let contradiction = |field| {
            Err(Error::config(
                field,
                "cannot be used where target_modules is a string",
            ))
        };
        if !listed && spec.layers_to_transform.is_some() {
            return contradiction("layers_to_transform");
        }
        if !listed && !spec.layers_pattern.is_empty() {
            return contradiction("layers_pattern");
        }
        let patterns: Vec<&String> = spec
            .layers_pattern
            .iter()
            .filter(|p| !p.is_empty())
            .collect();
        let indices = spec.layers_to_transform.unwrap_or_default();
        if indices.is_empty() {
            return match patterns[..] {
                [] => Ok(None),
                _ => Err(Error::config("layers_pattern", "needs layers_to_transform")),
            };
        }
        let finders = if patterns.is_empty() {
            vec![pattern::any_layer()?]
        } else {
            patterns
                .into_iter()
                .map(|p| pattern::layer("layers_pattern", p))
                .collect::<Result<_>>()?
        };
        Ok(Some(Self { indices, finders }))
    }

    /// The index of the layer that a path is in: the first number that follows a list's name.
    fn layer_of(&self, path: &str) -> Option<usize> {
        let found = self
            .finders
            .iter()
            .find_map(|finder| finder.captures(path))?;
        found.name("idx")?.as_str().parse().ok()
    }

    fn contain(&self, path: &str) -> bool {
        self.layer_of(path)
            .is_some_and(|layer| self.indices.contains(&layer))
    }

    /// Every index is a layer of the model.
    fn check(&self, candidates: &[Candidate<'_>]) -> Result<()> {
        let mut present: Vec<usize> = candidates
            .iter()
            .filter_map(|c| self.layer_of(c.path))
            .collect();
        present.sort_unstable();
        present.dedup();
        let Some(unknown) = self
            .indices
            .iter()
            .find(|i| present.binary_search(i).is_err())
        else {
            return Ok(());
        };
        let there = match present[..] {
            [] => "no layer was found; does layers_pattern name the list they are in?".to_owned(),
            [first, .., last] if last - first + 1 == present.len() => {
                format!("there are {first} to {last}")
            }
            _ => format!(
                "there are {}",
                present
                    .iter()
                    .map(usize::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        };
        Err(Error::config(
            "layers_to_transform",
            format!("layer {unknown} is not in the model; {there}"),
        ))
    }
}

/// Modules that the targets name and another field takes away.
#[derive(Default)]
struct LeftOut {
    excluded: usize,
    saved: usize,
    layers: usize,
}

impl LeftOut {
    fn error(&self) -> Error {
        let counts = [
            (self.excluded, "exclude_modules"),
            (self.saved, "modules_to_save"),
            (self.layers, "layers_to_transform"),
        ];
        let reasons: Vec<String> = counts
            .iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, field)| format!("{field} takes away {n}"))
            .collect();
        Error::config(
            "target_modules",
            format!("nothing is left to adapt: {}", reasons.join(", ")),
        )
    }
}
