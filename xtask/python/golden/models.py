"""Tiny base models: every weight random, every bias and norm moved off its initial value."""

import json

import torch
import transformers as tf

from .common import batch_of, fresh_dir, load_base, output_name, run, save_tensors, seed_all, write_json

LLAMA = dict(
    vocab_size=67, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROPE = dict(LLAMA, num_hidden_layers=2, vocab_size=65, hidden_size=24, num_attention_heads=3, num_key_value_heads=1)


def rope(rope_type, theta, **more):
    """transformers v5's `rope_parameters`."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **more}}


# name: (seed, class, config). `legacy` in a config asks for the config.json that transformers v4 wrote.
MODELS = {
    "llama": (11, tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, **rope("default", 10000.0))),
    "llama-tied": (12, tf.LlamaForCausalLM, tf.LlamaConfig(
        **dict(LLAMA, vocab_size=71, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
               num_key_value_heads=1, tie_word_embeddings=True), **rope("default", 5000.0))),
    "llama-rope-llama3": (13, tf.LlamaForCausalLM, tf.LlamaConfig(**ROPE, **rope(
        "llama3", 100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "llama-rope-linear": (14, tf.LlamaForCausalLM, tf.LlamaConfig(
        **ROPE, attention_bias=True, mlp_bias=True, **rope("linear", 10000.0, factor=2.5))),
    "llama-rope-dynamic": (15, tf.LlamaForCausalLM, tf.LlamaConfig(
        **dict(ROPE, max_position_embeddings=8), **rope("dynamic", 10000.0, factor=2.0))),
    "llama-rope-yarn": (16, tf.LlamaForCausalLM, tf.LlamaConfig(
        **ROPE, **rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=16))),
    "mistral": (21, tf.MistralForCausalLM, tf.MistralConfig(
        **dict(LLAMA, vocab_size=73, num_hidden_layers=2), sliding_window=4, head_dim=10, **rope("default", 10000.0))),
    "qwen2": (22, tf.Qwen2ForCausalLM, tf.Qwen2Config(
        **dict(LLAMA, vocab_size=79, hidden_size=24, num_attention_heads=6, num_key_value_heads=2), **rope("default", 1e6))),
    "qwen3": (23, tf.Qwen3ForCausalLM, tf.Qwen3Config(
        **dict(LLAMA, vocab_size=83, hidden_size=24, num_hidden_layers=2), head_dim=10, **rope("default", 1e6))),
    "gemma": (24, tf.GemmaForCausalLM, tf.GemmaConfig(
        **dict(LLAMA, vocab_size=89, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
               tie_word_embeddings=True), head_dim=10, hidden_activation="gelu_pytorch_tanh", pad_token_id=0,
        **rope("default", 10000.0))),
    "gemma2": (25, tf.Gemma2ForCausalLM, tf.Gemma2Config(
        **dict(LLAMA, vocab_size=77, hidden_size=24, num_hidden_layers=2, tie_word_embeddings=True), head_dim=8,
        query_pre_attn_scalar=10, attn_logit_softcapping=5.0, final_logit_softcapping=6.0, sliding_window=4,
        hidden_activation="gelu_pytorch_tanh", pad_token_id=0, **rope("default", 10000.0))),
    "phi3": (26, tf.Phi3ForCausalLM, tf.Phi3Config(
        **dict(LLAMA, vocab_size=69, hidden_size=24, num_hidden_layers=2), pad_token_id=0, sliding_window=5,
        **rope("default", 10000.0))),
    "gpt2": (31, tf.GPT2LMHeadModel, tf.GPT2Config(
        vocab_size=61, n_embd=24, n_head=3, n_layer=3, n_positions=40, bos_token_id=1, eos_token_id=2)),
    "bert-cls": (41, tf.BertForSequenceClassification, tf.BertConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36,
        max_position_embeddings=32, num_labels=3)),
    "bert": (42, tf.BertModel, tf.BertConfig(
        vocab_size=93, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=44,
        max_position_embeddings=24, type_vocab_size=3)),
}  # fmt: skip

# Whose config.json is rewritten to the fields of transformers v4, which most published checkpoints have.
LEGACY = {"llama", "llama-rope-llama3", "llama-rope-dynamic", "qwen2", "gemma"}
LENGTHS = {"llama-rope-dynamic": (13, 10), "mistral": (11, 7), "gemma2": (12, 8), "phi3": (12, 9)}


def randomise(model):
    """Draws every parameter: matrices at a scale that keeps activations near one, norms about their centre."""
    one_centred = not type(model).__name__.startswith("Gemma")
    for name, p in model.named_parameters():
        with torch.no_grad():
            if p.dim() == 2:
                embedding = any(s in name for s in ("embed", "wte", "wpe"))
                p.normal_(0.0, 0.7 if embedding else 1.2 / p.shape[1] ** 0.5)
            elif "norm" in name.lower() or ".ln_" in name:
                p.normal_(0.0, 0.3)
                if name.endswith("weight") and one_centred:
                    p.add_(1.0)
            else:
                p.normal_(0.0, 0.3)


def to_legacy(path):
    """Moves `rope_parameters` to `rope_theta` and `rope_scaling`, and `dtype` to `torch_dtype`."""
    config = json.loads(path.read_text())
    rope_parameters = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope_parameters.pop("rope_theta")
    scaled = rope_parameters.get("rope_type") != "default"
    config["rope_scaling"] = rope_parameters if scaled else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def batches(name, config, seed):
    """The inputs a model's own goldens run on: unpadded, padded right, and for decoders padded left."""
    long, short = LENGTHS.get(name, (9, 6))
    left = {} if name.startswith("bert") else {
        # transformers counts positions from the first column, padding or not: it shows where positions are learned.
        "left": batch_of(seed + 700, config.vocab_size, (short, long - 1), "left"),
    }  # fmt: skip
    return {
        **left,
        "plain": batch_of(seed + 500, config.vocab_size, (long, long)),
        "right": batch_of(seed + 600, config.vocab_size, (long, short), "right"),
    }


def make(name):
    """Writes `models/<name>`: the checkpoint, `inputs.json` and `expected.safetensors` (`<input>.<output>`)."""
    seed, cls, config = MODELS[name]
    seed_all(seed)
    folder = fresh_dir(f"models/{name}")
    model = cls(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    before = run(model, batches(name, config, seed)["plain"])
    if name in LEGACY:
        to_legacy(folder / "config.json")
    model = load_base(str(folder))
    inputs = batches(name, config, seed)
    outputs = {f"{key}.{output_name(model)}": run(model, batch) for key, batch in inputs.items()}
    gap = (outputs[f"plain.{output_name(model)}"] - before).abs().max().item()
    assert gap < 1e-5, f"{name} changed by {gap} when reloaded"
    write_json(folder / "inputs.json", inputs)
    save_tensors(folder / "expected.safetensors", outputs)
    return max(v.abs().max().item() for v in outputs.values())
