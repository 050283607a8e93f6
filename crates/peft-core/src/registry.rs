//! The registry: what each method says of itself. Nobody but a method's own file names it.

use serde_json::{Map, Value};

use crate::hub::Hub;
use crate::{Error, PeftMethod, Result, in_words};

/// The four families of the survey literature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    /// Adds modules or tokens.
    Additive,
    /// Trains some of the parameters that are there.
    Selective,
    /// Writes a weight's change in a smaller form.
    Reparameterized,
    /// Composes others.
    Hybrid,
}

impl Family {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Additive => "additive",
            Self::Selective => "selective",
            Self::Reparameterized => "reparameterized",
            Self::Hybrid => "hybrid",
        }
    }
}

/// A method read from its configuration.
pub struct Parsed {
    /// The method.
    pub method: Box<dyn PeftMethod>,
    /// All of its fields with defaults filled in, as they are written to `adapter_config.json`.
    pub fields: Value,
}

/// Facts about a method, and its constructor.
pub struct MethodEntry {
    /// Our name for it: that of its file.
    pub id: &'static str,
    /// Its name in the literature.
    pub title: &'static str,
    /// Its family.
    pub family: Family,
    /// Its place in the family.
    pub subfamily: &'static str,
    /// `peft_type` as HF PEFT writes it.
    pub peft_type: &'static str,
    /// Whether a configuration of this `peft_type` means this method; several may share one. The one that is the
    /// default for its `peft_type` says `false` throughout.
    pub when: fn(&Value) -> bool,
    /// Where it was published.
    pub paper: &'static str,
    /// The smallest configuration, as JSON without `peft_type`; the law suite and the docs read it.
    pub example: &'static str,
    /// Whether a fresh adapter leaves the model's function as it is.
    pub identity_at_init: bool,
    /// Whether it can be merged into the base weights.
    pub mergeable: bool,
    /// Whether training moves base parameters (the saved file then has to hold them).
    pub moves_base: bool,
    /// The file it is in, whose head is its documentation.
    pub file: &'static str,
    /// Its form in AdapterHub's folders, where it has one.
    pub hub: Option<Hub>,
    /// Reads its configuration.
    pub parse: fn(&Value) -> Result<Parsed>,
}

inventory::collect!(MethodEntry);

/// Every method linked in, by id.
pub fn methods() -> Vec<&'static MethodEntry> {
    let mut all: Vec<_> = inventory::iter::<MethodEntry>.into_iter().collect();
    // Link order is not stable.
    all.sort_by_key(|e| e.id);
    all
}

/// The method a configuration means.
///
/// # Errors
/// If there is no such `peft_type`, or several methods claim the configuration; both with the names there are.
pub fn entry_for(config: &Value) -> Result<&'static MethodEntry> {
    let all = methods();
    let known = || {
        let mut names: Vec<_> = all.iter().map(|e| e.peft_type).collect();
        names.sort_unstable();
        names.dedup();
        names.join(", ")
    };
    let Some(peft_type) = config["peft_type"].as_str() else {
        return Err(Error::config(
            "peft_type",
            format!("has to be given, one of {}", known()),
        ));
    };
    let same: Vec<_> = all
        .iter()
        .copied()
        .filter(|e| e.peft_type == peft_type)
        .collect();
    let claims: Vec<_> = same.iter().copied().filter(|e| (e.when)(config)).collect();
    match (&claims[..], &same[..]) {
        ([one], _) => Ok(one),
        ([], [one]) => Ok(one),
        ([], []) => {
            let near = crate::nearest(peft_type, all.iter().map(|e| e.peft_type));
            let hint = near
                .first()
                .map_or(String::new(), |n| format!("; did you mean {n}?"));
            Err(Error::config(
                "peft_type",
                format!("{peft_type:?} is unknown, known: {}{hint}", known()),
            ))
        }
        ([], several) => several
            .iter()
            .copied()
            .find(|e| e.id.eq_ignore_ascii_case(peft_type))
            .ok_or_else(|| {
                Error::config("peft_type", format!("no default method for {peft_type:?}"))
            }),
        (several, _) => {
            let ids: Vec<_> = several.iter().map(|e| e.id).collect();
            Err(Error::config(
                "peft_type",
                format!("the configuration fits several methods: {}", ids.join(", ")),
            ))
        }
    }
}

/// The fields a configuration of this kind may have: the method's own and those the core reads for every method.
///
/// # Errors
/// If the configuration means no method.
pub fn known_fields(config: &Value) -> Result<Vec<String>> {
    const COMMON: &[&str] = &[
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "trainable_token_indices",
    ];
    let parsed = (entry_for(config)?.parse)(config)?;
    let own = parsed
        .fields
        .as_object()
        .into_iter()
        .flat_map(Map::keys)
        .cloned();
    let mut all: Vec<String> = COMMON.iter().map(|&f| f.to_owned()).chain(own).collect();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Reads a method's own fields, naming the field that is wrong; fields it does not know are left alone.
///
/// # Errors
/// If a field has the wrong type or value.
pub fn parse_fields<T>(config: &Value) -> Result<(T, Value)>
where
    T: serde::de::DeserializeOwned + serde::Serialize + Default,
{
    let defaults = serde_json::to_value(T::default()).map_err(|e| Error::other(e.to_string()))?;
    let (Value::Object(known), Value::Object(given)) = (&defaults, config) else {
        return Err(Error::config("adapter", "has to be a table of fields"));
    };
    // A null means the default, as in Python, unless the field can be null.
    let own: Map<String, Value> = given
        .iter()
        .filter(|(key, value)| {
            known
                .get(*key)
                .is_some_and(|default| !value.is_null() || default.is_null())
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    for (key, value) in &own {
        // One field at a time, so that the message can name it: serde's does not.
        let mut single = known.clone();
        single.insert(key.clone(), value.clone());
        if let Err(e) = T::deserialize(Value::Object(single)) {
            return Err(Error::config(key.as_str(), in_words(&e)));
        }
    }
    let mut all = known.clone();
    all.extend(own);
    let method =
        T::deserialize(Value::Object(all)).map_err(|e| Error::config("adapter", in_words(&e)))?;
    let fields = serde_json::to_value(&method).map_err(|e| Error::other(e.to_string()))?;
    Ok((method, fields))
}

/// Registers a method: `register!(Type, id = "..", title = "..", family = Additive, subfamily = "..", peft_type = "..",
/// paper = "..", example = r#"{..}"#, ...)`. Then, all optional: `identity_at_init = false`, `mergeable = false`,
/// `moves_base = true`, `when = |config| ..`, `hub = Hub { .. }`.
#[macro_export]
macro_rules! register {
    ($ty:ty, id = $id:literal, title = $title:literal, family = $family:ident, subfamily = $sub:literal,
     peft_type = $peft_type:literal, paper = $paper:literal, example = $example:expr
     $(, identity_at_init = $identity:literal)? $(, mergeable = $mergeable:literal)?
     $(, moves_base = $moves:literal)? $(, when = $when:expr)? $(, hub = $hub:expr)? $(,)?) => {
        $crate::inventory::submit! {
            $crate::MethodEntry {
                id: $id,
                title: $title,
                family: $crate::Family::$family,
                subfamily: $sub,
                peft_type: $peft_type,
                when: $crate::register!(@or |_| false $(, $when)?),
                paper: $paper,
                example: $example,
                identity_at_init: $crate::register!(@or true $(, $identity)?),
                mergeable: $crate::register!(@or true $(, $mergeable)?),
                moves_base: $crate::register!(@or false $(, $moves)?),
                file: file!(),
                hub: $crate::register!(@hub $($hub)?),
                parse: |config| {
                    let (method, fields) = $crate::parse_fields::<$ty>(config)?;
                    Ok($crate::Parsed { method: Box::new(method), fields })
                },
            }
        }
    };
    (@hub) => { None };
    (@hub $hub:expr) => { Some($hub) };
    (@or $default:expr) => { $default };
    (@or $default:expr, $given:expr) => { $given };
}
