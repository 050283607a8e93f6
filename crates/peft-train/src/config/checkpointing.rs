//! `train.gradient_checkpointing`: how many blocks are computed again.

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which blocks keep only their input and are run forward once more in the backward pass: `false`, `true`, a number of
/// blocks, or `"auto"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// `false`: none.
    #[default]
    None,
    /// `true`: all.
    All,
    /// That many, the first of those that keep something: when the backward pass comes to them, what the others kept is
    /// gone.
    Blocks(usize),
    /// `"auto"`: as many as `train.memory_limit` makes necessary, by the forecast.
    Auto,
}

/// What a configuration can say.
const CHOICES: &str = "true, false, a number of blocks or \"auto\"";

impl Checkpointing {
    /// How many of `live` blocks, where `auto` is for the forecast to find out.
    pub(crate) fn of(self, live: usize) -> Option<usize> {
        match self {
            Self::None => Some(0),
            Self::All => Some(live),
            Self::Blocks(count) => Some(count.min(live)),
            Self::Auto => None,
        }
    }
}

impl Serialize for Checkpointing {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => to.serialize_bool(false),
            Self::All => to.serialize_bool(true),
            Self::Blocks(count) => to.serialize_u64(*count as u64),
            Self::Auto => to.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for Checkpointing {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Read;

        impl Visitor<'_> for Read {
            type Value = Checkpointing;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(CHOICES)
            }

            fn visit_bool<E: Error>(self, all: bool) -> Result<Checkpointing, E> {
                Ok(match all {
                    true => Checkpointing::All,
                    false => Checkpointing::None,
                })
            }

            fn visit_u64<E: Error>(self, count: u64) -> Result<Checkpointing, E> {
                Ok(Checkpointing::Blocks(
                    usize::try_from(count).unwrap_or(usize::MAX),
                ))
            }

            fn visit_i64<E: Error>(self, count: i64) -> Result<Checkpointing, E> {
                match u64::try_from(count) {
                    Ok(count) => self.visit_u64(count),
                    Err(_) => Err(E::invalid_value(Unexpected::Signed(count), &self)),
                }
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Checkpointing, E> {
                match text {
                    "auto" => Ok(Checkpointing::Auto),
                    other => Err(E::invalid_value(Unexpected::Str(other), &self)),
                }
            }
        }

        from.deserialize_any(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_value, json, to_value};

    #[test]
    fn every_form_is_read_and_written() {
        for (written, want) in [
            (json!(false), Checkpointing::None),
            (json!(true), Checkpointing::All),
            (json!(7), Checkpointing::Blocks(7)),
            (json!("auto"), Checkpointing::Auto),
        ] {
            let read: Checkpointing = from_value(written.clone()).unwrap();
            assert_eq!(read, want);
            assert_eq!(to_value(read).unwrap(), written);
        }
        for bad in [json!("all"), json!(-1), json!(0.5), Value::Null] {
            let text = from_value::<Checkpointing>(bad).unwrap_err().to_string();
            assert!(text.contains("a number of blocks or \"auto\""), "{text}");
        }
    }

    #[test]
    fn no_more_blocks_than_there_are() {
        assert_eq!(Checkpointing::All.of(6), Some(6));
        assert_eq!(Checkpointing::Blocks(4).of(6), Some(4));
        assert_eq!(Checkpointing::Blocks(9).of(6), Some(6));
        assert_eq!(Checkpointing::Auto.of(6), None);
    }
}
