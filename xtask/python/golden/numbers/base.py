"""One number: an adapter folder of ours, and what the model gives with it."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D

from ..cases import LEAST_EFFECT, gap
from ..common import batch_of, fresh_dir, load_base, output_name, run, save_tensors, write_json


class Adapted:
    """A tiny model in f64, the adapter's tensors so far, and draws of f32 values for them."""

    def __init__(self, name, seed):
        self.model = load_base(f"models/{name}").double()
        self.gen = np.random.default_rng(seed)
        self.tensors = {}

    def draw(self, *shape, std=0.3, mean=0.0):
        """Normal values that f32 holds exactly, as f64."""
        return self.gen.normal(mean, std, shape).astype(np.float32).astype(np.float64)

    def save(self, key, value, prefix="base_model.model."):
        """Puts a tensor into the adapter's file."""
        value = np.asarray(value)
        self.tensors[prefix + key] = value.astype(np.int32 if value.dtype.kind in "iu" else np.float32)
        return value

    def linears(self, *names, layers=None):
        """Path and module of the linear layers whose path ends in one of `names`."""
        for path, module in self.model.named_modules():
            if any(path == n or path.endswith("." + n) for n in names) and isinstance(module, (torch.nn.Linear, Conv1D)):
                if layers is None or any(f".{i}." in path for i in layers):
                    yield path, module

    def weight(self, path):
        """A linear layer's weight as `[out, in]`, any other's as it is."""
        module = self.model.get_submodule(path)
        w = module.weight.detach().numpy()
        return w.T if isinstance(module, Conv1D) else w

    def set_weight(self, path, value):
        """Replaces it."""
        module = self.model.get_submodule(path)
        value = value.T if isinstance(module, Conv1D) else value
        module.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(value)), requires_grad=False)

    def bias(self, path):
        """A module's bias, or None."""
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return None if bias is None else bias.detach().numpy()

    def set_bias(self, path, value):
        """Gives it that bias."""
        self.model.get_submodule(path).bias = torch.nn.Parameter(torch.from_numpy(value.copy()), requires_grad=False)


@dataclass
class Number:
    """`build` takes an `Adapted`, draws the adapter's tensors and changes the model by them."""

    name: str
    model: str
    seed: int
    config: dict
    build: Any
    pad: str | None = "right"
    lengths: tuple = (5, 3)
    # None: it merges, but the merged weights alone are not the model.
    merge: bool | None = True
    notes: str = ""
    # Keys that training moves but a file need not give back bit for bit.
    loose: tuple = ()

    def make(self):
        """Writes `numbers/<name>` in the form of `cases`, and returns a line about it."""
        folder = fresh_dir(f"numbers/{self.name}")
        (folder / "adapter").mkdir()
        at = Adapted(self.model, self.seed)
        output = output_name(at.model)
        batch = batch_of(self.seed + 900, at.model.config.vocab_size, self.lengths, self.pad)
        base = run(at.model, batch)
        extra = self.build(at) or {}
        adapted = run(at.model, batch)
        effect = gap(adapted, base, batch)
        assert effect > LEAST_EFFECT, f"{self.name}: the adapter moves the output by {effect} only"
        save_file(dict(sorted(at.tensors.items())), str(folder / "adapter" / "adapter_model.safetensors"))
        config = {**self.config, "base_model_name_or_path": f"models/{self.model}", **extra}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_tensors(folder / "expected.safetensors", {f"base_{output}": base, f"adapted_{output}": adapted})
        write_json(folder / "case.json", {
            "model": self.model, **batch, "output": output, "merge": self.merge, "loose": list(self.loose),
            "notes": self.notes})  # fmt: skip
        return f"{len(at.tensors)} tensors, effect {effect:.2f}"
