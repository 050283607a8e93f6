"""Twenty AdamW steps of HF LoRA in a plain torch loop: the loss, learning rate and gradient norm of every step."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import get_scheduler

from .cases import save_adapter
from .common import fresh_dir, load_base, seed_all, write_json
from .lora_cases import lora

STEPS = 20


@dataclass
class Curve:
    """One training run. `hyper` is added to the defaults below and written to train.json."""

    name: str
    model: str
    seed: int
    config: Any
    padded: bool = False
    notes: str = ""
    hyper: dict = field(default_factory=dict)


DEFAULTS = {
    "steps": STEPS,
    "batch_size": 3,
    "gradient_accumulation": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "schedule": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
}


def curves():
    """The runs. Between them: every schedule, clipping on and off, accumulation, decay, padding."""
    yield Curve("llama-qv", "llama", 2001, lora(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    yield Curve("llama-all-linear", "llama", 2002, lora(r=3, lora_alpha=6, target_modules="all-linear"), padded=True, hyper={
        "schedule": "linear", "warmup_steps": 4, "max_grad_norm": 1.0, "weight_decay": 0.1})
    yield Curve("gpt2", "gpt2", 2003, lora(
        r=4, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), padded=True, hyper={
        "schedule": "cosine", "warmup_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.01, "betas": [0.8, 0.95]})
    yield Curve("llama-rslora-head", "llama", 2004, lora(
        r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]), hyper={
        "schedule": "cosine", "max_grad_norm": 1.0, "weight_decay": 0.05, "learning_rate": 5e-3})
    yield Curve("gemma-accumulate", "gemma", 2005, lora(r=4, lora_alpha=8, target_modules="all-linear"),
                padded=True, hyper={"schedule": "linear", "gradient_accumulation": 2, "batch_size": 2, "max_grad_norm": 1.0,
                                    "learning_rate": 2e-2})
    yield Curve("qwen2-warmup", "qwen2", 2006, lora(r=3, lora_alpha=6, target_modules=["q_proj", "gate_proj"], bias="lora_only"), hyper={
        "schedule": "constant_with_warmup", "warmup_steps": 5, "weight_decay": 0.1, "learning_rate": 1e-2})


def rows_of(curve, vocab, count):
    """Rows with something to learn (each token is a fixed function of the last) and a prompt without labels."""
    gen = torch.Generator().manual_seed(curve.seed)
    rows = []
    for index in range(count):
        length = 10 - (index * 3 % 5 if curve.padded else 0)
        ids = [int(torch.randint(1, vocab, (1,), generator=gen))]
        while len(ids) < length:
            ids.append((ids[-1] * 3 + 7) % (vocab - 1) + 1)
        prompt = index % 3
        labels = [-100] * prompt + ids[prompt:]
        row = {"input_ids": ids, "labels": labels}
        if curve.padded:
            gap = 10 - length
            row = {"input_ids": ids + [0] * gap, "labels": labels + [-100] * gap, "attention_mask": [1] * length + [0] * gap}
        rows.append(row)
    return rows


def summed_loss(model, rows):
    """Cross-entropy summed over the labelled tokens after the shift, and how many there are."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1]
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum")
    return total, int((labels != -100).sum())


def make(curve):
    """Writes `curves/<name>` and returns a line about it."""
    folder = fresh_dir(f"curves/{curve.name}")
    hyper = {**DEFAULTS, **curve.hyper}
    seed_all(curve.seed)
    base = load_base(f"models/{curve.model}")
    save_adapter(get_peft_model(base, curve.config()), folder / "adapter_init")
    model = PeftModel.from_pretrained(
        load_base(f"models/{curve.model}"), str(folder / "adapter_init"), is_trainable=True
    ).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            # GPT-2 has dropouts of its own; the runs are compared without any.
            module.p = 0.0

    size, micro = hyper["batch_size"], hyper["gradient_accumulation"]
    rows = rows_of(curve, base.config.vocab_size, STEPS * size * micro)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        trained, lr=hyper["learning_rate"], betas=tuple(hyper["betas"]), eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
    )  # fmt: skip
    schedule = get_scheduler(hyper["schedule"], adam, hyper["warmup_steps"], STEPS)
    record = []
    for step in range(STEPS):
        parts = [rows[(step * micro + i) * size :][:size] for i in range(micro)]
        sums = [summed_loss(model, part) for part in parts]
        tokens = sum(n for _, n in sums)
        loss = sum(total for total, _ in sums) / tokens
        if micro == 1:
            labels = torch.tensor([row["labels"] for row in parts[0]])
            batch = {k: torch.tensor([row[k] for row in parts[0]]) for k in parts[0][0] if k != "labels"}
            theirs = model(**batch, labels=labels).loss
            assert abs(theirs.item() - loss.item()) < 1e-5, "transformers' own loss disagrees"
        adam.zero_grad()
        loss.backward()
        limit = hyper["max_grad_norm"] or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        record.append(
            {"step": step + 1, "loss": loss.item(), "learning_rate": schedule.get_last_lr()[0], "grad_norm": norm.item()}
        )
        adam.step()
        schedule.step()
    save_adapter(model.eval(), folder / "adapter_final")
    write_json(folder / "train.json", {
        "model": curve.model,
        **hyper,
        "loss": "mean over all labelled tokens after the shift of the step's rows (all micro-batches together)",
        "order": "rows in file order, no shuffling, one pass; one decay for all trained parameters; no dropout",
        "grad_norm": "before clipping; max_grad_norm 0 is off",
        "notes": curve.notes,
    })  # fmt: skip
    write_json(folder / "curve.json", record)
    return f"loss {record[0]['loss']:.3f} -> {record[-1]['loss']:.3f}, norms {record[0]['grad_norm']:.2f} .. {record[-1]['grad_norm']:.2f}"
