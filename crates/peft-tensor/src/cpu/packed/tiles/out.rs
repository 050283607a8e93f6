//! Parts of a result that threads write to at once.

use std::marker::PhantomData;

use super::square::SQUARE;

/// Some rows and columns of a result, which nobody else has.
pub(super) struct Window<'a> {
    at: *mut f32,
    rows: usize,
    cols: usize,
    /// Values from a row to the next.
    width: usize,
    result: PhantomData<&'a mut [f32]>,
}

/// Where all of a square fits.
pub(in super::super) struct Spot<'a> {
    pub(super) at: *mut f32,
    pub(super) width: usize,
    result: PhantomData<&'a mut [f32]>,
}

#[allow(
    unsafe_code,
    reason = "columns of a result are no slice, and threads write to them side by side"
)]
// SAFETY: a window is made of a slice that is borrowed alone, and cut into windows without a common element.
unsafe impl Send for Window<'_> {}

impl<'a> Window<'a> {
    /// The first `cols` of each of `rows` rows, `width` apart.
    pub(super) fn new(out: &'a mut [f32], rows: usize, cols: usize, width: usize) -> Self {
        let last = rows.saturating_sub(1) * width + cols;
        assert!(
            cols <= width && (rows * cols == 0 || last <= out.len()),
            "a window beyond the end of a result"
        );
        Self {
            at: out.as_mut_ptr(),
            rows,
            cols,
            width,
            result: PhantomData,
        }
    }

    /// Those rows, and the rest.
    pub(super) fn split_rows(self, rows: usize) -> (Self, Self) {
        let rows = rows.min(self.rows);
        let rest = Self {
            at: self.at.wrapping_add(rows * self.width),
            rows: self.rows - rows,
            ..self
        };
        (Self { rows, ..self }, rest)
    }

    /// Those columns, and the rest.
    pub(super) fn split_columns(self, cols: usize) -> (Self, Self) {
        let cols = cols.min(self.cols);
        let rest = Self {
            at: self.at.wrapping_add(cols),
            cols: self.cols - cols,
            ..self
        };
        (Self { cols, ..self }, rest)
    }

    /// A square of it, if all of it is inside.
    pub(super) fn spot(&mut self, row: usize, col: usize) -> Option<Spot<'_>> {
        (row + SQUARE <= self.rows && col + SQUARE <= self.cols).then_some(Spot {
            at: self.at.wrapping_add(row * self.width + col),
            width: self.width,
            result: PhantomData,
        })
    }

    /// At most a square's columns of a row, from one on.
    pub(super) fn row(&mut self, row: usize, col: usize) -> &mut [f32] {
        assert!(
            row < self.rows && col <= self.cols,
            "a row beyond the end of a result"
        );
        let len = (self.cols - col).min(SQUARE);
        // SAFETY: inside of the window, which has its elements to itself and is borrowed alone.
        #[allow(unsafe_code, reason = "see above")]
        unsafe {
            std::slice::from_raw_parts_mut(self.at.add(row * self.width + col), len)
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }
}

impl<'a> Spot<'a> {
    /// At the beginning of a slice with rows `width` apart.
    pub(super) fn of(out: &'a mut [f32], width: usize) -> Self {
        assert!(
            width >= SQUARE && (SQUARE - 1) * width + SQUARE <= out.len(),
            "a square beyond the end of a result"
        );
        Self {
            at: out.as_mut_ptr(),
            width,
            result: PhantomData,
        }
    }

    /// Where it begins, and values from a row to the next.
    pub(super) fn start(&self) -> (*const f32, usize) {
        (self.at, self.width)
    }

    #[cfg(test)]
    pub(super) fn row(&self, row: usize) -> &[f32] {
        assert!(row < SQUARE);
        // SAFETY: a spot has all the rows of a square.
        #[allow(unsafe_code, reason = "see above")]
        unsafe {
            std::slice::from_raw_parts(self.at.add(row * self.width), SQUARE)
        }
    }

    #[cfg(test)]
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < SQUARE);
        // SAFETY: as above, and it is borrowed alone.
        #[allow(unsafe_code, reason = "see above")]
        unsafe {
            std::slice::from_raw_parts_mut(self.at.add(row * self.width), SQUARE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_what_they_were_cut_to() {
        let width = 50;
        let mut out: Vec<f32> = (0..40 * width).map(|i| i as f32).collect();
        let (mut top, rest) = Window::new(&mut out, 40, 45, width).split_rows(5);
        let (mut left, mut right) = rest.split_columns(10);
        assert_eq!((top.rows(), left.rows(), right.rows()), (5, 35, 35));
        assert_eq!(top.row(4, 40), [240.0, 241.0, 242.0, 243.0, 244.0]);
        assert_eq!(left.row(0, 8), [258.0, 259.0]);
        assert_eq!(right.row(1, 30), [340.0, 341.0, 342.0, 343.0, 344.0]);
        assert_eq!(right.row(0, 0).len(), SQUARE);
        assert!(left.spot(0, 0).is_none() && top.spot(0, 0).is_none());
        assert!(right.spot(3, 3).is_some() && right.spot(4, 0).is_none());
        assert!(right.spot(0, 4).is_none());
        right.row(34, 34)[0] = -1.0;
        assert_eq!(out[39 * width + 44], -1.0);
    }

    #[test]
    #[should_panic(expected = "beyond the end")]
    fn a_window_is_inside_of_its_slice() {
        Window::new(&mut [0.0; 100], 3, 10, 50);
    }

    #[test]
    #[should_panic(expected = "beyond the end")]
    fn a_row_is_inside_of_its_window() {
        Window::new(&mut [0.0; 100], 2, 10, 50).row(2, 0);
    }
}
