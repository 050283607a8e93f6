//! The matcher against HF PEFT's answers (`tests/goldens/matcher.json`), a naive model, and its own promises.

use peft_core::matcher::{
    Candidate, MatchSpec, compile, default_targets, matches_name, pattern_value, select,
};
use peft_core::{Error, Result, Targets};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Modules that any method takes, none of them a head.
fn linears<'a>(paths: &[&'a str]) -> Vec<Candidate<'a>> {
    paths
        .iter()
        .map(|&path| Candidate {
            path,
            adaptable: true,
            linear: true,
            output_head: false,
        })
        .collect()
}

fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::Null => Vec::new(),
        Value::String(one) => vec![one.clone()],
        many => serde_json::from_value(many.clone()).unwrap(),
    }
}

/// Selects as a configuration says and gives the paths.
fn chosen(candidates: &[Candidate<'_>], config: &Value) -> Result<Vec<String>> {
    let targets =
        |key: &str| -> Option<Targets> { serde_json::from_value(config[key].clone()).unwrap() };
    let (target, exclude) = (targets("target_modules"), targets("exclude_modules"));
    let layers: Option<Vec<usize>> = match &config["layers_to_transform"] {
        Value::Number(one) => Some(vec![one.as_u64().unwrap() as usize]),
        other => serde_json::from_value(other.clone()).unwrap(),
    };
    let (pattern, saved) = (
        strings(&config["layers_pattern"]),
        strings(&config["modules_to_save"]),
    );
    let picked = select(
        candidates,
        &MatchSpec {
            targets: target.as_ref(),
            exclude: exclude.as_ref(),
            layers_to_transform: layers.as_deref(),
            layers_pattern: &pattern,
            modules_to_save: &saved,
            finished: config["finished"] == true,
        },
    )?;
    Ok(picked
        .into_iter()
        .map(|i| candidates[i].path.to_owned())
        .collect())
}

fn message(candidates: &[Candidate<'_>], config: Value) -> String {
    chosen(candidates, &config).unwrap_err().to_string()
}

const LLAMA: [&str; 8] = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
];

/// Whether an entry of a list names none of the modules, or a layer is not there: where HF is silent, we are not.
fn is_stricter(modules: &[&str], config: &Value) -> bool {
    let unmatched = |key: &str| match &config[key] {
        Value::Array(names) => names
            .iter()
            .any(|n| !modules.iter().any(|m| matches_name(m, n.as_str().unwrap()))),
        Value::String(text) if !text.is_empty() => {
            let regex = compile(key, text).unwrap();
            !modules.iter().any(|m| regex.is_match(m))
        }
        _ => false,
    };
    let no_such_layer = config["layers_pattern"].is_null()
        && strings(&json!(
            config["layers_to_transform"]
                .as_array()
                .map(|a| a.iter().map(Value::to_string).collect::<Vec<_>>())
        ))
        .iter()
        .any(|wanted| {
            !modules
                .iter()
                .any(|m| naive_layer(m).is_some_and(|l| l.to_string() == *wanted))
        });
    unmatched("target_modules") || unmatched("exclude_modules") || no_such_layer
}

#[test]
fn answers_what_peft_answers() {
    let goldens: Value =
        serde_json::from_str(include_str!("../../../tests/goldens/matcher.json")).unwrap();
    let (mut equal, mut refused) = (0, 0);
    for entry in goldens["match"].as_array().unwrap() {
        let names = strings(&entry["modules"]);
        let modules: Vec<&str> = names.iter().map(String::as_str).collect();
        let (config, expected) = (&entry["config"], &entry["expected"]);
        let ours = chosen(&linears(&modules), config);
        if entry["lookaround"] == json!(true) {
            let text = ours.unwrap_err().to_string();
            assert!(
                text.contains("look-ahead") && text.contains("target_modules"),
                "{text}"
            );
            continue;
        }
        if expected == "error" || expected == &json!([]) || is_stricter(&modules, config) {
            assert!(ours.is_err(), "{config} gave {ours:?}, expected an error");
            refused += 1;
        } else {
            assert_eq!(
                ours.unwrap_or_else(|e| panic!("{config}: {e}")),
                strings(expected),
                "{config}"
            );
            equal += 1;
        }
    }
    assert!(
        equal >= 40 && refused >= 8,
        "{equal} equal, {refused} refused: the goldens are not read"
    );

    for entry in goldens["pattern_key"].as_array().unwrap() {
        let patterns: Vec<(String, String)> = strings(&entry["keys"])
            .into_iter()
            .map(|k| (k.clone(), k))
            .collect();
        let found = pattern_value(&patterns, entry["module"].as_str().unwrap()).unwrap();
        assert_eq!(
            found.map(String::as_str),
            entry["expected"].as_str(),
            "{entry}"
        );
    }
    for (model_type, names) in goldens["default_targets"].as_object().unwrap() {
        let ours = default_targets(model_type)
            .map(|names| json!(names))
            .unwrap_or(Value::Null);
        assert_eq!(&ours, names, "{model_type}");
    }
}

#[test]
fn all_linear_leaves_the_head_and_what_cannot_be_adapted() {
    let mut modules = linears(&LLAMA);
    modules[0].linear = false;
    modules[3].adaptable = false;
    modules[7].output_head = true;
    let found = chosen(&modules, &json!({"target_modules": "All-Linear"})).unwrap();
    assert_eq!(found, [LLAMA[1], LLAMA[2], LLAMA[4], LLAMA[5], LLAMA[6]]);
    let fewer = json!({"target_modules": "all-linear", "exclude_modules": ["v_proj"], "modules_to_save": ["layers.1"]});
    assert_eq!(chosen(&modules, &fewer).unwrap(), [LLAMA[1]]);
    let layered = json!({"target_modules": "all-linear", "layers_to_transform": [0]});
    assert!(message(&modules, layered).contains("layers_to_transform"));
    let excluded = json!({"target_modules": ["q_proj"], "exclude_modules": "all-linear"});
    assert!(message(&modules, excluded).contains("exclude_modules"));
}

#[test]
fn what_matches_nothing_is_an_error_with_the_nearest() {
    let modules = linears(&LLAMA);
    let cases = [
        (
            json!({"target_modules": ["q_proj", "v_porj"]}),
            ["target_modules", "v_porj", "v_proj"],
        ),
        (
            json!({"target_modules": ["q_proj"], "exclude_modules": ["up_prj"]}),
            ["exclude_modules", "up_prj", "up_proj"],
        ),
        (
            json!({"target_modules": ["q_proj"], "modules_to_save": ["lmhead"]}),
            ["modules_to_save", "lmhead", "lm_head"],
        ),
        (
            json!({"target_modules": ["q_proj"], "layers_to_transform": [1, 5]}),
            ["layers_to_transform", "5", "0 to 1"],
        ),
        (
            json!({"target_modules": "v_proj"}),
            ["target_modules", "whole paths", r#"["v_proj"]"#],
        ),
        (
            json!({"target_modules": [".*_proj"]}),
            ["target_modules", ".*_proj", "no module"],
        ),
        (
            json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
            ["target_modules", "exclude_modules", "2"],
        ),
        (
            json!({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["self_attn"]}),
            ["nothing", "modules_to_save", "4"],
        ),
        (json!({}), ["target_modules", "has to be given", ""]),
        (
            json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}),
            ["layers_pattern", "0", "no layer"],
        ),
    ];
    for (config, parts) in cases {
        let text = message(&modules, config.clone());
        assert!(
            parts.iter().all(|part| text.contains(part)),
            "{config}: {text}"
        );
    }
}

#[test]
fn an_unsupported_kind_is_an_error_that_says_what_is_below() {
    let mut modules = linears(&[
        "model.layers.0.mlp",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp_norm",
    ]);
    modules[0].adaptable = false;
    modules[2].adaptable = false;
    let error = chosen(&modules, &json!({"target_modules": ["mlp", "up_proj"]})).unwrap_err();
    assert!(
        matches!(&error, Error::Module { module, .. } if module == "model.layers.0.mlp"),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains("mlp.up_proj") && !text.contains("mlp_norm"),
        "{text}"
    );
    // An excluded one is not in the way.
    let config = json!({"target_modules": ["mlp", "up_proj"], "exclude_modules": ["mlp"]});
    assert_eq!(
        chosen(&modules, &config).unwrap(),
        ["model.layers.0.mlp.up_proj"]
    );
}

#[test]
fn patterns_mean_what_they_mean_in_python() {
    let accepted = [
        (r"a\Z", "a", true),
        (r"(?i)A.B", "aXb", true),
        (r"q|k_proj", "q", true),
        (r"q|k_proj", "qk_proj", false),
        (r"(?x) a \. b  # the second", "a.b", true),
        (r"a(?# in passing )b", "ab", true),
        (r"[]a]+", "a]", true),
        (r"[^]a]", "]", false),
        (r"(?P<n>a)b", "ab", true),
        (r"a{2}", "aa", true),
        (r"a{,2}", "aa", true),
        (r"a{2,}?", "aaa", true),
        (r"\w+\.\d+", "layers.12", true),
        (r"a\b.*", "a.b", true),
        (r"a\-b\_c", "a-b_c", true),
        (r"(?s:.)", "\n", true),
        (r".", "\n", false),
        (r"[\]1(?=]", "?", true),
        (r"(a)(?:b)", "ab", true),
        (r"\\1", r"\1", true),
    ];
    for (pattern, path, expected) in accepted {
        let regex = compile("target_modules", pattern).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(regex.is_match(path), expected, "{pattern} on {path}");
    }
    let refused = [
        (r"a(?=b).*", "look-ahead"),
        (r"a(?!b).*", "negative look-ahead"),
        (r"(?<=a)b", "look-behind"),
        (r"(?<!a)b", "negative look-behind"),
        (r"(?>a|ab)c", "an atomic group"),
        (r"(a)?(?(1)b|c)", "a conditional group"),
        (r"(a)\1", r"a backreference (\1)"),
        (r"(?P<x>a)(?P=x)", "a backreference"),
        (r"a*+b", "possessive repetition"),
        (r"a{1,3}+", "possessive repetition"),
        (r"a**", "a repetition of a repetition"),
        (r"\pL+", r"\p{..}"),
        (r"[\pL]", r"\p{..}"),
        (r"[a&&b]", "a set operation"),
        (r"[a--b]", "a set operation"),
        (r"[[:alpha:]]", "a named class"),
        (r"[a[b]]", "a class in a class"),
        (r"(?U)a+", "a flag"),
        (r"(?R:a)", "a flag"),
        (r"a(?i)b", "flags that are not at its start"),
        (r"\<a", "a word boundary"),
        (r"a(b", "unclosed group"),
        (r"[a", "unclosed character class"),
        (r"a(?#b", "a comment without an end"),
        (r"*a", "is no regular expression"),
    ];
    for (pattern, part) in refused {
        let text = compile("layers_pattern", pattern).unwrap_err().to_string();
        assert!(
            text.contains(part) && text.contains("`layers_pattern`"),
            "{pattern}: {text}"
        );
    }
    // Asked a second time, past the cache.
    assert!(compile("target_modules", r"a*+b").is_err());
}

#[test]
fn targets_are_read_and_written_as_in_adapter_config() {
    let read = |value: Value| serde_json::from_value::<Targets>(value);
    assert_eq!(
        read(json!(["q", "v"])).unwrap(),
        Targets::Names(vec!["q".into(), "v".into()])
    );
    assert_eq!(read(json!("ALL-linear")).unwrap(), Targets::AllLinear);
    assert_eq!(
        read(json!("all-linears")).unwrap(),
        Targets::Pattern("all-linears".into())
    );
    for value in [json!(["q"]), json!(".*q"), json!("all-linear")] {
        assert_eq!(
            serde_json::to_value(read(value.clone()).unwrap()).unwrap(),
            value
        );
    }
    assert!(
        read(json!(3))
            .unwrap_err()
            .to_string()
            .contains("a list of module names")
    );
}

#[test]
fn first_matching_pattern_wins_and_bad_ones_are_reported() {
    let patterns = [
        (r"layers\.1\..*".to_owned(), 1),
        ("q_proj".to_owned(), 2),
        ("(a)\\1".to_owned(), 3),
    ];
    assert_eq!(
        pattern_value(&patterns, "m.layers.1.q_proj").unwrap(),
        Some(&1)
    );
    assert_eq!(
        pattern_value(&patterns, "m.layers.2.q_proj").unwrap(),
        Some(&2)
    );
    assert!(
        pattern_value(&patterns, "m.layers.2.k_proj")
            .unwrap_err()
            .to_string()
            .contains("rank_pattern")
    );
}

/// Whole dotted parts at the end, written the slow way.
fn naive_name(path: &str, name: &str) -> bool {
    let (path, name): (Vec<_>, Vec<_>) = (path.split('.').collect(), name.split('.').collect());
    path.len() >= name.len() && path[path.len() - name.len()..] == name[..]
}

/// The first number behind at least two parts and before another.
fn naive_layer(path: &str) -> Option<usize> {
    let parts: Vec<_> = path.split('.').collect();
    let inner = parts.get(2..parts.len().saturating_sub(1))?;
    inner.iter().find_map(|part| part.parse().ok())
}

fn paths() -> impl Strategy<Value = Vec<String>> {
    let part = prop::sample::select(vec!["a", "b", "aa", "q", "0", "1", "12", "layers"]);
    let path = prop::collection::vec(part, 1..6).prop_map(|parts| parts.join("."));
    prop::collection::vec(path, 1..12)
}

proptest! {
    #[test]
    fn lists_match_like_the_naive_model(
        paths in paths(),
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0..3usize), 1..4),
        excludes in prop::collection::vec((any::<prop::sample::Index>(), 0..3usize), 0..3),
        layered in any::<bool>(),
    ) {
        // Names are ends of paths, so that most match something; an end of another length may be a typo.
        let end = |(index, skip): &(prop::sample::Index, usize)| {
            let path = index.get(&paths);
            let parts: Vec<_> = path.split('.').collect();
            parts[(*skip).min(parts.len() - 1)..].join(".")
        };
        let targets: Vec<String> = picks.iter().map(end).collect();
        let exclude: Vec<String> = excludes.iter().map(end).collect();
        let mut layers: Vec<usize> = paths.iter().filter_map(|p| naive_layer(p)).collect();
        layers.truncate(if layered { 1 } else { 0 });
        let expected: Vec<String> = paths
            .iter()
            .filter(|path| targets.iter().any(|t| naive_name(path, t)))
            .filter(|path| !exclude.iter().any(|t| naive_name(path, t)))
            .filter(|path| {
                layers.is_empty() || targets.contains(path) || naive_layer(path).is_some_and(|l| layers.contains(&l))
            })
            .cloned()
            .collect();
        let borrowed: Vec<&str> = paths.iter().map(String::as_str).collect();
        let config = json!({"target_modules": targets, "exclude_modules": exclude, "layers_to_transform": layers});
        match chosen(&linears(&borrowed), &config) {
            Ok(found) => prop_assert_eq!(found, expected),
            Err(error) => prop_assert!(expected.is_empty(), "{}: {}", config, error),
        }
    }

    #[test]
    fn a_broken_name_is_never_taken_for_another(paths in paths(), cut in any::<prop::sample::Index>()) {
        let path = cut.get(&paths);
        let broken = format!("{path}x");
        let borrowed: Vec<&str> = paths.iter().map(String::as_str).collect();
        let error = chosen(&linears(&borrowed), &json!({"target_modules": [broken]})).unwrap_err();
        let is_no_match = matches!(&error, Error::NoMatch { name, .. } if *name == broken);
        prop_assert!(is_no_match, "{}", error);
    }

    #[test]
    fn no_pattern_panics(pattern in r"[a-z\\()\[\]{}?*+|^$.:=!<>#PiZ1-3&-]{0,24}", path in "[a-z.0-9]{0,12}") {
        if let Ok(regex) = compile("target_modules", &pattern) {
            let _ = regex.is_match(&path);
        }
    }
}

#[test]
fn what_a_finished_adapter_names_in_vain_is_passed_over() {
    let modules = linears(&LLAMA);
    let config = |finished: bool| {
        json!({
            "target_modules": ["q_proj", "query_key_value"], "exclude_modules": ["c_attn"],
            "modules_to_save": ["score"], "layers_to_transform": [1, 40], "finished": finished
        })
    };
    let found = chosen(&modules, &config(true)).unwrap();
    assert_eq!(found, ["model.layers.1.self_attn.q_proj"]);
    assert!(message(&modules, config(false)).contains("query_key_value"));
    // Nothing at all is a mistake still.
    let nothing = json!({"target_modules": ["query_key_value"], "finished": true});
    assert!(message(&modules, nothing).contains("query_key_value"));
}
