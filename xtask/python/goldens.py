"""Makes the interop goldens under tests/goldens from Hugging Face's own packages (see requirements.txt).

    python xtask/python/goldens.py [--out tests/goldens] [--only models|cases|curves|matcher] [--name NAME]

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

from golden import cases, curves, lora_cases, matcher, models, soft_cases  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "tests" / "goldens")
    parser.add_argument("--only", choices=["models", "cases", "curves", "matcher"])
    parser.add_argument("--name", help="one model, case or curve")
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
    for case in [*lora_cases.cases(), *soft_cases.cases()]:
        if wanted("cases", case.name):
            print(f"case {case.name}: {cases.make(case)}", flush=True)
    for curve in curves.curves():
        if wanted("curves", curve.name):
            print(f"curve {curve.name}: {curves.make(curve)}", flush=True)
    if wanted("matcher", None):
        print(f"matcher: {matcher.make()}", flush=True)


if __name__ == "__main__":
    main()
