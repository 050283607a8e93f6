//! A method that uses every hook, dropout and a state of its own, so that the loop can be seen to serve them.

use std::sync::Mutex;

use peft_core::{
    Adapter, Attach, Call, GroupRule, Init, Param, ParamGroups, PeftMethod, Result, Site, Tensors,
    TrainCx, TrainHooks, register,
};
use peft_tensor::Tensor;
use serde::{Deserialize, Serialize};

/// `y = base + dropout(x) Dᵀ` with a full matrix D that starts at `start`.
#[derive(Serialize, Deserialize)]
#[serde(default)]
struct TrainProbe {
    start: f32,
    dropout: f32,
    penalty: f32,
    target_modules: Option<serde_json::Value>,
    /// A name under which the calls of the hooks are written down.
    diary: Option<String>,
}

impl Default for TrainProbe {
    fn default() -> Self {
        Self {
            start: 0.0,
            dropout: 0.25,
            penalty: 0.01,
            target_modules: None,
            diary: None,
        }
    }
}

register!(
    TrainProbe,
    id = "train_probe",
    title = "Probe",
    family = Reparameterized,
    subfamily = "tests",
    peft_type = "TRAIN_PROBE",
    paper = "none",
    example = "{}"
);

impl PeftMethod for TrainProbe {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let shape = [site.out_features, site.in_features];
        let delta = cx.param("probe.weight", &shape, &Init::Constant(self.start))?;
        Ok(Box::new(Delta {
            delta,
            dropout: self.dropout,
            diary: self.diary.clone(),
        }))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks {
            penalty: self.penalty,
            seen: 0,
            diary: self.diary.clone(),
        })
    }
}

struct Delta {
    delta: Param,
    dropout: f32,
    diary: Option<String>,
}

impl Adapter for Delta {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(w.plus(&self.delta.tensor())?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if let Some(name) = &self.diary {
            let entry = (format!("{name}: calls"), String::new());
            DIARIES.lock().unwrap().push(entry);
        }
        let x = call.dropout(call.x()?, self.dropout)?;
        Ok(call.base()?.add(&x.matmul_t(&self.delta.tensor())?)?)
    }

    fn by_rows(&self) -> bool {
        self.dropout == 0.0
    }
}

static DIARIES: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// What the hooks of one diary wrote.
pub(super) fn diary(name: &str) -> Vec<String> {
    let all = DIARIES.lock().unwrap();
    all.iter()
        .filter(|(n, _)| n == name)
        .map(|(_, entry)| entry.clone())
        .collect()
}

struct Hooks {
    penalty: f32,
    /// Steps this method has seen; it decides what the hooks do, so a resume that forgets it ends elsewhere.
    seen: u64,
    diary: Option<String>,
}

impl Hooks {
    fn note(&self, hook: &str, cx: &TrainCx<'_>) {
        if let Some(name) = &self.diary {
            DIARIES.lock().unwrap().push((
                name.clone(),
                format!(
                    "{hook} {} {} {} {}",
                    cx.step,
                    cx.grads.is_empty(),
                    cx.used.is_empty(),
                    cx.learning_rate
                ),
            ));
        }
    }
}

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.note("prepare", cx);
        Ok(())
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.note("before_forward", cx);
        Ok(())
    }

    fn reads_used(&self) -> bool {
        self.diary.as_deref() == Some("used")
    }

    fn param_groups(&self, groups: &mut ParamGroups) {
        let rule = GroupRule {
            pattern: r"layers\.1\.".into(),
            learning_rate: 3.0,
            weight_decay: Some(0.0),
        };
        groups.rules.push(rule);
    }

    fn penalty(&self, cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        self.note("penalty", cx);
        let Some(param) = cx.params.first() else {
            return Ok(None);
        };
        Ok(Some(
            param.tensor().square()?.sum_all()?.scale(self.penalty)?,
        ))
    }

    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.note("after_backward", cx);
        self.seen += 1;
        if self.seen.is_multiple_of(2)
            && let Some(param) = cx.params.first()
            && let Some(grad) = cx.grads.take(&param.tensor())
        {
            cx.grads.set(&param.tensor(), grad.scale(-1.0)?);
        }
        Ok(())
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.note("after_step", cx);
        Ok(())
    }

    fn state(&self) -> Result<Tensors> {
        let seen = Tensor::full(self.seen as f32, &[1], &peft_core::Device::cpu())?;
        Ok(Tensors::from([("seen".to_owned(), seen)]))
    }

    fn restore(&mut self, state: Tensors) -> Result<()> {
        if let Some(seen) = state.get("seen") {
            self.seen = seen.item()? as u64;
        }
        Ok(())
    }
}
