//! Ad-hoc probe.
use peft_core::Pass;
use peft_models::*;
use std::time::Instant;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let t = Instant::now();
    let model = Model::load(args[1].as_ref(), &LoadOptions::default()).unwrap();
    eprintln!("load {:?}", t.elapsed());
    match args[2].as_str() {
        "logits" => {
            let t = Instant::now();
            let ids = model.tokenizer().unwrap().encode(&args[3]).unwrap();
            eprintln!("tokenizer+encode {:?}", t.elapsed());
            let b = Batch::single(ids.clone());
            let t = Instant::now();
            let l = model.logits(&b, &Pass::eval()).unwrap();
            eprintln!("forward {:?}", t.elapsed());
            let v = l.to_vec().unwrap();
            println!("{}", serde_json::json!({"ids": ids, "shape": l.shape(), "last": v[v.len() - l.last_dim()..].to_vec()}));
        }
        "tokens" => {
            let texts: Vec<String> = serde_json::from_str(&std::fs::read_to_string(&args[3]).unwrap()).unwrap();
            let tok = model.tokenizer().unwrap();
            let out: Vec<_> = texts.iter().map(|t| { let ids = tok.encode(t).unwrap(); let back = tok.decode(&ids).unwrap(); serde_json::json!({"ids": ids, "back": back}) }).collect();
            println!("{}", serde_json::json!(out));
        }
        "chat" => {
            let messages: Vec<serde_json::Value> = serde_json::from_str(&args[3]).unwrap();
            let tok = model.tokenizer().unwrap();
            println!("{}", serde_json::json!({"text": tok.chat_prompt(&messages).unwrap(), "tokens": tok.chat_tokens(&messages).unwrap()}));
        }
        _ => {
            let chat = model.tokenizer().unwrap().chat_prompt(&[serde_json::json!({"role":"user","content":args[3]})]).unwrap();
            let t = Instant::now();
            let mut first = None;
            let g = model.generate(&chat, false, &GenerateOptions { max_new_tokens: 200, ..Default::default() }, &mut |s| { first.get_or_insert(t.elapsed()); print!("{s}") }).unwrap();
            let e = t.elapsed().as_secs_f64();
            println!("\n{} prompt {} new in {e:.2}s = {:.1} tok/s, first {:?} {:?}", g.prompt_tokens, g.tokens.len(), g.tokens.len() as f64 / e, first, g.finish);
        }
    }
}
