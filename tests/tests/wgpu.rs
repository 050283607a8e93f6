//! A run on the graphics card against the same run on the processor, and what becomes of one where the card fails.
#![cfg(feature = "wgpu")]

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use peft::tensor::{Device, Keep, Precision, tested};
use peft::train::{Observer, StepReport, TrainConfig, train};
use serde_json::{Value, json};

/// Work on the device is counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Keeps what it is told, and what the device had done then.
#[derive(Default)]
struct Watcher {
    losses: Vec<f64>,
    norms: Vec<f64>,
    messages: Vec<String>,
    /// Waits and batches of work.
    work: Vec<(u64, u64)>,
    memory: Vec<peft::wgpu::MemoryUse>,
    /// Takes the device away after this step.
    destroy_at: Option<u64>,
}

impl Observer for Watcher {
    fn step(&mut self, report: &StepReport) {
        self.losses.push(report.loss);
        self.norms.push(report.grad_norm);
        self.work.push(work());
        self.memory
            .extend(peft::wgpu::usage().last().map(|u| u.memory));
        if self.destroy_at == Some(report.step) {
            peft::wgpu::destroy_all();
        }
    }

    fn message(&mut self, text: &str) {
        self.messages.push(text.to_owned());
    }
}

fn work() -> (u64, u64) {
    let add = |sum: (u64, u64), u: peft::wgpu::Usage| (sum.0 + u.waits, sum.1 + u.submits);
    peft::wgpu::usage().into_iter().fold((0, 0), add)
}

/// None, said aloud, where there is no adapter.
fn present() -> Option<MutexGuard<'static, ()>> {
    let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    tested("wgpu", Device::by_name("wgpu")).map(|_| alone)
}

/// A short run's configuration, with values put in by their dotted names.
fn config(device: &str, out: &Path, sets: &[(&str, Value)]) -> TrainConfig {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/quickstart");
    let mut config = json!({
        "device": device,
        "model": {"path": format!("{base}/base")},
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": format!("{base}/train.jsonl"), "max_length": 32},
        "train": {"steps": 4, "batch_size": 2, "learning_rate": 2e-3, "seed": 1},
        "output": {"dir": out},
    });
    for (name, value) in sets {
        match name.split_once('.') {
            Some((section, field)) => config[section][field] = value.clone(),
            None => config[*name] = value.clone(),
        }
    }
    TrainConfig::from_value(&config).unwrap()
}

/// The values of the adapter in a folder.
fn adapter(folder: &Path) -> Vec<f32> {
    let adapter = peft::io::read_adapter(folder).unwrap();
    let values = adapter.tensors.into_values().flat_map(|(_, values)| values);
    values.collect()
}

/// The length of the difference of two adapters, as a part of their length.
fn apart_by(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut gap, mut size) = (0f64, 0f64);
    for (g, w) in got.iter().zip(want) {
        gap += f64::from(g - w).powi(2);
        size += f64::from(*w).powi(2);
    }
    (gap / size).sqrt()
}

fn run(device: &str, precision: &str, steps: u64, folder: &Path) -> (Watcher, f64, Vec<f32>) {
    let out = folder.join(device).join(precision);
    let sets = [
        ("precision", json!(precision)),
        ("data.eval_split", json!(16)),
        ("data.max_length", json!(64)),
        ("train.steps", json!(steps)),
        ("train.batch_size", json!(4)),
    ];
    let mut watcher = Watcher::default();
    let summary = train(&config(device, &out, &sets), false, &mut watcher).unwrap();
    let eval = summary
        .eval_after
        .as_ref()
        .map_or(f64::NAN, |report| report.loss);
    (watcher, eval, adapter(&out))
}

/// The largest relative difference.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs());
    each.fold(0.0, f64::max)
}

#[test]
fn twenty_steps_are_those_of_the_processor() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (want, want_eval, want_adapter) = run("cpu", "f32", 20, folder.path());
    let (got, got_eval, got_adapter) = run("wgpu", "f32", 20, folder.path());
    assert_eq!(want.losses.len(), 20);
    assert!(
        want.losses[19] < want.losses[0],
        "nothing was learned: {:?}",
        want.losses
    );
    // Orders of sums differ; twenty steps of AdamW, which divides by the size of gradients, make the most of it.
    let loss = apart(&got.losses, &want.losses);
    let norm = apart(&got.norms, &want.norms);
    assert!(
        loss < 1e-3 && norm < 1e-2,
        "losses differ by {loss:e}, norms by {norm:e}: {:?} and {:?}",
        got.losses,
        want.losses
    );
    assert!((got_eval - want_eval).abs() < 1e-3 * want_eval);
    let adapter = apart_by(&got_adapter, &want_adapter);
    assert!(
        adapter < 1e-2,
        "the adapters differ by {adapter:e} of their size"
    );
    eprintln!("losses within {loss:.1e}, norms within {norm:.1e}, adapters within {adapter:.1e}");
}

/// Steps that are shown together are waited for once, all others not at all; each is one batch of work, and what is read is
/// another.
#[test]
fn a_step_that_is_not_shown_waits_for_nothing() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        ("data.max_length", json!(12)),
        ("train.batch_size", json!(1)),
        ("train.steps", json!(20)),
    ];
    let mut watcher = Watcher::default();
    train(&config("wgpu", folder.path(), &sets), false, &mut watcher).unwrap();
    let work = &watcher.work;
    assert_eq!(work.len(), 20);
    let (mut waits, mut together) = (0, 0);
    for pair in work.windows(2) {
        let waited = pair[1].0 - pair[0].0;
        assert!(waited <= 1, "{work:?}");
        waits += waited;
        together += u64::from(waited == 0);
    }
    let handed = work[19].1 - work[0].1;
    eprintln!("{waits} waits and {handed} batches of work in 19 steps");
    // A card that is watched gets smaller batches until it is known to be quick.
    assert!(handed <= 4 * 19 + waits, "{work:?}");
    let software = peft::wgpu::adapters()[0].kind == "software";
    assert!(!software || handed == 19 + waits, "{work:?}");
    // A machine so slow that a step takes two seconds shows each.
    assert!(waits == 19 || together > 0, "{work:?}");
}

#[test]
fn activations_in_bfloat16_learn_the_same() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (want, ..) = run("cpu", "bf16", 6, folder.path());
    let (got, ..) = run("wgpu", "bf16", 6, folder.path());
    // Base and kept activations have 8 bits: one rounding the other way is 2e-3 of a value.
    let loss = apart(&got.losses, &want.losses);
    assert!(
        loss < 1e-2,
        "losses differ by {loss:e}: {:?} and {:?}",
        got.losses,
        want.losses
    );
}

/// Groups, decay, clipping at every step and at none, accumulation, and methods that act between steps.
#[test]
fn settings_and_methods_are_those_of_the_processor() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let adalora = json!({
        "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 1, "total_step": 6,
        "target_modules": ["q_proj", "v_proj"]
    });
    let cases: [(&str, Vec<(&str, Value)>); 4] = [
        (
            "groups, decay, always clipped, two batches a step",
            vec![
                ("train.weight_decay", json!(0.5)),
                ("train.max_grad_norm", json!(0.02)),
                ("train.gradient_accumulation", json!(2)),
                (
                    "train.lr_multipliers",
                    json!([{"pattern": "lora_B", "multiplier": 8.0}, {"pattern": "q_proj.*lora_A", "weight_decay": 0.0}]),
                ),
            ],
        ),
        ("never clipped", vec![("train.max_grad_norm", json!(0.0))]),
        (
            "ranks that change, penalties",
            vec![("adapter", adalora), ("train.steps", json!(6))],
        ),
        (
            "the base itself",
            vec![
                ("adapter", json!(null)),
                ("train.learning_rate", json!(1e-4)),
            ],
        ),
    ];
    for (what, sets) in &cases {
        let mut ends = Vec::new();
        for device in ["cpu", "wgpu"] {
            let out = folder.path().join(device);
            let sets = [&sets[..], &[("output.overwrite", json!(true))]].concat();
            let mut watcher = Watcher::default();
            train(&config(device, &out, &sets), false, &mut watcher).unwrap();
            let of_rows = |m: &String| m.contains("train.jsonl");
            assert!(
                watcher.messages.iter().all(of_rows),
                "{:?}",
                watcher.messages
            );
            ends.push(watcher);
        }
        let loss = apart(&ends[1].losses, &ends[0].losses);
        let norm = apart(&ends[1].norms, &ends[0].norms);
        eprintln!("{what}: losses within {loss:.1e}, norms within {norm:.1e}");
        assert!(loss < 1e-3 && norm < 1e-2, "{what}: {loss:e} {norm:e}");
    }
}

/// Where a run has been to step 2, gone on with on another device.
#[test]
fn a_run_goes_on_on_another_device() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        ("train.save_every", json!(2)),
        ("train.keep_checkpoints", json!(5)),
        ("train.weight_decay", json!(0.1)),
    ];
    let mut saved = Vec::new();
    let mut whole = Vec::new();
    for device in ["cpu", "wgpu"] {
        let out = folder.path().join(device);
        train(&config(device, &out, &sets), false, &mut ()).unwrap();
        let (tensors, json) = peft::io::read_state(&out.join("checkpoints"), "step-2").unwrap();
        saved.push((tensors, json["optimizer_steps"].clone()));
        whole.push(adapter(&out));
    }
    let [(on_cpu, cpu_steps), (on_wgpu, wgpu_steps)] = &saved[..] else {
        unreachable!()
    };
    assert_eq!(cpu_steps, wgpu_steps);
    let shapes = |tensors: &peft::io::NamedTensors| -> Vec<(String, Vec<usize>)> {
        let all = tensors.iter();
        all.map(|(name, (shape, _))| (name.clone(), shape.clone()))
            .collect()
    };
    assert_eq!(shapes(on_cpu), shapes(on_wgpu), "the same files");
    assert!(on_cpu.keys().any(|name| name.starts_with("square/")));
    for (device, other) in [("wgpu", "cpu"), ("cpu", "wgpu")] {
        let from = folder.path().join(other);
        let out = folder.path().join(format!("{other} then {device}"));
        let state = |of: &Path| of.join("checkpoints/step-2");
        std::fs::create_dir_all(state(&out)).unwrap();
        for entry in std::fs::read_dir(state(&from)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), state(&out).join(entry.file_name())).unwrap();
        }
        std::fs::copy(from.join("metrics.jsonl"), out.join("metrics.jsonl")).unwrap();
        let mut watcher = Watcher::default();
        train(&config(device, &out, &sets), true, &mut watcher).unwrap();
        assert_eq!(watcher.losses.len(), 2, "only what was left");
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 4);
        let gap = apart_by(&adapter(&out), &whole[0]);
        eprintln!("{other}, then {device}: adapters within {gap:.1e}");
        assert!(gap < 1e-2, "{gap:e}");
    }
}

#[test]
fn what_is_not_finite_ends_the_run_with_nothing_saved() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        ("train.learning_rate", json!(1e30)),
        ("train.warmup_steps", json!(0)),
        ("train.steps", json!(40)),
    ];
    let error = train(&config("wgpu", folder.path(), &sets), false, &mut ()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("step ")
            && error.contains("train.jsonl")
            && error.contains("no adapter was written"),
        "{error}"
    );
    assert!(!folder.path().join("adapter_model.safetensors").exists());
}

#[test]
fn moments_in_eight_bits_stay_with_the_processor() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let sets = [
        ("train.optimizer", json!("adamw_8bit")),
        ("train.steps", json!(2)),
    ];
    let mut watcher = Watcher::default();
    train(&config("wgpu", folder.path(), &sets), false, &mut watcher).unwrap();
    let notes = watcher.messages.iter().filter(|m| m.contains("8 bits"));
    assert_eq!(notes.count(), 1, "{:?}", watcher.messages);
}

// --- what needs a process of its own: the environment and lost devices are everybody's ---

const CASE: &str = "PEFT_TEST_CASE";
const FOLDER: &str = "PEFT_TEST_FOLDER";

/// Runs `child` as a process, for `case`, in `folder`.
fn in_a_child(case: &str, folder: &Path, variables: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CASE, case)
        .env(FOLDER, folder)
        .env("PEFT_REQUIRE_GPU", "0")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case}: {text}");
    text.lines()
        .filter(|line| line.contains("held"))
        .for_each(|line| eprintln!("{line}"));
}

/// Trains on `device`; what it comes to, and what was said.
fn attempt(device: &str, folder: &Path, mut watcher: Watcher) -> (Result<(), String>, Watcher) {
    let out = folder.join(device);
    let done = train(&config(device, &out, &[]), false, &mut watcher);
    let done = done.map(drop).map_err(|e| e.to_string());
    let written = out.join("adapter_model.safetensors").exists();
    assert_eq!(written, done.is_ok(), "nothing is half-saved: {done:?}");
    (done, watcher)
}

/// Not a test by itself: what the tests below run in a process of its own.
#[test]
fn child() {
    let (Ok(case), Ok(folder)) = (std::env::var(CASE), std::env::var(FOLDER)) else {
        return;
    };
    let folder = Path::new(&folder);
    let said = |watcher: &Watcher, what: &str| {
        let found = watcher.messages.iter().any(|m| m.contains(what));
        assert!(found, "{what}: {:?}", watcher.messages);
    };
    let destroy = || Watcher {
        destroy_at: Some(1),
        ..Watcher::default()
    };
    let error = |done: Result<(), String>, what: &str| {
        let error = done.unwrap_err();
        assert!(error.contains(what), "{error}");
    };
    match case.as_str() {
        "no adapter" => {
            let why = Device::by_name("wgpu").unwrap_err().to_string();
            assert!(
                why.contains("no graphics adapter was found") && why.contains("cpu"),
                "{why}"
            );
            let chosen = Device::choose("auto", Precision::F32, Keep::F32).unwrap();
            assert_eq!(chosen.device.backend().name(), "cpu");
            assert!(chosen.note.unwrap().contains("wgpu finds nothing"));
            let (done, _) = attempt("wgpu", folder, Watcher::default());
            error(done, "no graphics adapter was found");
            assert!(!folder.join("wgpu").exists(), "nothing is written");
            let (done, watcher) = attempt("auto", folder, Watcher::default());
            done.unwrap();
            said(&watcher, "cpu, as wgpu finds nothing");
        }
        "no memory" => {
            let (done, _) = attempt("wgpu", folder, Watcher::default());
            error(done, "out of memory on the device");
            let (done, watcher) = attempt("auto", folder, Watcher::default());
            done.unwrap();
            said(&watcher, "out of memory on the device");
            said(&watcher, "from here on by the processor");
        }
        "lost" => {
            let (done, _) = attempt("wgpu", folder, destroy());
            error(done, "the device was lost");
        }
        "lost, auto" => {
            let (done, watcher) = attempt("auto", folder, destroy());
            done.unwrap();
            said(&watcher, "the device was lost");
            said(&watcher, "from here on by the processor");
            assert_eq!(watcher.losses.len(), 1 + 4, "begun anew by the processor");
        }
        "memory" => {
            // Four rows of 128 tokens a step, as in the quickstart's configuration with smaller batches.
            let sets = [
                ("data.packing", json!(true)),
                ("data.max_length", json!(128)),
                ("train.batch_size", json!(4)),
                ("train.steps", json!(10)),
            ];
            let mut watcher = Watcher::default();
            let out = folder.join("memory");
            train(&config("wgpu", &out, &sets), false, &mut watcher).unwrap();
            let use_of: Vec<_> = watcher.memory.iter().map(|m| (m.held, m.peak)).collect();
            let (held, peak) = use_of[9];
            eprintln!(
                "{held} bytes held, {peak} at most live: {:.3}; {} live between steps",
                held as f64 / peak as f64,
                watcher.memory[9].live
            );
            assert!(held <= peak * 13 / 10, "{use_of:?}");
            assert!(
                use_of[9].0 <= use_of[5].0 * 21 / 20,
                "no growth: {use_of:?}"
            );
        }
        "kernels" => {
            let (done, _) = attempt("wgpu", folder, Watcher::default());
            done.unwrap();
        }
        other => panic!("{other} is no case"),
    }
}

#[test]
fn without_an_adapter_the_processor_is_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let variables = [("VK_ICD_FILENAMES", nowhere), ("VK_DRIVER_FILES", nowhere)];
    // Other systems have other interfaces, which no variable hides.
    if cfg!(target_os = "linux") {
        in_a_child("no adapter", folder.path(), &variables);
    }
}

#[test]
fn memory_is_used_again() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    in_a_child("memory", folder.path(), &[]);
}

/// The same run by the processor alone.
fn by_the_processor(folder: &Path) -> Vec<f32> {
    let (done, _) = attempt("cpu", folder, Watcher::default());
    done.unwrap();
    adapter(&folder.join("cpu"))
}

#[test]
fn without_memory_the_processor_goes_on() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let name = peft::wgpu::adapters().remove(0).name;
    // The weights fit, a step does not.
    let variables = [("PEFT_WGPU_MEMORY", "4"), ("PEFT_WGPU_ADAPTER", &name)];
    in_a_child("no memory", folder.path(), &variables);
    let want = by_the_processor(folder.path());
    assert_eq!(adapter(&folder.path().join("auto")), want);
}

#[test]
fn where_the_device_is_lost_the_processor_goes_on() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let name = peft::wgpu::adapters().remove(0).name;
    let variables = [("PEFT_WGPU_ADAPTER", name.as_str())];
    in_a_child("lost", folder.path(), &variables);
    in_a_child("lost, auto", folder.path(), &variables);
    let want = by_the_processor(folder.path());
    assert_eq!(adapter(&folder.path().join("auto")), want);
}

#[test]
fn compiled_kernels_are_kept_between_processes() {
    let Some(_alone) = present() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let variables = [("PEFT_CACHE", cache.to_str().unwrap())];
    let run = |name: &str| {
        let out = folder.path().join(name);
        std::fs::create_dir(&out).unwrap();
        in_a_child("kernels", &out, &variables);
        adapter(&out.join("wgpu"))
    };
    let first = run("first");
    let Ok(mut files) = std::fs::read_dir(cache.join("kernels")) else {
        eprintln!("this driver keeps no compiled kernels");
        return;
    };
    let file = files.next().unwrap().unwrap().path();
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(run("second"), first);
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(run("spoiled"), first);
    assert_eq!(std::fs::read(&file).unwrap(), bytes, "saved anew");
}
