//! A few rows times a frozen weight: what generation does; see `wgsl/few.wgsl`.

use peft_tensor::Result;

use crate::gpu::{Gpu, Kernel};
use crate::matmul::{Right, Shape};
use crate::record::{Bind, in_a_row};

/// Rows up to which reading the weights is what takes the time.
pub(crate) const FEW: usize = 16;

/// Values that rows of weights come in: words of codes and blocks of scales are whole then.
const UNIT: u32 = 32;

/// Rows of weights of a group.
const OUT: usize = 8;

/// Whether the kernel takes a product with the rows of a packed matrix.
pub(crate) fn suits(shape: &Shape) -> bool {
    shape.m as usize <= FEW
        && shape.k.is_multiple_of(UNIT)
        && shape.lda.is_multiple_of(4)
        && shape.a_at.is_multiple_of(4)
        && shape.ldb == shape.k
}

impl Gpu {
    pub(crate) fn few(
        &self,
        shape: Shape,
        a: Bind<'_>,
        right: &Right<'_>,
        c: Bind<'_>,
    ) -> Result<()> {
        let rows = (shape.m as usize).next_power_of_two();
        let reads = 1 + right.binds.len() as u32;
        let kernel = Kernel::new("few", right.sources.few, reads, 1)
            .with(format!("const ROWS = {rows}u;\n{}", right.header))
            .rounds(&[("ROWS", rows)]);
        let mut binds = vec![a];
        binds.extend(right.binds);
        binds.push(c);
        let groups = in_a_row((shape.n as usize).div_ceil(OUT));
        self.run(&kernel, &binds, &shape, groups)
    }
}
