//! Squares of the result, in the tile registers of AMX (Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual",
//! volume 1, chapter 18) or, for tests, in memory.

use super::out::Spot;

/// Rows of a square, and its columns.
pub(in super::super) const SQUARE: usize = 32;

/// Rows of a tile, and the units in each.
pub(in super::super) const TILE: usize = 16;

/// Units of both tiles that one step of a strip takes.
pub(super) const STEP: usize = 2 * TILE * TILE;

/// [`SQUARE`] rows of as many f32 sums.
pub(in super::super) trait Square {
    /// All zero.
    fn zero(&mut self);
    /// The sums from a result.
    fn load(&mut self, from: Spot<'_>);
    /// The sums into a result.
    fn store(&mut self, to: Spot<'_>);
    /// Adds the products of some steps, [`STEP`] units of each side for each: of the left side two tiles of rows, of the right
    /// side rows of `SQUARE` columns. A side may be a sum of parts, of which each is at most 2^-8 of the one before: products
    /// that are as small as what was lost when the parts were made are left out.
    fn add(&mut self, left: &[&[u32]], right: &[&[u32]], ahead: Ahead<'_>);
}

/// What is brought into the second-level cache while a product is made: who takes it next would wait for each of its lines.
#[derive(Clone, Copy, Default)]
pub(in super::super) struct Ahead<'a> {
    /// Where it begins, in at most as many places as the right side has parts.
    pub(super) from: &'a [*const u8],
    /// For each step of the product, from where that of the last one ended.
    pub(super) runs: usize,
    /// From a run to the next, in bytes.
    pub(super) apart: usize,
    /// Cache lines of each run.
    pub(super) lines: usize,
    /// Where the square is stored after this product, to be had for writing by then, and its values from a row to the next.
    pub(super) to: Option<(*const f32, usize)>,
}

/// Bytes of a cache line.
pub(in super::super) const LINE: usize = 64;

/// What has squares.
pub(in super::super) trait Tiles: Copy + Send + Sync {
    /// Calls `f` with a square; `f` does not do so again.
    fn with<R>(self, f: impl FnOnce(&mut dyn Square) -> R) -> R;
}

/// Squares in memory.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(in super::super) struct Plain;

#[cfg(test)]
impl Tiles for Plain {
    fn with<R>(self, f: impl FnOnce(&mut dyn Square) -> R) -> R {
        f(&mut [[0.0; SQUARE]; SQUARE])
    }
}

#[cfg(test)]
impl Square for [[f32; SQUARE]; SQUARE] {
    fn zero(&mut self) {
        *self = [[0.0; SQUARE]; SQUARE];
    }

    fn load(&mut self, from: Spot<'_>) {
        for (i, sums) in self.iter_mut().enumerate() {
            sums.copy_from_slice(from.row(i));
        }
    }

    fn store(&mut self, mut to: Spot<'_>) {
        for (i, sums) in self.iter().enumerate() {
            to.row_mut(i).copy_from_slice(sums);
        }
    }

    fn add(&mut self, left: &[&[u32]], right: &[&[u32]], _ahead: Ahead<'_>) {
        let values = |unit: u32| [f32::from_bits(unit << 16), f32::from_bits(unit & !0xffff)];
        let parts = left.len().max(right.len());
        for (j, right) in right.iter().enumerate() {
            for left in left.iter().take(parts - j) {
                assert_eq!(left.len(), right.len());
                for (left, right) in left.chunks(STEP).zip(right.chunks(STEP)) {
                    for (sums, left) in self.iter_mut().zip(left.chunks(TILE)) {
                        for (left, right) in left.iter().zip(right.chunks(SQUARE)) {
                            let [low, high] = values(*left);
                            for (sum, right) in sums.iter_mut().zip(right) {
                                let right = values(*right);
                                *sum += low * right[0] + high * right[1];
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(in crate::cpu) use amx::Amx;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(
    unsafe_code,
    reason = "instructions without intrinsics, behind a type that exists only where the system lets them run"
)]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::marker::PhantomData;

    use super::{Ahead, LINE, SQUARE, STEP, Spot, Square, TILE, Tiles};

    /// The tile registers of this processor.
    #[derive(Clone, Copy)]
    pub(in crate::cpu) struct Amx(());

    impl Amx {
        /// Asks the system for them, once for all threads of the process.
        pub(in super::super::super) fn detect() -> Option<Self> {
            const TILES: u32 = 1 << 24;
            const BF16: u32 = 1 << 22;
            const ARCH_PRCTL: i64 = 158;
            const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
            const XFEATURE_XTILEDATA: i64 = 18;
            let here = __cpuid_count(0, 0).eax >= 7
                && __cpuid_count(7, 0).edx & (TILES | BF16) == TILES | BF16;
            if !here {
                return None;
            }
            let mut answer = ARCH_PRCTL;
            // SAFETY: a system call that takes two numbers and changes nothing but what the process may do; it
            // overwrites rcx and r11.
            unsafe {
                asm!("syscall", inlateout("rax") answer, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
                    lateout("rcx") _, lateout("r11") _, options(nostack));
            }
            (answer == 0).then_some(Self(()))
        }
    }

    /// What the registers hold: eight tiles of sixteen rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start: u8,
        reserved: [u8; 14],
        bytes: [u16; 16],
        rows: [u8; 16],
    }

    static EIGHT: Config = Config {
        palette: 1,
        start: 0,
        reserved: [0; 14],
        bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Tiles 0 and 1 are the upper half of the square, 2 and 3 the lower one; it stays on its thread, whose registers it is.
    struct Registers(PhantomData<*const ()>);

    impl Tiles for Amx {
        fn with<R>(self, f: impl FnOnce(&mut dyn Square) -> R) -> R {
            // SAFETY: 64 bytes are read; the system has allowed the registers, or there is no such value.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const EIGHT, options(nostack)) };
            f(&mut Registers(PhantomData))
        }
    }

    impl Drop for Registers {
        fn drop(&mut self) {
            // SAFETY: empties the registers, which no other code uses.
            unsafe { asm!("tilerelease", options(nostack)) };
        }
    }

    /// Cache lines of a square in a result, two for each row.
    const WRITTEN: usize = 2 * SQUARE;

    /// One after the other, the parts that there are of each step.
    #[inline(always)]
    fn add<const LEFT: usize, const RIGHT: usize>(
        left: &[&[u32]],
        right: &[&[u32]],
        ahead: Ahead<'_>,
    ) {
        let len = left[0].len();
        let all = left[..LEFT].iter().chain(&right[..RIGHT]);
        assert!(all.clone().all(|part| part.len() == len) && len.is_multiple_of(STEP));
        let starts = |parts: &[&[u32]], i: usize| parts[i].as_ptr();
        let left: [*const u32; LEFT] = std::array::from_fn(|i| starts(left, i));
        let right: [*const u32; RIGHT] = std::array::from_fn(|i| starts(right, i));
        let mut next: [*const u8; RIGHT] = [std::ptr::null(); RIGHT];
        let places = ahead.from.len().min(RIGHT);
        next[..places].copy_from_slice(&ahead.from[..places]);
        let (to, width) = ahead.to.unwrap_or((std::ptr::null(), 0));
        let mut written = if ahead.to.is_some() { 0 } else { WRITTEN };
        let each = WRITTEN.div_ceil((len / STEP).max(1));
        for at in (0..len).step_by(STEP) {
            for j in (0..RIGHT).rev() {
                // SAFETY: whole steps inside of slices, as the assertion says; only the registers change.
                unsafe {
                    // Two tiles of columns, side by side.
                    asm!("tileloadd tmm6, [{at} + {row}]", "tileloadd tmm7, [{at} + {row} + 64]",
                        at = in(reg) right[j].add(at), row = in(reg) 4 * SQUARE, options(nostack, readonly));
                    for i in (0..LEFT.max(RIGHT) - j).rev().filter(|i| *i < LEFT) {
                        // And two of rows, one below the other.
                        asm!("tileloadd tmm4, [{at} + {row}]", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                            "tileloadd tmm5, [{at} + {row} + 1024]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                            at = in(reg) left[i].add(at), row = in(reg) 4 * TILE, options(nostack, readonly));
                    }
                }
                if j >= places {
                    continue;
                }
                for _ in 0..ahead.runs {
                    for line in 0..ahead.lines {
                        // SAFETY: a hint, which may be beyond the end of what there is.
                        unsafe {
                            asm!("prefetcht1 [{}]", in(reg) next[j].wrapping_add(line * LINE),
                                options(nostack, readonly, preserves_flags));
                        }
                    }
                    next[j] = next[j].wrapping_add(ahead.apart);
                }
            }
            for line in written..(written + each).min(WRITTEN) {
                // SAFETY: a hint.
                unsafe {
                    asm!("prefetchw [{}]", in(reg) to.wrapping_add(line / 2 * width + line % 2 * TILE),
                        options(nostack, readonly, preserves_flags));
                }
            }
            written += each;
        }
    }

    impl Square for Registers {
        fn zero(&mut self) {
            // SAFETY: only the registers change, here and below where nothing else is said.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem)
                );
            }
        }

        fn load(&mut self, from: Spot<'_>) {
            let (high, low) = (from.at, from.at.wrapping_add(TILE * from.width));
            // SAFETY: a spot has all the rows that are read.
            unsafe {
                asm!("tileloadd tmm0, [{high} + {row}]", "tileloadd tmm1, [{high} + {row} + 64]",
                    "tileloadd tmm2, [{low} + {row}]", "tileloadd tmm3, [{low} + {row} + 64]",
                    high = in(reg) high, low = in(reg) low, row = in(reg) 4 * from.width, options(nostack, readonly));
            }
        }

        fn store(&mut self, to: Spot<'_>) {
            let (high, low) = (to.at, to.at.wrapping_add(TILE * to.width));
            // SAFETY: a spot has all the rows that are written, to itself.
            unsafe {
                asm!("tilestored [{high} + {row}], tmm0", "tilestored [{high} + {row} + 64], tmm1",
                    "tilestored [{low} + {row}], tmm2", "tilestored [{low} + {row} + 64], tmm3",
                    high = in(reg) high, low = in(reg) low, row = in(reg) 4 * to.width, options(nostack));
            }
        }

        fn add(&mut self, left: &[&[u32]], right: &[&[u32]], ahead: Ahead<'_>) {
            match (left.len(), right.len()) {
                (1, 1) => add::<1, 1>(left, right, ahead),
                (3, 1) => add::<3, 1>(left, right, ahead),
                (3, 2) => add::<3, 2>(left, right, ahead),
                (3, 3) => add::<3, 3>(left, right, ahead),
                other => unreachable!("{other:?} parts of a left and a right side"),
            }
        }
    }
}
