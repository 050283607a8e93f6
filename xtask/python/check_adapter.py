"""Loads an adapter that this project wrote in HF PEFT, strictly, and writes its logits.

    python check_adapter.py MODEL_DIR ADAPTER_DIR INPUT.json OUT.safetensors [--merged]

INPUT.json is `{"input_ids": [[..]], "attention_mask": [[..]]?}`; OUT gets `logits` (`last_hidden_state` for a model
without a head) and, with --merged, `merged_logits` after `merge_and_unload`. Exit code 1 with a list of what is
wrong if a key is missing, unexpected or misshaped, or if a tensor HF holds after loading is not the file's.
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
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from golden.common import load_base, output_name, run, save_tensors  # noqa: E402


def expected_keys(model_dir, adapter_dir):
    """Keys and shapes HF would save for this config: those that must be there, and those that may."""
    config = PeftConfig.from_pretrained(adapter_dir)
    config.inference_mode = False
    if config.is_prompt_learning and config.modules_to_save:
        config.modules_to_save = sorted(set(config.modules_to_save))
    model = get_peft_model(load_base(model_dir), config)
    shapes = [
        {k: tuple(v.shape) for k, v in get_peft_model_state_dict(model, save_embedding_layers=mode).items()}
        for mode in (False, "auto")
    ]
    return shapes[0], {**shapes[1], **shapes[0]}


def problems_of(found, required, allowed):
    """What is wrong with the file's keys and shapes, a line each."""
    for key in sorted(required.keys() - found.keys()):
        yield f"missing: {key} {list(required[key])}"
    for key in sorted(found.keys() - allowed.keys()):
        yield f"unexpected: {key} {list(found[key].shape)}"
    for key in sorted(found.keys() & allowed.keys()):
        if tuple(found[key].shape) != allowed[key]:
            yield f"wrong shape: {key} is {list(found[key].shape)}, HF has {list(allowed[key])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("adapter_dir")
    parser.add_argument("input")
    parser.add_argument("out")
    parser.add_argument("--merged", action="store_true")
    args = parser.parse_args()

    found = load_file(f"{args.adapter_dir}/adapter_model.safetensors")
    required, allowed = expected_keys(args.model_dir, args.adapter_dir)
    problems = list(problems_of(found, required, allowed))
    if not problems:
        model = PeftModel.from_pretrained(load_base(args.model_dir), args.adapter_dir).eval()
        held = get_peft_model_state_dict(model)
        problems = [
            f"not what HF holds after loading: {k}" for k in found if k in held and not torch.equal(held[k], found[k])
        ]
    if problems:
        sys.exit("\n".join([f"{args.adapter_dir}: {len(problems)} problems", *problems]))

    batch = json.loads(Path(args.input).read_text())
    name = output_name(model.get_base_model())
    outputs = {name: run(model, batch)}
    if args.merged:
        outputs[f"merged_{name}"] = run(model.merge_and_unload(), batch)
    save_tensors(args.out, outputs)
    print(f"{len(found)} keys as HF expects them, {name} {list(outputs[name].shape)}")


if __name__ == "__main__":
    main()
