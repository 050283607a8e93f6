//! The base model: its modules and their frozen parameters.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array1, Array2};
use peft_tensor::{BaseWeight, Device, FrozenWeight, Tensor};
use serde_json::Value;

use crate::{Error, ModelFacts, ModuleInfo, ModuleKind, ModuleTree, Result, Tensors};

/// Text to ids, for methods that start from text.
pub trait Tokenize: Send + Sync {
    /// The ids of a text with the special tokens the tokenizer adds.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    fn tokens(&self, text: &str) -> Result<Vec<u32>>;
}

/// The configuration (null for a bare file) and the tensors of a file or an adapter's folder by its path, for methods
/// that start from another adapter.
pub type ReadTensors = dyn Fn(&str) -> Result<(Value, Tensors)> + Send + Sync;

/// A matrix of the base by its parameter's name, and whether it belongs to a Conv1D, as it was before it was quantised
/// while loading; None where the checkpoint has none.
pub type Originals = dyn Fn(&str, bool) -> Result<Option<BaseWeight>> + Send + Sync;

/// A module tree with the parameters it names. Methods read it and never change it.
#[derive(Clone)]
pub struct Base {
    tree: ModuleTree,
    weights: BTreeMap<String, BaseWeight>,
    device: Device,
    tokenizer: Option<Arc<dyn Tokenize>>,
    reader: Option<Arc<ReadTensors>>,
    originals: Option<Arc<Originals>>,
}

impl Base {
    /// Without parameters yet; [`Base::insert`] them.
    pub fn new(tree: ModuleTree, device: &Device) -> Self {
        Self {
            tree,
            weights: BTreeMap::new(),
            device: device.clone(),
            tokenizer: None,
            reader: None,
            originals: None,
        }
    }

    pub(crate) fn set_tokenizer(&mut self, tokenizer: Arc<dyn Tokenize>) {
        self.tokenizer = Some(tokenizer);
    }

    pub(crate) fn tokenizer(&self) -> Option<&dyn Tokenize> {
        self.tokenizer.as_deref()
    }

    pub(crate) fn set_originals(&mut self, originals: Arc<Originals>) {
        self.originals = Some(originals);
    }

    /// The weight of a module as it was before it was quantised while loading; None where it was not.
    pub(crate) fn original(&self, name: &str) -> Result<Option<BaseWeight>> {
        match &self.originals {
            Some(read) => read(name, self.is_conv1d(name)),
            None => Ok(None),
        }
    }

    pub(crate) fn set_reader(&mut self, reader: Arc<ReadTensors>) {
        self.reader = Some(reader);
    }

    pub(crate) fn reader(&self) -> Option<&ReadTensors> {
        self.reader.as_deref()
    }

    /// An empty model on the processor, for programs that bring their own layers: see [`Base::linear`] and the others.
    pub fn custom() -> Self {
        let facts = ModelFacts {
            model_type: "custom".to_owned(),
            ..ModelFacts::default()
        };
        Self::new(ModuleTree::new(facts), &Device::cpu())
    }

    /// Adds a linear layer `y = x Wᵀ + b`, W `[out, in]`.
    ///
    /// # Errors
    /// If the bias is not as long as W has rows.
    pub fn linear(
        mut self,
        path: &str,
        weight: Array2<f32>,
        bias: Option<Array1<f32>>,
    ) -> Result<Self> {
        let (out, inside) = weight.dim();
        self.tree
            .push(ModuleInfo::linear(path, inside, out, bias.is_some()));
        if let Some(bias) = bias {
            if bias.len() != out {
                return Err(Error::module(
                    path,
                    format!("a bias of {} for a weight of {out} rows", bias.len()),
                ));
            }
            self.insert(
                format!("{path}.bias"),
                BaseWeight::dense(Tensor::from_array(bias, &self.device)?, false),
            );
        }
        self.insert_matrix(format!("{path}.weight"), weight)
    }

    /// Adds an embedding table `[rows, dim]`.
    ///
    /// # Errors
    /// Whatever the weight format says.
    pub fn embedding(mut self, path: &str, table: Array2<f32>) -> Result<Self> {
        let (rows, dim) = table.dim();
        self.tree.push(ModuleInfo::embedding(path, rows, dim));
        self.insert_matrix(format!("{path}.weight"), table)
    }

    /// Adds a norm.
    ///
    /// # Errors
    /// If the bias is not as long as the weight.
    pub fn norm(
        mut self,
        path: &str,
        weight: Array1<f32>,
        bias: Option<Array1<f32>>,
    ) -> Result<Self> {
        self.tree
            .push(ModuleInfo::norm(path, weight.len(), bias.is_some()));
        if let Some(bias) = bias {
            if bias.len() != weight.len() {
                return Err(Error::module(
                    path,
                    format!("a bias of {} for a weight of {}", bias.len(), weight.len()),
                ));
            }
            self.insert(
                format!("{path}.bias"),
                BaseWeight::dense(Tensor::from_array(bias, &self.device)?, false),
            );
        }
        self.insert(
            format!("{path}.weight"),
            BaseWeight::dense(Tensor::from_array(weight, &self.device)?, false),
        );
        Ok(self)
    }

    /// Adds a place where a sublayer's output of that width meets its residual.
    #[must_use]
    pub fn junction(mut self, path: &str, dim: usize) -> Self {
        self.tree.push(ModuleInfo::junction(path, dim));
        self
    }

    fn insert_matrix(mut self, name: String, matrix: Array2<f32>) -> Result<Self> {
        let (rows, cols) = matrix.dim();
        let values = Tensor::from_array(matrix, &Device::cpu())?.to_vec()?;
        let device = self.device.clone();
        self.insert(
            name,
            BaseWeight::frozen(FrozenWeight::from_f32(rows, cols, values)?, false, &device),
        );
        Ok(self)
    }

    /// Gives a parameter its value.
    pub fn insert(&mut self, name: impl Into<String>, weight: BaseWeight) {
        self.weights.insert(name.into(), weight);
    }

    /// A parameter by name.
    pub fn weight(&self, name: &str) -> Option<&BaseWeight> {
        self.weights.get(name)
    }

    /// Whether a parameter is the weight of a Conv1D.
    pub(crate) fn is_conv1d(&self, name: &str) -> bool {
        self.tree
            .iter()
            .any(|(_, m)| m.kind == ModuleKind::Conv1d && m.weight.as_deref() == Some(name))
    }

    /// A parameter's values in the layout of HF's class: `[in, out]` for a Conv1D, also where a GGUF file holds the
    /// transpose; vectors as vectors.
    pub(crate) fn hf_values(&self, name: &str) -> Result<Tensor> {
        let weight = self
            .weight(name)
            .ok_or_else(|| Error::other(format!("the base model has no parameter {name:?}")))?;
        if self.is_conv1d(name) {
            return Ok(weight.to_dense()?.t()?);
        }
        crate::attach::stored_values(weight)
    }

    /// Its modules.
    pub fn tree(&self) -> &ModuleTree {
        &self.tree
    }

    /// All parameters by name.
    pub fn weights(&self) -> &BTreeMap<String, BaseWeight> {
        &self.weights
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Checks that every parameter the tree names is there with its shape.
    ///
    /// # Errors
    /// Lists all that is missing or misshaped.
    pub fn check(&self) -> Result<()> {
        let (mut missing, mut misshaped) = (Vec::new(), Vec::new());
        let mut expect = |name: &str, shape: Vec<usize>| match self.weights.get(name) {
            None => missing.push(name.to_owned()),
            Some(w) => {
                // Frozen vectors are one row.
                let found: Vec<usize> = if shape.len() == 1 && w.shape().len() == 2 {
                    vec![w.shape().iter().product()]
                } else {
                    w.shape()
                };
                if found != shape {
                    misshaped.push(format!("{name}: {found:?}, expected {shape:?}"));
                }
            }
        };
        for (_, m) in self.tree.iter() {
            if let Some(name) = &m.weight {
                let mut shape = m.weight_shape();
                if m.kind == ModuleKind::Conv1d {
                    shape.reverse();
                }
                expect(name, shape);
            }
            if let Some(name) = &m.bias {
                expect(name, vec![m.out_features]);
            }
        }
        if missing.is_empty() && misshaped.is_empty() {
            return Ok(());
        }
        missing.dedup();
        Err(Error::Load {
            what: "the checkpoint".to_owned(),
            missing,
            unexpected: Vec::new(),
            misshaped,
        })
    }
}
