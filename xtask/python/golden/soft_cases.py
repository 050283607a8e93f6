"""Prefix tuning, prompt tuning and LN tuning: the methods beside LoRA that the foundation promises to match."""

from peft import LNTuningConfig, PrefixTuningConfig, PromptTuningConfig

from .cases import Case


def made(cls, task, **kwargs):
    """A maker of one config."""
    return lambda: cls(task_type=task, **kwargs)


def prefix(task="CAUSAL_LM", **kwargs):
    """A maker of prefix-tuning configs."""
    return made(PrefixTuningConfig, task, **kwargs)


def prompt(task="CAUSAL_LM", **kwargs):
    """A maker of prompt-tuning configs."""
    return made(PromptTuningConfig, task, **kwargs)


def cases():
    """All of them; the soft prompts are random, at a scale that moves the output."""
    loud = dict(merge="no", noise=0.5)
    yield Case("llama-prefix", "llama", 1101, prefix(num_virtual_tokens=3), pad="right", **loud)
    yield Case("llama-prefix-left", "llama", 1102, prefix(num_virtual_tokens=2), pad="left", **loud)
    yield Case("llama-prefix-projection", "llama", 1103, prefix(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=9), **loud,
        notes="the projection is folded into prompt_embeddings when saved")
    yield Case("gemma-prefix", "gemma", 1104, prefix(num_virtual_tokens=3), pad="right", **loud)
    for name, seed, tokens in [("mistral", 1108, 3), ("gemma2", 1109, 5)]:
        yield Case(f"{name}-prefix", name, seed, prefix(num_virtual_tokens=tokens), pad="right", lengths=(5, 3), **loud,
                   notes="the window slides over the prefix as over tokens")
    yield Case("gpt2-prefix", "gpt2", 1105, prefix(num_virtual_tokens=3), pad="right", **loud)
    yield Case("gpt2-prefix-projection", "gpt2", 1106, prefix(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7), **loud)
    yield Case("bert-cls-prefix", "bert-cls", 1107, prefix("SEQ_CLS", num_virtual_tokens=3), pad="right", **loud)

    yield Case("llama-prompt", "llama", 1201, prompt(num_virtual_tokens=3), pad="right", **loud,
               notes="the logits of the virtual tokens come first, as HF returns them")
    yield Case("llama-prompt-left", "llama", 1202, prompt(num_virtual_tokens=2), pad="left", **loud,
               notes="HF puts the virtual tokens before the padding")
    yield Case("gemma-prompt", "gemma", 1203, prompt(num_virtual_tokens=4), **loud)
    yield Case("gpt2-prompt", "gpt2", 1204, prompt(num_virtual_tokens=5), pad="right", **loud)
    yield Case("bert-cls-prompt", "bert-cls", 1205, prompt("SEQ_CLS", num_virtual_tokens=3), pad="right", **loud)
    yield Case("bert-prompt", "bert", 1206, prompt("FEATURE_EXTRACTION", num_virtual_tokens=3), pad="right", **loud)

    yield Case("llama-ln", "llama", 1301, made(LNTuningConfig, "CAUSAL_LM"), pad="right")
    yield Case("gpt2-ln", "gpt2", 1302, made(LNTuningConfig, "CAUSAL_LM"), pad="right")
    yield Case("gemma-ln", "gemma", 1303, made(LNTuningConfig, "CAUSAL_LM", target_modules=["input_layernorm"], exclude_modules=r".*\.0\..*"))
    yield Case("qwen2-ln", "qwen2", 1304, made(LNTuningConfig, "CAUSAL_LM", modules_to_save=["lm_head"]))
    yield Case("bert-cls-ln", "bert-cls", 1305, made(LNTuningConfig, "SEQ_CLS", target_modules=["LayerNorm"]), pad="right")
