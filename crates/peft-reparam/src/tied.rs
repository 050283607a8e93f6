//! One pair of matrices for both sides of a tied pair of embeddings, and the keys HF saves it under.

use std::sync::OnceLock;

use peft_core::{Result, Tensors};

/// The paths of both sides, known once the method is attached to a model.
#[derive(Clone, Debug, Default)]
pub(crate) struct TiedPair(OnceLock<(String, String)>);

impl TiedPair {
    /// The embedding keeps the matrices, the head uses them transposed.
    pub(crate) fn set(&self, embedding: &str, head: &str) {
        // A method is attached once; the first paths stand.
        let _ = self.0.set((embedding.to_owned(), head.to_owned()));
    }

    fn keys(&self) -> Vec<(String, String)> {
        let names = [
            ("lora_embedding_B", "lora_A.weight"),
            ("lora_embedding_A", "lora_B.weight"),
        ];
        let paths = self.0.get().into_iter();
        paths
            .flat_map(|(embedding, head)| {
                let key = |path: &str, name: &str| format!("base_model.model.{path}.{name}");
                names.map(|(from, to)| (key(embedding, from), key(head, to)))
            })
            .collect()
    }

    /// Adds the head's keys, which HF has beside the embedding's.
    pub(crate) fn save(&self, mut params: Tensors) -> Result<Tensors> {
        for (from, to) in self.keys() {
            if let Some(value) = params.get(&from) {
                let value = value.t()?;
                params.insert(to, value);
            }
        }
        Ok(params)
    }

    /// Takes the head's keys out again.
    pub(crate) fn load(&self, mut params: Tensors) -> Tensors {
        for (_, to) in self.keys() {
            params.remove(&to);
        }
        params
    }
}
