//! Values that are made when somebody reads them.
//!
//! A checkpointed function runs a second time for what its backward pass needs of it, which its result is not: the last
//! product and the sum it goes into would be made for nobody.

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{Buffer, Device, Result, memo};

type Make = Box<dyn FnOnce() -> Result<Buffer> + Send>;

/// What is made once, if it is read.
pub(crate) struct Late {
    make: Mutex<Option<Make>>,
    /// None inside where it could not be made.
    made: OnceLock<Option<Buffer>>,
}

impl Late {
    pub(crate) fn is_made(&self) -> bool {
        self.made.get().is_some()
    }

    pub(crate) fn read(&self) -> Option<&Buffer> {
        let made = self.made.get_or_init(|| {
            let make = self
                .make
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            make.and_then(|make| make().ok())
        });
        made.as_ref()
    }

    /// As it is, if it was made.
    pub(crate) fn read_mut(&mut self) -> Option<&mut Buffer> {
        self.made.get_mut()?.as_mut()
    }
}

/// What `make` makes: at once, or where a function runs again when it is read. A device that fails to make something does so
/// at once, so that its error is heard.
pub(crate) fn later(
    device: &Device,
    make: impl FnOnce() -> Result<Buffer> + Send + 'static,
) -> Result<Buffer> {
    if !memo::runs_again() || device.backend().waits().is_some() {
        return make();
    }
    Ok(Buffer::new(Late {
        make: Mutex::new(Some(Box::new(make))),
        made: OnceLock::new(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BaseWeight, FrozenWeight, Tensor, WeightFormat};

    /// A product, one with a low rank beside it, and their sum with what came in.
    fn block(x: &Tensor) -> [Tensor; 3] {
        let values: Vec<f32> = (0..36).map(|i| (i as f32 * 0.7).sin()).collect();
        let weight = FrozenWeight::quantize(6, 6, &values, WeightFormat::F32).unwrap();
        let weight = BaseWeight::frozen(weight, false, x.device());
        let factor = |shape: &[usize]| {
            Tensor::from_vec(values[..12].to_vec(), shape, x.device())
                .unwrap()
                .leaf()
        };
        let first = weight.linear(x).unwrap();
        let (a, b) = (factor(&[2, 6]), factor(&[6, 2]));
        let last = weight.linear_low_rank(&first, &a, &b, 0.5).unwrap();
        let sum = last.add(x).unwrap();
        [first, last, sum]
    }

    #[test]
    fn only_what_is_read_is_made_in_a_second_run() {
        let device = Device::cpu();
        let x = Tensor::from_vec((0..12).map(|i| i as f32).collect(), &[2, 6], &device).unwrap();
        let x = x.leaf();
        let at_once = block(&x);
        assert!(at_once.iter().all(|t| !t.data.is_late()));
        let (_, memo) = memo::first(|| ());
        let again = memo::again(&memo, || block(&x));
        // The second product and its gradient of A read the first one.
        assert_eq!(
            [false, true, true],
            again.each_ref().map(|t| t.data.is_late())
        );
        for (again, at_once) in again.iter().zip(&at_once).rev() {
            assert_eq!(again.to_vec().unwrap(), at_once.to_vec().unwrap());
            assert!(!again.data.is_late());
        }
        assert!(!memo::runs_again() && !block(&x)[2].data.is_late());
    }

    #[test]
    fn what_was_made_late_can_be_written_to() {
        let (_, memo) = memo::first(|| ());
        let device = Device::cpu();
        let make = || Device::cpu().backend().fill(5000, 2.0);
        let of = |data| Tensor::from_buffer(data, vec![5000], &Device::cpu());
        let late = || memo::again(&memo, || later(&device, make)).unwrap();
        let mut buffer = late();
        assert!(buffer.is_late() && buffer.get_mut::<u8>().is_none());
        let sum = of(late()).accumulated(&of(buffer.clone())).unwrap();
        assert_eq!(sum.to_vec().unwrap(), [4.0; 5000]);
        assert!(!buffer.is_late() && buffer.get::<u8>().is_none());
    }
}
