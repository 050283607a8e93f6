"""Loads a checkpoint that this project wrote (merged, say) in transformers, strictly, and writes its logits.

    python check_model.py MODEL_DIR INPUT.json OUT.safetensors

Input and output as for check_adapter.py. Exit code 1 if transformers reports a missing, unexpected or misshaped key.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from golden.common import output_name, run, save_tensors  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("input")
    parser.add_argument("out")
    args = parser.parse_args()

    config = transformers.AutoConfig.from_pretrained(args.model_dir)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(
        args.model_dir, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    problems = [f"{kind}: {key}" for kind, keys in info.items() for key in sorted(map(str, keys or []))]
    if problems:
        sys.exit("\n".join([f"{args.model_dir}: {len(problems)} problems", *problems]))
    value = run(model.eval(), json.loads(Path(args.input).read_text()))
    name = output_name(model)
    save_tensors(args.out, {name: value})
    print(f"loaded without a missing or unexpected key, {name} {list(value.shape)}")


if __name__ == "__main__":
    main()
