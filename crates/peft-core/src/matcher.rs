//! Placeholder until the real matcher lands.
#![allow(missing_docs, reason = "placeholder")]
use crate::{Error, Result};
use serde::Deserialize;

#[derive(Clone, Debug, PartialEq)]
pub enum Targets { Names(Vec<String>), Pattern(String), AllLinear }
impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)] #[serde(untagged)] enum Raw { One(String), Many(Vec<String>) }
        Ok(match Raw::deserialize(d)? { Raw::Many(v) => Self::Names(v), Raw::One(s) if s.eq_ignore_ascii_case("all-linear") => Self::AllLinear, Raw::One(s) => Self::Pattern(s) })
    }
}
pub struct MatchSpec<'a> { pub targets: Option<&'a Targets>, pub exclude: Option<&'a Targets>, pub layers_to_transform: Option<&'a [usize]>, pub layers_pattern: &'a [String], pub modules_to_save: &'a [String] }
pub struct Candidate<'a> { pub path: &'a str, pub adaptable: bool, pub linear: bool, pub output_head: bool }
fn hit(t: &Targets, path: &str) -> Result<bool> { Ok(match t { Targets::Names(n) => n.iter().any(|n| path == n || path.ends_with(&format!(".{n}"))), Targets::Pattern(p) => compile("target_modules", p)?.is_match(path), Targets::AllLinear => true }) }
pub fn select(candidates: &[Candidate<'_>], spec: &MatchSpec<'_>) -> Result<Vec<usize>> {
    let mut out = Vec::new();
    for (i, c) in candidates.iter().enumerate() {
        let Some(t) = spec.targets else { continue };
        if spec.modules_to_save.iter().any(|m| c.path == m || c.path.ends_with(&format!(".{m}"))) { continue }
        if matches!(t, Targets::AllLinear) && (!c.linear || c.output_head) { continue }
        if !hit(t, c.path)? || !c.adaptable { continue }
        if let Some(e) = spec.exclude && hit(e, c.path)? { continue }
        if let Some(l) = spec.layers_to_transform { let n: Option<usize> = c.path.split('.').find_map(|p| p.parse().ok()); if !n.is_some_and(|n| l.contains(&n)) { continue } }
        out.push(i);
    }
    if out.is_empty() { return Err(Error::config("target_modules", "matches nothing")) }
    Ok(out)
}
pub fn compile(field: &str, pattern: &str) -> Result<regex::Regex> { regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|e| Error::config(field, e.to_string())) }
pub fn pattern_value<'a, T>(patterns: &'a [(String, T)], path: &str) -> Result<Option<&'a T>> { for (k, v) in patterns { if compile("rank_pattern", &format!(r"(.*\.)?({k})"))?.is_match(path) { return Ok(Some(v)) } } Ok(None) }
pub fn default_targets(model_type: &str) -> Option<&'static [&'static str]> { match model_type { "gpt2" => Some(&["c_attn"]), "bert" => Some(&["query", "value"]), "llama" | "mistral" | "qwen2" | "qwen3" | "gemma" => Some(&["q_proj", "v_proj"]), _ => None } }
