//! Multitask prompt tuning: one shared prompt, turned into each task's by a low-rank factor of the task's own.
//!
//! # Paper
//! Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861, section 3.2 (equation 1).
//!
//! # Formula
//! Rows of task t get `[P_t; E(x)]` with `P_t = P * (U_t V_t)`, elementwise: P `[num_virtual_tokens, d]` shared,
//! `U_t [num_virtual_tokens, num_ranks]`, `V_t [num_ranks, d]`.
//!
//! # Saved keys
//! `prompt_embeddings [num_virtual_tokens, d]`, `prefix_task_cols [num_tasks, num_virtual_tokens, num_ranks]`,
//! `prefix_task_rows [num_tasks, num_ranks, d]`, without any prefix.
//!
//! # Defaults and their source
//! One task, rank 1, as HF PEFT 0.21 and the paper (`uv`, an outer product). Start: P as `prompt_tuning_init` says
//! (`RANDOM`: standard normal), the factors normal with deviation 0.02, HF's. `num_virtual_tokens` 8: HF has no default;
//! the paper has 100, at a learning rate of 0.3. On MiniLM 0.1 does (200 steps of 16 rows: accuracy 0.73).
//!
//! The starts `AVERAGE_SOURCE_TASKS`, `EXACT_SOURCE_TASK` and `ONLY_SOURCE_SHARED` take P from
//! `prompt_tuning_init_state_dict_path`, the weights of a prompt trained on several source tasks, and the first two also
//! the factors: their mean, or those of `prompt_tuning_init_task`; both need `num_tasks` 1.
//!
//! # Differences from HF
//! With a single task, rows need not say which it is. A saved prompt can be trained further. A source has to be a
//! safetensors file or an adapter's folder; HF also unpickles.
//!
//! # Limits
//! The paper's distillation from single-task prompts is not there: source prompts are trained by the tasks' losses alone.

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, Init, ModuleTree, Param, PeftMethod, PromptCx, Result, Site, Tensor,
    Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::model_fields::kept_for_hf;
use crate::virtual_tokens::{PROMPT, check_count, soft_prompt};
use crate::{ModelFields, PromptStart};

/// Multitask prompt tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MultitaskPromptTuning {
    /// Virtual tokens.
    pub num_virtual_tokens: usize,
    /// Initial values; also `AVERAGE_SOURCE_TASKS`, `EXACT_SOURCE_TASK` and `ONLY_SOURCE_SHARED`.
    #[serde(flatten)]
    pub start: PromptStart,
    /// Where the source prompt is.
    pub prompt_tuning_init_state_dict_path: Option<String>,
    /// The source task to take, from 0.
    pub prompt_tuning_init_task: usize,
    /// Rank of a task's factor.
    pub num_ranks: usize,
    /// Tasks.
    pub num_tasks: usize,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for MultitaskPromptTuning {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 8,
            start: PromptStart::default(),
            prompt_tuning_init_state_dict_path: None,
            prompt_tuning_init_task: 0,
            num_ranks: 1,
            num_tasks: 1,
            model: ModelFields::default(),
            others: kept_for_hf(),
        }
    }
}

register!(
    MultitaskPromptTuning,
    id = "multitask_prompt_tuning",
    title = "Multitask prompt tuning",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "MULTITASK_PROMPT_TUNING",
    paper = "arXiv 2303.02861",
    example = r#"{"num_virtual_tokens": 3, "num_tasks": 1, "num_ranks": 2}"#,
    identity_at_init = false,
    mergeable = false,
);

const COLS: &str = "prefix_task_cols";
const ROWS: &str = "prefix_task_rows";
const MEAN: &str = "AVERAGE_SOURCE_TASKS";
const EXACT: &str = "EXACT_SOURCE_TASK";
const SHARED: &str = "ONLY_SOURCE_SHARED";
const STATE: &str = "prompt_tuning_init_state_dict_path";

/// Which parts of a source prompt a start takes.
#[derive(Clone, Copy, PartialEq)]
enum Factors {
    Own,
    Mean,
    Of(usize),
}

impl MultitaskPromptTuning {
    /// The factors' source, if the start has one.
    fn source(&self) -> Result<Option<Factors>> {
        let factors = match self.start.prompt_tuning_init.as_str() {
            MEAN => Factors::Mean,
            EXACT => Factors::Of(self.prompt_tuning_init_task),
            SHARED => return Ok(Some(Factors::Own)),
            _ => return Ok(None),
        };
        if self.num_tasks != 1 {
            let detail = format!(
                "has to be 1 for the start {}, not {}",
                self.start.prompt_tuning_init, self.num_tasks
            );
            return Err(Error::config("num_tasks", detail));
        }
        Ok(Some(factors))
    }

    /// Initial values of prompt, columns and rows.
    fn starts(&self, cx: &Attach<'_>, shapes: &[Vec<usize>; 3]) -> Result<[Init; 3]> {
        let small = Init::Normal { std: 0.02 };
        // A saved prompt brings its values.
        let source = if cx.common().inference_mode {
            None
        } else {
            self.source()?
        };
        let Some(factors) = source else {
            const SOURCES: [&str; 3] = [MEAN, EXACT, SHARED];
            let prompt = self.start.init(cx, self.num_virtual_tokens, &SOURCES)?;
            return Ok([prompt, small.clone(), small]);
        };
        let Some(path) = &self.prompt_tuning_init_state_dict_path else {
            let detail = format!(
                "has to be given for the start {}",
                self.start.prompt_tuning_init
            );
            return Err(Error::config(STATE, detail));
        };
        let tensors = cx.tensors(path).map_err(|e| e.context(STATE.to_owned()))?;
        let part = |key: &str, shape: &[usize]| -> Result<Init> {
            let mut value = found(&tensors, key)?;
            if shape.len() == 3 {
                value = match factors {
                    Factors::Own => return Ok(small.clone()),
                    Factors::Mean => mean_of_tasks(&value)?,
                    Factors::Of(task) => one_task(&value, task)?,
                };
            }
            if value.shape() != shape {
                let detail = format!("{key} is {:?} there, {shape:?} is needed", value.shape());
                return Err(Error::config(STATE, detail));
            }
            Ok(Init::Value(value))
        };
        Ok([
            part(PROMPT, &shapes[0])?,
            part(COLS, &shapes[1])?,
            part(ROWS, &shapes[2])?,
        ])
    }
}

fn found(tensors: &Tensors, key: &str) -> Result<Tensor> {
    tensors
        .get(key)
        .cloned()
        .ok_or_else(|| Error::config(STATE, format!("has no tensor {key}")))
}

fn mean_of_tasks(value: &Tensor) -> Result<Tensor> {
    let (tasks, a, b) = value.dims3()?;
    let sum = value.sum_axis(0)?.reshape(&[1, a, b])?;
    Ok(sum.scale(1.0 / tasks.max(1) as f32)?)
}

fn one_task(value: &Tensor, task: usize) -> Result<Tensor> {
    let (tasks, ..) = value.dims3()?;
    if task >= tasks {
        let detail = format!("has to be 0 to {}, not {task}", tasks.saturating_sub(1));
        return Err(Error::config("prompt_tuning_init_task", detail));
    }
    Ok(value.narrow(0, task, 1)?)
}

impl PeftMethod for MultitaskPromptTuning {
    soft_prompt!();

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (count, hidden) = (self.num_virtual_tokens, cx.tree().facts().hidden_size);
        check_count(cx, "num_virtual_tokens", count)?;
        self.model.check(hidden)?;
        for (field, value) in [("num_tasks", self.num_tasks), ("num_ranks", self.num_ranks)] {
            if value == 0 {
                return Err(Error::config(field, "has to be at least 1"));
            }
        }
        let shapes = [
            vec![count, hidden],
            vec![self.num_tasks, count, self.num_ranks],
            vec![self.num_tasks, self.num_ranks, hidden],
        ];
        let [prompt, cols, rows] = self.starts(cx, &shapes)?;
        Ok(Box::new(Tasks {
            prompt: cx.bare(PROMPT, &shapes[0], &prompt)?,
            cols: cx.bare(COLS, &shapes[1], &cols)?,
            rows: cx.bare(ROWS, &shapes[2], &rows)?,
            count,
            tasks: self.num_tasks,
        }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let facts = tree.facts();
        ModelFields::write(config, facts, facts.hidden_size, facts.num_heads);
        self.start.finish(config);
    }
}

struct Tasks {
    /// `[V, hidden]`
    prompt: Param,
    /// `[tasks, V, r]`
    cols: Param,
    /// `[tasks, r, hidden]`
    rows: Param,
    count: usize,
    tasks: usize,
}

impl Tasks {
    /// The task of each row.
    fn ids(&self, at: &PromptCx<'_>) -> Result<Vec<u32>> {
        let Some(ids) = &at.pass.task_ids else {
            if self.tasks == 1 {
                return Ok(vec![0; at.batch]);
            }
            let detail = format!(
                "every row has to say its task, 0 to {}: a field `task` in the data, or --task",
                self.tasks - 1
            );
            return Err(Error::config("task", detail));
        };
        if let Some(bad) = ids.iter().find(|&&id| id as usize >= self.tasks) {
            let detail = format!("{bad} is not one of the tasks 0 to {}", self.tasks - 1);
            return Err(Error::config("task", detail));
        }
        if ids.len() != at.batch {
            let detail = format!("{} for {} rows", ids.len(), at.batch);
            return Err(Error::config("task", detail));
        }
        Ok(ids.to_vec())
    }
}

impl Adapter for Tasks {
    fn prompt(&self, at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        let ids = self.ids(at)?;
        let of_rows = |x: Tensor| -> Result<Tensor> {
            let (tasks, a, b) = x.dims3()?;
            let picked = x.reshape(&[tasks, a * b])?.gather_rows(&ids)?;
            Ok(picked.reshape(&[ids.len(), a, b])?)
        };
        let factor = of_rows(self.cols.tensor())?.matmul(&of_rows(self.rows.tensor())?)?;
        Ok(Some(factor.mul(&self.prompt.tensor())?))
    }

    fn prompt_len(&self) -> usize {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Device, ModelFacts, ModuleTree, Network, Pass, Result, Tensor, Tensors};

    fn network() -> Network {
        let facts = ModelFacts {
            hidden_size: 2,
            ..ModelFacts::default()
        };
        Network::new(Base::new(ModuleTree::new(facts), &Device::cpu()))
    }

    /// Two tasks, two tokens, one rank: P = ((1, 2), (3, 4)), U = (1, 2) and (-1, 1), V = (1, 10) and (2, 3).
    fn source() -> Tensors {
        let tensor = |values: &[f32], shape: &[usize]| {
            Tensor::from_vec(values.to_vec(), shape, &Device::cpu()).expect("a tensor")
        };
        [
            ("prompt_embeddings", tensor(&[1.0, 2.0, 3.0, 4.0], &[2, 2])),
            (
                "prefix_task_cols",
                tensor(&[1.0, 2.0, -1.0, 1.0], &[2, 2, 1]),
            ),
            (
                "prefix_task_rows",
                tensor(&[1.0, 10.0, 2.0, 3.0], &[2, 1, 2]),
            ),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect()
    }

    fn config(fields: Value) -> Value {
        let mut config = json!({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2});
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }

    fn prompt(network: &Network, tasks: Option<Vec<u32>>) -> Result<Vec<f32>> {
        let batch = tasks.as_ref().map_or(1, Vec::len);
        let pass = Pass {
            task_ids: tasks.map(Arc::new),
            ..Pass::eval()
        };
        Ok(network.prompt(batch, &pass)?.expect("a prompt").to_vec()?)
    }

    #[test]
    fn rows_get_the_prompt_of_their_task() {
        let mut network = network();
        network
            .load("a", &config(json!({"num_tasks": 2})), source(), true)
            .expect("loads");
        let first = [1.0, 20.0, 6.0, 80.0];
        let second = [-2.0, -6.0, 6.0, 12.0];
        let both = prompt(&network, Some(vec![1, 0])).expect("runs");
        assert_eq!(both, [second, first].concat());
        for (tasks, named) in [(None, "task"), (Some(vec![2]), "0 to 1")] {
            let error = prompt(&network, tasks).expect_err("refused").to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_target_starts_from_its_source() {
        let of = |kind: &str, more: Value| -> Result<Vec<f32>> {
            let mut fields = config(more);
            fields["prompt_tuning_init"] = json!(kind);
            fields["prompt_tuning_init_state_dict_path"] = json!("there");
            let mut network = network();
            network.set_tensors(Arc::new(|path: &str| {
                assert_eq!(path, "there");
                Ok((Value::Null, source()))
            }));
            network.attach("a", &fields, 0)?;
            prompt(&network, None)
        };
        let exact = of("EXACT_SOURCE_TASK", json!({"prompt_tuning_init_task": 1}));
        assert_eq!(exact.expect("attaches"), [-2.0, -6.0, 6.0, 12.0]);
        // U = (0, 1.5), V = (1.5, 6.5).
        let mean = of("AVERAGE_SOURCE_TASKS", json!({})).expect("attaches");
        assert_eq!(mean, [0.0, 0.0, 3.0 * 2.25, 4.0 * 9.75]);
        let shared = of("ONLY_SOURCE_SHARED", json!({})).expect("attaches");
        assert!(shared.iter().all(|v| v.abs() < 0.1), "{shared:?}");
        for (fields, named) in [
            (json!({"num_tasks": 2}), "num_tasks"),
            (
                json!({"prompt_tuning_init_task": 2}),
                "prompt_tuning_init_task",
            ),
            (json!({"num_ranks": 2}), "prefix_task_cols"),
        ] {
            let error = of("EXACT_SOURCE_TASK", fields)
                .expect_err("refused")
                .to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
