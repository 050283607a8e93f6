//! What goes wrong on a device: no memory left, the device gone, compiled kernels spoiled. Each is an error that says what
//! to do, or is got over.

mod common;

use std::sync::Mutex;

use common::{open, random};
use peft_tensor::{Device, KernelStore, Tensor, TensorError};
use peft_wgpu::{Options, destroy_all, usage};

/// Taking devices away takes those of other tests away, too.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

#[test]
fn memory_runs_out_with_a_word_and_comes_back() {
    let _alone = alone();
    let options = Options {
        max_memory: Some(8 << 20),
        ..Options::default()
    };
    let Some(device) = open(&options) else { return };
    let mut held: Vec<Tensor> = Vec::new();
    let error = loop {
        // A megabyte each.
        match Tensor::full(1.0, &[1 << 18], &device) {
            Ok(tensor) => held.push(tensor),
            Err(e) => break e,
        }
        assert!(held.len() < 9, "the limit is 8 MiB");
    };
    assert!(matches!(error, TensorError::Device(_)), "{error:?}");
    let error = error.to_string();
    assert!(
        error.contains("out of memory") && error.contains("train.batch_size"),
        "{error}"
    );
    assert!(held.len() >= 6, "{}", held.len());
    // Results go wrong nowhere: what there was is as it was, and what is given up can be had again.
    assert_eq!(held[0].to_vec().unwrap()[77], 1.0);
    held.truncate(3);
    let sum = held[0].add(&held[1]).unwrap().to_vec().unwrap();
    assert!(sum.iter().all(|&v| v == 2.0));
}

#[test]
fn buffers_are_used_again_and_given_back() {
    let _alone = alone();
    let Some(device) = open(&Options::default()) else {
        return;
    };
    let of_this = || usage().pop().unwrap().memory;
    let step = |n: usize| {
        let mut x = random(n as u64, &[n], &device);
        for _ in 0..20 {
            x = x.affine(1.01, 0.1).unwrap().add(&x).unwrap();
        }
        let _ = x.to_vec().unwrap();
        device.backend().hand_over().unwrap();
    };
    step(300_000);
    let after_one = of_this();
    assert!(
        after_one.peak >= 2 * 1_200_000 && after_one.live < 1000,
        "{after_one:?}"
    );
    for _ in 0..5 {
        step(300_000);
        assert_eq!(of_this().held, after_one.held, "no growth");
    }
    assert!(after_one.held <= after_one.peak * 3 / 2, "{after_one:?}");
    // Work of another size: what it does not touch goes.
    (0..20).for_each(|_| step(5_000));
    assert!(of_this().held < 300_000, "{:?}", of_this());
}

#[test]
fn a_device_that_goes_away_says_so_from_then_on() {
    let _alone = alone();
    for first in 0..4 {
        let Some(device) = open(&Options::default()) else {
            return;
        };
        let x = random(1, &[100, 30], &device);
        let y = random(2, &[30, 20], &device);
        x.matmul(&y).unwrap();
        destroy_all();
        // Whatever is done first, and afterwards everything else.
        for what in first..first + 4 {
            let error = match what % 4 {
                0 => x.to_vec().map(drop),
                1 => x.matmul(&y).and_then(|z| z.to_vec()).map(drop),
                2 => Tensor::zeros(&[5_000_000], &device)
                    .and_then(|z| z.to_vec())
                    .map(drop),
                _ => Tensor::from_vec(vec![1.0; 100], &[100], &device)
                    .and_then(|z| z.to_vec())
                    .map(drop),
            };
            let error = error.unwrap_err().to_string();
            assert!(error.contains("the device was lost"), "{what}: {error}");
        }
    }
    // Another one can be had.
    let Some(again) = open(&Options::default()) else {
        return;
    };
    assert_eq!(
        Tensor::full(3.0, &[4], &again).unwrap().to_vec().unwrap(),
        [3.0; 4]
    );
}

#[test]
fn a_number_that_the_processor_knows_is_not_waited_for() {
    let _alone = alone();
    let Some(device) = open(&Options::default()) else {
        return;
    };
    let waits = || device.backend().waits().unwrap();
    let x = random(1, &[40], &device);
    let begun = waits();
    let number = Tensor::full(3.0, &[], &device)
        .unwrap()
        .affine(0.5, 1.0)
        .unwrap();
    assert_eq!(number.item().unwrap(), 2.5);
    assert_eq!(waits(), begun);
    let sum = x.sum_all().unwrap();
    assert!(sum.item().unwrap().is_finite() && waits() == begun + 1);
    // It is the device's number, too, and one that is added to is no longer known.
    let twice = x.mul(&number).unwrap().to_vec().unwrap();
    assert_eq!(twice[7], x.to_vec().unwrap()[7] * 2.5);
    let mut buffer = device.backend().fill(1, 3.0).unwrap();
    let more = device.backend().fill(1, 4.0).unwrap();
    buffer = device.backend().accumulate(buffer, &more).unwrap();
    assert_eq!(device.backend().download(&buffer).unwrap(), [7.0]);
    // Kernels that fill and then write.
    let two = device.backend().upload(vec![1.5, 2.0]).unwrap();
    let sum = device.backend().scatter_add(&two, 1, 1, &[0, 0]).unwrap();
    assert_eq!(device.backend().download(&sum).unwrap(), [3.5]);
    let one = device.backend().upload(vec![4.5]).unwrap();
    let wide = device.backend().narrow_grad(&one, 1, 1, 1, 0, 1).unwrap();
    assert_eq!(device.backend().download(&wide).unwrap(), [4.5]);
    let shared = buffer.clone();
    let both = device.backend().accumulate(more.clone(), &shared).unwrap();
    assert_eq!(device.backend().download(&both).unwrap(), [11.0]);
    assert_eq!(device.backend().download(&more).unwrap(), [4.0]);
}

/// What a store of this test holds, and how often it was asked and given something.
static STORED: Mutex<(Option<Vec<u8>>, usize, usize)> = Mutex::new((None, 0, 0));

const STORE: KernelStore = KernelStore {
    load: |_| {
        let mut stored = STORED.lock().unwrap();
        stored.1 += 1;
        stored.0.clone()
    },
    save: |_, bytes| {
        let mut stored = STORED.lock().unwrap();
        stored.2 += 1;
        stored.0 = Some(bytes.to_vec());
        true
    },
};

#[test]
fn compiled_kernels_are_kept_and_spoiled_ones_ignored() {
    let _alone = alone();
    let work = |device: &Device| {
        let (x, y) = (random(1, &[9, 30], device), random(2, &[30, 20], device));
        x.matmul(&y).unwrap().softmax().unwrap().to_vec().unwrap()
    };
    let options = Options {
        store: Some(STORE),
        ..Options::default()
    };
    let Some(device) = open(&options) else { return };
    let want = work(&device);
    let (bytes, asked, given) = STORED.lock().unwrap().clone();
    let Some(bytes) = bytes else {
        assert_eq!((asked, given), (0, 0), "this driver keeps no kernels");
        eprintln!("this driver keeps no compiled kernels");
        return;
    };
    assert_eq!((asked, given), (1, 1), "asked once, saved once");
    eprintln!("{} bytes of kernels", bytes.len());
    work(&device);
    assert_eq!(STORED.lock().unwrap().2, 1, "nothing new to save");
    // The next process has them.
    assert_eq!(work(&open(&options).unwrap()), want);
    let mut spoiled = bytes.clone();
    let middle = spoiled.len() / 2;
    spoiled[middle] ^= 0xff;
    for bad in [
        spoiled,
        bytes[..bytes.len() - 1].to_vec(),
        vec![],
        vec![7; 3000],
    ] {
        STORED.lock().unwrap().0 = Some(bad);
        assert_eq!(work(&open(&options).unwrap()), want);
        assert_eq!(
            STORED.lock().unwrap().0.as_ref(),
            Some(&bytes),
            "and saved anew"
        );
    }
}
