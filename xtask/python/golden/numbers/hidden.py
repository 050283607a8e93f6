"""Methods that act on hidden states: bottlenecks, products of Kronecker factors, low-rank edits, couplings, scalings."""

import math

import numpy as np
import torch

from .base import Number


def t(value):
    """An f64 tensor."""
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))


def first(output):
    """The hidden states of a module's output, and how to put others in their place."""
    if isinstance(output, tuple):
        return output[0], lambda y: (y, *output[1:])
    return output, lambda y: y


def blocks(at):
    """Path, module and hidden width of each layer."""
    layers = [(n, m) for n, m in at.model.named_modules() if type(m).__name__ in ("LlamaDecoderLayer", "BertLayer")]
    return [(name, module, at.model.config.hidden_size) for name, module in layers]


def meet(at, place, change):
    """Replaces what happens where a sublayer's output h meets its residual x by `change(path, h, x, norm)`."""
    for name, layer, _ in blocks(at):
        if type(layer).__name__ == "BertLayer":
            module = layer.attention.output if place == "attention" else layer.output
            path = f"{name}.attention.output" if place == "attention" else f"{name}.output"
            rule = change(path)
            module.forward = lambda hidden, x, m=module, f=rule: f(m.dense(hidden), x, m.LayerNorm)
            continue
        rule = change(f"{name}.{place}_adapters")
        kept = {}
        source = layer if place == "attention" else layer.post_attention_layernorm

        def keep(module, args, kwargs, kept=kept):
            kept["x"] = args[0] if args else kwargs["hidden_states"]

        def replace(module, args, output, kept=kept, f=rule):
            h, put = first(output)
            return put(f(h, kept["x"], lambda y: y) - kept["x"])

        source.register_forward_pre_hook(keep, with_kwargs=True)
        (layer.self_attn if place == "attention" else layer.mlp).register_forward_hook(replace)


def swish(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def relu(x):
    return torch.clamp(x, min=0)


def dense(at, key, k, d):
    """A bottleneck's two linear layers."""
    down, up = at.save(f"{key}adapter_down.0.weight", at.draw(k, d)), at.save(f"{key}adapter_up.weight", at.draw(d, k))
    b, c = at.save(f"{key}adapter_down.0.bias", at.draw(k)), at.save(f"{key}adapter_up.bias", at.draw(d))
    return lambda z, f: f(z @ t(down).T + t(b)) @ t(up).T + t(c)


def bottleneck(places, width, activation, kind, scale=1.0, learned=False):
    """`kind`: "serial" reads h, "normed" LN(h + x), "parallel" x; then y = LN(s (U f(D z)) + h + x)."""

    def build(at):
        d = at.model.config.hidden_size

        def change(path):
            net = dense(at, f"{path}.adapters.", width, d)
            s = at.save(f"{path}.adapters.scaling", at.draw(1, std=0.2, mean=1.5))[0] if learned else scale

            def run(h, x, norm):
                z = {"serial": lambda: h, "normed": lambda: norm(h + x), "parallel": lambda: x}[kind]()
                return norm(s * net(z, activation) + h + x)

            return run

        for place in places:
            meet(at, place, change)

    return build


def hypercomplex(n, rank, width):
    """Compacter++: behind the feed-forward alone; z H + b with H the sum of A_i (x) (L_i R_i), A shared by all."""

    def build(at):
        d = at.model.config.hidden_size
        rule = at.save("shared_parameters.phm_rule", at.draw(n, n, n, std=0.6), "base_model.")

        def product(key, inside, out):
            left = at.save(f"{key}.W_left", at.draw(n, inside // n, rank, std=0.6))
            right = at.save(f"{key}.W_right", at.draw(n, rank, out // n, std=0.6))
            b = at.save(f"{key}.b", at.draw(out))
            h = np.zeros((inside, out))
            for i in range(n):
                small = left[i] @ right[i]
                for p in range(n):
                    for q in range(n):
                        rows, cols = slice(p * inside // n, (p + 1) * inside // n), slice(q * out // n, (q + 1) * out // n)
                        h[rows, cols] += rule[i, p, q] * small
            return lambda z: z @ t(h) + t(b)

        def change(path):
            down = product(f"{path}.adapters.adapter_down.0", d, width)
            up = product(f"{path}.adapters.adapter_up", width, d)
            return lambda h, x, norm: norm(up(gelu(down(norm(h + x)))) + h + x)

        meet(at, "output", change)

    return build


def edits(rank, prefix, suffix, lengths, seq):
    """LoReFT behind each layer: x + (W x + b - R x) R at the first and last real tokens, R's rows orthonormal."""

    def build(at):
        for name, layer, d in blocks(at):
            units = []
            for unit in range(2):
                key = f"{name}.refts.units.{unit}"
                w, b = at.save(f"{key}.learned_source.weight", at.draw(rank, d)), at.save(
                    f"{key}.learned_source.bias", at.draw(rank))
                # Householder's way to orthonormal rows, rounded to what the file holds.
                q, _ = np.linalg.qr(at.draw(d, rank, std=1.0))
                r = at.save(f"{key}.projection.weight", np.ascontiguousarray(q.T).astype(np.float32).astype(np.float64))
                units.append((t(w), t(b), t(r)))

            def hook(module, args, output, units=units):
                x, put = first(output)
                y = x.clone()
                for row, length in enumerate(lengths):
                    for unit, places in ((0, range(prefix)), (1, range(length - suffix, length))):
                        w, b, r = units[unit]
                        for p in places:
                            v = x[row, p]
                            y[row, p] = v + (w @ v + b - r @ v) @ r
                return put(y)

            layer.register_forward_hook(hook)

    return build


def coupling(factor):
    """NICE behind the embeddings, and its inverse in front of the language-model head."""

    def build(at):
        d = at.model.config.hidden_size // 2
        prefix = "model." if hasattr(at.model, "lm_head") else ""
        nets = []
        for name in "FG":
            key = f"{prefix}invertible_adapters.{name}"
            w0, b0 = at.save(f"{key}.0.weight", at.draw(d // factor, d)), at.save(f"{key}.0.bias", at.draw(d // factor))
            w2, b2 = at.save(f"{key}.2.weight", at.draw(d, d // factor)), at.save(f"{key}.2.bias", at.draw(d))
            nets.append(lambda x, w0=w0, b0=b0, w2=w2, b2=b2: relu(x @ t(w0).T + t(b0)) @ t(w2).T + t(b2))
        f, g = nets

        def forth(module, args, output):
            x, put = first(output)
            x1, x2 = x[..., :d], x[..., d:]
            y1 = x1 + f(x2)
            return put(torch.cat([y1, x2 + g(y1)], -1))

        def back(module, args):
            y1, y2 = args[0][..., :d], args[0][..., d:]
            x2 = y2 - g(y1)
            return (torch.cat([y1 - f(x2), x2], -1),)

        if prefix:
            at.model.model.embed_tokens.register_forward_hook(forth)
            at.model.lm_head.register_forward_pre_hook(back)
        else:
            at.model.embeddings.register_forward_hook(forth)

    return build


def scaled(names, shifted):
    """SSF: g * y + b behind linear layers and norms, b where the layer has a bias; folded into weight and bias."""

    def build(at):
        for path, module in list(at.model.named_modules()):
            if not any(path == n or path.endswith("." + n) for n in names):
                continue
            weight, bias = at.weight(path), at.bias(path)
            one = 1.0 if type(module).__name__ == "GemmaRMSNorm" else 0.0
            g = at.save(f"{path}.ssf_scale", at.draw(weight.shape[0], std=0.2, mean=1.0))
            by = g[:, None] if weight.ndim == 2 else g
            at.set_weight(path, by * (weight + one) - one)
            if bias is not None and shifted:
                b = at.save(f"{path}.ssf_shift", at.draw(weight.shape[0], std=0.2))
                at.set_bias(path, g * bias + b)

    return build


def numbers():
    """All of them."""
    no = dict(merge=False)
    both, last = ("attention", "output"), ("output",)
    yield Number("bert-cls-houlsby", "bert-cls", 3301, {"peft_type": "HOULSBY", "reduction_factor": 4, "non_linearity": "swish"},
                 bottleneck(both, 6, swish, "serial"), **no)
    yield Number("llama-houlsby", "llama", 3302, {"peft_type": "HOULSBY", "reduction_factor": 8, "non_linearity": "swish"},
                 bottleneck(both, 4, swish, "serial"), **no)
    yield Number("bert-pfeiffer", "bert", 3303, {"peft_type": "PFEIFFER", "reduction_factor": 4, "non_linearity": "relu"},
                 bottleneck(last, 5, relu, "normed"), **no)
    yield Number("llama-pfeiffer", "llama", 3304, {"peft_type": "PFEIFFER", "reduction_factor": 10, "non_linearity": "relu"},
                 bottleneck(last, 3, relu, "normed"), **no, notes="without a norm to read behind, it reads h + x")
    yield Number("bert-cls-parallel", "bert-cls", 3305, {
        "peft_type": "PARALLEL_ADAPTER", "reduction_factor": 2, "scaling": 4.0, "non_linearity": "relu"},
        bottleneck(last, 12, relu, "parallel", 4.0), **no)
    yield Number("llama-scaled-parallel", "llama", 3306, {
        "peft_type": "SCALED_PARALLEL_ADAPTER", "reduction_factor": 4, "scaling": "learned", "non_linearity": "relu"},
        bottleneck(last, 8, relu, "parallel", learned=True), **no)
    yield Number("bert-cls-compacter-plus", "bert-cls", 3307, {
        "peft_type": "COMPACTER_PLUS", "reduction_factor": 2, "phm_dim": 4, "phm_rank": 2, "non_linearity": "gelu"},
        hypercomplex(4, 2, 12), **no)
    yield Number("llama-compacter-plus", "llama", 3308, {
        "peft_type": "COMPACTER_PLUS", "reduction_factor": 4, "phm_dim": 2, "phm_rank": 1, "non_linearity": "gelu"},
        hypercomplex(2, 1, 8), **no)
    yield Number("llama-loreft", "llama", 3311, {"peft_type": "LOREFT", "r": 3, "prefix_positions": 2, "suffix_positions": 1},
                 edits(3, 2, 1, (5, 3), 5), **no)
    yield Number("bert-loreft", "bert", 3312, {"peft_type": "LOREFT", "r": 2, "prefix_positions": 1, "suffix_positions": 2},
                 edits(2, 1, 2, (5, 3), 5), **no)
    yield Number("llama-nice", "llama", 3313, {"peft_type": "NICE", "inv_adapter_reduction_factor": 2.0}, coupling(2), **no)
    yield Number("bert-nice", "bert", 3314, {"peft_type": "NICE", "inv_adapter_reduction_factor": 5.0}, coupling(5), **no)
    ssf = lambda names: {"peft_type": "SSF", "target_modules": list(names)}  # noqa: E731
    for model, seed, names in [
        ("llama", 3321, ("q_proj", "down_proj", "input_layernorm", "norm")),
        ("gemma", 3322, ("v_proj", "post_attention_layernorm", "norm")),
        ("gpt2", 3323, ("c_attn", "mlp.c_proj", "ln_1", "ln_f")),
        ("bert-cls", 3324, ("query", "output.dense", "LayerNorm")),
    ]:
        yield Number(f"{model}-ssf", model, seed, ssf(names), scaled(names, True))
