//! Checkpointing and eager differentiation change nothing but when things are computed.

use peft_tensor::{Device, RngKey, Tensor, checkpoint, eager};

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

/// In bfloat16 the values are those of single precision, and only what waited for the backward pass was rounded.
#[test]
fn packed_activations_change_gradients_a_little() {
    use peft_tensor::{Glu, Precision};
    let run = |precision| {
        let device = Device::cpu_in(precision);
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
    let (value, exact) = run(Precision::F32);
    let (same, packed) = run(Precision::Bf16);
    assert_eq!(value, same);
    let size = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let gap = size(&mut exact.iter().zip(&packed).map(|(a, b)| a - b));
    let whole = size(&mut exact.iter().copied());
    assert!(gap > 1e-5 * whole && gap < 1e-2 * whole, "{gap} of {whole}");
}
