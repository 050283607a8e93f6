"""What a fresh adapter holds: all keys and shapes, and the values that no random seed of the run decides.

Two adapters are made under different seeds; what they agree on (projections from a seed in the configuration, rows of
the embedding, norms of the base's weights, zeros and ones) every implementation has to arrive at.
"""

import json

import torch
from peft import (
    AdaptionPromptConfig,
    AdaLoraConfig,
    BOFTConfig,
    CPTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import save_file

from .common import fresh_dir, load_base, seed_all, write_json
from .reparam_cases import CLS, FEATURES, LM, QV

GPT2 = dict(target_modules=["c_attn"], fan_in_fan_out=True)


def starts():
    """Name, model, configuration class, task and fields."""
    yield "llama-lora", "llama", LoraConfig, LM, dict(r=3, target_modules=QV, modules_to_save=["norm"])
    yield "llama-olora", "llama", LoraConfig, LM, dict(r=3, target_modules=["q_proj"], init_lora_weights="olora")
    yield "llama-dora", "llama", LoraConfig, LM, dict(r=3, use_dora=True, target_modules=QV)
    yield "gpt2-dora", "gpt2", LoraConfig, LM, dict(r=3, use_dora=True, target_modules=["c_attn", "wpe"], fan_in_fan_out=True)
    yield "bert-cls-adalora", "bert-cls", AdaLoraConfig, CLS, dict(init_r=4, target_r=2, total_step=9, target_modules=["query"])
    yield "llama-vera", "llama", VeraConfig, LM, dict(r=5, target_modules=QV + ["down_proj"])
    yield "gpt2-vera", "gpt2", VeraConfig, LM, dict(r=3, projection_prng_key=2**40 + 9, d_initial=0.3, **GPT2)
    yield "bert-vera", "bert", VeraConfig, FEATURES, dict(r=17, projection_prng_key=12, target_modules="all-linear")
    yield "llama-loha", "llama", LoHaConfig, LM, dict(r=3, target_modules=QV)
    yield "llama-lokr", "llama", LoKrConfig, LM, dict(r=2, target_modules=["q_proj", "down_proj"])
    yield "bert-lokr-both", "bert", LoKrConfig, FEATURES, dict(
        r=1, decompose_both=True, decompose_factor=4, init_weights="lycoris", target_modules=["key", "output.dense"])
    yield "llama-oft", "llama", OFTConfig, LM, dict(oft_block_size=8, target_modules=QV)
    yield "bert-cls-oft-shared", "bert-cls", OFTConfig, CLS, dict(r=6, oft_block_size=0, block_share=True, target_modules=["value"])
    yield "llama-boft", "llama", BOFTConfig, LM, dict(boft_block_size=8, target_modules=["o_proj"])
    yield "llama-hra", "llama", HRAConfig, LM, dict(r=4, target_modules=["q_proj"])
    yield "llama-fourier", "llama", FourierFTConfig, LM, dict(n_frequency=9, init_weights=True, target_modules=QV)
    for model, task in [("llama", LM), ("gpt2", LM), ("bert-cls", CLS), ("gemma", LM), ("qwen2", LM), ("mistral", LM)]:
        # Its default targets, and which of them scale their input.
        yield f"{model}-ia3", model, IA3Config, task, {}
    yield "llama-shira", "llama", ShiraConfig, LM, dict(r=1, random_seed=77, target_modules=QV)
    yield "bert-cls-shira", "bert-cls", ShiraConfig, CLS, dict(r=2, random_seed=2**34 + 5, target_modules=["output.dense"])
    yield "llama-tokens", "llama", TrainableTokensConfig, LM, dict(token_indices=[3, 1, 60])
    yield "llama-tied-tokens", "llama-tied", TrainableTokensConfig, LM, dict(token_indices=[7, 2])
    yield "bert-cls-ln", "bert-cls", LNTuningConfig, CLS, dict(target_modules=["LayerNorm"])
    yield "llama-ptuning", "llama", PromptEncoderConfig, LM, dict(num_virtual_tokens=3, encoder_hidden_size=7)
    yield "bert-cls-prefix", "bert-cls", PrefixTuningConfig, CLS, dict(num_virtual_tokens=2)
    yield "llama-prompt-text", "llama", PromptTuningConfig, LM, dict(
        num_virtual_tokens=7, prompt_tuning_init="TEXT", prompt_tuning_init_text="say what it is", tokenizer_name_or_path="tokenizers/words")
    yield "bert-cls-prompt-text-cut", "bert-cls", PromptTuningConfig, CLS, dict(
        num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="the film was good and not bad",
        tokenizer_name_or_path="tokenizers/words")
    yield "llama-mpt", "llama", MultitaskPromptTuningConfig, LM, dict(num_virtual_tokens=3, num_tasks=2, num_ranks=2)
    for init in ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]:
        tasks = 3 if init == "ONLY_SOURCE_SHARED" else 1
        yield f"llama-mpt-{init.split('_')[0].lower()}", "llama", MultitaskPromptTuningConfig, LM, dict(
            num_virtual_tokens=3, num_tasks=tasks, num_ranks=2, prompt_tuning_init=init, prompt_tuning_init_task=2,
            prompt_tuning_init_state_dict_path="cases/llama-mpt/adapter/adapter_model.safetensors")
    yield "llama-adaption", "llama", AdaptionPromptConfig, LM, dict(adapter_len=3, adapter_layers=2)
    yield "llama-cpt", "llama", CPTConfig, LM, dict(cpt_token_ids=[5, 9, 2], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 4])


def fresh(model, cls, task, fields, seed):
    """The state a fresh adapter would save."""
    seed_all(seed)
    made = get_peft_model(load_base(f"models/{model}"), cls(task_type=task, **fields))
    state = get_peft_model_state_dict(made, save_embedding_layers=False)
    return {k: v.detach().contiguous().clone() for k, v in state.items()}, made.peft_config["default"]


def make(name, model, cls, task, fields):
    """Writes `initial/<name>`: `case.json` (model, config, keys with shapes) and `same.safetensors`."""
    folder = fresh_dir(f"initial/{name}")
    one, config = fresh(model, cls, task, fields, 1)
    two, _ = fresh(model, cls, task, fields, 2)
    same = {k: v for k, v in one.items() if torch.equal(v, two[k])}
    save_file(same, str(folder / "same.safetensors"))
    write_json(folder / "case.json", {
        "model": model,
        "config": {"peft_type": config.peft_type.value, "task_type": task, **fields},
        "shapes": {k: list(v.shape) for k, v in sorted(one.items())},
        "paths": "relative to the goldens' folder",
    })  # fmt: skip
    json.dumps(fields)
    return f"{len(one)} tensors, {len(same)} the same under every seed"
