//! Several adapters on one model: loading, switching, disabling, deleting, and rows of one batch through different ones.

use std::sync::Arc;

use peft::core::{Device, Network, Param, Pass, RngKey, Tensor};
use peft_tests::toy::{Ids, Spec, Style, Toy};
use serde_json::{Value, json};

fn toy(style: Style, tied: bool) -> Toy {
    let spec = Spec {
        style,
        layers: 2,
        heads: 2,
        kv_heads: 2,
        head_dim: 4,
        hidden: 8,
        inner: 12,
        vocab: 17,
        tied,
        format: peft::tensor::WeightFormat::F32,
        seed: 3,
    };
    Toy::new(&spec, &Device::cpu()).expect("a toy model")
}

fn ids() -> Ids {
    let (batch, seq) = (4, 5);
    let ids = (0..batch * seq).map(|i| (i * 7 % 17) as u32).collect();
    Ids { ids, batch, seq }
}

/// Adapters of different families, each with values of its own.
fn configs() -> Vec<(&'static str, Value)> {
    let mut chosen = Vec::new();
    for entry in peft::methods() {
        let mut config: Value = serde_json::from_str(entry.example).expect("JSON");
        config["peft_type"] = json!(entry.peft_type);
        chosen.push((entry.id, config));
    }
    chosen
}

fn move_away(network: &Network, name: &str) {
    for (at, param) in network
        .adapter_parameters(name)
        .expect("attached")
        .iter()
        .filter(|p| !p.is_frozen())
        .enumerate()
    {
        let key = RngKey::new(11).fork(name).fork_n(at as u64);
        let noise = Tensor::normal(key, 0.0, 0.2, &param.shape(), network.device()).expect("noise");
        let moved = param.tensor().detach().add(&noise).expect("a sum");
        param.set(moved).expect("the same shape");
    }
}

fn logits(toy: &Toy, pass: &Pass) -> Vec<f32> {
    toy.logits(&ids(), pass)
        .expect("runs")
        .to_vec()
        .expect("values")
}

fn named(names: &[Option<&str>]) -> Pass {
    let names = names.iter().map(|n| n.map(str::to_owned)).collect();
    Pass {
        adapter_names: Some(Arc::new(names)),
        ..Pass::eval()
    }
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Each row of a mixed batch is what it is in a batch of its own adapter, for every pair of methods that can share one.
#[test]
fn rows_of_one_batch_go_through_their_own_adapters() {
    let mut shared = 0;
    for (id, config) in configs() {
        let mut toy = toy(Style::Decoder, true);
        toy.network.attach("one", &config, 1).expect("attaches");
        let lora = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "lm_head", "down_proj"]});
        toy.network.attach("two", &lora, 2).expect("attaches");
        move_away(&toy.network, "one");
        move_away(&toy.network, "two");
        let mixed = named(&[Some("one"), None, Some("two"), Some("one")]);
        let together = match toy.logits(&ids(), &mixed) {
            Ok(together) => together.to_vec().expect("values"),
            // Virtual tokens lengthen rows; those cannot share a batch with others.
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("adapter_names"), "{id}: {said}");
                continue;
            }
        };
        shared += 1;
        let width = together.len() / 4;
        for (row, active) in [&["one"][..], &[], &["two"], &["one"]].iter().enumerate() {
            toy.network.set_active(active).expect("attached");
            let alone = logits(&toy, &Pass::eval());
            assert_eq!(alone.len(), together.len(), "{id}");
            let part = row * width..(row + 1) * width;
            let gap = gap(&alone[part.clone()], &together[part]);
            assert!(gap < 1e-5, "{id}: row {row} differs by {gap}");
        }
    }
    assert!(shared >= 5, "only {shared} methods took part");
}

#[test]
fn a_name_that_is_not_active_is_an_error() {
    let mut toy = toy(Style::Encoder, false);
    let lora = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]});
    toy.network.attach("one", &lora, 1).expect("attaches");
    let error = toy
        .logits(&ids(), &named(&[Some("one"), Some("tow"), None, None]))
        .expect_err("no such adapter")
        .to_string();
    assert!(error.contains("tow") && error.contains("one"), "{error}");
    toy.network.merge().expect("merges");
    let error = toy
        .logits(&ids(), &named(&[Some("one"), None, None, None]))
        .expect_err("merged")
        .to_string();
    assert!(error.contains("unmerge"), "{error}");
}

/// Switching merged adapters is switching and merging, and leaves no trace of the first; a refused switch changes nothing.
#[test]
fn merged_adapters_are_switched() {
    let mut toy = toy(Style::Decoder, false);
    let lora = |r: usize| json!({"peft_type": "LORA", "r": r, "target_modules": "all-linear"});
    toy.network.attach("one", &lora(2), 1).expect("attaches");
    toy.network.attach("two", &lora(3), 2).expect("attaches");
    let prompt = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2});
    toy.network.attach("tokens", &prompt, 2).expect("attaches");
    move_away(&toy.network, "one");
    move_away(&toy.network, "two");
    toy.network.set_active(&["two"]).expect("attached");
    toy.network.merge().expect("merges");
    let two = logits(&toy, &Pass::eval());
    toy.network.switch(&["one"]).expect("switches");
    assert!(toy.network.is_merged());
    let one = logits(&toy, &Pass::eval());
    assert!(gap(&one, &two) > 1e-3, "both adapters do the same");
    for _ in 0..3 {
        toy.network.switch(&["two"]).expect("switches");
        assert_eq!(logits(&toy, &Pass::eval()), two);
        toy.network.switch(&["one"]).expect("switches");
        assert_eq!(logits(&toy, &Pass::eval()), one);
    }
    let error = toy.network.switch(&["tokens"]).expect_err("virtual tokens");
    assert!(error.to_string().contains("cannot be merged"), "{error}");
    assert!(toy.network.is_merged() && toy.network.active() == ["one"]);
    assert_eq!(logits(&toy, &Pass::eval()), one);
    toy.network.unmerge();
    toy.network.set_active(&[]).expect("none");
    let mut fresh = self::toy(Style::Decoder, false);
    assert_eq!(logits(&toy, &Pass::eval()), logits(&fresh, &Pass::eval()));
    fresh.network.switch(&[]).expect("nothing to do");
}

/// Loading, switching and deleting adapters never changes which parameters of the others are trained
/// (huggingface/peft issues 3487, 3580 and 2759).
#[test]
fn one_adapter_never_freezes_another() {
    let frozen = |network: &Network, name: &str| {
        let params = network.adapter_parameters(name).expect("attached");
        let trainable = params.iter().filter(|p| !p.is_frozen());
        trainable.filter(|p| !p.is_trainable()).count()
    };
    for (id, config) in configs() {
        let mut toy = toy(Style::Decoder, false);
        toy.network.attach("first", &config, 1).expect("attaches");
        let trained: Vec<String> = keys(&toy.network.parameters());
        // A method may hold some back until later in its training.
        let held_back = frozen(&toy.network, "first");
        let (saved, tensors) = toy.network.export("first").expect("exports");
        toy.network
            .load("second", &saved, tensors, false)
            .unwrap_or_else(|e| panic!("{id}: {e}"));
        assert_eq!(
            keys(&toy.network.parameters()),
            trained,
            "{id}: after a load"
        );
        assert!(frozen(&toy.network, "second") > 0, "{id}");
        toy.network.set_active(&["second"]).expect("attached");
        toy.network.set_active(&["first"]).expect("attached");
        assert_eq!(
            keys(&toy.network.parameters()),
            trained,
            "{id}: after a switch"
        );
        toy.network.set_trainable("second", true).expect("attached");
        assert_eq!(frozen(&toy.network, "first"), held_back, "{id}");
        toy.network.delete("second").expect("attached");
        assert_eq!(
            keys(&toy.network.parameters()),
            trained,
            "{id}: after a delete"
        );
    }
}

fn keys(params: &[Param]) -> Vec<String> {
    params.iter().map(|p| p.key().to_owned()).collect()
}

/// AdapterDrop at inference: with every layer skipped the adapters inside of layers are gone, with one skipped only its.
#[test]
fn skipped_layers_have_no_adapter() {
    let mut toy = toy(Style::Decoder, false);
    let lora = json!({"peft_type": "LORA", "r": 2, "target_modules": "all-linear"});
    toy.network.attach("one", &lora, 1).expect("attaches");
    move_away(&toy.network, "one");
    let all = logits(&toy, &Pass::eval());
    toy.network.set_skipped_layers(1);
    let later = logits(&toy, &Pass::eval());
    toy.network.set_skipped_layers(2);
    let none = logits(&toy, &Pass::eval());
    toy.network.set_skipped_layers(0);
    assert_eq!(logits(&toy, &Pass::eval()), all);
    toy.network.set_active(&[]).expect("none");
    assert_eq!(logits(&toy, &Pass::eval()), none);
    assert!(gap(&later, &all) > 1e-4 && gap(&later, &none) > 1e-4);
}

/// What a merge can take of the hybrids: all of LoRA plus LN tuning, nothing of prefixes, bottlenecks and gates.
#[test]
fn hybrids_say_which_members_merge() {
    for (peft_type, whys) in [
        ("LORA_LN", &["", ""][..]),
        ("MAM", &["virtual tokens", "acts on"]),
        ("UNIPELT", &["virtual tokens", "acts on", "wraps"]),
    ] {
        let mut toy = toy(Style::Decoder, false);
        let config = json!({"peft_type": peft_type});
        toy.network.attach("one", &config, 1).expect("attaches");
        let members = toy.network.members("one").expect("attached");
        assert_eq!(members.len(), whys.len(), "{peft_type}");
        for (member, why) in members.iter().zip(whys) {
            let stays = member.stays.as_deref().unwrap_or_default();
            assert_eq!(stays.is_empty(), why.is_empty(), "{peft_type}: {member:?}");
            assert!(stays.contains(why), "{peft_type}: {member:?}");
        }
        let whole = (0..members.len()).collect::<Vec<_>>();
        let (_, all) = toy.network.export("one").expect("exports");
        let (_, kept) = toy.network.export_members("one", &whole).expect("exports");
        assert!(all.keys().eq(kept.keys()), "{peft_type}");
    }
    let mut toy = toy(Style::Decoder, false);
    let lora = json!({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]});
    toy.network.attach("plain", &lora, 1).expect("attaches");
    assert!(toy.network.members("plain").expect("attached").is_empty());
    let error = toy.network.export_members("plain", &[0]).expect_err("none");
    assert!(error.to_string().contains("members"), "{error}");
    let union = json!({"peft_type": "UNION", "bias": "all", "members": [lora]});
    toy.network.attach("biased", &union, 1).expect("attaches");
    let error = toy.network.export_members("biased", &[0]);
    let error = error.expect_err("its own biases").to_string();
    assert!(error.contains("`bias`"), "{error}");
    let error = toy.network.export_members("plain", &[7]).expect_err("none");
    assert!(error.to_string().contains("members"), "{error}");
}
