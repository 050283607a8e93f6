//! Checkpointing and eager differentiation change nothing but when things are computed.

use peft_tensor::{Device, Eager, RngKey, Tensor, checkpoint, eager};

/// A block with dropout, a norm, parameters that it captures, and an input used twice.
fn block(x: &Tensor, w: &Tensor, g: &Tensor) -> peft_tensor::Result<Tensor> {
    let h = x
        .rms_norm(g, 1e-5)?
        .matmul_t(w)?
        .silu()?
        .dropout(0.3, RngKey::new(9))?;
    h.matmul(w)?.add(x)
}

struct Net {
    x: Tensor,
    w: [Tensor; 2],
    g: [Tensor; 2],
}

fn net(device: &Device) -> Net {
    let normal = |seed, shape: &[usize]| {
        Tensor::normal(RngKey::new(seed), 0.0, 0.5, shape, device)
            .unwrap()
            .leaf()
    };
    Net {
        x: normal(1, &[3, 7, 24]),
        w: [normal(2, &[40, 24]), normal(3, &[40, 24])],
        g: [normal(4, &[24]), normal(5, &[24])],
    }
}

fn grads(net: &Net, loss: Tensor) -> Vec<Vec<f32>> {
    let grads = loss.backward().unwrap();
    let leaves = [&net.x, &net.w[0], &net.w[1], &net.g[0], &net.g[1]];
    leaves
        .iter()
        .map(|leaf| grads.get(leaf).unwrap().to_vec().unwrap())
        .collect()
}

fn run(net: &Net, checkpointed: bool) -> Vec<Vec<f32>> {
    let mut h = net.x.clone();
    for (w, g) in net.w.iter().zip(&net.g) {
        h = if checkpointed {
            let (w, g) = (w.clone(), g.clone());
            checkpoint(&[&h], move |x| block(&x[0], &w, &g)).unwrap()
        } else {
            block(&h, w, g).unwrap()
        };
    }
    grads(net, h.square().unwrap().sum_all().unwrap())
}

#[test]
fn checkpoint_gives_the_same_bits() {
    for device in [Device::cpu(), Device::reference()] {
        let net = net(&device);
        let plain = run(&net, false);
        assert_eq!(run(&net, true), plain);
        assert!(plain.iter().all(|g| g.iter().any(|v| *v != 0.0)));
    }
}

#[test]
fn eager_gives_the_same_gradients() {
    let net = net(&Device::cpu());
    let head = |h: &[Tensor]| h[0].flatten_rows()?.cross_entropy(&[5; 21]);
    let h = block(
        &block(&net.x, &net.w[0], &net.g[0]).unwrap(),
        &net.w[1],
        &net.g[1],
    )
    .unwrap();
    let plain = grads(
        &net,
        head(std::slice::from_ref(&h)).unwrap().scale(0.7).unwrap(),
    );
    let early = grads(&net, eager(&[&h], head).unwrap().scale(0.7).unwrap());
    for (a, b) in plain.iter().zip(&early) {
        for (a, b) in a.iter().zip(b) {
            // The factor is applied at another place, once more rounded.
            assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{a} and {b}");
        }
    }
}

/// A loss in pieces of different weights has the gradient of their sum.
#[test]
fn pieces_add_up() {
    let net = net(&Device::cpu());
    let piece = |h: &Tensor, i: usize| {
        h.flatten_rows()?
            .narrow(0, 7 * i, 7)?
            .cross_entropy(&[5; 7])
    };
    let h = block(&net.x, &net.w[0], &net.g[0]).unwrap();
    let h = block(&h, &net.w[1], &net.g[1]).unwrap();
    let weights = [1.0, 0.25, 2.0];
    let mut whole = Tensor::zeros(&[], &Device::cpu()).unwrap();
    let (mut pieces, mut sum) = (Eager::default(), whole.clone());
    for (i, weight) in weights.into_iter().enumerate() {
        let part = piece(&h, i).unwrap().scale(weight).unwrap();
        whole = whole.add(&part).unwrap();
        let value = pieces.piece(&[&h], weight, |x| piece(&x[0], i)).unwrap();
        assert!(!value.requires_grad());
        sum = sum.add(&value.scale(weight).unwrap()).unwrap();
    }
    assert_eq!(sum.item().unwrap(), whole.item().unwrap());
    let early = pieces.finish(&sum).scale(0.7).unwrap();
    let (plain, early) = (grads(&net, whole.scale(0.7).unwrap()), grads(&net, early));
    for (a, b) in plain.iter().flatten().zip(early.iter().flatten()) {
        // The factor is applied at another place, once more rounded.
        assert!((a - b).abs() <= 1e-5 * (1.0 + a.abs()), "{a} and {b}");
    }
}

/// The values are those of single precision, and only what waited for the backward pass was rounded: little in bfloat16,
/// somewhat more in 8 bits.
#[test]
fn packed_activations_change_gradients_a_little() {
    use peft_tensor::{Glu, Keep, Precision};
    let run = |keep| {
        let device = Device::cpu_keeping(Precision::F32, keep);
        let random = |seed, shape: &[usize]| {
            Tensor::normal(RngKey::new(seed), 0.0, 1.0, shape, &device).unwrap()
        };
        let (a, b) = (random(1, &[24, 40]).leaf(), random(2, &[40, 24]).leaf());
        let x = random(3, &[33, 40]).matmul_t(&a).unwrap();
        let h = x.rms_norm(&random(4, &[24]), 1e-6).unwrap();
        let y = h.matmul_t(&b).unwrap();
        let out = y.glu(Glu::Silu, &y.gelu().unwrap()).unwrap();
        let loss = out.mul(&random(5, &[33, 40])).unwrap().sum_all().unwrap();
        let value = loss.item().unwrap();
        let grads = loss.backward().unwrap();
        let both = [&a, &b].map(|p| grads.get(p).unwrap().to_vec().unwrap());
        (value, both.concat())
    };
    let (value, exact) = run(Keep::F32);
    let size = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let whole = size(&mut exact.iter().copied());
    let gap = |keep| {
        let (same, packed) = run(keep);
        assert_eq!(value, same);
        size(&mut exact.iter().zip(&packed).map(|(a, b)| a - b)) / whole
    };
    let (half, codes) = (gap(Keep::Bf16), gap(Keep::Int8));
    // Half a step of 2^-8 relative, and of 1/127 of the largest of 64, which is about 2.5 deviations.
    assert!(half > 1e-5 && half < 5e-3, "{half}");
    assert!(codes > half && codes < 2e-2, "{codes}");
}
