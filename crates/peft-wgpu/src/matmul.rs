//! Products. One kernel for every layout and every stored form of the right operand; see `wgsl/matmul.wgsl`.

use bytemuck::NoUninit;
use peft_tensor::{Buffer, Result};

use crate::gpu::{Gpu, Kernel};
use crate::memory::{Data, get};
use crate::record::{Bind, threads};

pub(crate) const OPERANDS: &str = include_str!("wgsl/operands.wgsl");
pub(crate) const TILES: &str = include_str!("wgsl/matmul.wgsl");
pub(crate) const WIDE: &str = include_str!("wgsl/wide.wgsl");
pub(crate) const UNITS: &str = include_str!("wgsl/coop.wgsl");
const DENSE: &str = include_str!("wgsl/dense.wgsl");

/// The kernels for a dense right operand.
const DENSE_SOURCES: Sources = Sources {
    tiles: &[OPERANDS, DENSE, TILES],
    wide: &[OPERANDS, DENSE, WIDE],
    units: &[include_str!("wgsl/dense_half.wgsl"), UNITS],
    few: &[],
};

/// Groups below which k is split to have more of them, and the least of k that a split is worth.
const FEW_GROUPS: usize = 256;
const SPLIT: usize = 128;

/// The right operand of a product.
pub(crate) struct Right<'a> {
    /// Constants that the sources want in front.
    pub(crate) header: &'static str,
    pub(crate) binds: &'a [Bind<'a>],
    pub(crate) sources: &'static Sources,
}

/// Each kernel with what declares the right operand and `c`, and how to read it.
pub(crate) struct Sources {
    pub(crate) tiles: &'static [&'static str],
    pub(crate) wide: &'static [&'static str],
    pub(crate) units: &'static [&'static str],
    /// None for dense operands.
    pub(crate) few: &'static [&'static str],
}

/// `c [m, n] = add c + scale op(a) op(b)`, with where each begins, in elements, and how long its rows are.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub(crate) struct Shape {
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) lda: u32,
    pub(crate) ldb: u32,
    pub(crate) ldc: u32,
    pub(crate) a_at: u32,
    pub(crate) b_at: u32,
    pub(crate) c_at: u32,
    pub(crate) a_step: u32,
    pub(crate) b_step: u32,
    pub(crate) c_step: u32,
    pub(crate) splits: u32,
    pub(crate) chunk: u32,
    pub(crate) scale: f32,
    pub(crate) add: u32,
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct JoinParams {
    n: u32,
    parts: u32,
    scale: f32,
    add: u32,
}

/// A kernel for any product, and its variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// 256 threads with so many rows and columns each.
    Tiles(usize, usize),
    /// A subgroup of eight with so many rows, and columns of each lane.
    Wide(usize, usize),
}

/// A product of dense matrices, as [`peft_tensor::Backend::matmul`] describes it.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) batch: usize,
    pub(crate) m: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    pub(crate) a_batched: bool,
    pub(crate) b_batched: bool,
    pub(crate) ta: bool,
    pub(crate) tb: bool,
    pub(crate) scale: f32,
    /// Whether its operands may be rounded to 16 bits.
    pub(crate) half: bool,
}

/// Elements `at..at + len` of an array: a binding that begins at a multiple of [`Gpu::ALIGN`] bytes, and where in it
/// they begin.
pub(crate) fn window(x: &Data, at: usize, len: usize) -> (Bind<'_>, u32) {
    let align = (Gpu::ALIGN / 4) as usize;
    let first = at / align * align;
    (x.part(first, at - first + len), (at - first) as u32)
}

/// Values of a tile that one thread makes along each axis. Larger tiles read less, and are fewer: a card wants many of
/// them at once.
fn per_thread(m: usize, n: usize, batch: usize, enough: usize) -> (usize, usize) {
    let one = |size: usize| if size <= 24 { 1 } else { 4 };
    let large = batch * m.div_ceil(128) * n.div_ceil(128);
    if m.min(n) >= 96 && large >= enough {
        (8, 8)
    } else {
        (one(m), one(n))
    }
}

impl Gpu {
    /// Where the result goes: `into` for writing, or room; and whether it is added to.
    pub(crate) fn target(&self, into: Option<Buffer>, len: usize) -> Result<(Buffer, bool)> {
        match into {
            Some(into) => Ok((self.owned(into)?, true)),
            None => Ok((Buffer::new(self.room(len)?), false)),
        }
    }

    pub(crate) fn matmul(
        &self,
        a: &Data,
        b: &Data,
        p: Product,
        into: Option<Buffer>,
    ) -> Result<Buffer> {
        let (out, add) = self.target(into, p.batch * p.m * p.n)?;
        let c = get(&out)?;
        if c.len == 0 {
            return Ok(out);
        }
        let limit = (self.max_binding / 4) as usize;
        if a.len.max(b.len).max(c.len) <= limit {
            let shape = Shape {
                a_step: if p.a_batched { p.m * p.k } else { 0 } as u32,
                b_step: if p.b_batched { p.k * p.n } else { 0 } as u32,
                ..shape(&p, add)
            };
            self.dense(&p, shape, p.batch, (a.bind(), b.bind(), c))?;
            return Ok(out);
        }
        // Pieces of one entry after another that fit. A window may begin up to ALIGN bytes early.
        let room = (limit - (Gpu::ALIGN / 4) as usize).max(1);
        let rows = |width: usize| (room / width.max(1)).max(1);
        let mut m_step = rows(p.n);
        let (mut k_step, mut n_step) = (p.k.max(1), p.n);
        if p.ta {
            k_step = k_step.min(rows(p.m));
        } else {
            m_step = m_step.min(rows(p.k));
        }
        if p.tb {
            n_step = n_step.min(rows(p.k));
        } else {
            k_step = k_step.min(rows(p.n));
        }
        for entry in 0..p.batch {
            let a0 = if p.a_batched { entry * p.m * p.k } else { 0 };
            let b0 = if p.b_batched { entry * p.k * p.n } else { 0 };
            for m0 in (0..p.m).step_by(m_step) {
                let m = m_step.min(p.m - m0);
                let (c_bind, c_at) = window(c, (entry * p.m + m0) * p.n, m * p.n);
                for n0 in (0..p.n).step_by(n_step) {
                    let n = n_step.min(p.n - n0);
                    for k0 in (0..p.k).step_by(k_step) {
                        let k = k_step.min(p.k - k0);
                        // Rows of each operand that this piece needs: whole ones, as they lie together.
                        let (a_first, a_rows, a_width) =
                            if p.ta { (k0, k, p.m) } else { (m0, m, p.k) };
                        let (b_first, b_rows, b_width) =
                            if p.tb { (n0, n, p.k) } else { (k0, k, p.n) };
                        let (a_bind, a_at) = window(a, a0 + a_first * a_width, a_rows * a_width);
                        let (b_bind, b_at) = window(b, b0 + b_first * b_width, b_rows * b_width);
                        let piece = Shape {
                            m: m as u32,
                            n: n as u32,
                            k: k as u32,
                            a_at: a_at + if p.ta { m0 } else { k0 } as u32,
                            b_at: b_at + if p.tb { k0 } else { n0 } as u32,
                            c_at: c_at + n0 as u32,
                            chunk: k as u32,
                            add: u32::from(add || k0 > 0),
                            ..shape(&p, add)
                        };
                        let right = dense_right(std::slice::from_ref(&b_bind));
                        self.product(piece, 1, (p.ta, p.tb), a_bind, &right, c_bind)?;
                    }
                }
            }
        }
        Ok(out)
    }

    /// A product whose operands fit a binding; with k split where there would be few groups otherwise.
    fn dense(
        &self,
        p: &Product,
        shape: Shape,
        batch: usize,
        (a, b, c): (Bind<'_>, Bind<'_>, &Data),
    ) -> Result<()> {
        let right = dense_right(std::slice::from_ref(&b));
        if p.half && self.suits_units(&shape, batch)? {
            let (most_a, most_b) = (
                self.most(a, 0, a.size as usize / 4)?,
                self.most(b, 0, b.size as usize / 4)?,
            );
            let most = [most_a.bind(), most_b.bind()];
            return self.by_units(shape, batch, (p.ta, p.tb), a, &right, most, c.bind());
        }
        let (tm, tn) = per_thread(p.m, p.n, batch, self.large_tiles);
        let groups = batch * p.m.div_ceil(16 * tm) * p.n.div_ceil(16 * tn);
        let splits = (FEW_GROUPS / groups.max(1)).min(p.k / SPLIT);
        if splits < 2 || self.is_wide() {
            return self.product(shape, batch, (p.ta, p.tb), a, &right, c.bind());
        }
        let chunk = p.k.div_ceil(splits).next_multiple_of(16);
        let splits = p.k.div_ceil(chunk);
        let parts = self.room(splits * c.len)?;
        let split = Shape {
            splits: splits as u32,
            chunk: chunk as u32,
            scale: 1.0,
            add: 0,
            ..shape
        };
        // Entries of the batch lie behind all parts of the one before; `join` takes them in turn.
        self.product(split, batch, (p.ta, p.tb), a, &right, parts.bind())?;
        const JOIN: Kernel = Kernel::new("join", &[include_str!("wgsl/join.wgsl")], 1, 1);
        let len = p.m * p.n;
        for entry in 0..batch {
            let (x, x_at) = window(&parts, entry * splits * len, splits * len);
            let (y, y_at) = window(c, entry * len, len);
            let params = JoinParams {
                n: len as u32,
                parts: splits as u32,
                scale: shape.scale,
                add: shape.add,
            };
            debug_assert!(x_at == 0 && y_at == 0, "only a single entry is split");
            self.run(&JOIN, &[x, y], &params, threads(len))?;
        }
        Ok(())
    }

    /// Whether products are for a software driver; see `wgsl/wide.wgsl`.
    pub(crate) fn is_wide(&self) -> bool {
        self.has.software && self.has.subgroups && self.has.subgroup_sizes == (8, 8)
    }

    /// Records the kernel.
    pub(crate) fn product(
        &self,
        shape: Shape,
        batch: usize,
        (ta, tb): (bool, bool),
        a: Bind<'_>,
        right: &Right<'_>,
        c: Bind<'_>,
    ) -> Result<()> {
        let form = self.form([shape.m, shape.n, shape.k].map(|n| n as usize), batch);
        self.product_as(form, shape, batch, (ta, tb), a, right, c)
    }

    /// The form that suits a product.
    pub(crate) fn form(&self, [m, n, k]: [usize; 3], batch: usize) -> Form {
        if self.is_wide() {
            // The larger ones take a second to compile.
            let small = m * n * k <= 1 << 16;
            let rows = if small || m <= 8 { 8 } else { 32 };
            Form::Wide(rows, if small || n <= 8 { 1 } else { 4 })
        } else {
            let (tm, tn) = per_thread(m, n, batch, self.large_tiles);
            Form::Tiles(tm, tn)
        }
    }

    /// The kernel of a form.
    pub(crate) fn product_as(
        &self,
        form: Form,
        shape: Shape,
        batch: usize,
        (ta, tb): (bool, bool),
        a: Bind<'_>,
        right: &Right<'_>,
        c: Bind<'_>,
    ) -> Result<()> {
        let reads = 1 + right.binds.len() as u32;
        let header = format!("const TA = {ta};\nconst TB = {tb};\n{}", right.header);
        let (kernel, high, broad) = match form {
            Form::Wide(rows, cols) => {
                let kernel = Kernel::new("wide", right.sources.wide, reads, 1)
                    .with(format!(
                        "const ROWS = {rows}u;\nconst COLS = {cols}u;\n{header}"
                    ))
                    .rounds(&[("ROWS", rows), ("COLS", cols)]);
                (kernel, rows, 8 * cols)
            }
            Form::Tiles(tm, tn) => {
                let kernel = Kernel::new("matmul", right.sources.tiles, reads, 1)
                    .with(format!("const TM = {tm}u;\nconst TN = {tn}u;\n{header}"))
                    .rounds(&[
                        ("TM", tm),
                        ("TN", tn),
                        ("FM", tm.div_ceil(4)),
                        ("FN", tn.div_ceil(4)),
                    ]);
                (kernel, 16 * tm, 16 * tn)
            }
        };
        let mut binds = vec![a];
        binds.extend(right.binds);
        binds.push(c);
        let groups = [
            (shape.n as usize).div_ceil(broad) as u32,
            (shape.m as usize).div_ceil(high) as u32,
        ];
        // Axis z has at most 65535 groups.
        let most = 65_535 / shape.splits as usize;
        for first in (0..batch).step_by(most) {
            let count = most.min(batch - first);
            let shape = Shape {
                a_at: shape.a_at + first as u32 * shape.a_step,
                b_at: shape.b_at + first as u32 * shape.b_step,
                c_at: shape.c_at + (first as u32 * shape.splits) * shape.c_step,
                ..shape
            };
            let z = count as u32 * shape.splits;
            self.run(&kernel, &binds, &shape, [groups[0], groups[1], z])?;
        }
        Ok(())
    }
}

pub(crate) fn dense_right<'a>(b: &'a [Bind<'a>]) -> Right<'a> {
    Right {
        header: "",
        binds: b,
        sources: &DENSE_SOURCES,
    }
}

impl Shape {
    /// The whole product of one entry.
    pub(crate) fn whole(p: &Product) -> Self {
        shape(p, false)
    }
}

/// The whole product of one entry.
fn shape(p: &Product, add: bool) -> Shape {
    Shape {
        m: p.m as u32,
        n: p.n as u32,
        k: p.k as u32,
        lda: if p.ta { p.m } else { p.k } as u32,
        ldb: if p.tb { p.k } else { p.n } as u32,
        ldc: p.n as u32,
        a_at: 0,
        b_at: 0,
        c_at: 0,
        a_step: 0,
        b_step: 0,
        c_step: (p.m * p.n) as u32,
        splits: 1,
        chunk: p.k as u32,
        scale: p.scale,
        add: u32::from(add),
    }
}
