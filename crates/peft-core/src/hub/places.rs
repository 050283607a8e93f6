//! Where AdapterHub's configurations put adapters: words for kinds of places, and layers left out.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::HubModel;
use crate::{Error, Result};

/// The index of a path's layer: the first number in it.
fn layer(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// `leave_out`: the layers in which no group of paths has one, given that all groups are in the same layers.
///
/// # Errors
/// If groups are in different layers: AdapterHub's configurations cannot say that.
pub fn left_out(model: &HubModel, groups: &[&[String]]) -> Result<Vec<usize>> {
    let layers =
        |paths: &[String]| -> BTreeSet<usize> { paths.iter().filter_map(|p| layer(p)).collect() };
    let mut all = groups
        .iter()
        .filter(|paths| !paths.is_empty())
        .map(|paths| layers(paths));
    let first = all.next().unwrap_or_default();
    if all.any(|other| other != first) {
        let detail = "adapters are in different layers at different places, which AdapterHub's configurations cannot say";
        return Err(Error::config("target_modules", detail));
    }
    Ok((0..model.num_layers)
        .filter(|l| !first.contains(l))
        .collect())
}

/// Names in AdapterHub's `attn_matrices`, and the two linear layers of the feed-forward sublayer by its words for them.
const WORDS: [&str; 5] = ["q", "k", "v", "intermediate", "output"];
/// The ends of their paths: BERT's; Llama's, where it calls `down_proj` intermediate and `up_proj` output.
const ENDS: [[&str; 5]; 2] = [
    [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "intermediate.dense",
        "output.dense",
    ],
    [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
        "mlp.up_proj",
    ],
];

/// Which word an adapted linear layer has there.
fn word(path: &str) -> Option<usize> {
    let at = ENDS.iter().find_map(|ends| {
        ends.iter()
            .position(|end| path.ends_with(&format!(".{end}")))
    })?;
    (!path.ends_with("attention.output.dense")).then_some(at)
}

/// The fields of a configuration of theirs that say on which linear layers it acts.
///
/// # Errors
/// If it acts on others, or in other layers, than they can say.
pub fn linear_places(model: &HubModel, paths: &[String]) -> Result<Map<String, Value>> {
    let mut groups: [Vec<String>; 5] = Default::default();
    for path in paths {
        match word(path) {
            Some(at) => groups[at].push(path.clone()),
            None => {
                let detail = format!(
                    "`{path}` cannot be adapted there; these can: {} (BERT), {} (Llama)",
                    ENDS[0].join(", "),
                    ENDS[1].join(", ")
                );
                return Err(Error::config("target_modules", detail));
            }
        }
    }
    let used = |at: usize| !groups[at].is_empty();
    let matrices: Vec<&str> = (0..3).filter(|&at| used(at)).map(|at| WORDS[at]).collect();
    let all: Vec<&[String]> = groups.iter().map(Vec::as_slice).collect();
    let fields = json!({
        "selfattn_lora": !matrices.is_empty(),
        "attn_matrices": matrices,
        "intermediate_lora": used(3),
        "output_lora": used(4),
        "leave_out": left_out(model, &all)?,
    });
    Ok(fields.as_object().cloned().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> HubModel {
        HubModel {
            num_layers: 3,
            ..HubModel::default()
        }
    }

    fn paths(all: &[&str]) -> Vec<String> {
        all.iter().map(|&p| p.to_owned()).collect()
    }

    #[test]
    fn places_have_words() {
        let found = paths(&[
            "bert.encoder.layer.0.attention.self.value",
            "bert.encoder.layer.2.attention.self.value",
            "bert.encoder.layer.0.output.dense",
            "bert.encoder.layer.2.output.dense",
        ]);
        let fields = linear_places(&model(), &found).expect("fits");
        assert_eq!(fields["attn_matrices"], json!(["v"]));
        assert_eq!(fields["output_lora"], json!(true));
        assert_eq!(fields["leave_out"], json!([1]));
        for wrong in [
            "bert.encoder.layer.0.attention.output.dense",
            "model.layers.0.mlp.gate_proj",
        ] {
            let error = linear_places(&model(), &paths(&[wrong])).expect_err("refused");
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }

    #[test]
    fn groups_have_to_share_layers() {
        let (a, b) = (paths(&["m.0.a", "m.1.a"]), paths(&["m.0.b", "m.2.b"]));
        assert_eq!(left_out(&model(), &[&a, &[]]).expect("fits"), [2]);
        assert!(left_out(&model(), &[&a, &b]).is_err());
    }
}
