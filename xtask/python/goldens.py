"""Makes the interop goldens under tests/goldens from Hugging Face's own packages (see requirements.txt).

    python xtask/python/goldens.py [--out tests/goldens] [--only models|cases|initial|curves|runs|numbers|matcher] [--name NAME]

The Rust tests read the data only; this script is run again when a case is added or a pinned package moves.
Everything is seeded: a second run on the same machine gives the same files.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("PYTHONHASHSEED") != "0":
    # peft keeps targets in sets, and writes them in the order Python hashes them.
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

from golden import (  # noqa: E402
    additive_cases,
    cases,
    curves,
    initials,
    lora_cases,
    matcher,
    models,
    numbers,
    reparam_cases,
    runs,
    soft_cases,
    tokenizers,
)
from golden.numbers import trained  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "tests" / "goldens")
    parser.add_argument("--only", choices=["models", "cases", "initial", "curves", "runs", "numbers", "matcher"])
    parser.add_argument("--name", help="one model, case, start, curve, run or number")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # Relative model paths end up in adapter_config.json: they must be the same wherever this runs.
    os.chdir(args.out)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    wanted = lambda part, name: args.only in (None, part) and args.name in (None, name)  # noqa: E731
    for name in models.MODELS:
        if wanted("models", name):
            print(f"model {name}: largest output {models.make(name):.3f}", flush=True)
    if wanted("models", "words"):
        print(f"tokenizer words: {tokenizers.make()}", flush=True)
    for case in [*lora_cases.cases(), *soft_cases.cases(), *reparam_cases.cases(), *additive_cases.cases()]:
        if wanted("cases", case.name):
            print(f"case {case.name}: {cases.make(case)}", flush=True)
    for curve in curves.curves():
        if wanted("curves", curve.name):
            print(f"curve {curve.name}: {curves.make(curve)}", flush=True)
    for start in initials.starts():
        if wanted("initial", start[0]):
            print(f"initial {start[0]}: {initials.make(*start)}", flush=True)
    for run in [*runs.runs(), *trained.runs()]:
        if wanted("runs", run.name):
            print(f"run {run.name}: {run.make()}", flush=True)
    for number in numbers.numbers():
        if wanted("numbers", number.name):
            print(f"number {number.name}: {number.make()}", flush=True)
    if wanted("matcher", None):
        print(f"matcher: {matcher.make()}", flush=True)


if __name__ == "__main__":
    main()
