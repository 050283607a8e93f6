//! Single rows of an embedding, trained.

use std::sync::Arc;

use peft_tensor::Tensor;

use crate::attach::Injector;
use crate::builtin::{key_of, tied_partner};
use crate::{Adapter, Call, Error, Init, ModuleKind, Param, Result, Slot};

/// Some rows of an embedding, trained; saved as the rows themselves. On the tied head the same rows act as outputs.
pub struct TokenRows {
    ids: Vec<u32>,
    /// `[ids, dim]`
    rows: Param,
}

impl TokenRows {
    /// Trains rows `ids` of `module`, or of the input embedding, and of the head where it is tied to it; saved under
    /// `<module>.<key>`. Errors name `field`.
    ///
    /// # Errors
    /// If there is no such module, or the ids are not different rows of it.
    pub fn attach(
        cx: &mut Injector<'_>,
        module: Option<&str>,
        ids: &[u32],
        field: &str,
        key: &str,
    ) -> Result<()> {
        let name = match module {
            Some(name) => name.to_owned(),
            None => cx.tree().facts().input_embedding.clone().ok_or_else(|| {
                Error::config(
                    field,
                    "the model has no input embedding; give {\"module\": [rows]}",
                )
            })?,
        };
        let found = cx.tree().subtree(field, std::slice::from_ref(&name))?;
        for id in found {
            if cx.tree().info(id).weight.is_none() {
                continue;
            }
            let site = cx.tree().site(id);
            let rows = if site.kind == ModuleKind::Embedding {
                site.in_features
            } else {
                site.out_features
            };
            let mut unique = ids.to_vec();
            unique.sort_unstable();
            unique.dedup();
            if ids.is_empty()
                || unique.len() != ids.len()
                || ids.iter().any(|&i| i as usize >= rows)
            {
                let detail = format!(
                    "has to be different rows of `{}`, 0 to {}",
                    site.path,
                    rows.saturating_sub(1)
                );
                return Err(Error::config(field, detail));
            }
            if cx.store.selected.contains_key(&(id, Slot::Weight)) {
                let detail = format!(
                    "`{}` is in modules_to_save, which trains all of its rows",
                    site.path
                );
                return Err(Error::config(field, detail));
            }
            let weight = cx
                .tree()
                .info(id)
                .weight
                .as_ref()
                .and_then(|n| cx.base.weight(n));
            let weight = weight.ok_or_else(|| Error::module(&site.path, "has no weight"))?;
            let table = weight.to_dense()?;
            let value = Init::Value(table.gather_rows(ids)?).tensor(
                &[ids.len(), table.last_dim()],
                cx.key,
                cx.base.device(),
            )?;
            let key = key_of(cx, &site.path, key);
            let rows = cx.store.insert(Param::new(key, &value, true))?;
            let adapter: Arc<dyn Adapter> = Arc::new(TokenRows {
                ids: ids.to_vec(),
                rows,
            });
            cx.place(site, adapter.clone(), false);
            if let Some(other) = tied_partner(cx, id) {
                cx.place(cx.tree().site(other), adapter, true);
            }
        }
        Ok(())
    }

    /// Trained rows minus what is there, `[ids, dim]`.
    fn change(&self, present: &Tensor) -> Result<Tensor> {
        Ok(self.rows.tensor().sub(present)?)
    }
}

impl Adapter for TokenRows {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let rows = w.shape().first().copied().unwrap_or(0);
        let change = self.change(&w.gather_rows(&self.ids)?)?;
        Ok(Some(w.plus(&change.scatter_rows(&self.ids, rows)?)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if !call.is_embedding() {
            return call.through_weight(self);
        }
        // Only the positions that hold one of the trained ids change.
        let (mut positions, mut which) = (Vec::new(), Vec::new());
        for (position, id) in call.ids()?.iter().enumerate() {
            if let Some(row) = self.ids.iter().position(|known| known == id) {
                positions.push(position as u32);
                which.push(row as u32);
            }
        }
        let base = call.base()?;
        let rows = base.shape()[0];
        if positions.is_empty() {
            // Rows that do not occur have a gradient, of zeros: a batch without any is a step like others.
            let own = self.rows.tensor();
            if rows == 0 || !own.requires_grad() {
                return Ok(base);
            }
            let nothing = own.gather_rows(&[0])?.scale(0.0)?;
            return Ok(base.add(&nothing.scatter_rows(&[0], rows)?)?);
        }
        let change = self
            .rows
            .tensor()
            .gather_rows(&which)?
            .sub(&base.gather_rows(&positions)?)?;
        Ok(base.add(&change.scatter_rows(&positions, rows)?)?)
    }
}
