//! Values of fields of inserted networks that are more than a number or a word.

use std::collections::BTreeMap;

use peft_core::{Error, Result, Site};
use serde::{Deserialize, Serialize};

/// `reduction_factor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "has to be a number, or numbers by layer like {\"1\": 8, \"default\": 16}"
)]
pub enum Reduction {
    /// The same for all layers.
    All(f64),
    /// By layer index, the others' under `default`.
    ByLayer(BTreeMap<String, f64>),
}

/// `scaling`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "has to be a number, \"learned\" or \"channel\"")]
pub enum Scaling {
    /// Constant.
    Factor(f64),
    /// Trained.
    Trained(TrainedScaling),
}

/// A scaling that is trained, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainedScaling {
    /// One number.
    Learned,
    /// One for each feature.
    Channel,
}

/// `residual_before_ln`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "has to be true, false or \"post_add\"")]
pub enum ResidualFrom {
    /// The sublayer's output; what the bottleneck reads where false.
    Norm(bool),
    /// The sum of the sublayer's output and its residual.
    Sum(PostAdd),
}

/// The one word of [`ResidualFrom`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostAdd {
    /// Behind the sum.
    PostAdd,
}

/// `init_weights`, by AdapterHub's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Start {
    /// `bert`: weights normal with deviation 0.02.
    Bert,
    /// `mam_adapter`: down uniform with bound `1 / sqrt(in)`, up zero.
    ZeroUp,
    /// `houlsby`: weights normal with deviation 0.01, cut off at two of it.
    Truncated,
}

const STARTS: &str = "bert mam_adapter houlsby";

impl TryFrom<String> for Start {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        let found = STARTS.split(' ').position(|known| known == name);
        let start = [Self::Bert, Self::ZeroUp, Self::Truncated];
        found
            .and_then(|at| start.get(at).copied())
            .ok_or_else(|| format!("{name:?} is not one of {}", STARTS.replace(' ', ", ")))
    }
}

impl From<Start> for String {
    fn from(start: Start) -> Self {
        STARTS
            .split(' ')
            .nth(start as usize)
            .unwrap_or_default()
            .to_owned()
    }
}

/// Layers by index, or all of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged, expecting = "has to be \"all\" or a list of layers")]
pub enum Layers {
    /// Every one.
    All(All),
    /// These.
    Some(Vec<usize>),
}

/// The one word of [`Layers`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum All {
    /// Every one.
    All,
}

impl Default for Layers {
    fn default() -> Self {
        Self::All(All::All)
    }
}

impl Layers {
    /// Keeps the sites in these layers.
    ///
    /// # Errors
    /// If there are none, or none in one of the layers; names `field`.
    pub(crate) fn retain(&self, field: &str, sites: &mut Vec<Site>) -> Result<()> {
        let Self::Some(wanted) = self else {
            return Ok(());
        };
        let there: Vec<_> = sites.iter().filter_map(|s| s.layer).collect();
        if wanted.is_empty() || wanted.iter().any(|layer| !there.contains(layer)) {
            let detail = format!("{wanted:?}: has to be \"all\" or some of {there:?}");
            return Err(Error::config(field, detail));
        }
        sites.retain(|s| s.layer.is_some_and(|layer| wanted.contains(&layer)));
        Ok(())
    }
}
