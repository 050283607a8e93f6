//! Functions over flat arrays, in parts where an array is larger than a binding.

use bytemuck::NoUninit;
use peft_tensor::{Binary, Buffer, Glu, Result, RngKey, Unary};

use crate::gpu::{Gpu, Kernel};
use crate::memory::{Data, get};
use crate::record::threads;

const SOURCES: &[&str] = &[
    include_str!("wgsl/math.wgsl"),
    include_str!("wgsl/elementwise.wgsl"),
];

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Params {
    n: u32,
    op: u32,
    mul: f32,
    add: f32,
}

impl Params {
    fn of(op: u32) -> Self {
        Self {
            n: 0,
            op,
            mul: 1.0,
            add: 0.0,
        }
    }
}

const HALVES: &[&str] = &[include_str!("wgsl/halves.wgsl")];

/// Values that wait for the backward pass in bfloat16, two a word.
pub(crate) struct Halves {
    words: Data,
    len: usize,
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct DropoutParams {
    n: u32,
    first: u32,
    key: [u32; 2],
    p: f32,
    scale: f32,
}

/// The number of a function in the kernels.
fn code(op: Unary) -> u32 {
    match op {
        Unary::Neg => 0,
        Unary::Exp => 1,
        Unary::Ln => 2,
        Unary::Sqrt => 3,
        Unary::Rsqrt => 4,
        Unary::Recip => 5,
        Unary::Square => 6,
        Unary::Abs => 7,
        Unary::Tanh => 8,
        Unary::Sigmoid => 9,
        Unary::Relu => 10,
        Unary::Silu => 11,
        Unary::Gelu => 12,
        Unary::GeluTanh => 13,
        Unary::Sin => 14,
        Unary::Cos => 15,
    }
}

fn gate_code(kind: Glu) -> u32 {
    code(match kind {
        Glu::Silu => Unary::Silu,
        Glu::Gelu => Unary::Gelu,
        Glu::GeluTanh => Unary::GeluTanh,
    })
}

/// The number of an operation in the kernel of [`crate::shape`].
pub(crate) fn binary_code(op: Binary) -> u32 {
    match op {
        Binary::Add => 0,
        Binary::Sub => 1,
        Binary::Mul => 2,
        Binary::Div => 3,
    }
}

impl Gpu {
    /// Parts of an array of `len` that fit a binding: (first, length).
    pub(crate) fn parts(&self, len: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        // An even number of alignments, so that halves of parts begin where a binding may, too.
        let step = (self.max_binding / 4) as usize;
        let step = (step / 128 * 128).max(64);
        (0..len)
            .step_by(step)
            .map(move |at| (at, step.min(len - at)))
    }

    /// A kernel over flat arrays of one length.
    fn flat(&self, kernel: &Kernel, arrays: &[&Data], len: usize, params: Params) -> Result<()> {
        for (at, n) in self.parts(len) {
            let binds: Vec<_> = arrays.iter().map(|x| x.part(at, n)).collect();
            let params = Params {
                n: n as u32,
                ..params
            };
            self.run(kernel, &binds, &params, threads(n))?;
        }
        Ok(())
    }

    /// A single number that the processor goes on knowing. No kernel writes into it but through [`Gpu::owned`].
    pub(crate) fn number(&self, value: f32) -> Result<Data> {
        let mut y = self.fill(1, value)?;
        y.number = Some(value);
        Ok(y)
    }

    pub(crate) fn fill(&self, len: usize, value: f32) -> Result<Data> {
        let y = self.room(len)?;
        let params = Params {
            add: value,
            ..Params::of(0)
        };
        self.flat(&Kernel::new("fill", SOURCES, 0, 1), &[&y], len, params)?;
        Ok(y)
    }

    pub(crate) fn unary(&self, op: Unary, x: &Data) -> Result<Data> {
        let y = self.room(x.len)?;
        let kernel = Kernel::new("unary", SOURCES, 1, 1);
        self.flat(&kernel, &[x, &y], x.len, Params::of(code(op)))?;
        Ok(y)
    }

    pub(crate) fn unary_grad(&self, op: Unary, x: &Data, y: &Data, dy: &Data) -> Result<Data> {
        let dx = self.room(dy.len)?;
        let kernel = Kernel::new("unary_grad", SOURCES, 3, 1);
        // Where the slope is taken from the argument alone, or the result alone, the other may be of another length.
        let same = |t: &Data| t.len == dy.len;
        let (x, y) = (if same(x) { x } else { y }, if same(y) { y } else { x });
        self.flat(&kernel, &[x, y, dy, &dx], dy.len, Params::of(code(op)))?;
        Ok(dx)
    }

    pub(crate) fn affine(&self, x: &Data, mul: f32, add: f32) -> Result<Data> {
        if let Some(number) = x.number {
            return self.number(mul * number + add);
        }
        let y = self.room(x.len)?;
        let params = Params {
            mul,
            add,
            ..Params::of(0)
        };
        let kernel = Kernel::new("affine", SOURCES, 1, 1);
        self.flat(&kernel, &[x, &y], x.len, params)?;
        Ok(y)
    }

    /// a += b, in the memory of a where nobody else holds it.
    pub(crate) fn accumulate(&self, a: Buffer, b: &Data) -> Result<Buffer> {
        let a = self.owned(a)?;
        let kernel = Kernel::new("accumulate", SOURCES, 1, 1);
        self.flat(&kernel, &[b, get(&a)?], b.len, Params::of(0))?;
        Ok(a)
    }

    /// The buffer for writing: itself where nobody else holds it, else a copy.
    pub(crate) fn owned(&self, mut a: Buffer) -> Result<Buffer> {
        // What shares its buffer with others may not be written while they are read.
        if let Some(data) = a.get_mut::<Data>().filter(|data| data.is_alone()) {
            data.number = None;
            return Ok(a);
        }
        let mut copy = self.affine(get(&a)?, 1.0, 0.0)?;
        copy.number = None;
        Ok(Buffer::new(copy))
    }

    /// The values in bfloat16.
    pub(crate) fn halves(&self, x: &Data) -> Result<Halves> {
        let words = self.room(x.len.div_ceil(2))?;
        // Two values a word: a part of the words is as long as half a part of the values.
        for (at, n) in self.parts(x.len) {
            let params = Params {
                n: n as u32,
                ..Params::of(0)
            };
            let binds = [x.part(at, n), words.part(at / 2, n.div_ceil(2))];
            let kernel = Kernel::new("to_halves", HALVES, 1, 1);
            self.run(&kernel, &binds, &params, threads(n.div_ceil(2)))?;
        }
        Ok(Halves { words, len: x.len })
    }

    /// The values of [`Gpu::halves`] in f32.
    pub(crate) fn whole(&self, x: &Halves) -> Result<Data> {
        let y = self.room(x.len)?;
        for (at, n) in self.parts(x.len) {
            let params = Params {
                n: n as u32,
                ..Params::of(0)
            };
            let binds = [x.words.part(at / 2, n.div_ceil(2)), y.part(at, n)];
            let kernel = Kernel::new("from_halves", HALVES, 1, 1);
            self.run(&kernel, &binds, &params, threads(n.div_ceil(2)))?;
        }
        Ok(y)
    }

    pub(crate) fn glu(&self, kind: Glu, gate: &Data, up: &Data) -> Result<Data> {
        let y = self.room(gate.len)?;
        let kernel = Kernel::new("glu", SOURCES, 2, 1);
        self.flat(
            &kernel,
            &[gate, up, &y],
            gate.len,
            Params::of(gate_code(kind)),
        )?;
        Ok(y)
    }

    pub(crate) fn glu_grad(
        &self,
        kind: Glu,
        gate: &Data,
        up: &Data,
        dy: &Data,
    ) -> Result<(Data, Data)> {
        let (dgate, dup) = (self.room(gate.len)?, self.room(gate.len)?);
        let kernel = Kernel::new("glu_grad", SOURCES, 3, 2);
        let arrays = [gate, up, dy, &dgate, &dup];
        self.flat(&kernel, &arrays, gate.len, Params::of(gate_code(kind)))?;
        Ok((dgate, dup))
    }

    pub(crate) fn dropout(&self, x: &Data, p: f32, key: RngKey) -> Result<Data> {
        const DROPOUT: Kernel = Kernel::new("dropout", &[include_str!("wgsl/dropout.wgsl")], 1, 1);
        let y = self.room(x.len)?;
        for (at, n) in self.parts(x.len) {
            let params = DropoutParams {
                n: n as u32,
                // Parts begin at multiples of 64 elements, and so at whole blocks of four.
                first: (at / 4) as u32,
                key: [key.0 as u32, (key.0 >> 32) as u32],
                p,
                scale: 1.0 / (1.0 - p),
            };
            let binds = [x.part(at, n), y.part(at, n)];
            self.run(&DROPOUT, &binds, &params, threads(n.div_ceil(4)))?;
        }
        Ok(y)
    }
}
