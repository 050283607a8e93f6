//! The same bits for any number of threads.

use std::sync::Arc;

use peft_tensor::{
    Attention, BaseWeight, Device, Glu, Mask, RngKey, Rope, Tensor, Unary, WeightFormat,
};

use crate::frozen::weight;

/// Values and gradients of operations that are all large enough to be split.
fn everything() -> Vec<Vec<f32>> {
    let device = Device::cpu();
    let normal = |seed, shape: &[usize]| {
        Tensor::normal(RngKey::new(seed), 0.0, 1.0, shape, &device)
            .unwrap()
            .leaf()
    };
    let (x, y) = (normal(1, &[4, 96, 192]), normal(2, &[4, 96, 192]));
    let (w, g, b) = (normal(3, &[300, 192]), normal(4, &[192]), normal(5, &[192]));
    let positions = Arc::new((0..4 * 96).map(|i| i % 96).collect::<Vec<u32>>());
    let table = Arc::new(
        (0..96 * 16)
            .map(|i| (i as f32 * 0.01).sin())
            .collect::<Vec<f32>>(),
    );
    let rope = Arc::new(Rope {
        heads: 6,
        head_dim: 32,
        half: 16,
        cos: table.clone(),
        sin: table,
        positions,
    });
    let spec = Attention {
        heads: 6,
        kv_heads: 6,
        head_dim: 32,
        scale: 0.2,
        causal: true,
        window: None,
        prefix: 0,
        shared: 0,
        softcap: None,
        mask: Mask::default(),
    };
    let ids: Vec<u32> = (0..2000)
        .map(|i| RngKey::new(7).below(i, 300) as u32)
        .collect();
    let targets: Vec<i64> = (0..4 * 96).map(|i| i % 192).collect();

    let mut out = Vec::new();
    let mut keep = |t: peft_tensor::Result<Tensor>| {
        let t = t.unwrap();
        out.push(t.to_vec().unwrap());
        let grads = t.square().unwrap().sum_all().unwrap().backward().unwrap();
        for leaf in [&x, &y, &w, &g, &b] {
            out.extend(grads.get(leaf).map(|g| g.to_vec().unwrap()));
        }
    };
    for op in [Unary::Silu, Unary::Gelu, Unary::Exp] {
        keep(x.unary(op));
    }
    keep(x.mul(&g).and_then(|t| t.add(&y)));
    keep(x.glu(Glu::GeluTanh, &y));
    keep(x.dropout(0.2, RngKey::new(3)));
    keep(x.sum_to(&[192]));
    keep(x.sum_to(&[4, 96, 1]));
    keep(x.sum_all());
    keep(x.permute(&[2, 0, 1]));
    keep(w.gather_rows(&ids));
    keep(x.matmul_t(&w));
    keep(x.matmul_t(&y));
    keep(x.t_matmul(&y));
    keep(
        x.narrow(0, 0, 1)
            .and_then(|t| t.narrow(1, 3, 1)?.matmul_t(&w)),
    );
    keep(x.softmax());
    keep(x.rms_norm(&g, 1e-5));
    keep(x.layer_norm(&g, Some(&b), 1e-5));
    keep(x.rope(&rope));
    keep(x.attention(&y, &x, &spec));
    keep(x.flatten_rows().and_then(|t| t.cross_entropy(&targets)));
    for format in [
        WeightFormat::F32,
        WeightFormat::BF16,
        WeightFormat::Q4_0,
        WeightFormat::Q8_0,
    ] {
        let frozen = BaseWeight::frozen(weight(format, 500, 192, 6), false, &device);
        keep(frozen.linear(&x));
        keep(
            x.narrow(0, 0, 1)
                .and_then(|t| frozen.linear(&t.narrow(1, 3, 1)?)),
        );
    }
    // A product of several slabs in depth: many blocks of the packed kernel, with an odd rest.
    let (p, q) = (normal(8, &[333, 1111]), normal(9, &[707, 1111]));
    keep(p.matmul_t(&q));
    // Cut by rows and by columns, and no taller than what is cut by columns alone.
    let (p, q) = (normal(10, &[1030, 600]), normal(11, &[450, 600]));
    keep(p.matmul_t(&q));
    keep(p.narrow(0, 0, 60).and_then(|p| p.matmul_t(&q)));
    // Fewer pieces than rows would have.
    let (p, q) = (normal(12, &[9000, 16]), normal(13, &[16, 16]));
    keep(p.matmul_t(&q));
    out
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let with = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(everything)
    };
    let one = with(1);
    for threads in [2, 3, 12] {
        for (i, (a, b)) in one.iter().zip(with(threads)).enumerate() {
            assert!(
                a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()),
                "result {i} differs with {threads} threads"
            );
        }
    }
}
