//! Rotations of runs of columns, and the maps from skew-symmetric matrices to rotations.

use peft_core::{Result, RngKey, Tensor};

/// Each run of b columns of `x [.., n b]` times its own matrix of `blocks [n, b, b]`, or times the only one there is.
pub(crate) fn rotate(x: &Tensor, blocks: &Tensor, transposed: bool) -> Result<Tensor> {
    let (n, b, _) = blocks.dims3()?;
    let times = |x: &Tensor, by: &Tensor| {
        if transposed {
            x.matmul_t(by)
        } else {
            x.matmul(by)
        }
    };
    if n == 1 {
        let runs = x.reshape(&[x.numel() / b.max(1), b])?;
        return Ok(times(&runs, &blocks.reshape(&[b, b])?)?.reshape(x.shape())?);
    }
    let runs = x.reshape(&[x.numel() / (n * b).max(1), n, b])?;
    let turned = times(&runs.permute(&[1, 0, 2])?, blocks)?;
    Ok(turned.permute(&[1, 0, 2])?.reshape(x.shape())?)
}

/// The identity `[b, b]`, shaped to stand beside `like [n, b, b]` or `[b, b]`.
pub(crate) fn identity(like: &Tensor) -> Result<Tensor> {
    let b = like.last_dim();
    let values = (0..b * b)
        .map(|at| if at % (b + 1) == 0 { 1.0 } else { 0.0 })
        .collect();
    let mut shape = vec![1; like.rank().saturating_sub(2)];
    shape.extend([b, b]);
    Ok(Tensor::from_vec(values, &shape, like.device())?)
}

/// Cayley's map `(I - S)(I + S)⁻¹ = 2 (I + S)⁻¹ - I` of skew-symmetric `S [n, b, b]`: rotations.
pub(crate) fn cayley(skew: &Tensor) -> Result<Tensor> {
    let one = identity(skew)?;
    Ok(inverse(&skew.add(&one)?)?.scale(2.0)?.sub(&one)?)
}

/// The inverses of `m [n, b, b]` or `[b, b]`, computed in double precision.
pub(crate) fn inverse(m: &Tensor) -> Result<Tensor> {
    let b = m.last_dim();
    let mut values = m.to_f64()?;
    for matrix in values.chunks_mut((b * b).max(1)) {
        let inverted = inverted(matrix, b);
        matrix.copy_from_slice(&inverted);
    }
    let value = Tensor::from_f64(values, m.shape(), m.device())?;
    if !m.requires_grad() {
        return Ok(value);
    }
    // d M⁻¹ = -M⁻¹ dM M⁻¹: a term that is zero and has this slope.
    let nothing = m.sub(&m.detach())?;
    Ok(value.sub(&value.matmul(&nothing)?.matmul(&value)?)?)
}

/// Gauss and Jordan's elimination with row pivots; a singular matrix gives values that are not finite.
fn inverted(matrix: &[f64], b: usize) -> Vec<f64> {
    let mut rows: Vec<Vec<f64>> = matrix
        .chunks(b)
        .enumerate()
        .map(|(i, row)| {
            let right = (0..b).map(|j| if i == j { 1.0 } else { 0.0 });
            row.iter().copied().chain(right).collect()
        })
        .collect();
    for column in 0..b {
        let size = |row: &Vec<f64>| row[column].abs();
        let pivot = (column..b).max_by(|&i, &j| size(&rows[i]).total_cmp(&size(&rows[j])));
        rows.swap(column, pivot.unwrap_or(column));
        let mut top = std::mem::take(&mut rows[column]);
        let scale = 1.0 / top[column];
        top.iter_mut().for_each(|v| *v *= scale);
        for row in rows.iter_mut().filter(|row| !row.is_empty()) {
            let factor = row[column];
            if factor != 0.0 {
                // To the left of the pivot's column the pivot row is zero already.
                for (v, t) in row.iter_mut().zip(&top).skip(column) {
                    *v -= factor * t;
                }
            }
        }
        rows[column] = top;
    }
    rows.iter().flat_map(|row| &row[b..]).copied().collect()
}

/// Skew-symmetric matrices `[r, b, b]` from their upper triangles `[r, b (b - 1) / 2]`.
pub(crate) fn skew(rows: &Tensor, b: usize) -> Result<Tensor> {
    let place = |i: usize, j: usize| i * (2 * b - i - 1) / 2 + j - i - 1;
    let (mut from, mut signs) = (Vec::new(), Vec::new());
    for at in 0..b * b {
        let (i, j) = (at / b, at % b);
        let (index, sign) = match i.cmp(&j) {
            std::cmp::Ordering::Less => (place(i, j), 1.0),
            std::cmp::Ordering::Equal => (0, 0.0),
            std::cmp::Ordering::Greater => (place(j, i), -1.0),
        };
        from.push(index as u32);
        signs.push(sign);
    }
    let (r, _) = rows.dims2()?;
    let signs = Tensor::from_vec(signs, &[b * b, 1], rows.device())?;
    let all = rows.t()?.gather_rows(&from)?.mul(&signs)?;
    Ok(all.t()?.reshape(&[r, b, b])?)
}

/// `I + 2 Q + 2 Q² + ..`, the last power once, cut off as HF does: 3 and 4 terms are the same.
pub(crate) fn neumann(q: &Tensor, terms: usize) -> Result<Tensor> {
    let mut sum = identity(q)?.add(&q.scale(2.0)?)?;
    if terms > 2 {
        let mut power = q.matmul(q)?;
        sum = sum.add(&power.scale(2.0)?)?;
        for _ in 3..terms.saturating_sub(1) {
            power = power.matmul(q)?;
            sum = sum.add(&power.scale(2.0)?)?;
        }
        sum = sum.add(&power.matmul(q)?)?;
    }
    Ok(sum)
}

/// Rows `[r, n]` of upper triangles, those with a norm of their skew-symmetric matrix above `bound` shortened to it.
pub(crate) fn bring_back(rows: &Tensor, bound: f64) -> Result<Tensor> {
    // Every element stands in the matrix twice.
    let square = rows.square()?.sum_axis(1)?.scale(2.0)?;
    // What was shortened once is not to be touched again for its rounding.
    let limit = bound * bound * (1.0 + 2e-5);
    let far = |&s: &f64| if s > limit { 1.0 } else { 0.0 };
    let far: Vec<f32> = square.to_f64()?.iter().map(far).collect();
    if !far.contains(&1.0) {
        return Ok(rows.clone());
    }
    let far = Tensor::from_vec(far, square.shape(), rows.device())?;
    let near = far.affine(-1.0, 1.0)?;
    // Near rows get the norm 1, whose slope is finite also where they are zero.
    let norm = square.mul(&far)?.add(&near)?.sqrt()?;
    let factor = far.scale(bound as f32)?.div(&norm)?.add(&near)?;
    Ok(rows.mul(&factor)?)
}

/// The first `p n`, rounded down, of the matrices `[n, b, b]` in an order drawn from `key` replaced by the identity:
/// HF's multiplicative dropout.
pub(crate) fn drop_blocks(blocks: &Tensor, p: f32, key: RngKey) -> Result<Tensor> {
    let (n, _, _) = blocks.dims3()?;
    let count = (f64::from(p) * n as f64) as usize;
    if count == 0 {
        return Ok(blocks.clone());
    }
    let mut dropped = vec![0.0; n];
    for at in key.permutation(n).into_iter().take(count) {
        if let Some(entry) = dropped.get_mut(at) {
            *entry = 1.0;
        }
    }
    let dropped = Tensor::from_vec(dropped, &[n, 1, 1], blocks.device())?;
    let kept = blocks.mul(&dropped.affine(-1.0, 1.0)?)?;
    Ok(kept.add(&identity(blocks)?.mul(&dropped)?)?)
}

#[cfg(test)]
mod tests {
    use peft_core::{Device, Tensor};

    use super::{bring_back, cayley, inverse, neumann, skew};

    fn matrix(values: &[f32], n: usize) -> Tensor {
        Tensor::from_vec(
            values.to_vec(),
            &[values.len() / (n * n), n, n],
            &Device::cpu(),
        )
        .expect("a tensor")
    }

    #[test]
    fn inverts_with_pivots() {
        let y = inverse(&matrix(&[0.0, 2.0, 4.0, 0.0, 1.0, 1.0, 0.0, 1.0], 2)).expect("inverts");
        assert_eq!(
            y.to_vec().expect("values"),
            [0.0, 0.25, 0.5, 0.0, 1.0, -1.0, 0.0, 1.0]
        );
    }

    /// S = [[0, t], [-t, 0]]: (I - S)(I + S)⁻¹ = [[1 - t², -2 t], [2 t, 1 - t²]] / (1 + t²), with slope
    /// -4 t / (1 + t²)² in the corner.
    #[test]
    fn the_map_of_a_plane_and_its_slope() {
        let t = matrix(&[0.5], 1).leaf();
        let signs = matrix(&[0.0, 1.0, -1.0, 0.0], 2);
        let q = cayley(&signs.mul(&t).expect("broadcasts")).expect("maps");
        let values = q.to_vec().expect("values");
        for (got, want) in values.iter().zip([0.6, -0.8, 0.8, 0.6]) {
            assert!((got - want).abs() < 1e-6, "{values:?}");
        }
        let corner = q
            .narrow(1, 0, 1)
            .and_then(|q| q.narrow(2, 0, 1))
            .expect("narrows");
        let grads = corner
            .sum_all()
            .and_then(Tensor::backward)
            .expect("backward");
        let slope = grads.get(&t).expect("a gradient").to_vec().expect("values");
        assert!((slope[0] + 2.0 / 1.5625).abs() < 1e-5, "{slope:?}");
    }

    fn rows(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::cpu()).expect("a tensor")
    }

    /// A plane's Q has Q² = -t² I, so the terms can be counted: t = 1 gives I + 2 Q, then - 2 I - Q, then - 2 Q + I.
    #[test]
    fn terms_are_counted_as_hf_counts_them() {
        let q = skew(&rows(&[1.0], &[1, 1]), 2).expect("a matrix");
        let first_row = |terms| {
            let sum = neumann(&q, terms).expect("sums").to_vec().expect("values");
            [sum[0], sum[1]]
        };
        assert_eq!(first_row(2), [1.0, 2.0]);
        assert_eq!(first_row(3), [-1.0, 1.0]);
        assert_eq!(first_row(4), [-1.0, 1.0]);
        assert_eq!(first_row(5), [0.0, 0.0]);
    }

    /// The matrix of (3, 4) has the norm 5 sqrt 2; that of (0.1, 0) is within the bound.
    #[test]
    fn far_rotations_are_brought_back() {
        let rows = rows(&[3.0, 4.0, 0.1, 0.0], &[2, 2]);
        let y = bring_back(&rows, 2f64.sqrt())
            .and_then(|y| Ok(y.to_vec()?))
            .expect("values");
        for (got, want) in y.iter().zip([0.6, 0.8, 0.1, 0.0]) {
            assert!((got - want).abs() < 1e-6, "{y:?}");
        }
    }
}
