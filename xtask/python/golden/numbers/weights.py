"""Methods whose whole effect is another weight."""

import numpy as np

from .base import Number

QV = ("q_proj", "v_proj")


def pairs(at, names, rank, layers=None):
    """LoRA's A and B at each module: path, A, B."""
    for path, _ in at.linears(*names, layers=layers):
        out, inside = at.weight(path).shape
        a = at.save(f"{path}.lora_A.weight", at.draw(rank, inside, std=0.4))
        b = at.save(f"{path}.lora_B.weight", at.draw(out, rank, std=0.4))
        yield path, a, b


def mixed(names, rank, scale, layers=None):
    """MoSLoRA: W + s B M A (arXiv 2406.11909, eq. 6)."""

    def build(at):
        for path, a, b in pairs(at, names, rank, layers):
            m = at.save(f"{path}.lora_AB.weight", at.draw(rank, rank, std=0.7))
            at.set_weight(path, at.weight(path) + scale * b @ m @ a)

    return build


def served(names, rank, serve, alpha):
    """DyLoRA at rank b: W + alpha / b B[:, :b] A[:b]."""

    def build(at):
        for path, a, b in pairs(at, names, rank):
            at.set_weight(path, at.weight(path) + alpha / serve * b[:, :serve] @ a[:serve])

    return build


def gated(names, rank, scale):
    """SoRA: W + s B diag(g) A, some gates exactly zero."""

    def build(at):
        for path, a, b in pairs(at, names, rank):
            g = at.draw(rank, std=1.0)
            g[at.gen.integers(rank)] = 0.0
            at.save(f"{path}.lora_gate", g)
            at.set_weight(path, at.weight(path) + scale * b @ np.diag(g) @ a)

    return build


def kronecker(names, splits, scale):
    """KronA: W + s A (x) B; `splits` gives A's sizes by the last part of the path."""

    def build(at):
        for path, _ in at.linears(*names):
            out, inside = at.weight(path).shape
            a1, a2 = splits[path.rsplit(".", 1)[-1]]
            a = at.save(f"{path}.krona_A", at.draw(a1, a2))
            b = at.save(f"{path}.krona_B", at.draw(out // a1, inside // a2))
            # Entry by entry, not by a library's product.
            delta = np.zeros((out, inside))
            for i in range(out):
                for j in range(inside):
                    delta[i, j] = a[i // b.shape[0], j // b.shape[1]] * b[i % b.shape[0], j % b.shape[1]]
            at.set_weight(path, at.weight(path) + scale * delta)

    return build


def moved(names, rank, scale, ratio):
    """Delta-LoRA: W + ratio s (B A - B_K A_K), and s B A beside it."""

    def build(at):
        for path, a, b in pairs(at, names, rank):
            a0 = at.save(f"{path}.lora_A_start.weight", at.draw(*a.shape, std=0.4))
            b0 = at.save(f"{path}.lora_B_start.weight", at.draw(*b.shape, std=0.4))
            at.set_weight(path, at.weight(path) + ratio * scale * (b @ a - b0 @ a0) + scale * b @ a)

    return build


def differences(names, count):
    """A sparse difference: values at rows and columns of `[out, in]`."""

    def build(at):
        for path, _ in at.linears(*names):
            w = at.weight(path).copy()
            places = np.sort(at.gen.choice(w.size, count, replace=False))
            rows, cols = places // w.shape[1], places % w.shape[1]
            values = at.save(f"{path}.sparse_values", at.draw(count, std=1.0))
            at.save(f"{path}.sparse_indices", np.stack([rows, cols]))
            for row, col, value in zip(rows, cols, values):
                w[row, col] += value
            at.set_weight(path, w)

    return build


def shared(names, rank, scale, groups):
    """LoRA-drop: the modules of `groups[type]` run one pair, the others their own."""

    def build(at):
        pairs, listed = {}, []
        for path, _ in at.linears(*names):
            w, kind = at.weight(path), path.split(".", 3)[3]
            layer = path.split(".")[2]
            mine = layer not in groups.get(kind, ())
            where = (path, "base_model.model.") if mine else (f"shared.{kind}", "base_model.")
            if where not in pairs:
                a, b = at.draw(rank, w.shape[1], std=0.4), at.draw(w.shape[0], rank, std=0.4)
                pairs[where] = at.save(f"{where[0]}.lora_A.weight", a, where[1]), at.save(f"{where[0]}.lora_B.weight", b, where[1])
            if not mine:
                listed.append(path)
            a, b = pairs[where]
            at.set_weight(path, w + scale * b @ a)
        return {"shared_modules": sorted(listed)}

    return build


def longer(rank, scale, factor):
    """LongLoRA: LoRA on attention, norms and embedding of its own, positions divided by `factor`."""

    def build(at):
        for path, a, b in pairs(at, ("q_proj", "k_proj", "v_proj", "o_proj"), rank):
            at.set_weight(path, at.weight(path) + scale * b @ a)
        for path, module in list(at.model.named_modules()):
            if path.endswith("norm") or path.endswith("embed_tokens"):
                at.set_weight(path, at.save(f"{path}.weight", at.weight(path) + at.draw(*at.weight(path).shape, std=0.1)).astype(
                    np.float32).astype(np.float64))
        at.model.model.rotary_emb.inv_freq /= factor

    return build


def numbers():
    """All of them."""
    mos = lambda **k: {"peft_type": "MOSLORA", **k}  # noqa: E731
    yield Number("llama-moslora", "llama", 3101, mos(r=3, lora_alpha=6, target_modules=list(QV)), mixed(QV, 3, 2.0))
    yield Number("gpt2-moslora", "gpt2", 3102, mos(r=5, lora_alpha=4, target_modules=["c_attn"], use_rslora=True),
                 mixed(("c_attn",), 5, 4 / 5**0.5), notes="rsLoRA's scale")
    yield Number("bert-cls-moslora", "bert-cls", 3103, mos(r=2, lora_alpha=3, target_modules=["query"], task_type=None),
                 mixed(("query",), 2, 1.5))
    dy = lambda **k: {"peft_type": "DYLORA", **k}  # noqa: E731
    yield Number("llama-dylora", "llama", 3111, dy(r=5, lora_alpha=3, target_modules=list(QV)), served(QV, 5, 5, 3))
    yield Number("bert-dylora-served", "bert", 3112, dy(r=6, lora_alpha=5, rank_to_serve=2, target_modules=["key"]),
                 served(("key",), 6, 2, 5))
    yield Number("gpt2-dylora-served", "gpt2", 3113, dy(r=4, lora_alpha=2, rank_to_serve=3, target_modules=["c_fc"]),
                 served(("c_fc",), 4, 3, 2))
    so = lambda **k: {"peft_type": "SORA", **k}  # noqa: E731
    yield Number("llama-sora", "llama", 3121, so(r=4, lora_alpha=6, target_modules=list(QV)), gated(QV, 4, 1.5))
    yield Number("bert-sora", "bert", 3122, so(r=3, lora_alpha=5, target_modules=["value"]), gated(("value",), 3, 5 / 3))
    kr = lambda **k: {"peft_type": "KRONA", **k}  # noqa: E731
    yield Number("llama-krona", "llama", 3131, kr(a1=4, a2=8, scale=1.7, target_modules=["q_proj", "o_proj"]), kronecker(
        ("q_proj", "o_proj"), {"q_proj": (4, 8), "o_proj": (4, 8)}, 1.7))
    yield Number("bert-cls-krona", "bert-cls", 3132, kr(a1=9, a2=6, target_modules=["intermediate.dense"], task_type=None),
                 kronecker(("intermediate.dense",), {"dense": (9, 6)}, 1.0))
    yield Number("gpt2-krona", "gpt2", 3133, kr(a1=3, a2=2, scale=0.5, target_modules=["c_attn"]), kronecker(
        ("c_attn",), {"c_attn": (3, 2)}, 0.5))
    de = lambda **k: {"peft_type": "DELTA_LORA", **k}  # noqa: E731
    yield Number("llama-delta-lora", "llama", 3141, de(r=3, lora_alpha=2, update_ratio=1.5, target_modules=list(QV)),
                 moved(QV, 3, 2 / 3, 1.5))
    yield Number("gpt2-delta-lora", "gpt2", 3142, de(r=2, lora_alpha=1, target_modules=["c_attn"]), moved(("c_attn",), 2, 0.5, 2.0))
    for kind, model, seed, names, count in [
        ("DIFF_PRUNING", "llama", 3151, QV, 37), ("FISH_MASK", "gpt2", 3152, ("c_attn", "c_fc"), 50),
        ("LT_SFT", "bert-cls", 3153, ("query", "intermediate.dense"), 70), ("PAFI", "qwen2", 3154, ("k_proj", "down_proj"), 21),
        ("CHILD_TUNING", "bert", 3155, ("value",), 90),
    ]:
        name = f"{model}-{kind.lower().replace('_', '-')}"
        yield Number(name, model, seed, {"peft_type": kind, "target_modules": list(names)}, differences(names, count),
                     notes="GPT-2's layers are stored transposed: rows are outputs all the same")
    yield Number("llama-lora-drop", "llama", 3161, {"peft_type": "LORA_DROP", "r": 3, "lora_alpha": 6, "target_modules": list(QV)},
                 shared(QV, 3, 2.0, {"self_attn.q_proj": "02", "self_attn.v_proj": "01"}))
    lo = lambda **k: {"peft_type": "LONGLORA", "r": 3, "lora_alpha": 4, **k}  # noqa: E731
    yield Number("llama-longlora", "llama", 3171, lo(), longer(3, 4 / 3, 1.0))
    yield Number("llama-longlora-context", "llama", 3172, lo(context_length=160), longer(3, 4 / 3, 2.5), merge=None,
                 notes="64 positions stretched to 160")
