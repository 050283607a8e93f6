//! Two methods for the tests of compositions: one that adds a number at a junction, one with a prefix of one position.

use peft_core::{
    Adapter, Attach, Call, Common, Init, ModuleKind, ModuleTree, Param, PeftMethod, Prefix,
    PrefixCx, Result, Site, Targets, Tensor, register,
};
use serde::{Deserialize, Serialize};

/// Adds `c` to a sublayer's output.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Adds {
    c: f32,
}

register!(
    Adds,
    id = "adds",
    title = "Adds",
    family = Additive,
    subfamily = "tests",
    peft_type = "ADDS_FOR_TESTS",
    paper = "",
    example = "{}",
);

impl PeftMethod for Adds {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Junction]
    }

    fn default_targets(&self, _: &ModuleTree) -> Option<Targets> {
        Some(Targets::Pattern(r".*_adapters".to_owned()))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let c = cx.param("c", &[site.out_features], &Init::Constant(self.c))?;
        Ok(Box::new(Number(c)))
    }
}

struct Number(Param);

impl Adapter for Number {
    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        Ok(Some(call.x()?.scale(0.0)?.add(&self.0.tensor())?))
    }
}

/// Keys 2 and values 4 in front.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Ahead {}

register!(
    Ahead,
    id = "ahead",
    title = "Ahead",
    family = Additive,
    subfamily = "tests",
    peft_type = "AHEAD_FOR_TESTS",
    paper = "",
    example = "{}",
);

impl PeftMethod for Ahead {
    fn sites(&self, _: &ModuleTree, _: &Common) -> Result<Vec<Site>> {
        Ok(vec![Site::root()])
    }

    fn attach(&self, _: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(Kv(cx.bare(
            "kv",
            &[1, 1],
            &Init::Constant(2.0),
        )?)))
    }
}

struct Kv(Param);

impl Adapter for Kv {
    fn prefix(&self, _: &PrefixCx<'_>) -> Result<Option<Prefix>> {
        let k = self.0.tensor();
        Ok(Some(Prefix {
            v: k.scale(2.0)?,
            k,
        }))
    }
}
