"""Short runs of methods that Hugging Face PEFT has not, in f64: plain torch modules, AdamW, and each method's own rule.

Written as the runs of `golden.runs`, so that one test reads both. The adapter's first and last state are in files under
our documented keys.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from transformers import get_scheduler
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..common import fresh_dir, load_base, seed_all, write_json
from ..curves import DEFAULTS, rows_of
from ..runs import loss_of


class Layer(torch.nn.Module):
    """A frozen linear layer whose weight `[out, in]` is `weight(layer)`; trained tensors are its own parameters."""

    def __init__(self, path, base, weight):
        super().__init__()
        self.path, self.rule = path, weight
        w = base.weight.detach().clone()
        self.w = w.T.contiguous() if isinstance(base, Conv1D) else w
        self.b = None if base.bias is None else base.bias.detach().clone()

    def forward(self, x):
        return F.linear(x, self.rule(self), self.b)


@dataclass
class Trained:
    """One run. `start(layer, draw)` gives a layer's parameters by key suffix; `weight(layer)` its weight with them."""

    name: str
    model: str
    seed: int
    config: dict
    targets: tuple
    start: Any
    weight: Any
    steps: int = 5
    hyper: dict = field(default_factory=dict)
    # Called as hook(run, layers, step, learning rate) after each optimiser step, and with the rows before the first.
    after_step: Any = None
    before: Any = None
    after_backward: Any = None
    # Suffixes without weight decay.
    undecayed: tuple = ()
    # What is written of a layer: by default its parameters.
    saved: Any = None
    # A run from a fresh adapter has no first file.
    fresh: bool = False
    whole_rows: bool = False
    # Tokens of a row, where not ten.
    width: int | None = None
    # Called with the model: base parameters that are trained too, by their key.
    extra: Any = None
    # Parts of keys whose values are drawn by the run, and its other fields that are compared at the end.
    drawn: tuple = ()
    padded: bool = False
    notes: str = ""

    def layers(self, model):
        """Puts the layers into the model."""
        found = []
        for path, module in list(model.named_modules()):
            if any(path.endswith("." + t) for t in self.targets) and isinstance(module, (torch.nn.Linear, Conv1D)):
                parent = model.get_submodule(path.rpartition(".")[0])
                layer = Layer(path, module, self.weight)
                setattr(parent, path.rpartition(".")[2], layer)
                found.append(layer)
        return found

    def write(self, folder, layers):
        """The adapter as it is now, in our form."""
        folder.mkdir()
        tensors = {}
        for layer in layers:
            state = self.saved(layer) if self.saved else dict(layer.state())
            for suffix, value in state.items():
                value = value.detach().numpy() if torch.is_tensor(value) else value
                kind = np.int32 if value.dtype.kind in "iu" else np.float32
                prefix = "" if suffix.startswith("base_model.") else f"base_model.model.{layer.path}."
                tensors[prefix + suffix] = np.ascontiguousarray(value).astype(kind)
        for key, value in self.whole.items():
            tensors[f"base_model.model.{key}"] = value.detach().numpy().astype(np.float32)
        save_file(dict(sorted(tensors.items())), str(folder / "adapter_model.safetensors"))
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    def make(self):
        """Writes `runs/<name>` and returns a line about it."""
        folder = fresh_dir(f"runs/{self.name}")
        hyper = {**DEFAULTS, "steps": self.steps, **self.hyper}
        seed_all(self.seed)
        model = load_base(f"models/{self.model}").double()
        model.requires_grad_(False)
        layers = self.layers(model)
        self.whole = self.extra(model) if self.extra else {}
        gen = np.random.default_rng(self.seed)
        draw = lambda *shape, std=0.3: gen.normal(0, std, shape).astype(np.float32).astype(np.float64)  # noqa: E731
        for layer in layers:
            layer.names = []
            for suffix, value in self.start(layer, draw).items():
                layer.names.append(suffix)
                setattr(layer, suffix.replace(".", "_"), torch.nn.Parameter(torch.from_numpy(value)))
            layer.state = lambda layer=layer: [(n, getattr(layer, n.replace(".", "_"))) for n in layer.names]
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        size = hyper["batch_size"]
        rows = rows_of(self, model.config.vocab_size, self.steps * size)
        for row in rows:
            ids = row["input_ids"]
            while self.width and len(ids) < self.width:
                ids.append((ids[-1] * 3 + 7) % (model.config.vocab_size - 1) + 1)
            if self.whole_rows:
                row["labels"] = list(ids)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.before:
            self.before(self, model, layers, rows)
        self.write(folder / "adapter_init", layers) if not self.fresh else None
        named = [(n, p) for layer in layers for n, p in layer.state()] + list(self.whole.items())
        decayed, rest = [p for n, p in named if n not in self.undecayed], [p for n, p in named if n in self.undecayed]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        adam = torch.optim.AdamW(groups, lr=hyper["learning_rate"], betas=tuple(hyper["betas"]), eps=hyper["eps"],
                                 weight_decay=hyper["weight_decay"])
        schedule = get_scheduler(hyper["schedule"], adam, hyper["warmup_steps"], self.steps)
        record = []
        for step in range(self.steps):
            loss, _ = loss_of(model, rows[step * size :][:size], 0)
            adam.zero_grad()
            loss.backward()
            if self.after_backward:
                self.after_backward(self, layers, step)
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], hyper["max_grad_norm"] or float("inf"))
            rate = schedule.get_last_lr()[0]
            line = {"step": step + 1, "loss": loss.item(), "learning_rate": rate}
            if not any(getattr(layer, "dropped", False) for layer in layers):
                # What was drawn anew has gradients too.
                line["grad_norm"] = norm.item()
            adam.step()
            schedule.step()
            if self.after_step:
                self.after_step(self, layers, step, rate, adam)
            record.append(line)
        self.write(folder / "adapter_final", layers)
        write_json(folder / "train.json", {
            "model": self.model, **hyper, "adapter_fields": self.config if self.fresh else {}, "fresh": self.fresh,
            "drawn": list(self.drawn),
            "loss": "mean over all labelled tokens after the shift", "notes": self.notes})  # fmt: skip
        write_json(folder / "curve.json", record)
        return f"loss {record[0]['loss']:.3f} -> {record[-1]['loss']:.3f}"


def low_rank(rank, **more):
    """LoRA's two factors and whatever else, all drawn."""

    def start(layer, draw):
        out, inside = layer.w.shape
        return {"lora_A.weight": draw(rank, inside), "lora_B.weight": draw(out, rank),
                **{k.replace("__", "."): draw(*shape, std=1.0) for k, shape in more.items()}}

    return start


def shrink(strength):
    """SoRA's proximal step: every gate moves towards zero by rate times strength, and stops there."""

    def after(run, layers, step, rate, adam):
        with torch.no_grad():
            for layer in layers:
                g = layer.lora_gate.numpy()
                for i, v in enumerate(g):
                    g[i] = 0.0 if abs(v) <= rate * strength else v - np.sign(v) * rate * strength

    return after


def sparse(layer):
    """The documented sparse form: values and their places, row by row."""
    places = np.argwhere(layer.mask.numpy())
    return {"sparse_values": layer.delta.detach().numpy()[tuple(places.T)], "sparse_indices": places.T.astype(np.int32)}


def masked(run, layers, step):
    """Only the mask learns."""
    for layer in layers:
        layer.delta.grad *= layer.mask


def choose(scores, layers, count):
    """Masks of the `count` largest scores of all layers together."""
    cut = np.sort(np.concatenate([s.ravel() for s in scores]))[::-1][count - 1]
    for layer, score in zip(layers, scores):
        layer.mask = torch.from_numpy(score >= cut)
    assert sum(int(layer.mask.sum()) for layer in layers) == count, "a tie at the edge of the mask"


def smallest(count):
    """PaFi: the weights nearest to zero."""
    return lambda run, model, layers, rows: choose([-layer.w.abs().numpy() for layer in layers], layers, count)


def fisher(count, samples):
    """FISH: squared gradients of log p of the first `samples` rows, one row at a time."""

    def before(run, model, layers, rows):
        scores = [np.zeros(layer.w.shape) for layer in layers]
        for row in rows[:samples]:
            loss, _ = loss_of(model, [row], 0)
            for score, grad in zip(scores, torch.autograd.grad(loss, [layer.delta for layer in layers])):
                score += grad.numpy() ** 2 / samples
        choose(scores, layers, count)

    return before


def in_batches(count, size, limit):
    """Child-Tuning D: squared gradients of batches, each clipped layer by layer before it is squared."""

    def before(run, model, layers, rows):
        scores = [np.zeros(layer.w.shape) for layer in layers]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        for batch in batches:
            loss, _ = loss_of(model, batch, 0)
            for score, grad in zip(scores, torch.autograd.grad(loss, [layer.delta for layer in layers])):
                score += (grad.numpy() * min(1.0, limit / grad.norm().item())) ** 2 / len(batches)
        choose(scores, layers, count)

    return before


def ticket(count, at):
    """LT-SFT: after `at` dense steps keep what moved most, go back, forget the moments."""

    def after(run, layers, step, rate, adam):
        if step + 1 == at:
            choose([layer.delta.detach().abs().numpy() for layer in layers], layers, count)
            with torch.no_grad():
                for layer in layers:
                    layer.delta.zero_()
            adam.state.clear()

    return after


def all_learn(run, model, layers, rows):
    """No mask yet."""
    for layer in layers:
        layer.mask = torch.ones_like(layer.w, dtype=torch.bool)


def follow(ratio, scale, start):
    """Delta-LoRA: the weight takes `ratio` times each step of the product, from step `start` on."""

    def after(run, layers, step, rate, adam):
        with torch.no_grad():
            for layer in layers:
                product = layer.lora_B_weight @ layer.lora_A_weight
                if step == start - 1 or (start == 0 and step == 0):
                    layer.pair = (layer.lora_A_weight.clone(), layer.lora_B_weight.clone()) if start else layer.pair
                if step >= start:
                    layer.w += ratio * scale * (product - layer.product)
                layer.product = product.clone()

    return after


def remember(run, model, layers, rows):
    """The product before the first step."""
    for layer in layers:
        layer.pair = (layer.lora_A_weight.detach().clone(), layer.lora_B_weight.detach().clone())
        layer.product = (layer.lora_B_weight @ layer.lora_A_weight).detach()


def with_start(layer):
    """Delta-LoRA's file: the pair, and the pair that the weight began to follow at."""
    a, b = layer.pair
    return {**dict(layer.state()), "lora_A_start.weight": a, "lora_B_start.weight": b}


def apart(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Shifted sparse attention: half of the heads within groups, half within groups moved by half of one; the half-groups
    at both ends stay on their own."""
    length, heads = query.shape[2], query.shape[1]
    group = length // 4
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    place = torch.arange(length)
    masks = [torch.stack([place // group == p // group for p in place]), torch.stack(
        [(place + group // 2) // group == (p + group // 2) // group for p in place])]
    causal = place[None] <= place[:, None]
    seen = torch.stack([masks[h >= heads // 2] & causal for h in range(heads)])
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


def long_context(model):
    """The pattern, and norms and embedding to train."""
    ALL_ATTENTION_FUNCTIONS["apart"] = apart
    model.config._attn_implementation = "apart"
    whole = {}
    for path, module in model.named_modules():
        if path.endswith("norm") or path.endswith("embed_tokens"):
            module.weight.requires_grad_(True)
            whole[f"{path}.weight"] = module.weight
    return whole


def watched(layer):
    """LoRA that adds up the squared length of what it puts out, token by token."""
    out, inside = layer.w.shape
    change = 2.0 * layer.lora_B_weight @ layer.lora_A_weight
    return layer.w if getattr(layer, "dropped", False) else layer.w + change


def uneven(layer, draw):
    """Pairs that differ in size from layer to layer."""
    out, inside = layer.w.shape
    size = {"0": (0.05, 0.4), "1": (0.4, 0.06), "2": (0.06, 0.04)}[layer.path.split(".")[2]]
    size = size[0] if layer.path.endswith("q_proj") else size[1]
    layer.total, layer.seen = 0.0, 0

    def see(module, args):
        x = args[0].detach()
        with torch.no_grad():
            put = 2.0 * x @ module.lora_A_weight.T @ module.lora_B_weight.T
        module.total += float((put**2).sum())
        module.seen += put.shape[0] * put.shape[1]

    layer.register_forward_pre_hook(see)
    return {"lora_A.weight": draw(3, inside), "lora_B.weight": draw(out, 3, std=size)}


def drop(threshold, at):
    """LoRA-drop: after `at` steps each type of matrix keeps the pairs that make up the share; the others share a fresh one."""

    def after(run, layers, step, rate, adam):
        if step + 1 != at:
            return
        shared = []
        for kind in sorted({layer.path.split(".", 3)[3] for layer in layers}):
            same = [layer for layer in layers if layer.path.endswith(kind)]
            weight = {layer: layer.total / layer.seen for layer in same}
            kept, got = 0, 0.0
            order = sorted(same, key=lambda layer: -weight[layer])
            while got < threshold * sum(weight.values()):
                got, kept = got + weight[order[kept]], kept + 1
            if len(order) - kept > 1:
                shared += order[kept:]
        for layer in shared:
            layer.dropped = True
        run.config = {**run.config, "shared_modules": sorted(layer.path for layer in shared)}

    return after


def own_or_shared(layer):
    """A pair of its own under the module, the shared one (drawn anew: not compared) under its type."""
    if not getattr(layer, "dropped", False):
        return dict(layer.state())
    return {f"base_model.shared.{layer.path.split('.', 3)[3]}.{n}": p for n, p in layer.state()}


DELTA = dict(start=lambda layer, draw: {"delta": np.zeros(layer.w.shape)}, weight=lambda layer: layer.w + layer.delta,
             saved=sparse, after_backward=masked, fresh=True, whole_rows=True)  # fmt: skip


@dataclass
class Gates:
    """Diff pruning's first two steps, as far as nothing is drawn: D = 0, so that the loss is the base's and the gates feel
    the penalty alone, the expected number of open ones."""

    name: str = "llama-diff-pruning"
    model: str = "llama"
    seed: int = 3211
    padded: bool = False

    def make(self):
        """Writes `runs/<name>` and returns a line about it."""
        folder = fresh_dir(f"runs/{self.name}")
        strength, alpha, low, high, beta, factor, rate = 1e-3, 2.0, -1.2, 1.3, 0.7, 50.0, 2e-3
        model = load_base(f"models/{self.model}").double()
        rows = rows_of(self, model.config.vocab_size, 4 * 3)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes = [m.weight.numel() for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
        with torch.no_grad():
            loss, _ = loss_of(model, rows[:3], 0)
        shift = beta * np.log(-low / high)
        sigma = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
        # All gates of a layer start alike and stay alike.
        gate, group = np.full(len(sizes), alpha), np.full(len(sizes), alpha)
        record = []
        for step in range(2):
            open_gate, open_group = sigma(gate - shift), sigma(group - shift)
            line = {"step": step + 1, "penalty": strength * float((sizes * open_gate * open_group).sum()), "learning_rate": rate}
            record.append({**line, "loss": loss.item()} if step == 0 else line)
            slopes = (strength * open_gate * (1 - open_gate) * open_group,
                      strength * np.array(sizes) * open_gate * open_group * (1 - open_group))
            # Adam's first step.
            gate, group = (v - rate * factor * g / (abs(g) + 1e-8) for v, g in zip((gate, group), slopes))
        write_json(folder / "train.json", {
            "model": self.model, **DEFAULTS, "steps": 4, "learning_rate": rate, "fresh": True, "partial": True, "adapter_fields": {
                "peft_type": "DIFF_PRUNING", "l0_penalty": strength, "alpha_init": alpha, "stretch": [low, high], "beta": beta,
                "gate_lr_factor": factor, "sparsity": 0.01, "prune_at": 0.75, "target_modules": ["q_proj", "v_proj"]},
            "notes": "penalties of the first two steps, loss of the first; the rest is drawn"})  # fmt: skip
        write_json(folder / "curve.json", record)
        return f"penalty {record[0]['penalty']:.5f}, then {record[1]['penalty']:.5f}"


def runs():
    """All of them."""
    yield Gates()
    qv = ("q_proj", "v_proj")
    names = list(qv)
    yield Trained("llama-moslora", "llama", 3201, {"peft_type": "MOSLORA", "r": 3, "lora_alpha": 6, "target_modules": names}, qv,
                  low_rank(3, lora_AB__weight=(3, 3)),
                  lambda m: m.w + 2.0 * m.lora_B_weight @ m.lora_AB_weight @ m.lora_A_weight, hyper={"weight_decay": 0.1})
    yield Trained("llama-sora", "llama", 3202, {
        "peft_type": "SORA", "r": 4, "lora_alpha": 6, "sparse_lambda": 9.0, "target_modules": names}, qv, low_rank(4, lora_gate=(4,)),
        lambda m: m.w + 1.5 * (m.lora_B_weight * m.lora_gate) @ m.lora_A_weight, after_step=shrink(9.0), undecayed=("lora_gate",),
        hyper={"weight_decay": 0.1, "schedule": "linear", "max_grad_norm": 0.5}, steps=6,
        notes="after each step every gate moves towards zero by that step's rate times sparse_lambda")
    yield Trained("gpt2-krona", "gpt2", 3203, {"peft_type": "KRONA", "a1": 3, "a2": 2, "scale": 0.5, "target_modules": ["c_attn"]},
                  ("c_attn",), lambda layer, draw: {
                      "krona_A": draw(3, 2), "krona_B": draw(layer.w.shape[0] // 3, layer.w.shape[1] // 2)},
                  lambda m: m.w + 0.5 * torch.kron(m.krona_A, m.krona_B))
    yield Trained("llama-pafi", "llama", 3204, {"peft_type": "PAFI", "keep_ratio": 0.0625, "target_modules": names}, qv,
                  before=smallest(288), hyper={"weight_decay": 0.1, "max_grad_norm": 1.0}, **DELTA)
    yield Trained("llama-fish-mask", "llama", 3205, {
        "peft_type": "FISH_MASK", "keep_ratio": 0.03125, "num_samples": 15, "target_modules": names}, qv,
        before=fisher(144, 15), hyper={"weight_decay": 0.05}, **DELTA,
        notes="rows have the same number of labels, so that the sum and the mean of log p choose the same mask")
    yield Trained("llama-child-tuning-d", "llama", 3206, {
        "peft_type": "CHILD_TUNING", "mode": "D", "reserve_p": 0.25, "fisher_batch": 3, "max_grad_norm": 0.05,
        "target_modules": names}, qv, before=in_batches(1152, 3, 0.05), **DELTA)
    yield Trained("llama-lt-sft", "llama", 3207, {
        "peft_type": "LT_SFT", "keep_ratio": 0.0625, "dense_share": 0.5, "target_modules": names}, qv, before=all_learn,
        after_step=ticket(288, 3), steps=6, hyper={"weight_decay": 0.1, "max_grad_norm": 1.0}, **DELTA)
    for start in (0, 2):
        yield Trained(f"llama-delta-lora-{start}", "llama", 3208 + start, {
            "peft_type": "DELTA_LORA", "r": 3, "lora_alpha": 6, "update_ratio": 0.5, "start_steps": start, "target_modules": names}, qv,
            low_rank(3), lambda m: m.w + 2.0 * m.lora_B_weight @ m.lora_A_weight, before=remember,
            after_step=follow(0.5, 2.0, start), saved=with_start, steps=4, notes="the weight itself moves here, step by step")
    yield Trained("llama-longlora", "llama", 3221, {"peft_type": "LONGLORA", "r": 3, "lora_alpha": 6}, (
        "q_proj", "k_proj", "v_proj", "o_proj"), low_rank(3), lambda m: m.w + 2.0 * m.lora_B_weight @ m.lora_A_weight,
        extra=long_context, width=16, whole_rows=True, steps=3, hyper={"learning_rate": 3e-3},
        notes="groups of four tokens, moved by two for the second half of the heads; two half-groups at the ends")
    yield Trained("llama-lora-drop", "llama", 3222, {
        "peft_type": "LORA_DROP", "r": 3, "lora_alpha": 6, "threshold": 0.9, "sample_steps": 3, "target_modules": names}, qv,
        uneven, watched, after_step=drop(0.9, 3), steps=4, saved=own_or_shared, drawn=("base_model.shared.",),
        notes="the shared pair starts anew, with B at zero")
