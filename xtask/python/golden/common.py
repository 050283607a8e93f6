"""Helpers shared by every maker: seeds, small files, models by name, and logits as the tests compare them."""

import json
import random
import shutil
import warnings
from pathlib import Path

import numpy
import torch
import transformers
from safetensors.torch import save_file

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def seed_all(seed):
    """Seeds every generator that transformers and peft draw from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def write_json(path, value):
    """One value a line at the top two levels, so that a diff of a golden shows what moved."""
    if isinstance(value, dict):
        body = ",\n".join(f"  {json.dumps(k)}: {lines(v)}" for k, v in value.items())
        text = "{\n" + body + "\n}\n"
    else:
        text = "[\n" + ",\n".join("  " + json.dumps(v) for v in value) + "\n]\n"
    Path(path).write_text(text)


def lines(value):
    """A list of objects one a line, anything else on one line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join("    " + json.dumps(v) for v in value) + "\n  ]"
    return json.dumps(value)


def fresh_dir(path):
    """An empty folder at `path`."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def save_tensors(path, tensors):
    """Writes tensors as contiguous f32, each with storage of its own."""
    save_file({k: v.detach().float().contiguous().clone() for k, v in tensors.items()}, str(path))


def load_base(model_dir):
    """The base model of a folder in eval mode, as the class its config names, with the plain attention kernel."""
    config = transformers.AutoConfig.from_pretrained(model_dir)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(model_dir, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def output_name(model):
    """What a model's compared output is called."""
    name = type(model).__name__
    return "logits" if "ForCausalLM" in name or "LMHead" in name or "Classification" in name else "last_hidden_state"


def run(model, batch):
    """Logits (or last hidden state) of `{"input_ids", "attention_mask"?}`, with nothing but those given; `task_ids` for prompts that differ by task."""
    ids = torch.tensor(batch["input_ids"])
    mask = batch.get("attention_mask")
    kwargs = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    if "task_ids" in batch:
        kwargs["task_ids"] = torch.tensor(batch["task_ids"])
    with torch.no_grad():
        out = model(input_ids=ids, **kwargs)
    value = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    assert torch.isfinite(value).all(), "a golden must be finite"
    return value


def batch_of(seed, vocab, lengths, pad=None, pad_id=0):
    """Random rows. `pad` is None (all of the shortest length, no mask), "right" or "left"."""
    if pad is None:
        lengths = [min(lengths)] * len(lengths)
    gen = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, vocab, (n,), generator=gen).tolist() for n in lengths]
    width = max(lengths)
    if pad is None:
        return {"input_ids": rows}
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        if pad == "right":
            ids.append(row + [pad_id] * gap)
            mask.append([1] * len(row) + [0] * gap)
        else:
            ids.append([pad_id] * gap + row)
            mask.append([0] * gap + [1] * len(row))
    return {"input_ids": ids, "attention_mask": mask}
