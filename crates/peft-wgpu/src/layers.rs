//! Softmax, norms and rotary positions.

use bytemuck::NoUninit;
use peft_tensor::{Result, Rope};

use crate::frozen::gcd;
use crate::gpu::{Gpu, Kernel};
use crate::memory::Data;
use crate::record::{in_a_row, threads};

const LOOKUP: &[&str] = &[include_str!("wgsl/lookup.wgsl")];

/// Parameters of the kernels that work on rows.
#[repr(C)]
#[derive(Clone, Copy, Default, NoUninit)]
pub(crate) struct RowParams {
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    pub(crate) eps: f32,
    pub(crate) centre: u32,
    pub(crate) bias: u32,
    pub(crate) chunk: u32,
}

/// Parameters of the kernels that look rows up.
#[repr(C)]
#[derive(Clone, Copy, Default, NoUninit)]
struct LookupParams {
    n: u32,
    cols: u32,
    heads: u32,
    half: u32,
    sign: f32,
}

/// A norm over the last axis: its size, whether the mean is taken out, and what is added under the root.
#[derive(Clone, Copy)]
pub(crate) struct Norm {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) centre: bool,
    pub(crate) eps: f32,
}

impl Norm {
    fn params(&self) -> RowParams {
        RowParams {
            rows: self.rows as u32,
            cols: self.cols as u32,
            eps: self.eps,
            centre: u32::from(self.centre),
            ..RowParams::default()
        }
    }
}

fn sized(rows: usize, cols: usize) -> RowParams {
    RowParams {
        rows: rows as u32,
        cols: cols as u32,
        ..RowParams::default()
    }
}

impl Gpu {
    pub(crate) fn max_rows(&self, x: &Data, rows: usize, cols: usize) -> Result<Data> {
        if cols == 0 {
            return self.fill(rows, f32::NEG_INFINITY);
        }
        let y = self.room(rows)?;
        let kernel = self.of_rows("max_rows", cols, 1, 1);
        self.run(
            &kernel,
            &[x.bind(), y.bind()],
            &sized(rows, cols),
            in_a_row(rows),
        )?;
        Ok(y)
    }

    pub(crate) fn softmax(&self, x: &Data, rows: usize, cols: usize) -> Result<Data> {
        let y = self.room(x.len)?;
        let kernel = self.of_rows("softmax", cols, 1, 1);
        self.run(
            &kernel,
            &[x.bind(), y.bind()],
            &sized(rows, cols),
            in_a_row(rows),
        )?;
        Ok(y)
    }

    pub(crate) fn softmax_grad(
        &self,
        y: &Data,
        dy: &Data,
        rows: usize,
        cols: usize,
    ) -> Result<Data> {
        let dx = self.room(y.len)?;
        let kernel = self.of_rows("softmax_grad", cols, 2, 1);
        let binds = [y.bind(), dy.bind(), dx.bind()];
        self.run(&kernel, &binds, &sized(rows, cols), in_a_row(rows))?;
        Ok(dx)
    }

    pub(crate) fn norm(&self, x: &Data, w: &Data, b: Option<&Data>, norm: Norm) -> Result<Data> {
        let y = self.room(x.len)?;
        let params = RowParams {
            bias: u32::from(b.is_some()),
            ..norm.params()
        };
        // A binding has to be there; without a bias nothing reads it.
        let binds = [x.bind(), w.bind(), b.unwrap_or(w).bind(), y.bind()];
        let kernel = self.of_rows("norm", norm.cols, 3, 1);
        self.run(&kernel, &binds, &params, in_a_row(norm.rows))?;
        Ok(y)
    }

    /// dx, and (dw, db) if wanted.
    pub(crate) fn norm_grad(
        &self,
        x: &Data,
        w: &Data,
        dy: &Data,
        norm: Norm,
        want: bool,
    ) -> Result<(Data, Option<(Data, Data)>)> {
        let (dx, moments) = (self.room(x.len)?, self.room(2 * norm.rows)?);
        let binds = [x.bind(), w.bind(), dy.bind(), dx.bind(), moments.bind()];
        let kernel = self.of_rows("norm_grad", norm.cols, 3, 2);
        self.run(&kernel, &binds, &norm.params(), in_a_row(norm.rows))?;
        if !want {
            return Ok((dx, None));
        }
        let chunk = norm.rows.div_ceil(64).max(16);
        let runs = norm.rows.div_ceil(chunk);
        let (dw, db) = (self.room(runs * norm.cols)?, self.room(runs * norm.cols)?);
        let params = RowParams {
            chunk: chunk as u32,
            ..norm.params()
        };
        let binds = [x.bind(), dy.bind(), moments.bind(), dw.bind(), db.bind()];
        let kernel = self.of_rows("norm_grad_weight", norm.cols, 3, 2);
        self.run(&kernel, &binds, &params, threads(runs * norm.cols))?;
        let (from, to) = ([runs, norm.cols], [1, norm.cols]);
        let sums = (self.sum_to(&dw, &from, &to)?, self.sum_to(&db, &from, &to)?);
        Ok((dx, Some(sums)))
    }

    pub(crate) fn rope(&self, x: &Data, rope: &Rope, inverse: bool) -> Result<Data> {
        let y = self.room(x.len)?;
        let floats = |table: &Vec<f32>| self.put(&table[..]);
        let cos = self.table(&rope.cos, "f32", floats)?;
        let sin = self.table(&rope.sin, "f32", floats)?;
        let positions = self.table(&rope.positions, "u32", |t| self.put(&t[..]))?;
        let params = LookupParams {
            n: x.len as u32,
            cols: rope.head_dim as u32,
            heads: rope.heads as u32,
            half: rope.half as u32,
            sign: if inverse { -1.0 } else { 1.0 },
        };
        let binds = [x.bind(), cos.bind(), sin.bind(), positions.bind(), y.bind()];
        self.run(
            &Kernel::new("rope", LOOKUP, 4, 1),
            &binds,
            &params,
            threads(x.len),
        )?;
        Ok(y)
    }

    pub(crate) fn gather(&self, x: &Data, cols: usize, ids: &[u32]) -> Result<Data> {
        let y = self.room(ids.len() * cols)?;
        for (first, ids) in self.row_parts(ids, cols) {
            let n = ids.len() * cols;
            let params = LookupParams {
                n: n as u32,
                cols: cols as u32,
                ..LookupParams::default()
            };
            let ids = self.put(ids)?;
            let binds = [x.bind(), ids.bind(), y.part(first * cols, n)];
            self.run(
                &Kernel::new("gather", LOOKUP, 2, 1),
                &binds,
                &params,
                threads(n),
            )?;
        }
        Ok(y)
    }

    /// Runs of `ids` whose rows of `cols` fit a binding and begin where one may: (position of the first, the run).
    pub(crate) fn row_parts<'a>(
        &self,
        ids: &'a [u32],
        cols: usize,
    ) -> impl Iterator<Item = (usize, &'a [u32])> + use<'a> {
        let align = (Self::ALIGN / 4) as usize;
        let unit = align / gcd(align, cols.max(1));
        let fit = self.max_binding as usize / 4 / cols.max(1);
        let step = (fit / unit).max(1) * unit;
        ids.chunks(step)
            .enumerate()
            .map(move |(i, ids)| (i * step, ids))
    }

    pub(crate) fn scatter_add(
        &self,
        dy: &Data,
        rows: usize,
        cols: usize,
        ids: &[u32],
    ) -> Result<Data> {
        let y = self.fill(rows * cols, 0.0)?;
        let (order, mut starts, mut named) = (by_id(ids), vec![0u32], vec![]);
        for (at, &row) in order.iter().enumerate() {
            let id = ids[row as usize];
            if named.last() != Some(&id) {
                if !named.is_empty() {
                    starts.push(at as u32);
                }
                named.push(id);
            }
        }
        starts.push(order.len() as u32);
        if named.is_empty() || cols == 0 {
            return Ok(y);
        }
        let params = LookupParams {
            n: (named.len() * cols) as u32,
            cols: cols as u32,
            ..LookupParams::default()
        };
        let (named, starts, order) = (self.put(&named)?, self.put(&starts)?, self.put(&order)?);
        let binds = [
            dy.bind(),
            named.bind(),
            starts.bind(),
            order.bind(),
            y.bind(),
        ];
        let kernel = Kernel::new("scatter_rows", LOOKUP, 4, 1);
        self.run(&kernel, &binds, &params, threads(params.n as usize))?;
        Ok(y)
    }
}

/// Positions of `ids` in order of the ids, those of one id in their own order.
fn by_id(ids: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&i| ids[i as usize]);
    order
}
