//! Products of tiles of bfloat16 (AMX), from registers and with operands in the caches.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

/// Products of one call of the loop.
const STEPS: usize = 400_000;
/// Floating-point operations of a product: 16 x 16 sums of 32.
const WORK: usize = 2 * 16 * 16 * 32;
/// Bytes of a tile.
const TILE: usize = 1024;

/// Eight tiles of sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

/// Asks the system for the registers; false where there are none.
fn allowed() -> bool {
    let here = __cpuid_count(0, 0).eax >= 7 && {
        let bits = 1 << 24 | 1 << 22;
        __cpuid_count(7, 0).edx & bits == bits
    };
    if !here {
        return false;
    }
    let mut answer: i64 = 158;
    #[allow(unsafe_code, reason = "a system call without a function in std")]
    // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA) takes two numbers and gives the process a permission.
    unsafe {
        asm!("syscall", inlateout("rax") answer, in("rdi") 0x1023, in("rsi") 18,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    answer == 0
}

/// Operations a second of all threads: from registers, and with each four products loading their four tiles from so many bytes
/// of memory of a thread's own.
pub(crate) fn flops(bytes: &[usize]) -> Option<Vec<f64>> {
    if !allowed() {
        return None;
    }
    let rate = |run: &(dyn Fn() + Sync)| {
        let seconds = super::best(|| {
            rayon::broadcast(|_| run());
        });
        (STEPS * WORK * rayon::current_num_threads()) as f64 / seconds
    };
    let from = |bytes: &usize| {
        let values = vec![0u64; bytes / 8 + 8];
        rate(&move || {
            // Each thread its own: a copy.
            let mine = values.clone();
            from_memory(&mine);
        })
    };
    Some(
        std::iter::once(rate(&from_registers))
            .chain(bytes.iter().map(from))
            .collect(),
    )
}

fn configured(run: impl FnOnce()) {
    let mut config = Config([0; 64]);
    config.0[0] = 1;
    for tile in 0..8 {
        config.0[16 + 2 * tile] = 64;
        config.0[48 + tile] = 16;
    }
    #[allow(unsafe_code, reason = "instructions without intrinsics")]
    // SAFETY: 64 bytes are read; the registers are allowed, and nobody else uses them.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack));
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "tilezero tmm6",
            "tilezero tmm7",
            options(nostack, nomem)
        );
        run();
        asm!("tilerelease", options(nostack));
    }
}

fn from_registers() {
    configured(|| {
        for _ in 0..STEPS / 4 {
            #[allow(unsafe_code, reason = "instructions without intrinsics")]
            // SAFETY: only tile registers change, which are configured.
            unsafe {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nostack, nomem)
                );
            }
        }
    });
}

fn from_memory(values: &[u64]) {
    // From a cache line on.
    let first = values.as_ptr().align_offset(64);
    let values = &values[first..];
    let steps = size_of_val(values) / (4 * TILE);
    assert!(steps > 0, "four tiles of memory");
    configured(|| {
        for i in 0..STEPS / 4 {
            let at = values[i % steps * 4 * TILE / 8..].as_ptr();
            #[allow(unsafe_code, reason = "instructions without intrinsics")]
            // SAFETY: four tiles from there on are inside of the values, and only tile registers change.
            unsafe {
                asm!("tileloadd tmm6, [{at} + {row}]", "tileloadd tmm7, [{at} + {row} + 1024]",
                    "tileloadd tmm4, [{at} + {row} + 2048]", "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{at} + {row} + 3072]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                    at = in(reg) at, row = in(reg) 64usize, options(nostack, readonly));
            }
        }
    });
}
