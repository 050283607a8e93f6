//! Cross-entropy: loss and gradient in one go.

use peft_tensor::Result;

use crate::gpu::Gpu;
use crate::layers::RowParams;
use crate::memory::Data;
use crate::record::in_a_row;

impl Gpu {
    /// (loss `[1]`, dx); rows with a negative target are skipped.
    pub(crate) fn cross_entropy(
        &self,
        x: &Data,
        targets: &[i64],
        rows: usize,
        cols: usize,
    ) -> Result<(Data, Data)> {
        // Which classes there are is checked before this is called, so they fit; what is skipped is any negative number.
        let targets: Vec<i32> = targets
            .iter()
            .map(|&t| i32::try_from(t).unwrap_or(-1))
            .collect();
        let targets = self.put(&targets)?;
        let (losses, dx) = (self.room(rows)?, self.room(x.len)?);
        let params = RowParams {
            rows: rows as u32,
            cols: cols as u32,
            ..RowParams::default()
        };
        let binds = [x.bind(), targets.bind(), losses.bind(), dx.bind()];
        let kernel = self.of_rows("cross_entropy", cols, 2, 2);
        self.run(&kernel, &binds, &params, in_a_row(rows))?;
        Ok((self.sum_to(&losses, &[rows], &[1])?, dx))
    }
}
