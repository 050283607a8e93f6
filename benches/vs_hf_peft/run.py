"""Measures the `peft` command against Hugging Face PEFT on PyTorch: same machine, weights, data and adapter.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r benches/vs_hf_peft/requirements.txt
    cargo xtask models && cargo build --release
    .venv-bench/bin/python benches/vs_hf_peft/run.py                     # everything, five times each, a table at the end
    .venv-bench/bin/python benches/vs_hf_peft/run.py --only lora-f32     # one task; --list names them
    .venv-bench/bin/python benches/vs_hf_peft/run.py --write             # the table also into docs/performance.md

Each measurement is a process of its own. The two engines take turns, so that a machine that slows down slows both; peak
memory is what the system says of the finished process (`ru_maxrss`). Hugging Face makes the adapter's initial values and the
batches, both engines start from these, and their losses have to agree: 1e-3 relative in f32, 2e-2 in bf16 and 4-bit. The
first step of a run warms up and does not count. A task that this build of the command refuses is reported as such.

`notes.md` is what there is to say about the table, and goes below it. `hf.py` is the other side: one task a process. Inputs are made once, in out/bench.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "out" / "bench"
BF16, MINILM = WORK / "smollm2-bf16", ROOT / "models" / "minilm"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = "Explain what a neural network is."


def training(model, rows, seq=0, precision="f32", **more):
    """A training task: `rows` of a batch, of `seq` random tokens or (0) from the movie reviews."""
    task = dict(kind="train", model=str(model), rows=rows, seq=seq, precision=precision, quantize=None, activations=None, checkpointing=False,
                classify=False, targets=ALL, busy=False, learning_rate=1e-4)
    return task | more


TASKS = {
    "lora-f32": training(BF16, 4, 256),
    "lora-f32-small": training(BF16, 4, 256, activations="bf16"),
    "lora-bf16": training(BF16, 4, 256, "bf16"),
    "lora-nf4": training(BF16, 4, 256, "bf16", quantize="nf4", activations="int8"),
    "lora-nf4-f32": training(BF16, 4, 256, quantize="nf4", activations="bf16"),
    "sft-f32": training(BF16, 8),
    "sft-bf16": training(BF16, 8, precision="bf16"),
    "long-bf16": training(BF16, 1, 2048, "bf16", checkpointing=True),
    "long-f32": training(BF16, 1, 2048, checkpointing=True),
    "minilm": training(MINILM, 32, classify=True, targets=["query", "value"], learning_rate=1e-3),
    "minilm-bf16": training(MINILM, 32, precision="bf16", classify=True, targets=["query", "value"], learning_rate=1e-3),
    "merge": dict(kind="merge", model=str(BF16), precision="bf16", busy=False),
    "generate-f32": dict(kind="generate", model=str(BF16), precision="f32", busy=False),
    "generate-bf16": dict(kind="generate", model=str(BF16), precision="bf16", busy=False),
    "generate-nf4": dict(kind="generate", model=str(BF16), precision="bf16", quantize="nf4", busy=False),
    "lora-f32-busy": training(BF16, 4, 256, busy=True),
    "lora-bf16-busy": training(BF16, 4, 256, "bf16", busy=True),
}

WHAT = {
    "lora-f32": "f32, LoRA r 8 on all linear layers, 4 x 256 tokens",
    "lora-f32-small": "the same, peft with activations kept in bf16",
    "lora-bf16": "bf16, the same",
    "lora-nf4": "NF4 base (bitsandbytes, double quantisation), the same, peft with activations kept in int8",
    "lora-nf4-f32": "NF4 base computed in f32, 4 x 256 tokens, peft with activations kept in bf16",
    "sft-f32": "instruction tuning on movie reviews, loss on the completion, batch 8, f32",
    "sft-bf16": "the same in bf16",
    "long-bf16": "1 x 2048 tokens, gradient checkpointing, bf16",
    "long-f32": "1 x 2048 tokens, gradient checkpointing, f32",
    "minilm": "MiniLM, polarity of movie reviews, batch 32, LoRA on query and value plus head, f32",
    "minilm-bf16": "the same in bf16",
    "merge": "merge an adapter (r 16) and save, SmolLM2 bf16",
    "generate-f32": "generation, greedy, 128 tokens, f32",
    "generate-bf16": "the same in bf16",
    "generate-nf4": "the same from NF4",
    "lora-f32-busy": "f32 4 x 256 with another process on one core",
    "lora-bf16-busy": "bf16 4 x 256 with another process on one core",
}

UNITS = {"train": "tokens/s", "merge": "merges/s", "generate": "tokens/s"}


class Unsupported(Exception):
    """The command does not do this task."""


def run(command):
    """Runs a process: its output, wall seconds, CPU seconds and peak resident MB."""
    begun = time.time()
    with tempfile.TemporaryFile("w+") as out_file, tempfile.TemporaryFile("w+") as err_file:
        process = subprocess.Popen(command, stdout=out_file, stderr=err_file, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out_file.seek(0)
        err_file.seek(0)
        out, err = out_file.read(), err_file.read()
    result = dict(seconds=time.time() - begun, cpu=usage.ru_utime + usage.ru_stime, peak_mb=usage.ru_maxrss / 1024)
    return process.returncode, out, err, result


def hf(name, task, inputs, steps):
    """One run of Hugging Face's side."""
    code, out, err, result = run([sys.executable, str(HERE / "hf.py"), json.dumps(task | dict(inputs=str(inputs), steps=steps))])
    if code != 0:
        raise RuntimeError(f"{name}: hf.py failed:\n{err[-3000:]}")
    said = result | json.loads(out.splitlines()[-1])
    if task["kind"] == "merge":
        # A merge is a command of its own on both sides: whole processes are compared, Python's imports among them.
        said |= dict(without_imports=said["rate"], rate=1 / said["seconds"])
    return said


def config(task, inputs, steps):
    """The run's configuration for the command."""
    adapter = {"init_from": str(inputs / "adapter")}
    return {
        "precision": task["precision"],
        "model": {"path": task["model"]} | ({"quantize": task["quantize"]} if task["quantize"] else {}),
        "adapter": adapter,
        "data": {"train": str(inputs / "rows.jsonl"), "max_length": max(task["seq"], 128), "shuffle": False, "add_eos": False},
        "train": {
            "steps": steps, "batch_size": task["rows"], "learning_rate": task["learning_rate"], "schedule": "constant",
            "max_grad_norm": 0.0, "gradient_checkpointing": task["checkpointing"], "seed": 0,
        } | ({"activations": task["activations"]} if task["activations"] else {}),
        "output": {"dir": str(WORK / "trained"), "overwrite": True},
    }


def ours(command, name, task, inputs, steps):
    """One run of the command."""
    if task["kind"] == "train":
        path = WORK / "run.json"
        path.write_text(json.dumps(config(task, inputs, steps)))
        arguments = ["train", str(path), "--json"]
    elif task["kind"] == "merge":
        shutil.rmtree(WORK / "merged", ignore_errors=True)
        arguments = ["merge", "--model", task["model"], "--adapter", str(inputs / "adapter"), "--output", str(WORK / "merged"), "--json"]
    else:
        arguments = ["generate", "--model", task["model"], "--prompt", PROMPT, "--max-new-tokens", "128", "--json"]
        if task.get("quantize"):
            arguments += ["--quantize", task["quantize"]]
    code, out, err, result = run([command, *arguments, "--quiet"])
    if code != 0:
        refused = [line for line in err.splitlines() if "not in this build" in line or "no such key" in line or "not one of" in line]
        if refused:
            raise Unsupported(refused[0])
        raise RuntimeError(f"{name}: {command} failed:\n{err[-3000:]}")
    if task["kind"] == "train":
        lines = [json.loads(line) for line in (WORK / "trained" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line and "tokens_per_second" in line]
        rates = [line["tokens_per_second"] for line in steps[1:] or steps]
        return result | dict(rate=statistics.median(rates), losses=[line["loss"] for line in steps])
    if task["kind"] == "merge":
        return result | dict(rate=1 / result["seconds"])
    said = json.loads(out)
    return result | dict(rate=said["tokens_per_second"], tokens=said["tokens"])


def burn():
    """Keeps a core busy until it is ended."""
    while True:
        pass


def agree(task, theirs, mine):
    """How far the results are apart, and whether that is near enough; None where there is nothing to compare."""
    if task["kind"] == "train":
        pairs = list(zip(theirs["losses"], mine["losses"]))
        worst = max(abs(a - b) / abs(a) for a, b in pairs)
        return worst <= (1e-3 if task["precision"] == "f32" else 2e-2), f"losses apart by {worst:.1e}"
    if task["kind"] == "merge":
        code, out, err, _ = run([sys.executable, str(HERE / "hf.py"), json.dumps(dict(kind="compare", work=str(WORK)))])
        worst = json.loads(out.splitlines()[-1])["worst"] if code == 0 else float("inf")
        # Weights are below 8, where the last bit of bf16 is 2^-5 of one: each side rounds once.
        return worst <= 0.04, f"weights apart by {worst:.1e}"
    same = next((i for i, (a, b) in enumerate(zip(theirs["tokens"], mine["tokens"])) if a != b), None)
    return True, "same tokens" if same is None else f"same tokens up to {same}"


def measure(command, name, task, repeats, steps):
    """The task's line: medians of both engines, taking turns."""
    inputs = WORK / "inputs" / name.removesuffix("-busy")
    if not (inputs / "done").exists():
        code, out, err, _ = run([sys.executable, str(HERE / "hf.py"), json.dumps(task | dict(kind=f"prepare-{task['kind']}", inputs=str(inputs), steps=32))])
        if code != 0:
            raise RuntimeError(f"{name}: the inputs could not be made:\n{err[-3000:]}")
        (inputs / "done").touch()
    busy = multiprocessing.Process(target=burn, daemon=True) if task["busy"] else None
    if busy:
        busy.start()
    theirs, mine, unsupported = [], [], None
    try:
        for repeat in range(repeats):
            theirs.append(hf(name, task, inputs, steps))
            if unsupported is None:
                try:
                    mine.append(ours(command, name, task, inputs, steps))
                except Unsupported as refusal:
                    unsupported = str(refusal)
            print(f"{name} {repeat + 1}/{repeats}: HF {theirs[-1]['rate']:.4g}, peft {mine[-1]['rate'] if mine else float('nan'):.4g} {UNITS[task['kind']]}", file=sys.stderr, flush=True)
    finally:
        if busy:
            busy.terminate()
    of = lambda runs, key: statistics.median(r[key] for r in runs)
    line = dict(name=name, what=WHAT[name], unit=UNITS[task["kind"]], hf=of(theirs, "rate"), hf_mb=of(theirs, "peak_mb"))
    if unsupported:
        return line | dict(note=f"not supported by this build: {unsupported}")
    fine, how = agree(task, theirs[-1], mine[-1])
    if task["kind"] == "merge":
        how += f"; HF without Python's imports {of(theirs, 'without_imports'):.3g}"
    return line | dict(rate=of(mine, "rate"), mb=of(mine, "peak_mb"), agrees=fine, note=how if fine else f"**disagrees**: {how}")


def table(lines):
    """The lines as markdown."""
    out = ["| work | unit | HF PEFT | peft | ratio | HF MB | peft MB | ratio | runs | |", "|---|---|---|---|---|---|---|---|---|---|"]
    for line in lines:
        start = f"| {line['what']} | {line['unit']} | {line['hf']:.3g} |"
        if "rate" in line:
            out.append(f"{start} {line['rate']:.3g} | **{line['rate'] / line['hf']:.2f}** | {line['hf_mb']:.0f} | {line['mb']:.0f} | "
                       f"1/{line['hf_mb'] / line['mb']:.1f} | {line['repeats']} | {line['note']} |")
        else:
            out.append(f"{start} | | {line['hf_mb']:.0f} | | | {line['repeats']} | {line['note']} |")
    return "\n".join(out)


def machine():
    """The machine in a line or two."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    field = lambda name: next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name)), "")
    features = set(field("flags").split() + field("Features").split())
    known = ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm"]
    memory = pathlib.Path("/proc/meminfo")
    total = int(memory.read_text().split()[1]) / 1e6 if memory.exists() else 0
    versions = [line for line in (HERE / "requirements.txt").read_text().split() if line.split("==")[0] in ("torch", "transformers", "peft", "bitsandbytes")]
    return (f"{field('model name') or platform.processor()}, {os.cpu_count()} cores, {' '.join(f for f in known if f in features)}, "
            f"{total:.0f} GB of memory, {platform.system()} {platform.release()}; {', '.join(versions)}.")


def main():
    parser = argparse.ArgumentParser(description="peft against Hugging Face PEFT")
    parser.add_argument("--only", nargs="*", choices=TASKS, metavar="TASK", help="only these tasks; none: what was measured before")
    parser.add_argument("--list", action="store_true", help="name the tasks")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each engine")
    parser.add_argument("--steps", type=int, default=6, help="steps of a training run, at most 32; the first does not count")
    parser.add_argument("--peft", default=str(ROOT / "target" / "release" / "peft"), help="the command")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:16}{what}" for name, what in WHAT.items()))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    about = machine()
    code, _, err, _ = run([sys.executable, str(HERE / "hf.py"), json.dumps(dict(kind="models", bf16=str(BF16)))])
    if code != 0:
        sys.exit(f"the models could not be made:\n{err[-3000:]}")
    command = str(pathlib.Path(arguments.peft).resolve())
    # What `--only` leaves out keeps its line of an earlier run.
    results = WORK / "results.json"
    known = {line["name"]: line for line in json.loads(results.read_text())["lines"]} if results.exists() else {}
    for name in TASKS if arguments.only is None else arguments.only:
        line = measure(command, name, TASKS[name], arguments.repeats, min(arguments.steps, 32))
        known[name] = line | dict(repeats=arguments.repeats, load=os.getloadavg()[0])
        lines = [known[name] for name in TASKS if name in known]
        results.write_text(json.dumps(dict(machine=about, lines=lines), indent=2))
    lines = [known[name] for name in TASKS if name in known]
    loads = [line["load"] for line in lines]
    text = (f"Medians of as many runs of each engine as the table says, taking turns. Higher is faster; memory is the peak of resident pages.\n\n"
            f"Machine: {about} Load average after each task, the engines' own included: {min(loads, default=0):.1f} to {max(loads, default=0):.1f}.\n\n"
            f"{table(lines)}\n")
    print(text)
    if arguments.write:
        head = "# Performance\n\nWritten by `python benches/vs_hf_peft/run.py --write`, which says what is measured and how.\n\n"
        (ROOT / "docs" / "performance.md").write_text(head + text + "\n" + (HERE / "notes.md").read_text())
    return 0 if all(line.get("agrees", True) for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
