//! What a family of models has to do to be one: embed, run layers, read out.

use std::ops::Range;
use std::sync::Arc;

use peft_core::{Error, ModuleId, ModuleInfo, ModuleTree, Network, Pass, Result};
use peft_tensor::{Tensor, TensorError, concat};

use crate::attend::{KvCache, Rows, per_row};
use crate::config::ModelConfig;
use crate::model::{Batch, Task};

/// A model's code over the modules of a [`Network`].
pub(crate) trait Architecture: Send + Sync {
    /// Hidden states `[B, V + S, hidden]` after the last norm.
    fn hidden(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        cache: Option<&mut KvCache>,
        pass: &Pass,
    ) -> Result<Tensor>;

    /// The block of that number alone, on hidden states of rows without padding, nothing in front of them.
    fn block(
        &self,
        number: usize,
        network: &Network,
        x: &Tensor,
        rows: &Rows,
        pass: &Pass,
    ) -> Result<Tensor>;

    /// Logits of rows `[.., hidden]`: the language model's head, or the classifier's on rows that [`pool`] picked.
    ///
    /// [`pool`]: Architecture::pool
    fn head(&self, network: &Network, rows: &Tensor, pass: &Pass) -> Result<Tensor>;

    /// Hidden states behind the last norm of these positions of the flattened rows alone, `[ids, hidden]`; other rows of the
    /// last layer need not be computed.
    fn hidden_of(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        ids: &[u32],
        pass: &Pass,
    ) -> Result<Tensor> {
        let all = self.hidden(network, batch, None, pass)?;
        positions_of(network, &all, batch, ids, pass)
    }

    /// For classification: the row of each text that its label is read from, `[texts, hidden]`.
    fn pool(&self, hidden: &Tensor, batch: &Batch) -> Result<Tensor>;

    /// What [`pool`](Architecture::pool) picks of the batch's hidden states; other rows of the last layer need not be
    /// computed.
    fn texts(&self, network: &Arc<Network>, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        self.pool(&self.hidden(network, batch, None, pass)?, batch)
    }
}

/// Some positions of the flattened hidden states of a batch, `[ids, hidden]`.
pub(crate) fn positions_of(
    network: &Network,
    hidden: &Tensor,
    batch: &Batch,
    ids: &[u32],
    pass: &Pass,
) -> Result<Tensor> {
    let (_, width, _) = hidden.dims3()?;
    let announced = network.prompt_len_in(pass) + batch.seq;
    if width != announced {
        let detail = format!("{width} positions, {announced} were announced by the adapters");
        return Err(Error::other(detail));
    }
    Ok(hidden.flatten_rows()?.gather_rows(ids)?)
}

/// A tree under construction together with the ids a model keeps.
pub(crate) struct Builder {
    pub(crate) tree: ModuleTree,
}

impl Builder {
    pub(crate) fn push(&mut self, module: ModuleInfo) -> ModuleId {
        self.tree.push(module)
    }

    pub(crate) fn container(&mut self, path: &str) {
        self.tree
            .push(ModuleInfo::new(path, peft_core::ModuleKind::Container));
    }

    pub(crate) fn linear(&mut self, path: String, from: usize, to: usize, bias: bool) -> ModuleId {
        self.push(ModuleInfo::linear(&path, from, to, bias))
    }

    /// A place that hidden states pass.
    pub(crate) fn stream(&mut self, path: String, dim: usize) -> ModuleId {
        self.push(ModuleInfo::stream(&path, dim))
    }

    pub(crate) fn norm(&mut self, path: String, dim: usize, bias: bool) -> ModuleId {
        self.push(ModuleInfo::norm(&path, dim, bias))
    }
}

/// Why rows with virtual tokens are not shared.
pub(crate) const PROMPTED: &str =
    "an adapter puts virtual tokens in front of each row, so that a row can hold but one text";

/// Input embeddings with the virtual tokens of the active adapters in front: `[B, V + S, hidden]`, and what attention
/// has to know of the rows. Virtual tokens come once, at the start of a cached text.
pub(crate) fn embedded(
    network: &Network,
    embedding: ModuleId,
    scale: Option<f32>,
    batch: &Batch,
    seen: usize,
    pass: &Pass,
) -> Result<(Tensor, Rows)> {
    let mut x = network.embed(embedding, &batch.ids, pass)?;
    if let Some(scale) = scale {
        x = x.scale(scale)?;
    }
    let mut x = x.reshape(&[batch.batch, batch.seq, x.last_dim()])?;
    let mut keys = batch.mask.clone();
    let mut added = 0;
    if seen > 0 && batch.segments.is_some() {
        return Err(Error::config(
            "segments",
            "texts that share a row are not generated",
        ));
    }
    if seen == 0
        && let Some(prompt) = network.prompt(batch.batch, pass)?
    {
        if batch.segments.is_some() {
            return Err(Error::config("segments", PROMPTED));
        }
        let prompt = per_row(&prompt, batch.batch)?;
        let virtual_tokens = prompt.dims3()?.1;
        added = virtual_tokens;
        x = concat(&[&prompt, &x], 1)?;
        keys = keys.map(|mask| {
            let row = |r: &[bool]| {
                std::iter::repeat_n(true, virtual_tokens)
                    .chain(r.iter().copied())
                    .collect::<Vec<_>>()
            };
            mask.chunks(batch.seq.max(1)).flat_map(row).collect()
        });
    }
    let seq = x.dims3()?.1;
    Ok((
        x,
        Rows {
            batch: batch.batch,
            seq,
            keys: keys.map(Arc::new),
            seen,
            virtual_tokens: added,
            segments: batch.segments.clone().map(Arc::new),
            shared: batch.shared,
        },
    ))
}

/// Positions `first..` of every row of the batch, or of every text of it where several share a row.
pub(crate) fn positions(rows: &Rows, first: usize) -> Result<Arc<Vec<u32>>> {
    let end =
        u32::try_from(first + rows.seq).map_err(|_| Error::other("the sequence is too long"))?;
    if let Some(segments) = &rows.segments {
        let mut positions = Vec::with_capacity(segments.len());
        for row in segments.chunks(rows.seq.max(1)) {
            let mut begin = first;
            for text in row.chunk_by(|a, b| a == b) {
                positions.extend((begin as u32..).take(text.len()));
                // Behind what all of them begin with.
                begin = first + rows.shared;
            }
        }
        return Ok(Arc::new(positions));
    }
    let one: Vec<u32> = (first as u32..end).collect();
    Ok(Arc::new(
        one.iter()
            .copied()
            .cycle()
            .take(one.len() * rows.batch)
            .collect(),
    ))
}

/// The block of that number.
pub(crate) fn numbered<T>(blocks: &[T], number: usize) -> Result<&T> {
    blocks.get(number).ok_or_else(|| {
        Error::other(format!(
            "the model has {} blocks and none of number {number}",
            blocks.len()
        ))
    })
}

/// Runs the layer of that number, recomputing it in the backward pass if the pass says so.
pub(crate) fn layer(
    number: usize,
    network: &Arc<Network>,
    x: &Tensor,
    pass: &Pass,
    run: impl Fn(&Network, &Tensor, &Pass) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if number >= pass.checkpoint {
        return run(network, x, pass);
    }
    let (network, pass) = (network.clone(), pass.clone());
    Ok(peft_tensor::checkpoint(&[x], move |inputs| {
        run(&network, &inputs[0], &pass).map_err(into_tensor_error)
    })?)
}

/// An error on its way through a tensor operation.
pub(crate) fn into_tensor_error(error: Error) -> TensorError {
    match error {
        Error::Tensor(e) => e,
        other if other.is_device() => TensorError::Device(other.to_string()),
        other => TensorError::Unsupported(other.to_string()),
    }
}

/// The last token of each text that is no padding, `[texts, hidden]`: where decoders read a text's label.
pub(crate) fn last_tokens(config: &ModelConfig, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
    let len = hidden.dims3()?.1;
    let added = len - batch.seq;
    let last = |text: Range<usize>| {
        let last = text.len().checked_sub(1);
        let found = match (&batch.mask, config.pad_token) {
            (Some(mask), _) => mask[text.clone()].iter().rposition(|&seen| seen),
            (None, Some(pad)) if batch.segments.is_none() => {
                batch.ids[text.clone()].iter().rposition(|&id| id != pad)
            }
            (None, _) => last,
        };
        // Virtual tokens stand in front of each row.
        let row = text.start / batch.seq;
        ((row + 1) * added + text.start + found.unwrap_or(0)) as u32
    };
    let rows: Vec<u32> = batch.texts().into_iter().map(last).collect();
    Ok(hidden.flatten_rows()?.gather_rows(&rows)?)
}

/// Positions that a text of these rows needs: the row's, or the longest text's where several share one.
pub(crate) fn longest(rows: &Rows) -> usize {
    let Some(segments) = &rows.segments else {
        return rows.seq;
    };
    let texts = segments
        .chunks(rows.seq.max(1))
        .flat_map(|row| row.chunk_by(|a, b| a == b));
    rows.shared + texts.map(<[u32]>::len).max().unwrap_or(0)
}

/// Labels of the task's head, if it has one.
pub(crate) fn labels(task: &Task) -> Option<usize> {
    match task {
        Task::SequenceClassification { num_labels } => Some(*num_labels),
        Task::CausalLm | Task::Features => None,
    }
}
