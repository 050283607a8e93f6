//! Where the entries of a sparse difference are: a parameter of whole numbers, decoded once for every value it takes.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use peft_core::{Error, Param, Result, Tensor};

/// The parameter, `[2, k]`: rows, then columns. It changes a few times in a run and is asked for in every pass.
pub(crate) struct Places {
    param: Param,
    /// The entries as last decoded, and how often the parameter had changed by then.
    decoded: Mutex<Option<(u64, Arc<Entries>)>>,
}

/// Decoded places.
pub(crate) struct Entries {
    pub(crate) rows: Vec<u32>,
    pub(crate) cols: Vec<u32>,
    /// Row and number of each entry, sorted: made for the first lookup.
    by_row: OnceLock<Vec<(u32, usize)>>,
}

impl Places {
    pub(crate) fn new(param: Param) -> Self {
        Self {
            param,
            decoded: Mutex::default(),
        }
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.param.numel() == 0
    }

    /// Puts the entries elsewhere: `[2, k]`.
    pub(crate) fn set(&self, places: Tensor) -> Result<()> {
        self.param.set(places)
    }

    /// The entries in a weight of `rows` x `cols`; `wrong` makes an error of what is no place there.
    pub(crate) fn entries(
        &self,
        (rows, cols): (usize, usize),
        wrong: impl Fn(String) -> Error,
    ) -> Result<Arc<Entries>> {
        let changes = self.param.changes();
        let mut decoded = self.decoded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((then, entries)) = &*decoded
            && *then == changes
        {
            return Ok(entries.clone());
        }
        let all = self.param.tensor().to_vec()?;
        let (r, c) = all.split_at(all.len() / 2);
        let outside = |at| wrong(format!("{at} is no place in a weight of {rows} x {cols}"));
        let entries = Arc::new(Entries {
            rows: inside(r, rows).map_err(outside)?,
            cols: inside(c, cols).map_err(outside)?,
            by_row: OnceLock::new(),
        });
        *decoded = Some((changes, entries.clone()));
        Ok(entries)
    }
}

/// As whole numbers below `len`, or the first that is none.
fn inside(axis: &[f32], len: usize) -> std::result::Result<Vec<u32>, f32> {
    let no_place = |i: &&f32| !(**i >= 0.0 && **i < len as f32 && i.fract() == 0.0);
    match axis.iter().find(no_place) {
        Some(at) => Err(*at),
        None => Ok(axis.iter().map(|&i| i as u32).collect()),
    }
}

impl Entries {
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Counted row by row in a weight of `cols` columns.
    pub(crate) fn flat(&self, cols: usize) -> Vec<u32> {
        let places = self.rows.iter().zip(&self.cols);
        places.map(|(r, c)| r * cols as u32 + c).collect()
    }

    /// Numbers of the entries in `row`.
    pub(crate) fn in_row(&self, row: u32) -> impl Iterator<Item = usize> {
        let order = self.by_row.get_or_init(|| {
            let mut order: Vec<_> = self.rows.iter().copied().zip(0..).collect();
            order.sort_unstable();
            order
        });
        let first = order.partition_point(|(r, _)| *r < row);
        let found = order[first..].iter().take_while(move |(r, _)| *r == row);
        found.map(|(_, entry)| *entry)
    }
}
