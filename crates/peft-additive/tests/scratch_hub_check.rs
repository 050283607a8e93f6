use peft_additive::core::serde_json::{self, Value};
use peft_additive::core::*;
use std::sync::Arc;
fn floats(v: &Value) -> Vec<f32> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect() }
fn t(v: &Value, shape: &[usize]) -> Tensor { Tensor::from_vec(floats(v), shape, &Device::cpu()).unwrap() }
fn param(v: &Value) -> Tensor { let s: Vec<usize> = v[0].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect(); t(&v[1], &s) }
fn diff(a: &Tensor, b: &Value) -> f32 { a.to_vec().unwrap().iter().zip(floats(b)).map(|(x, y)| (x - y).abs() / (1.0 + y.abs())).fold(0.0, f32::max) }
#[test]
fn check() {
    let all: Value = serde_json::from_str(&std::fs::read_to_string("/tmp/d_check/cases.json").unwrap()).unwrap();
    let mut worst = 0.0f32; let mut ups = 0;
    for (i, c) in all["bn"].as_array().unwrap().iter().enumerate() {
        let place = "layers.0.output_adapters";
        let mut config = c["config"].clone();
        config["mh_adapter"] = false.into(); config["output_adapter"] = true.into();
        let mut net = Network::new(Base::custom().junction(place, 8));
        let tensors: Tensors = c["params"].as_object().unwrap().iter().map(|(k, v)| {
            let key = match k.strip_prefix("P.") { Some(k) => format!("base_model.model.{place}.adapters.{k}"), None => format!("base_model.shared_parameters.{}", &k[2..]) };
            (key, param(v))
        }).collect();
        if let Err(e) = net.load("a", &config, tensors, true) { panic!("{i} {config}: {e}"); }
        let id = net.module(place).unwrap();
        let (h, x) = (t(&c["h"], &[2, 3, 8]), t(&c["x"], &[2, 3, 8]));
        let norm = |s: &Tensor| -> Result<Tensor> { Ok(s.layer_norm(&t(&c["ln"][0], &[8]), Some(&t(&c["ln"][1], &[8])), 1e-6)?) };
        let y = net.junction(id, &h, &x, if c["ln"].is_null() { None } else { Some(&norm) }, &Pass::eval()).unwrap();
        let d = diff(&y, &c["y"]);
        if d > 1e-5 { println!("{i} {d} {config} ln {}", !c["ln"].is_null()); }
        worst = worst.max(d); ups += 1;
    }
    println!("bottlenecks {ups} worst {worst}");
    for c in all["inv"].as_array().unwrap() {
        let d = c["d"].as_u64().unwrap() as usize;
        let mut tree = ModuleTree::new(ModelFacts::default());
        tree.push(ModuleInfo::stream("model.invertible_adapters", d));
        tree.push(ModuleInfo::stream("model.invertible_adapters_rev", d));
        let mut net = Network::new(Base::new(tree, &Device::cpu()));
        let tensors: Tensors = c["params"].as_object().unwrap().iter().map(|(k, v)| (format!("base_model.model.model.invertible_adapters.{k}"), param(v))).collect();
        net.load("a", &c["config"], tensors, true).unwrap();
        let x = t(&c["x"], &[2, 3, d]);
        let run = |p: &str| net.stream(net.module(p).unwrap(), &x, &Pass::eval()).unwrap();
        println!("inv {} {}", diff(&run("model.invertible_adapters"), &c["y"]), diff(&run("model.invertible_adapters_rev"), &c["b"]));
    }
    let mut worst = 0.0f32;
    for c in all["reft"].as_array().unwrap() {
        let mut tree = ModuleTree::new(ModelFacts::default());
        tree.push(ModuleInfo::stream("model.layers.0.refts", 6));
        let mut net = Network::new(Base::new(tree, &Device::cpu()));
        let tensors: Tensors = c["params"].as_object().unwrap().iter().map(|(k, v)| (format!("base_model.model.model.layers.0.refts.units.{k}"), param(v))).collect();
        net.load("a", &c["config"], tensors, true).unwrap();
        let mask: Vec<bool> = floats(&c["mask"]).iter().map(|&v| v > 0.0).collect();
        let mut pass = Pass::eval();
        pass.tokens = Some(Arc::new(Tokens { batch: 2, seq: 5, seen: 0, virtual_tokens: 0, mask: Some(Arc::new(mask)) }));
        let y = net.stream(net.module("model.layers.0.refts").unwrap(), &t(&c["x"], &[2, 5, 6]), &pass).unwrap();
        let d = diff(&y, &c["y"]);
        if d > 1e-5 { println!("{d} {}", c["config"]); }
        worst = worst.max(d);
    }
    println!("reft worst {worst}");
}
