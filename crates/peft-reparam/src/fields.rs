//! What several methods check and write in the same way about their fields.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{Error, ModuleKind, ModuleTree, Result, Site};

/// Fields of HF's that decide where a method acts, and `more`, as a fresh configuration has them.
pub(crate) fn kept_for_hf(more: &Value) -> Map<String, Value> {
    let mut all = Map::new();
    for field in [
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    ] {
        all.insert(field.to_owned(), Value::Null);
    }
    all.extend(more.as_object().cloned().unwrap_or_default());
    all
}

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
    let detail = format!(
        "{value} does not divide the {size} {what} of `{}`; possible are {}",
        site.path,
        listed(size, 1..=size)
    );
    Err(Error::config(field, detail))
}

fn listed(size: usize, within: std::ops::RangeInclusive<usize>) -> String {
    let valid: Vec<String> = within
        .filter(|n| size.is_multiple_of(*n))
        .map(|n| n.to_string())
        .collect();
    valid.join(", ")
}

/// Number and width of the blocks that a site's `size` columns are cut into, one of which a configuration gives: `count`
/// as the field of that name, or `width`, the other being 0. Blocks of one column cannot turn.
pub(crate) fn blocks(
    (count_field, count): (&str, usize),
    (width_field, width): (&str, usize),
    size: usize,
    site: &Site,
) -> Result<(usize, usize)> {
    let (field, value) = match (count, width) {
        (0, 0) => {
            let detail = format!("has to be given, or {count_field}, the number of blocks");
            return Err(Error::config(width_field, detail));
        }
        (0, width) => (width_field, width),
        (count, 0) => (count_field, count),
        (count, width) => {
            let detail = format!(
                "{count} and {width_field} {width} cannot both be given; set the other to 0"
            );
            return Err(Error::config(count_field, detail));
        }
    };
    divides(field, value, size, "columns", site)?;
    let (count, width, valid) = if count == 0 {
        (size / width, width, listed(size, 2..=size))
    } else {
        (count, size / count, listed(size, 1..=size / 2))
    };
    if width < 2 {
        let detail = format!(
            "{value} cuts the {size} columns of `{}` into blocks of one, which cannot turn; possible are {valid}",
            site.path
        );
        return Err(Error::config(field, detail));
    }
    Ok((count, width))
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
