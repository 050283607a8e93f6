"""Twenty training steps of methods with an optimiser, schedule or encoder of their own: as `curves`, with more fields."""

import json
from dataclasses import dataclass, field
from typing import Any

import peft.optimizers.lorafa as lorafa
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptEncoderConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import get_scheduler

from .cases import save_adapter
from .common import fresh_dir, load_base, save_tensors, seed_all, write_json
from .curves import DEFAULTS, STEPS, rows_of
from .reparam_cases import QV, made


@dataclass
class Run:
    """One run. `fields` are what our configuration says besides HF's file; `optimizer` makes HF's own."""

    name: str
    model: str
    seed: int
    config: Any
    hyper: dict = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    optimizer: Any = None
    padded: bool = False
    # Whether the norm of the gradients before the optimiser is what ours reports.
    norms: bool = True
    notes: str = ""

    def make(self):
        """Writes `runs/<name>` and returns a line about it."""
        return make(self)


def adamw(model, hyper):
    """AdamW over what is trainable."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=hyper["learning_rate"], betas=tuple(hyper["betas"]),
        eps=hyper["eps"], weight_decay=hyper["weight_decay"],
    )  # fmt: skip


def lora_plus(ratio, embedding):
    """HF's parameter groups."""

    def build(model, hyper):
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=hyper["learning_rate"], loraplus_lr_ratio=ratio, loraplus_lr_embedding=embedding,
            loraplus_weight_decay=hyper["weight_decay"], betas=tuple(hyper["betas"]), eps=hyper["eps"],
        )  # fmt: skip

    return build


def lora_fa(model, hyper):
    """HF's projected gradients, in f32 throughout (it takes bf16 for one product where the machine has it)."""
    lorafa.is_bf16_available = lambda: False
    config = model.peft_config["default"]
    adam = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=hyper["learning_rate"])
    adam.param_groups[0]["eps"] = hyper["eps"]
    return adam


def runs():
    """The runs."""
    lora = lambda **k: made(LoraConfig, **k)  # noqa: E731
    yield Run("llama-dora", "llama", 2101, lora(r=3, lora_alpha=6, use_dora=True, target_modules=QV), padded=True, hyper={
        "max_grad_norm": 1.0, "schedule": "linear", "warmup_steps": 2})
    yield Run("llama-lora-plus", "llama", 2102, lora(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj", "v_proj"]),
              optimizer=lora_plus(8.0, 3e-4), hyper={"learning_rate": 2e-3, "weight_decay": 0.05},
              fields={"loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 3e-4, "loraplus_weight_decay": 0.05},
              notes="create_loraplus_optimizer; learning_rate is that of A")
    yield Run("gpt2-lora-plus", "gpt2", 2103, lora(
        r=4, lora_alpha=4, target_modules=["c_fc"], fan_in_fan_out=True, bias="lora_only"), optimizer=lora_plus(4.0, 1e-6),
        hyper={"learning_rate": 3e-3, "schedule": "cosine", "weight_decay": 0.1, "max_grad_norm": 1.0},
        fields={"loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1}, notes="biases join B, without decay (not a key's: its slope is nothing but rounding)")
    yield Run("llama-lora-fa", "llama", 2104, lora(r=3, lora_alpha=6, target_modules=QV), optimizer=lora_fa,
              hyper={"learning_rate": 5e-3}, fields={"lora_fa": "projected"}, norms=False,
              notes="create_lorafa_optimizer: A frozen, B's gradient projected (inside of the optimiser: no norms here)")
    yield Run("llama-adalora", "llama", 2105, made(
        AdaLoraConfig, init_r=4, target_r=2, tinit=3, tfinal=5, deltaT=2, total_step=STEPS, lora_alpha=8, orth_reg_weight=0.3,
        target_modules=QV), hyper={"learning_rate": 3e-2, "max_grad_norm": 1.0},
        notes="update_and_allocate(step) after each optimiser step, steps counted from 1")
    yield Run("llama-vera", "llama", 2106, made(VeraConfig, r=9, target_modules=QV), hyper={"learning_rate": 3e-2})
    yield Run("gpt2-ia3", "gpt2", 2107, made(IA3Config), hyper={"learning_rate": 5e-2})
    yield Run("llama-lokr", "llama", 2108, made(LoKrConfig, r=2, alpha=4, target_modules=QV + ["down_proj"]), padded=True,
              hyper={"learning_rate": 3e-2})
    yield Run("llama-oft", "llama", 2109, made(OFTConfig, oft_block_size=8, target_modules=QV), hyper={"weight_decay": 0.1})
    yield Run("llama-shira", "llama", 2112, made(ShiraConfig, r=1, random_seed=5, target_modules=QV))
    yield Run("llama-ptuning", "llama", 2110, made(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=11))
    yield Run("gpt2-ptuning-lstm", "gpt2", 2111, made(
        PromptEncoderConfig, num_virtual_tokens=4, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"))


def loss_of(model, rows, virtual):
    """Cross-entropy over the labelled tokens after the shift, the virtual ones in front unlabelled, as HF has it."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    out = model(**batch)
    labels = torch.cat([torch.full((len(rows), virtual), -100), batch["labels"]], 1)[:, 1:]
    logits = out.logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)
    return loss, out.loss


def make(run):
    """Writes `runs/<name>` and returns a line about it."""
    folder = fresh_dir(f"runs/{run.name}")
    hyper = {**DEFAULTS, **run.hyper}
    seed_all(run.seed)
    base = load_base(f"models/{run.model}")
    model = get_peft_model(base, run.config())
    config = model.peft_config["default"]
    virtual = config.num_virtual_tokens if config.is_prompt_learning else 0
    plain = {"save_embedding_layers": False}
    save_adapter(model, folder / "adapter_init", **plain)
    if virtual:
        # A loaded prompt cannot be trained in HF; the encoder is not in its file.
        save_tensors(folder / "encoder_init.safetensors", model.prompt_encoder["default"].state_dict())
    else:
        model = PeftModel.from_pretrained(
            load_base(f"models/{run.model}"), str(folder / "adapter_init"), is_trainable=True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    size = hyper["batch_size"]
    rows = rows_of(run, base.config.vocab_size, STEPS * size)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adam = (run.optimizer or adamw)(model, hyper)
    trained = [p for p in model.parameters() if p.requires_grad]
    schedule = get_scheduler(hyper["schedule"], adam, hyper["warmup_steps"], STEPS)
    record = []
    for step in range(STEPS):
        loss, total = loss_of(model, rows[step * size :][:size], virtual)
        adam.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, hyper["max_grad_norm"] or float("inf"))
        line = {"step": step + 1, "loss": loss.item(), "learning_rate": schedule.get_last_lr()[0], "grad_norm": norm.item()}
        if not run.norms:
            del line["grad_norm"]
        adam.step()
        schedule.step()
        if isinstance(config, AdaLoraConfig):
            model.base_model.update_and_allocate(step + 1)
            line["penalty"] = (total - loss).item()
            kept = [p for n, p in model.named_parameters() if ".lora_E." in n]
            line["ranks"] = [int((p != 0).sum()) for p in kept]
        else:
            assert abs(total.item() - loss.item()) < 1e-5, "transformers' own loss disagrees"
        record.append(line)
    save_adapter(model.eval(), folder / "adapter_final", **plain)
    write_json(folder / "train.json", {
        "model": run.model,
        **hyper,
        "adapter_fields": run.fields,
        "loss": "mean over all labelled tokens after the shift; penalty apart",
        "notes": run.notes,
    })  # fmt: skip
    write_json(folder / "curve.json", record)
    return f"loss {record[0]['loss']:.3f} -> {record[-1]['loss']:.3f}, ranks {record[-1].get('ranks')}"
