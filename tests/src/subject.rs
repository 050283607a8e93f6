//! What a law is about: one registered method on one device, and a drawn model, batch and configuration.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use serde_json::{Value, json};

use peft::core::{Device, Grads, MethodEntry, Param, Pass, RngKey, Tensor};
use peft::tensor::{WeightFormat, tested};

use crate::compare::Check;
use crate::toy::{Ids, Spec, Style, Toy};

/// One drawn situation.
#[derive(Clone, Debug)]
pub struct Case {
    /// The model.
    pub spec: Spec,
    /// Rows.
    pub batch: usize,
    /// Tokens a row.
    pub seq: usize,
    /// Seed of adapter, noise and tokens.
    pub seed: u64,
    /// Values for the numbers of the configuration, by field.
    pub numbers: Vec<(&'static str, u64)>,
    /// What is asked for besides the method.
    pub besides: Besides,
}

/// Fields any configuration may have: the core sees to them for every method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Besides {
    /// None.
    Nothing,
    /// `bias: "all"`
    Biases,
    /// `modules_to_save`: the head and the last norm.
    Modules,
    /// `trainable_token_indices`: two of the tokens that occur.
    Tokens,
}

/// A method on a device in a drawn situation.
pub struct Subject<'a> {
    /// The method.
    pub entry: &'static MethodEntry,
    /// Its example, or one of the other configurations in `variants.json`.
    pub config: &'a Value,
    /// The device.
    pub device: &'a Device,
    /// The situation.
    pub case: &'a Case,
}

/// Numbers that configurations have, with the values that are drawn for them; a method that refuses the drawn value
/// runs with its example's.
const NUMBERS: &[(&str, u64, u64)] = &[
    ("r", 1, 5),
    ("lora_alpha", 1, 9),
    ("num_virtual_tokens", 1, 4),
    ("reduction_factor", 1, 4),
    ("encoder_hidden_size", 8, 14),
];

fn sizes() -> impl Strategy<Value = Spec> {
    let format = prop_oneof![
        Just(WeightFormat::F32),
        Just(WeightFormat::BF16),
        Just(WeightFormat::Q8_0),
        Just(WeightFormat::Q4_1),
    ];
    let style = prop_oneof![Just(Style::Decoder), Just(Style::Encoder)];
    (
        style,
        format,
        1usize..=2,
        0usize..3,
        0usize..3,
        0usize..2,
        any::<bool>(),
        7usize..24,
        any::<u64>(),
    )
        .prop_map(
            |(style, format, layers, split, width, inner, tied, vocab, seed)| {
                let blocks = format.block_len() > 1;
                // Blocks of 32 have to fill whole rows, and an encoder's rows are as long as its outputs.
                let (heads, head_dim) = match (blocks, split) {
                    (true, 0) => (2, 16),
                    (true, 1) => (4, 8),
                    (true, _) => (8, 4),
                    (false, 0) => (2, 4),
                    (false, 1) => (2, 6),
                    (false, _) => (4, 4),
                };
                let kv_heads = if style == Style::Encoder || vocab % 2 == 0 {
                    heads
                } else {
                    heads / 2
                };
                let hidden = if blocks { 32 } else { [8, 12, 20][width] };
                let inner = if blocks {
                    [32, 64][inner]
                } else {
                    [12, 24][inner]
                };
                Spec {
                    style,
                    layers,
                    heads,
                    kv_heads,
                    head_dim,
                    hidden,
                    inner,
                    vocab,
                    tied,
                    format,
                    seed,
                }
            },
        )
}

fn cases() -> impl Strategy<Value = Case> {
    let numbers: Vec<_> = NUMBERS
        .iter()
        .map(|&(name, low, high)| (low..=high).prop_map(move |n| (name, n)))
        .collect();
    let besides = prop_oneof![
        3 => Just(Besides::Nothing),
        1 => Just(Besides::Biases),
        1 => Just(Besides::Modules),
        1 => Just(Besides::Tokens),
    ];
    let drawn = (
        sizes(),
        1usize..=3,
        2usize..=5,
        any::<u64>(),
        numbers,
        besides,
    );
    drawn.prop_map(|(spec, batch, seq, seed, numbers, besides)| Case {
        spec,
        batch,
        seq,
        seed,
        numbers,
        besides,
    })
}

/// Every method's example configuration, and others in which a method has more to it, by `peft_type`.
pub fn configs() -> Vec<(&'static MethodEntry, Value)> {
    let variants: BTreeMap<String, Vec<Value>> =
        serde_json::from_str(include_str!("../variants.json"))
            .expect("variants.json maps a peft_type to configurations");
    // One's own methods alone while they are worked on; the suite in full takes minutes.
    let wanted = std::env::var("PEFT_METHODS").unwrap_or_default();
    let wanted: Vec<&str> = wanted.split(',').filter(|id| !id.is_empty()).collect();
    let mut all: Vec<_> = peft::methods()
        .into_iter()
        .map(|e| {
            (
                e,
                example(e).unwrap_or_else(|why| panic!("{}: {why}", e.id)),
            )
        })
        .collect();
    for (peft_type, configs) in variants {
        for mut config in configs {
            config["peft_type"] = json!(peft_type);
            let entry =
                peft::core::entry_for(&config).unwrap_or_else(|e| panic!("variants.json: {e}"));
            all.push((entry, config));
        }
    }
    all.retain(|(entry, _)| wanted.is_empty() || wanted.contains(&entry.id));
    all
}

/// Runs a law on every method, configuration and device, on `count` drawn situations each (`PROPTEST_CASES` sets
/// another number), and fails with the smallest situation found that breaks it for each.
///
/// # Panics
/// If the law is broken, or the registry is empty.
pub fn every_method(count: u32, law: impl Fn(&Subject<'_>) -> Check) {
    let configs = configs();
    assert!(!configs.is_empty(), "no method is registered");
    let count = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(count);
    let mut failures = Vec::new();
    for (at, (entry, config)) in configs.iter().enumerate() {
        for device in devices() {
            let name = device.backend().name();
            let options = Config {
                cases: count,
                failure_persistence: None,
                max_shrink_iters: 60,
                ..Config::default()
            };
            // The same situations every time, others for each configuration.
            let seed = RngKey::new(at as u64)
                .fork(entry.id)
                .0
                .to_le_bytes()
                .repeat(4);
            let mut runner =
                TestRunner::new_with_rng(options, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
            let outcome = runner.run(&cases(), |case| {
                law(&Subject {
                    entry,
                    config,
                    device,
                    case: &case,
                })
                .map_err(TestCaseError::fail)
            });
            match outcome {
                Ok(()) => {}
                Err(TestError::Fail(reason, case)) => {
                    failures.push(format!("{config} on {name}: {reason}\n    {case:?}"))
                }
                Err(TestError::Abort(reason)) => {
                    failures.push(format!("{config} on {name}: {reason}"))
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} broken:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// The devices that laws are about: those that are linked in and the reference, or those that `PEFT_DEVICES` names. One that
/// does not open is left out aloud, and is a failure where `PEFT_REQUIRE_GPU` is 1.
fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let wanted = std::env::var("PEFT_DEVICES").unwrap_or_default();
        let wanted: Vec<&str> = wanted.split(',').filter(|name| !name.is_empty()).collect();
        let mut names = Device::names();
        names.push("reference");
        names.retain(|name| wanted.is_empty() || wanted.contains(name));
        let opened: Vec<Device> = names.into_iter().filter_map(opened).collect();
        assert!(!opened.is_empty(), "no device is left to test on");
        opened
    })
}

fn opened(name: &str) -> Option<Device> {
    if name == "reference" {
        return Some(Device::reference());
    }
    tested(name, Device::by_name(name))
}

/// The example configuration of a method.
///
/// # Errors
/// If it is no JSON object.
pub fn example(entry: &MethodEntry) -> Result<Value, String> {
    let mut config: Value = told(
        "the example configuration",
        serde_json::from_str(entry.example),
    )?;
    let object = config
        .as_object_mut()
        .ok_or("the example configuration is no object")?;
    object.insert("peft_type".to_owned(), json!(entry.peft_type));
    Ok(config)
}

/// An error as a sentence.
pub fn told<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Result<T, String> {
    result.map_err(|e| format!("{what}: {e}"))
}

/// The error of something that has to be refused; its message has to name `name`.
///
/// # Errors
/// If it was not refused, or the message does not.
pub fn refused<T, E: std::fmt::Display>(what: &str, name: &str, result: Result<T, E>) -> Check {
    match result {
        Ok(_) => Err(format!("{what} was accepted")),
        Err(e) if e.to_string().contains(name) => Ok(()),
        Err(e) => Err(format!("{what}: the error does not name {name:?}: {e}")),
    }
}

impl Subject<'_> {
    /// The configuration with what was drawn in it: numbers where the method takes them, and what is asked for besides.
    ///
    /// # Errors
    /// If the configuration as it was given does not attach.
    pub fn config(&self) -> Result<Value, String> {
        let mut with = self.config.clone();
        match self.case.besides {
            Besides::Nothing => {}
            Besides::Biases => with["bias"] = json!("all"),
            Besides::Modules => with["modules_to_save"] = json!(["lm_head", "model.norm"]),
            Besides::Tokens => with["trainable_token_indices"] = json!(self.two_tokens()),
        }
        let mut drawn = with.clone();
        for (name, number) in &self.case.numbers {
            if with[*name].is_u64() {
                drawn[*name] = json!(number);
            }
        }
        // A method may refuse a number, or what is asked for besides where it trains that itself; never its example.
        for config in [drawn, with] {
            if self.toy()?.network.attach("probe", &config, 0).is_ok() {
                return Ok(config);
            }
        }
        told(
            "the configuration",
            self.toy()?.network.attach("probe", self.config, 0),
        )
        .map(|()| self.config.clone())
    }

    /// Two tokens that occur, the later in the vocabulary first; one where there is no other.
    fn two_tokens(&self) -> Vec<u32> {
        let mut ids = self.ids().ids;
        ids.sort_unstable_by(|a, b| b.cmp(a));
        ids.dedup();
        // One that occurs stays the base's: adapters below trained rows show only there.
        ids.truncate(2.min(ids.len().saturating_sub(1)).max(1));
        ids
    }

    /// The model without adapters.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn toy(&self) -> Result<Toy, String> {
        told("the toy model", Toy::new(&self.case.spec, self.device))
    }

    /// The model with a fresh adapter `name`, active.
    ///
    /// # Errors
    /// If it does not attach.
    pub fn fresh(&self, name: &str) -> Result<Toy, String> {
        let mut toy = self.toy()?;
        told(
            "attach",
            toy.network.attach(name, &self.config()?, self.case.seed),
        )?;
        Ok(toy)
    }

    /// The model with an adapter `name` whose parameters were moved away from their initial values.
    ///
    /// # Errors
    /// If it does not attach.
    pub fn moved(&self, name: &str) -> Result<Toy, String> {
        let toy = self.fresh(name)?;
        self.perturb(&toy, name)?;
        Ok(toy)
    }

    /// Adds noise to every parameter of an adapter, the same on every device.
    ///
    /// # Errors
    /// If it has none.
    pub fn perturb(&self, toy: &Toy, name: &str) -> Check {
        let params = told("parameters", toy.network.adapter_parameters(name))?;
        for param in params.iter().filter(|p| !p.is_frozen()) {
            let key = RngKey::new(self.case.seed).fork(name).fork(param.key());
            let noise = told(
                "noise",
                Tensor::normal(key, 0.0, 0.15, &param.shape(), self.device),
            )?;
            told(
                "perturb",
                param
                    .tensor()
                    .detach()
                    .add(&noise)
                    .map_err(Into::into)
                    .and_then(|v| param.set(v)),
            )?;
        }
        if params.is_empty() {
            Err("the adapter has no parameters".to_owned())
        } else {
            Ok(())
        }
    }

    /// The drawn tokens.
    pub fn ids(&self) -> Ids {
        let Case {
            batch,
            seq,
            seed,
            ref spec,
            ..
        } = *self.case;
        let key = RngKey::new(seed).fork("tokens");
        let mut ids: Vec<u32> = (0..batch * seq)
            .map(|i| key.below(i as u64, spec.vocab as u64) as u32)
            .collect();
        // Where all tokens are the same, so are all values, and attention has no gradient.
        if let [first, second, ..] = &mut ids[..]
            && first == second
        {
            *second = (*first + 1) % spec.vocab as u32;
        }
        Ids { ids, batch, seq }
    }

    /// The model's output on the drawn tokens.
    ///
    /// # Errors
    /// Whatever the model says.
    pub fn run(&self, toy: &Toy) -> Result<Tensor, String> {
        told(
            "forward",
            peft::tensor::no_grad(|| toy.logits(&self.ids(), &self.with_tasks(&Pass::eval()))),
        )
    }

    /// A scalar that depends on every output with a weight of its own.
    ///
    /// # Errors
    /// Whatever the model says.
    pub fn loss(&self, toy: &Toy, pass: &Pass) -> Result<Tensor, String> {
        let loss = || {
            let logits = toy.logits(&self.ids(), &self.with_tasks(pass))?;
            let key = RngKey::new(self.case.seed).fork("loss");
            let weights = Tensor::normal(key, 0.0, 1.0, logits.shape(), self.device)?;
            Ok::<_, peft::Error>(logits.mul(&weights)?.mean_all()?)
        };
        told("loss", loss())
    }

    /// The pass with a task for each row, where the configuration has several.
    fn with_tasks(&self, pass: &Pass) -> Pass {
        let tasks = self.config["num_tasks"].as_u64().filter(|&n| n > 1);
        let of_rows = |n| (0..self.case.batch as u64).map(move |row| (row % n) as u32);
        Pass {
            task_ids: tasks.map(|n| Arc::new(of_rows(n).collect())),
            ..pass.clone()
        }
    }

    /// A pass whose gradients are true slopes throughout.
    pub fn exact(&self) -> Pass {
        Pass {
            exact: true,
            ..Pass::eval()
        }
    }

    /// Gradients of [`Subject::loss`], true slopes throughout.
    ///
    /// # Errors
    /// Whatever the model says.
    pub fn grads(&self, toy: &Toy) -> Result<(Vec<Param>, Grads), String> {
        let grads = told("backward", self.loss(toy, &self.exact())?.backward())?;
        Ok((toy.network.parameters(), grads))
    }

    /// Rounding that outputs of a model this small may gather on this device, relative to 1 + their size.
    pub fn tolerance(&self) -> f64 {
        // The reference computes in f64; f32 leaves about a hundred roundings of 1e-7 in two layers.
        if self.device.backend().name() == "reference" {
            1e-10
        } else {
            2e-5
        }
    }
}
