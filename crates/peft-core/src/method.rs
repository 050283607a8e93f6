//! What a method is, and what one of its adapters can do.

use peft_tensor::Tensor;
use serde_json::Value;

use crate::{
    Attach, Call, Common, Injector, ModelFacts, ModuleKind, ModuleTree, Pass, Result, Site,
    Targets, Tensors, TrainHooks, matcher,
};

/// A method: the struct of its fields in `adapter_config.json`.
///
/// Most methods write [`PeftMethod::attach`] and an [`Adapter`], nothing more.
pub trait PeftMethod: Send + Sync {
    /// Kinds of modules it can act on.
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Linear, ModuleKind::Conv1d]
    }

    /// Targets where the configuration gives none.
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let names = matcher::default_targets(&tree.facts().model_type)?;
        Some(Targets::Names(
            names.iter().map(|&n| n.to_owned()).collect(),
        ))
    }

    /// Where it acts: what `target_modules` and its companions match.
    ///
    /// # Errors
    /// If a name matches nothing, or the method cannot act there.
    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        tree.matching(common, self.kinds(), self.default_targets(tree))
    }

    /// Makes its parameters at one site; the name given to `cx.param` is the key's suffix on disk.
    ///
    /// # Errors
    /// If a field does not fit the site: names field, module and valid range.
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>>;

    /// Goes over all sites. Only compositions of methods have another way.
    ///
    /// # Errors
    /// Whatever the sites return.
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        cx.attach_all(self.sites(cx.tree(), cx.common())?, |site, cx| {
            self.attach(site, cx)
        })
    }

    /// Behaviour between steps; `()` is none.
    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(())
    }

    /// From live parameters, transient ones included, to what is on disk, where that differs; transient ones are left
    /// out of the file whatever this returns.
    ///
    /// # Errors
    /// If the parameters cannot be brought into that form.
    fn save(&self, params: Tensors) -> Result<Tensors> {
        Ok(params)
    }

    /// The inverse of [`PeftMethod::save`].
    ///
    /// # Errors
    /// If the file is not of that form.
    fn load(&self, params: Tensors) -> Result<Tensors> {
        Ok(params)
    }

    /// Of a composition: its members, each by what stands in front of its keys and its `peft_type`.
    fn members(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Of a composition: a saved adapter with these of its members alone, in this order.
    ///
    /// # Errors
    /// If there is no such member.
    fn keep_members(
        &self,
        _keep: &[usize],
        _config: Value,
        _params: Tensors,
    ) -> Result<(Value, Tensors)> {
        Err(crate::Error::config("members", "the method has none"))
    }

    /// In front of a base module's path in a saved key; prompt methods of HF wrap the model once less.
    fn module_prefix(&self) -> &'static str {
        "base_model.model."
    }

    /// Last word on the fields to be saved, once the model is known (number of layers, token width), and again when the
    /// adapter is saved.
    fn finish_config(&self, _config: &mut serde_json::Map<String, Value>, _tree: &ModuleTree) {}
}

/// One method at one site. Each facet is one way of acting on the model; an adapter may have several.
pub trait Adapter: Send + Sync {
    /// W -> W', both of the logical shape `[out, in]` (`[rows, dim]` for an embedding). With this alone the core can
    /// run, merge and unmerge the adapter. None = it is not a change of the weight. W is given away: what is added by
    /// [`Tensor::plus`] or [`Tensor::plus_matmul_t`] goes where W is, without a copy of it.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn weight(&self, _w: Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// b -> b'; unchanged unless the method says otherwise.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        Ok(b)
    }

    /// Around the module's call, or the fast equal of [`Adapter::weight`].
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        call.through_weight(self)
    }

    /// What this adapter adds to what is below it: its share of a linear module's output, or the part that joins a
    /// sublayer's output before the norm of a junction. For compositions, which weigh and sum such parts; None = it does
    /// not work by adding.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn added(&self, _call: &Call<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// What [`Adapter::added`] is computed from (a bottleneck's input, behind the norm in front of it): compositions
    /// decide by it how much each part counts.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn reads(&self, call: &Call<'_>) -> Result<Tensor> {
        call.x().cloned()
    }

    /// Keys and values in front of a layer's own.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn prefix(&self, _at: &PrefixCx<'_>) -> Result<Option<Prefix>> {
        Ok(None)
    }

    /// By how much [`Adapter::prefix`] moves the positions of the text.
    fn prefix_len(&self) -> usize {
        0
    }

    /// Whether [`Adapter::prefix`] puts anything in front, be it without moving positions.
    fn has_prefix(&self) -> bool {
        self.prefix_len() > 0
    }

    /// How much closer together rotary positions are than the model has them (position interpolation): they are divided
    /// by it. Asked of adapters of the model as a whole.
    fn position_scale(&self) -> f32 {
        1.0
    }

    /// Whether it leaves its module as it is outside of training: a merge may leave it out.
    fn only_in_training(&self) -> bool {
        false
    }

    /// Whether it makes each row of its output from that row of its input alone, and so that equal rows come out equal,
    /// also in training: then what texts have in common is run once for all of them. A no costs nothing but time.
    fn by_rows(&self) -> bool {
        false
    }

    /// Virtual tokens in front of the input embeddings: `[V, hidden]`, or `[batch, V, hidden]` where rows differ.
    ///
    /// # Errors
    /// Whatever its arithmetic returns.
    fn prompt(&self, _at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Positions [`Adapter::prompt`] adds.
    fn prompt_len(&self) -> usize {
        0
    }

    /// Where [`Adapter::prompt`] comes in.
    fn prompt_place(&self) -> PromptPlace {
        PromptPlace::Input
    }

    /// Tokens that a language model is to say inside the prompt, which training asks for along with the text's.
    fn prompt_labels(&self) -> Vec<PromptLabel> {
        Vec::new()
    }
}

/// A token that belongs at a position of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PromptLabel {
    /// The position, from 0; the model is asked for the token one position earlier.
    pub position: usize,
    /// The token.
    pub token: u32,
    /// What its loss counts, beside 1 for a token of the text.
    pub weight: f32,
}

/// An adapter that only trains stand-ins for base parameters ([`Attach::select`]) and does nothing on its own.
pub struct Selected;

impl Adapter for Selected {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(w))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        call.base()
    }
}

/// A layer asking for its prefix.
pub struct PrefixCx<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Sizes of the model.
    pub facts: &'a ModelFacts,
    /// Rows of the batch.
    pub batch: usize,
    /// The sublayer's input `[batch, seq, hidden]`, normed where the model norms in front.
    pub hidden: &'a Tensor,
    /// The pass.
    pub pass: &'a Pass,
}

/// Where virtual tokens come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptPlace {
    /// In front of the input embeddings: they get positions like other tokens.
    #[default]
    Input,
    /// In front of what the first block sees, behind whatever the model does to embeddings.
    Blocks,
    /// There, but behind the first token.
    BlocksBehindFirst,
}

/// The model asking for virtual tokens.
pub struct PromptCx<'a> {
    /// Sizes of the model.
    pub facts: &'a ModelFacts,
    /// Rows of the batch.
    pub batch: usize,
    /// The pass.
    pub pass: &'a Pass,
}

/// Keys and values, each `[P, kv_heads * head_dim]` or `[batch, P, kv_heads * head_dim]`.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// Keys, not rotated.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}
