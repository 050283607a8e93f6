//! What several methods check and write in the same way about their fields.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{Error, ModuleKind, ModuleTree, Result, Site};

/// Checks that `value` divides `size`, the `what` of a site.
pub(crate) fn divides(
    field: &str,
    value: usize,
    size: usize,
    what: &str,
    site: &Site,
) -> Result<()> {
    if value > 0 && size.is_multiple_of(value) {
        return Ok(());
    }
    let valid: Vec<String> = (1..=size)
        .filter(|n| size.is_multiple_of(*n))
        .map(|n| n.to_string())
        .collect();
    let detail = format!(
        "{value} does not divide the {size} {what} of `{}`; possible are {}",
        site.path,
        valid.join(", ")
    );
    Err(Error::config(field, detail))
}

/// The divisor nearest to `value`, the smaller of two: what HF takes for one that does not divide.
pub(crate) fn nearest_divisor(size: usize, value: usize) -> usize {
    let divides = |n: &usize| size.is_multiple_of(*n);
    let above = (value..=size).find(divides).unwrap_or(size);
    let below = (1..=value.min(size)).rev().find(divides).unwrap_or(1);
    if value >= size || above - value < value - below {
        above
    } else {
        below
    }
}

/// Checks a rank against the most a site has room for.
pub(crate) fn rank_fits(field: &str, rank: usize, most: usize, site: &Site) -> Result<()> {
    if (1..=most).contains(&rank) {
        return Ok(());
    }
    let detail = format!(
        "{rank} is out of range at `{}` ({} x {}); possible are 1 to {most}",
        site.path, site.out_features, site.in_features
    );
    Err(Error::config(field, detail))
}

/// Checks a probability of dropping something.
pub(crate) fn probability(field: &str, p: f32) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        Ok(())
    } else {
        Err(Error::config(field, "has to be in [0, 1)"))
    }
}

/// Checks a factor.
pub(crate) fn finite(field: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        Ok(())
    } else {
        Err(Error::config(field, "has to be a finite number"))
    }
}

/// HF writes whole numbers as integers where a field may hold both.
pub(crate) fn whole(config: &mut Map<String, Value>, field: &str) {
    if let Some(number) = config.get(field).and_then(Value::as_f64)
        && number.fract() == 0.0
        && number.abs() < 1e15
    {
        config.insert(field.to_owned(), json!(number as i64));
    }
}

/// HF knows GPT-2's layers, which store their weight `[in, out]`, by this flag.
pub(crate) fn fan_in_fan_out(config: &mut Map<String, Value>, tree: &ModuleTree) {
    if tree.iter().any(|(_, m)| m.kind == ModuleKind::Conv1d) {
        config.insert("fan_in_fan_out".to_owned(), json!(true));
    }
}

#[cfg(test)]
mod tests {
    use super::nearest_divisor;

    #[test]
    fn the_nearer_the_smaller_of_two_or_all() {
        let cases = [(12, 5), (20, 32), (20, 7), (12, 4)];
        assert_eq!(cases.map(|(n, d)| nearest_divisor(n, d)), [4, 20, 5, 4]);
    }
}
