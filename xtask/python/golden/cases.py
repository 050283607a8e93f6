"""Runs one adapter case: make, perturb, save, load afresh, record the logits with it and merged."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from .common import batch_of, fresh_dir, load_base, output_name, run, save_tensors, seed_all, write_json

# What an unmerged and a merged model may differ by before HF's merge is called wrong.
MERGE_TOLERANCE = 2e-4
# The least an adapter must move the output: a golden that equals the base tests nothing.
LEAST_EFFECT = 2e-2


@dataclass
class Case:
    """One adapter on one model. `config` is made by a call, as peft writes into configs."""

    name: str
    model: str
    seed: int
    config: Any
    pad: str | None = None
    lengths: tuple = (7, 5)
    # "yes", "hf_wrong" (HF's merge changes the output) or "no" (the method cannot, or HF refuses).
    merge: str = "yes"
    notes: str = ""
    noise: float = 0.15
    save_kwargs: dict = field(default_factory=dict)
    # Saves PiSSA and OLoRA as a plain LoRA of twice the rank, by way of the adapter as it was initialised.
    convert: bool = False
    # Whether the merged output is kept beside the adapted one; without it they agree to `merge_gap`.
    keep_merged: bool = True
    # The task of each row.
    task_ids: list | None = None
    # Called with the perturbed model before it is saved.
    prepare: Any = None


def small(*args, **kwargs):
    """A case with short rows, whose merged output is not written a second time."""
    return Case(*args, **{"lengths": (5, 3), "keep_merged": False, **kwargs})


def perturb(model, noise, seed):
    """Moves every trainable parameter off its initial value (at B = 0 an adapter does nothing)."""
    gen = torch.Generator().manual_seed(seed)
    seen = set()
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad and p.data_ptr() not in seen:
            seen.add(p.data_ptr())
            with torch.no_grad():
                p.add_(torch.randn(p.shape, generator=gen) * noise)


def compared(value, batch):
    """The positions that count: for per-token outputs those that are not padding (virtual tokens count)."""
    mask = batch.get("attention_mask")
    if mask is None or value.dim() != 3:
        return value
    mask = torch.tensor(mask).bool()
    virtual = value.shape[1] - mask.shape[1]
    mask = torch.cat([torch.ones(mask.shape[0], virtual, dtype=torch.bool), mask], dim=1)
    return value[mask]


def gap(a, b, batch):
    """Largest difference over the compared positions."""
    return (compared(a, batch) - compared(b, batch)).abs().max().item()


def save_adapter(model, folder, **kwargs):
    """`save_pretrained` without the model card."""
    model.save_pretrained(str(folder), **kwargs)
    (folder / "README.md").unlink(missing_ok=True)


def merged_logits(model, batch):
    """Output after `merge_and_unload`, or the reason HF gives for refusing."""
    try:
        return run(model.merge_and_unload(), batch), None
    except (AttributeError, RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"


def make(case):
    """Writes `cases/<name>` and returns a line about it."""
    base_dir = f"models/{case.model}"
    folder = fresh_dir(f"cases/{case.name}")
    adapter = folder / "adapter"
    seed_all(case.seed)
    base = load_base(base_dir)
    output = output_name(base)
    batch = batch_of(case.seed + 900, base.config.vocab_size, case.lengths, case.pad)
    base_out = run(base, batch)
    if case.task_ids is not None:
        batch["task_ids"] = case.task_ids

    model = get_peft_model(base, case.config()).eval()
    init = None
    if case.convert:
        init = fresh_dir(folder / "init")
        # As HF's documentation says: the saved initial adapter must not redo its initialisation.
        keep, model.peft_config["default"].init_lora_weights = model.peft_config["default"].init_lora_weights, True
        save_adapter(model, init)
        model.peft_config["default"].init_lora_weights = keep
    perturb(model, case.noise, case.seed + 1)
    if case.prepare:
        case.prepare(model)
    if case.convert:
        save_adapter(model, adapter, path_initial_model_for_weight_conversion=str(init), **case.save_kwargs)
        for leftover in init.rglob("*"):
            if leftover.is_file():
                leftover.unlink()
        init.rmdir()
    else:
        save_adapter(model, adapter, **case.save_kwargs)
    # After saving: a forward pass may change parameters (a constrained OFT projects its own).
    before = run(model, batch)

    # What users get: a fresh base and `from_pretrained` (PiSSA and OLoRA change the base again).
    model = PeftModel.from_pretrained(load_base(base_dir), str(adapter)).eval()
    adapted = run(model, batch)
    outputs = {f"base_{output}": base_out, f"adapted_{output}": adapted}
    reload_gap = gap(before, adapted, batch)
    effect = gap(adapted[:, -base_out.shape[1] :] if adapted.dim() == 3 else adapted, base_out, batch)
    assert effect > LEAST_EFFECT, f"{case.name}: the adapter moves the output by {effect} only"

    merged, why_not = merged_logits(model, batch)
    merge_gap = None if merged is None else gap(merged, adapted, batch)
    found = "no" if merged is None else ("yes" if merge_gap < MERGE_TOLERANCE else "hf_wrong")
    assert found == case.merge, f"{case.name}: merge is {found} ({why_not or merge_gap}), not {case.merge}"
    if found == "yes" and case.keep_merged:
        outputs[f"merged_{output}"] = merged
    save_tensors(folder / "expected.safetensors", outputs)
    record = {
        "model": case.model,
        **batch,
        "output": output,
        "merge": {"yes": True, "no": False}.get(case.merge, case.merge),
        "compare": "all positions" if case.pad is None else "positions with attention_mask 1 and virtual tokens",
        "reload_gap": reload_gap,
        "merge_gap": merge_gap,
        "notes": case.notes,
    }
    if why_not:
        record["merge_refused"] = why_not
    write_json(folder / "case.json", record)
    keys = len(load_file(adapter / "adapter_model.safetensors"))
    return (
        f"{keys} tensors, effect {effect:.2f}, reload {reload_gap:.1e}, "
        f"merge {case.merge}{'' if merge_gap is None else f' {merge_gap:.1e}'}{' ' + why_not if why_not else ''}"
    )
