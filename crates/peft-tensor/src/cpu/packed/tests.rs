//! Every kind of lanes, simulated or of this processor, against sums in double precision.

use super::lanes::{Lanes, Plain, WIDTH, Work};
use super::*;
use crate::WeightFormat;
use crate::cpu::matmul::View;

/// Values of both signs whose sizes differ, the same for the same seed.
fn values(seed: u64, len: usize) -> Vec<f32> {
    let key = crate::RngKey(seed);
    (0..len as u64)
        .map(|i| (key.uniform_at(i) - 0.5) * 4.0)
        .collect()
}

fn rounded(values: &[f32]) -> Vec<f64> {
    let round = |v: &f32| f64::from(::half::bf16::from_f32(*v).to_f32());
    values.iter().map(round).collect()
}

/// Transposed, into, added.
type ByProduct<'a> = dyn Fn(&Product<'_>, bool, &mut [f32], bool) + 'a;
/// Sides, shape, both matrices, into rows of a width, added.
type Dense<'a> =
    dyn Fn(&mut Sides, (usize, usize, usize), [View<'_>; 2], &mut [f32], usize, bool) + 'a;

/// A way to make products, and what it sees of their values.
struct Way<'a> {
    precision: Precision,
    product: &'a ByProduct<'a>,
    /// Where attention is made of such products.
    dense: Option<&'a Dense<'a>>,
}

impl Way<'_> {
    fn sees(&self, values: &[f32]) -> Vec<f64> {
        match self.precision {
            Precision::F32 => values.iter().map(|v| f64::from(*v)).collect(),
            Precision::Bf16 => rounded(values),
        }
    }

    /// A rounding of half a unit in the last place for each of the sums: as many as there are products of parts.
    fn allowed(&self, inside: usize, size: f64) -> f64 {
        let sums = match self.precision {
            Precision::F32 => 6 * inside,
            Precision::Bf16 => inside,
        };
        f64::from(f32::EPSILON) * size * (sums as f64).sqrt()
    }

    fn check(&self) {
        all_shapes(self);
        if let Some(by) = self.dense {
            dense(self, by);
        }
        // Weights of several slabs and several blocks.
        check(self, (15, 1030, 1100), WeightFormat::BF16, true, false, 16);
        check(self, (15, 1030, 1100), WeightFormat::NF4, false, true, 33);
        check(self, (2, 40, 2300), WeightFormat::BF16, true, true, 0);
        // Columns whose steps are packed in several pieces.
        check(self, (3, 1500, 400), WeightFormat::BF16, false, true, 4);
        // So many rows that they are not kept: packed by who takes them, in ranges of several parts, and for all slabs.
        check(self, (450, 35, 1100), WeightFormat::F32, true, true, 0);
        check(self, (450, 1100, 35), WeightFormat::F32, false, true, 5);
        check(self, (58, 170, 8000), WeightFormat::BF16, true, false, 3);
    }
}

/// Tiles, in both precisions.
fn by_tiles<L: Lanes, T: tiles::Tiles>(l: L, tiles: T) {
    for precision in [Precision::Bf16, Precision::F32] {
        let parts = tiles::parts(precision);
        Way {
            precision,
            product: &|product, transposed, out, add| match transposed {
                true => product.forward_by_tiles((l, tiles), parts, out, add),
                false => product.backward_by_tiles((l, tiles), parts, out, add),
            },
            dense: None,
        }
        .check();
    }
}

/// Lanes and what is made with them.
fn by_lanes<L: Lanes>(l: L) {
    every_function(l);
    Way {
        precision: Precision::Bf16,
        product: &|product, transposed, out, add| product.on(l, transposed, out, add),
        dense: Some(&|sides, shape, [a, b], out, width, add| {
            super::dense::multiply(l, sides, shape, a, b, out, width, add);
        }),
    }
    .check();
}

/// One product against the sum of the products of what it gets to see.
fn check(
    way: &Way<'_>,
    (m, rows, cols): (usize, usize, usize),
    format: WeightFormat,
    transposed: bool,
    add: bool,
    r: usize,
) {
    let (inside, outside) = if transposed {
        (cols, rows)
    } else {
        (rows, cols)
    };
    let x = values(m as u64, m * inside);
    let w = FrozenWeight::quantize(rows, cols, &values(7, rows * cols), format).unwrap();
    let (low, other) = (values(5, m * r), values(6, r * outside));
    let before = values(3, m * outside);
    let mut out = before.clone();
    let product = Product {
        x: &x,
        m,
        w: &w,
        low: Low {
            values: &low,
            other: &other,
            r,
        },
    };
    (way.product)(&product, transposed, &mut out, add);
    let (x, w) = (way.sees(&x), way.sees(&w.to_f32()));
    let (low, other) = (way.sees(&low), way.sees(&other));
    for i in 0..m {
        for j in 0..outside {
            let at = |k: usize| {
                if transposed {
                    w[j * cols + k]
                } else {
                    w[k * cols + j]
                }
            };
            let beside = |k: usize| match transposed {
                true => other[j * r + k],
                false => other[k * outside + j],
            };
            let products = (0..inside).map(|k| x[i * inside + k] * at(k));
            let products = products.chain((0..r).map(|k| low[i * r + k] * beside(k)));
            let size: f64 = products.clone().map(f64::abs).sum();
            let start = if add {
                f64::from(before[i * outside + j])
            } else {
                0.0
            };
            let want = products.sum::<f64>() + start;
            let got = f64::from(out[i * outside + j]);
            let allowed = way.allowed(inside + r, size + start.abs());
            assert!(
                (got - want).abs() <= allowed,
                "{m} rows by {rows} x {cols} in {} and {r}, transposed {transposed}, add {add}: ({i}, {j}) is {got}, not {want}",
                format.name()
            );
        }
    }
}

/// Shapes with and without remainders in every direction, and more than one block.
fn all_shapes(way: &Way<'_>) {
    for (n, shape) in [
        (1, 1, 1),
        (5, 3, 2),
        (14, 32, 64),
        (6, 16, 8),
        (29, 65, 131),
        (43, 130, 53),
        (17, 33, 250),
        (100, 47, 34),
    ]
    .into_iter()
    .enumerate()
    {
        for transposed in [true, false] {
            let add = n.is_multiple_of(2) == transposed;
            for format in [WeightFormat::F32, WeightFormat::BF16, WeightFormat::NF4] {
                for r in [0, 1, 8, 5] {
                    check(way, shape, format, transposed, add, r);
                }
            }
        }
    }
    for format in [
        WeightFormat::F16,
        WeightFormat::Q4_1,
        WeightFormat::Q8_0,
        WeightFormat::INT8,
    ] {
        for transposed in [true, false] {
            check(way, (20, 37, 96), format, transposed, transposed, 3);
        }
    }
    // More rows of the weight than leave the left side in the cache.
    check(way, (40, 7300, 22), WeightFormat::BF16, false, true, 5);
}

/// Products of two dense matrices, either side by rows or by columns, inside of wider ones.
fn dense(way: &Way<'_>, by: &Dense<'_>) {
    let mut sides = Sides::default();
    for (n, (m, k, n_cols)) in [
        (1, 1, 1),
        (14, 2, 32),
        (3, 31, 5),
        (64, 33, 40),
        (29, 64, 66),
        (47, 90, 17),
    ]
    .into_iter()
    .enumerate()
    {
        for (a_rows, b_rows) in [(true, true), (true, false), (false, true), (false, false)] {
            let add = (n + usize::from(a_rows)).is_multiple_of(2);
            let gap = n % 3;
            let stride = |rows: bool, across: usize, down: usize| {
                if rows { across + gap } else { down + gap }
            };
            let (a_step, b_step) = (stride(a_rows, k, m), stride(b_rows, n_cols, k));
            let a = values(n as u64, a_step * if a_rows { m } else { k });
            let b = values(40 + n as u64, b_step * if b_rows { k } else { n_cols });
            let view = |x, step, rows: bool| {
                let view = View::rows(x, step);
                if rows { view } else { view.t() }
            };
            let width = n_cols + gap;
            let before = values(3, m * width);
            let mut out = before.clone();
            let both = [view(&a, a_step, a_rows), view(&b, b_step, b_rows)];
            by(&mut sides, (m, k, n_cols), both, &mut out, width, add);
            let (a, b) = (way.sees(&a), way.sees(&b));
            for at in 0..m * width {
                let (i, j) = (at / width, at % width);
                if j >= n_cols {
                    assert_eq!(out[at], before[at], "written beyond a row");
                    continue;
                }
                let a = |k: usize| {
                    a[if a_rows {
                        i * a_step + k
                    } else {
                        k * a_step + i
                    }]
                };
                let b = |k: usize| {
                    b[if b_rows {
                        k * b_step + j
                    } else {
                        j * b_step + k
                    }]
                };
                let products = (0..k).map(|k| a(k) * b(k));
                let size: f64 = products.clone().map(f64::abs).sum();
                let start = if add { f64::from(before[at]) } else { 0.0 };
                let want = products.sum::<f64>() + start;
                let allowed = way.allowed(k, size + start.abs());
                let got = f64::from(out[at]);
                assert!(
                    (got - want).abs() <= allowed,
                    "{m} x {k} x {n_cols}, rows {a_rows} {b_rows}, add {add}: ({i}, {j}) is {got}, not {want}"
                );
            }
        }
    }
}

#[test]
fn simulated() {
    by_lanes(Plain);
    by_tiles(Plain, tiles::Plain);
}

/// Each function of lanes against that of the simulated ones, to the bit but for the order of a dot product.
fn every_function<L: Lanes>(l: L) {
    struct Each<'a> {
        a: &'a [f32],
        b: &'a [f32],
        out: &'a mut [Vec<u32>],
    }
    impl<L: Lanes> Work<L> for Each<'_> {
        #[inline(always)]
        fn on(self, l: L) {
            let (a, b) = (l.units(self.a), l.units(self.b));
            let (low, high) = l.zip(a, b);
            let (even, odd) = l.weave(a, b);
            let sum = l.load(bytemuck::cast_slice(&self.b[WIDTH..]));
            let parts = l.parts(self.a);
            let all = [
                l.zero(),
                l.splat(self.a[3].to_bits()),
                sum,
                a,
                low,
                high,
                even,
                odd,
                l.add(l.load(bytemuck::cast_slice(self.a)), sum),
                parts[0],
                parts[1],
                parts[2],
                l.dot(sum, a, b),
            ];
            for (v, out) in all.into_iter().zip(self.out) {
                l.store(v, out);
            }
        }
    }
    let (a, b) = (values(11, 2 * WIDTH), values(12, 2 * WIDTH));
    let names = [
        "zero", "splat", "load", "units", "zip", "zip", "weave", "weave", "add", "part 0",
        "part 1", "part 2", "dot",
    ];
    let (mut got, mut want) = (vec![vec![1; WIDTH]; 13], vec![vec![2; WIDTH]; 13]);
    l.run(Each {
        a: &a,
        b: &b,
        out: &mut got,
    });
    Plain.run(Each {
        a: &a,
        b: &b,
        out: &mut want,
    });
    for ((name, got), want) in names.into_iter().zip(&got).zip(&want) {
        if name == "dot" {
            for (got, want) in got.iter().zip(want) {
                let (got, want) = (f32::from_bits(*got), f32::from_bits(*want));
                // At most three terms below 4, each rounded.
                assert!((got - want).abs() < 4e-6, "dot: {got}, not {want}");
            }
        } else {
            assert_eq!(got, want, "{name}");
        }
    }
}

#[test]
fn of_this_processor() {
    #[cfg(target_arch = "x86_64")]
    if let Some(l) = lanes::Avx512Bf16::detect() {
        by_lanes(l);
        assert!(Kernel::Avx512Bf16(l).is_right());
        #[cfg(target_os = "linux")]
        if let Some(tiles) = tiles::Amx::detect() {
            by_tiles(l, tiles);
            assert!(
                (1..=3)
                    .step_by(2)
                    .all(|parts| Kernel::Amx((l, tiles), parts).is_right())
            );
            return;
        }
        eprintln!("no tiles on this processor: only simulated ones were tested");
        return;
    }
    eprintln!("no product of bfloat16 on this processor: only the simulated one was tested");
}

#[test]
fn a_row_is_the_same_among_few_and_among_many() {
    // Weights of two slabs, decoded, and beside as many rows of x as fit with them: the sums of the second go on from those of
    // the first, in whole squares and in parts of one.
    for (rows, cols, format) in [
        (1100, 1000, WeightFormat::NF4),
        (7300, 70, WeightFormat::BF16),
    ] {
        let w = values(7, rows * cols);
        let w = FrozenWeight::quantize(rows, cols, &w, format).unwrap();
        let x = values(8, 40 * rows);
        let product = |m: usize| {
            let (x, low) = (&x[..m * rows], Low::default());
            let mut out = vec![1.0; m * cols];
            let product = Product { x, m, w: &w, low };
            product.backward_by_tiles((Plain, tiles::Plain), 1, &mut out, true);
            out
        };
        assert_eq!(product(40)[..3 * cols], product(3));
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn products_in_microcode_are_left_to_single_precision() {
    let [intel, amd] = [*b"Genu", *b"Auth"].map(u32::from_le_bytes);
    // Sapphire Rapids and what came after it; Cooper Lake, which has the product but no FP16; Zen.
    for (vendor, fp16, microcode) in [
        (intel, true, true),
        (intel, false, false),
        (amd, true, false),
    ] {
        assert_eq!(super::lanes::microcode(vendor, fp16), microcode);
    }
}
