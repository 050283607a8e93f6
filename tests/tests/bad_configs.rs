//! Configurations that cannot be: the error names the field, the module where it is about one, and what is valid.

use std::cell::Cell;

use peft::core::{
    Base, BaseWeight, Device, Grads, ModelFacts, ModuleInfo, ModuleTree, Network, Tensor, TrainCx,
};
use serde_json::{Value, json};

const Q: &str = "model.layers.0.self_attn.q_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";

/// A Llama of one layer, 12 wide, with 16 positions and 10 tokens; `down_proj` has 18 inputs.
fn network() -> Network {
    let facts = ModelFacts {
        model_type: "llama".to_owned(),
        hidden_size: 12,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: 6,
        vocab_size: 10,
        max_positions: 16,
        input_embedding: Some("model.embed_tokens".to_owned()),
        rotary: true,
        ..ModelFacts::default()
    };
    let device = Device::cpu();
    let mut tree = ModuleTree::new(facts);
    let mut weights = vec![("model.embed_tokens", [10, 12])];
    tree.push(ModuleInfo::embedding("model.embed_tokens", 10, 12));
    tree.push(ModuleInfo::attention("model.layers.0.self_attn", 12));
    for (path, out, inside) in [(Q, 12, 12), (DOWN, 12, 18)] {
        tree.push(ModuleInfo::linear(path, inside, out, false));
        weights.push((path, [out, inside]));
    }
    for name in ["attention_adapters", "output_adapters"] {
        tree.push(ModuleInfo::junction(&format!("model.layers.0.{name}"), 12));
    }
    tree.push(ModuleInfo::stream("model.layers.0.refts", 12));
    let mut base = Base::new(tree, &device);
    for (path, shape) in weights {
        let value = Tensor::full(0.1, &shape, &device).expect("a weight");
        base.insert(format!("{path}.weight"), BaseWeight::dense(value, false));
    }
    Network::new(base)
}

fn has_all(config: &Value, error: &str, words: &[&str]) -> Result<(), String> {
    match words.iter().find(|word| !error.contains(**word)) {
        Some(word) => Err(format!("{config}\n  says {error}\n  without {word:?}")),
        None => Ok(()),
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused_with_what_does() {
    let on_q = |fields: Value| {
        let mut config = fields;
        config["target_modules"] = json!(["q_proj"]);
        config
    };
    let prompt = "between 1 and 15: the model has 16 positions";
    #[rustfmt::skip]
    let cases: Vec<(Value, Vec<&str>)> = vec![
        // Ranks.
        (on_q(json!({"peft_type": "LORA", "r": 0})), vec!["`r`", Q, "at least 1"]),
        (on_q(json!({"peft_type": "LORA", "r": 13, "init_lora_weights": "pissa"})), vec!["`r`", Q, "1 to 12"]),
        (on_q(json!({"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": 0}})), vec!["`r`", Q, "at least 1"]),
        (on_q(json!({"peft_type": "LORA", "use_dora": true, "r": 0})), vec!["`r`", Q, "at least 1"]),
        (on_q(json!({"peft_type": "DYLORA", "r": 4, "rank_to_serve": 9})), vec!["`rank_to_serve`", "1 to 4"]),
        (on_q(json!({"peft_type": "VERA", "r": 0})), vec!["`r`", "at least 1"]),
        (on_q(json!({"peft_type": "LOHA", "r": 13})), vec!["`r`", Q, "1 to 12"]),
        (on_q(json!({"peft_type": "LOKR", "r": 0})), vec!["`r`", Q, "at least 1"]),
        (on_q(json!({"peft_type": "HRA", "r": 14})), vec!["`r`", Q, "1 to 12"]),
        (on_q(json!({"peft_type": "HRA", "r": 3})), vec!["`r`", Q, "even numbers up to 12"]),
        (json!({"peft_type": "LOREFT", "r": 13}), vec!["`r`", "model.layers.0.refts", "between 1 and 12"]),
        (on_q(json!({"peft_type": "SHIRA", "r": 7})), vec!["`r`", Q, "1 to 6"]),
        // Blocks and factors.
        (on_q(json!({"peft_type": "OFT", "oft_block_size": 5})), vec!["`oft_block_size`", Q, "1, 2, 3, 4, 6, 12"]),
        (on_q(json!({"peft_type": "OFT", "oft_block_size": 1})), vec!["`oft_block_size`", Q, "possible are 2, 3, 4, 6, 12"]),
        (on_q(json!({"peft_type": "OFT", "oft_block_size": 0, "r": 12})), vec!["`r`", Q, "possible are 1, 2, 3, 4, 6"]),
        (on_q(json!({"peft_type": "OFT", "oft_block_size": 4, "r": 3})), vec!["`r`", "oft_block_size"]),
        (on_q(json!({"peft_type": "BOFT", "boft_block_size": 5})), vec!["`boft_block_size`", Q, "1, 2, 3, 4, 6, 12"]),
        (on_q(json!({"peft_type": "BOFT", "boft_n_butterfly_factor": 3})), vec!["`boft_n_butterfly_factor`", Q, "1 to 1"]),
        (on_q(json!({"peft_type": "LOKR", "decompose_factor": 0})), vec!["`decompose_factor`", "-1 or at least 1"]),
        (json!({"peft_type": "KRONA", "a2": 4, "target_modules": ["down_proj"]}), vec!["`a2`", DOWN, "1, 2, 3, 6, 9, 18"]),
        (json!({"peft_type": "COMPACTER", "phm_dim": 5}), vec!["`phm_dim`", "model.layers.0", "possible are 1"]),
        (json!({"peft_type": "PFEIFFER", "reduction_factor": 0}), vec!["`reduction_factor`", "model.layers.0.output_adapters", "12"]),
        (json!({"peft_type": "HOULSBY", "reduction_factor": {"1": 4}}), vec!["`reduction_factor`", "model.layers.0", "default"]),
        // Prompts and prefixes longer than the context.
        (json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 16}), vec!["`num_virtual_tokens`", prompt]),
        (json!({"peft_type": "P_TUNING", "num_virtual_tokens": 16}), vec!["`num_virtual_tokens`", prompt]),
        (json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 99}), vec!["`num_virtual_tokens`", prompt]),
        (json!({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 16, "num_tasks": 2}), vec!["`num_virtual_tokens`", prompt]),
        (json!({"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2}), vec!["`adapter_layers`", "between 1 and 1"]),
        (json!({"peft_type": "MAM", "members": [{"num_virtual_tokens": 16}, {}]}), vec!["members.0", "`num_virtual_tokens`", prompt]),
        // Budgets.
        (on_q(json!({"peft_type": "ADALORA", "init_r": 4, "target_r": 5})), vec!["`target_r`", "0 to 4"]),
        (on_q(json!({"peft_type": "FOURIERFT", "n_frequency": 145})), vec!["`n_frequency`", Q, "1 to 144"]),
        (on_q(json!({"peft_type": "SAID", "intrinsic_dimension": 1})), vec!["`intrinsic_dimension`", "2 to 145"]),
        (on_q(json!({"peft_type": "PAFI", "keep_ratio": 0.001})), vec!["`keep_ratio`", "144 weights", "to 1"]),
        (on_q(json!({"peft_type": "CHILD_TUNING", "reserve_p": 0})), vec!["`reserve_p`", "at most 1"]),
        (json!({"peft_type": "LAST_LAYERS", "num_trained_layers": 2}), vec!["`num_trained_layers`", "1 to 1"]),
        (json!({"peft_type": "TRAINABLE_TOKENS", "token_indices": [10]}), vec!["`token_indices`", "model.embed_tokens", "0 to 9"]),
        (on_q(json!({"peft_type": "LORA_DROP", "threshold": 0})), vec!["`threshold`", "above 0, at most 1"]),
    ];
    let mut wrong = Vec::new();
    for (config, words) in cases {
        let mut network = network();
        let told = match network.attach("a", &config, 0) {
            Ok(()) => Err(format!("{config} was accepted")),
            Err(error) => has_all(&config, &error.to_string(), &words),
        };
        if told.is_ok() && !network.adapters().is_empty() {
            wrong.push(format!("{config} is refused, and attached"));
        }
        wrong.extend(told.err());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Budgets that a run of ten steps cannot meet.
#[test]
fn what_does_not_fit_the_run_is_refused_with_what_does() {
    let mut wrong = Vec::new();
    for (config, words) in [
        (
            json!({"peft_type": "ADALORA", "tinit": 6, "tfinal": 4, "target_modules": ["q_proj"]}),
            ["`tinit`", "at most 9"],
        ),
        (
            json!({"peft_type": "LORA_DROP", "sample_steps": 10, "target_modules": ["q_proj"]}),
            ["`sample_steps`", "1 to 9"],
        ),
        (
            json!({"peft_type": "FISH_MASK", "keep_ratio": 1.5, "target_modules": ["q_proj"]}),
            [
                "`keep_ratio`",
                "144 weights to train, from 3.5e-3 (one of them) to 1",
            ],
        ),
        (
            json!({"peft_type": "DIFF_PRUNING", "sparsity": 0.001, "target_modules": ["q_proj"]}),
            ["`sparsity`", "(one of them) to 1"],
        ),
        (
            json!({"peft_type": "LT_SFT", "keep_ratio": 2.0, "target_modules": ["q_proj"]}),
            ["`keep_ratio`", "to 1"],
        ),
    ] {
        let mut network = network();
        let mut prepared = network.attach("a", &config, 0);
        for (_, mut hooks) in network.trainers() {
            let mut cx = TrainCx {
                step: 0,
                total_steps: 10,
                network: &network,
                params: &network.parameters(),
                grads: &mut Grads::default(),
                used: &[],
                learning_rate: 0.1,
                data: None,
                reset_optimizer: &Cell::new(false),
            };
            prepared = prepared.and_then(|()| hooks.prepare(&mut cx));
        }
        wrong.extend(match prepared {
            Ok(()) => Some(format!("{config} was accepted")),
            Err(error) => has_all(&config, &error.to_string(), &words).err(),
        });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
