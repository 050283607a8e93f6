//! Ad-hoc: all adapter goldens.
use peft_core::{Pass, Tensor};
use peft_io::Checkpoint;
use peft_models::*;
use std::path::Path;
#[allow(unused_imports)]
use {peft_additive as _, peft_reparam as _, peft_selective as _};
fn main() {
    eprintln!("{} methods", peft_core::methods().len());
    let root = Path::new("tests/goldens");
    let mut names: Vec<_> = std::fs::read_dir(root.join("cases")).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    let filter = std::env::args().nth(1).unwrap_or_default();
    let mut bad = 0;
    for dir in names {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        if !name.contains(&filter) { continue; }
        let run = || -> Result<(f32, f32), String> {
            let case = peft_io::read_json(&dir.join("case.json")).map_err(|e| e.to_string())?;
            let mut model = Model::load(&root.join("models").join(case["model"].as_str().unwrap()), &LoadOptions::default()).map_err(|e| e.to_string())?;
            let exp = Checkpoint::open(&dir.join("expected.safetensors")).map_err(|e| e.to_string())?;
            let rows: Vec<Vec<u32>> = case["input_ids"].as_array().unwrap().iter().map(|r| r.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()).collect();
            let mask: Option<Vec<bool>> = case["attention_mask"].as_array().map(|m| m.iter().flat_map(|r| r.as_array().unwrap().iter().map(|v| v.as_u64() == Some(1))).collect());
            let b = Batch { batch: rows.len(), seq: rows[0].len(), ids: rows.concat(), mask, task_ids: None };
            let cmp = |got: Tensor, want: (Vec<usize>, Vec<f32>)| -> Result<f32, String> {
                if got.shape() != want.0 { return Err(format!("shape {:?} vs {:?}", got.shape(), want.0)); }
                let g = got.to_vec().unwrap();
                let mut worst = 0f32;
                if want.0.len() == 3 {
                    let (n, w) = (want.0[1], want.0[2]);
                    let add = n - b.seq;
                    for r in 0..want.0[0] { for p in 0..n {
                        if p >= add && b.mask.as_ref().is_some_and(|m| !m[r * b.seq + p - add]) { continue; }
                        for c in 0..w { let i = (r * n + p) * w + c; worst = worst.max((g[i] - want.1[i]).abs()); }
                    } }
                } else { for (a, b) in g.iter().zip(&want.1) { worst = worst.max((a - b).abs()); } }
                Ok(worst)
            };
            let pick = |p: &str| exp.names().find(|n| n.starts_with(p)).map(|n| exp.f32(n).unwrap());
            let base = cmp(model.logits(&b, &Pass::eval()).map_err(|e| e.to_string())?, pick("base").ok_or("no base")?)?;
            let files = peft_io::read_adapter(&dir.join("adapter")).map_err(|e| e.to_string())?;
            let dev = model.device().clone();
            let tensors = files.tensors.into_iter().map(|(k, (s, v))| (k, Tensor::from_vec(v, &s, &dev).unwrap())).collect();
            model.network_mut().unwrap().load("a", &files.config, tensors, false).map_err(|e| e.to_string())?;
            let adapted = cmp(model.logits(&b, &Pass::eval()).map_err(|e| e.to_string())?, pick("adapted").ok_or("no adapted")?)?;
            Ok((base, adapted))
        };
        match run() {
            Ok((b, a)) if b < 1e-4 && a < 1e-4 => println!("ok   {name} {b:.1e} {a:.1e}"),
            Ok((b, a)) => { bad += 1; println!("BAD  {name} base {b:.2e} adapted {a:.2e}") }
            Err(e) => { bad += 1; println!("ERR  {name}: {}", e.replace('\n', " | ").chars().take(300).collect::<String>()) }
        }
    }
    println!("{bad} bad");
}
