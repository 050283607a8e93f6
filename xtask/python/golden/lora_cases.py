"""LoRA cases: every switch on at least two models where it applies."""

from peft import LoraConfig

from .cases import Case

QV = ["q_proj", "v_proj"]


def lora(task="CAUSAL_LM", **kwargs):
    """A maker of LoRA configs for one task."""
    return lambda: LoraConfig(task_type=task, **kwargs)


def plain():
    """Targets and scalings."""
    yield Case("llama-qv", "llama", 101, lora(r=3, lora_alpha=6, target_modules=QV), pad="right")
    yield Case("llama-qv-left", "llama", 102, lora(r=5, lora_alpha=4, target_modules=QV), pad="left")
    yield Case("llama-default-targets", "llama", 103, lora(r=2, lora_alpha=3))
    yield Case("llama-all-linear", "llama", 104, lora(r=2, lora_alpha=5, target_modules="all-linear"), pad="right",
               notes="21 targets: HF writes the shortest suffixes that single them out")
    yield Case("llama-regex", "llama", 105, lora(
        r=3, lora_alpha=6, target_modules=r".*\.layers\.[02]\.(self_attn\.(k|o)_proj|mlp\.gate_proj)"))
    yield Case("llama-rslora", "llama", 106, lora(
        r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"]), pad="right")
    yield Case("llama-rslora-patterns", "llama", 107, lora(
        r=3, lora_alpha=2, use_rslora=True, target_modules=QV, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 4}))
    yield Case("llama-patterns", "llama", 108, lora(
        r=3, lora_alpha=4, target_modules=QV + ["up_proj"],
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5, r"^model\.layers\.0\..*v_proj": 1},
        alpha_pattern={"layers.2.self_attn.q_proj": 9, "mlp.up_proj": 1, "up_proj": 100}),
        notes="the first pattern that matches wins: up_proj's 100 is never used")
    yield Case("llama-layers", "llama", 109, lora(
        r=3, lora_alpha=6, target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers"))
    yield Case("llama-layers-int", "llama", 110, lora(r=3, lora_alpha=6, target_modules=QV, layers_to_transform=1))
    yield Case("llama-exclude", "llama", 111, lora(
        r=3, lora_alpha=6, target_modules=QV + ["gate_proj"], exclude_modules=["layers.0.self_attn.q_proj", "gate_proj"]))
    yield Case("llama-exclude-regex", "llama", 112, lora(
        r=3, lora_alpha=6, target_modules=QV, exclude_modules=r"model\.layers\.1\..*"))
    yield Case("llama-dropout", "llama", 113, lora(r=3, lora_alpha=6, lora_dropout=0.3, target_modules=QV),
               notes="dropout does nothing outside training")
    yield Case("llama-lm-head", "llama", 114, lora(r=5, lora_alpha=10, target_modules=["lm_head", "v_proj"]), pad="right",
               notes="save_embedding_layers=auto also saves lm_head.base_layer.weight")
    yield Case("llama-lm-head-lean", "llama", 115, lora(r=5, lora_alpha=10, target_modules=["lm_head", "v_proj"]),
               save_kwargs={"save_embedding_layers": False})

    yield Case("llama-unused-names", "llama", 116, lora(
        r=3, lora_alpha=6, target_modules=["q_proj", "query_key_value"], exclude_modules=["c_attn"], modules_to_save=["pre_head"],
        rank_pattern={"up_proj": 5, "layers.1.self_attn.q_proj": 2}, alpha_pattern={"c_fc": 9}, bias="lora_only",
        layers_to_transform=[0, 1, 40]), notes="HF passes over what means nothing on the model, and writes it into the file")

    yield Case("qwen2-qv", "qwen2", 201, lora(r=3, lora_alpha=6, target_modules=QV), pad="right")
    yield Case("qwen2-all-linear", "qwen2", 202, lora(r=2, lora_alpha=5, target_modules="all-linear"), pad="right")
    yield Case("qwen2-regex", "qwen2", 203, lora(r=3, lora_alpha=6, target_modules=r".*(k_proj|down_proj)"))
    yield Case("qwen2-patterns", "qwen2", 204, lora(
        r=4, lora_alpha=4, target_modules=["k_proj", "gate_proj"], rank_pattern={"k_proj|gate": 1, "layers.2.*gate_proj": 3},
        alpha_pattern={r"layers\.[01]\.self_attn.k_proj": 7}))
    yield Case("qwen2-layers", "qwen2", 205, lora(
        r=3, lora_alpha=6, target_modules=QV, layers_to_transform=[1], layers_pattern=["blocks", "layers"]))
    yield Case("qwen2-exclude", "qwen2", 206, lora(
        r=1, lora_alpha=6, target_modules="all-linear", exclude_modules=["mlp.down_proj", "model.layers.2.self_attn.o_proj"]))

    yield Case("gemma-qv", "gemma", 301, lora(r=3, lora_alpha=6, target_modules=QV), pad="right")
    yield Case("gemma-all-linear", "gemma", 302, lora(r=2, lora_alpha=5, target_modules="all-linear"), pad="right")
    yield Case("gemma-regex-rslora", "gemma", 303, lora(
        r=5, lora_alpha=4, use_rslora=True, target_modules=r"model\.layers\.1\.(self_attn\.o_proj|mlp\.up_proj)"))

    yield Case("gpt2-c-attn", "gpt2", 401, lora(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True), pad="right")
    yield Case("gpt2-default-targets", "gpt2", 402, lora(r=5, lora_alpha=6),
               notes="HF turns fan_in_fan_out on when it meets a Conv1D, in the saved config too")
    yield Case("gpt2-c-proj-c-fc", "gpt2", 403, lora(
        r=3, lora_alpha=6, target_modules=["c_proj", "c_fc"], fan_in_fan_out=True), pad="right",
        notes="c_proj is both attn.c_proj and mlp.c_proj")
    yield Case("gpt2-all-linear", "gpt2", 404, lora(r=2, lora_alpha=5, target_modules="all-linear", fan_in_fan_out=True))
    yield Case("gpt2-patterns", "gpt2", 405, lora(
        r=3, lora_alpha=4, use_rslora=True, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True,
        rank_pattern={"h.0.attn.c_attn": 5}, alpha_pattern={r"mlp\.c_proj": 7}))
    yield Case("gpt2-layers", "gpt2", 406, lora(
        r=3, lora_alpha=6, target_modules=["attn.c_attn"], fan_in_fan_out=True, layers_to_transform=[1, 2], layers_pattern="h"))
    yield Case("gpt2-exclude", "gpt2", 407, lora(
        r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, exclude_modules=r".*\.mlp\.c_proj"))

    yield Case("bert-cls-qv", "bert-cls", 501, lora("SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"]), pad="right",
               notes="SEQ_CLS adds classifier and score to modules_to_save; score matches nothing here")
    yield Case("bert-cls-all-linear", "bert-cls", 502, lora("SEQ_CLS", r=2, lora_alpha=5, target_modules="all-linear"), pad="right")
    yield Case("bert-cls-patterns", "bert-cls", 503, lora(
        "SEQ_CLS", r=3, lora_alpha=4, target_modules=r".*\.layer\.\d+\..*dense", rank_pattern={"intermediate.dense": 5},
        alpha_pattern={"layer.1.output.dense": 9}), pad="right")
    yield Case("bert-cls-layers", "bert-cls", 504, lora(
        "SEQ_CLS", r=5, lora_alpha=6, use_rslora=True, target_modules=["key", "attention.output.dense"],
        layers_to_transform=[1], layers_pattern="layer"))
    yield Case("bert-qv", "bert", 601, lora("FEATURE_EXTRACTION", r=3, lora_alpha=6, target_modules=["query", "value"]), pad="right")
    yield Case("bert-default-targets", "bert", 602, lora("FEATURE_EXTRACTION", r=5, lora_alpha=2), pad="right")

    yield Case("llama-tied-qv", "llama-tied", 701, lora(r=3, lora_alpha=6, target_modules=QV), pad="right")
    yield Case("mistral-qkvo", "mistral", 702, lora(
        r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), pad="right", lengths=(10, 7))
    yield Case("qwen3-all-linear", "qwen3", 703, lora(r=2, lora_alpha=3, target_modules="all-linear"), pad="right")
    yield Case("gemma2-all-linear", "gemma2", 704, lora(r=2, lora_alpha=3, target_modules="all-linear"), pad="right", lengths=(10, 7))
    yield Case("phi3-fused", "phi3", 705, lora(
        r=3, lora_alpha=6, target_modules=["qkv_proj", "gate_up_proj"]), pad="right", lengths=(10, 7))
    yield Case("llama-rope-llama3-qv", "llama-rope-llama3", 706, lora(r=3, lora_alpha=6, target_modules=QV), pad="left")


def biases():
    """bias=all, bias=lora_only and lora_bias."""
    yield Case("llama-biased-bias-all", "llama-rope-linear", 801, lora(r=3, lora_alpha=6, target_modules=QV, bias="all"),
               notes="HF keeps the trained base biases in the model: they are part of the merged model")
    yield Case("qwen2-bias-all", "qwen2", 802, lora(r=3, lora_alpha=6, target_modules=["q_proj"], bias="all"), pad="right")
    yield Case("qwen2-bias-lora-only", "qwen2", 803, lora(
        r=3, lora_alpha=6, target_modules=["q_proj", "gate_proj"], bias="lora_only"))
    yield Case("qwen2-lora-bias", "qwen2", 804, lora(r=3, lora_alpha=6, target_modules=QV, lora_bias=True))
    yield Case("llama-lora-bias", "llama", 805, lora(r=3, lora_alpha=6, target_modules=QV, lora_bias=True), merge="no",
               notes="HF refuses to merge lora_bias into a layer without bias")
    yield Case("gpt2-bias-all", "gpt2", 806, lora(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"))
    yield Case("gpt2-bias-lora-only", "gpt2", 807, lora(
        r=3, lora_alpha=6, target_modules=["mlp.c_fc"], fan_in_fan_out=True, bias="lora_only"), pad="right")
    yield Case("gpt2-lora-bias", "gpt2", 808, lora(
        r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_bias=True))
    yield Case("bert-cls-bias-all", "bert-cls", 809, lora("SEQ_CLS", r=3, lora_alpha=6, target_modules=["query"], bias="all"), pad="right")
    yield Case("bert-cls-bias-all-pooler", "bert-cls", 811, lora(
        "SEQ_CLS", r=3, lora_alpha=6, target_modules=["query"], bias="all", modules_to_save=["pooler"]), lengths=(5, 3), keep_merged=False,
        notes="the wrapper of a module with children writes its biases twice, with its own name inside")
    yield Case("bert-cls-bias-lora-only", "bert-cls", 810, lora(
        "SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"], bias="lora_only"))


def embeddings():
    """Embedding targets, tied weights, saved modules, token rows."""
    yield Case("llama-embed", "llama", 901, lora(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]), pad="right",
               notes="save_embedding_layers=auto also saves embed_tokens.base_layer.weight")
    yield Case("llama-embed-lean", "llama", 902, lora(r=5, lora_alpha=6, target_modules=["embed_tokens"]),
               save_kwargs={"save_embedding_layers": False})
    yield Case("gpt2-wte", "gpt2", 903, lora(r=3, lora_alpha=6, target_modules=["wte", "c_attn"], fan_in_fan_out=True),
               merge="hf_wrong", notes="tied: the adapter acts on the input side alone; HF's merge changes both")
    yield Case("gpt2-wpe", "gpt2", 904, lora(r=3, lora_alpha=6, target_modules=["wpe", "c_attn"], fan_in_fan_out=True))
    yield Case("bert-word-embeddings", "bert", 905, lora(
        "FEATURE_EXTRACTION", r=3, lora_alpha=6, target_modules=["word_embeddings", "token_type_embeddings", "query"]), pad="right")
    yield Case("gemma-embed", "gemma", 906, lora(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
               merge="hf_wrong", notes="tied: the adapter acts on the input side alone; HF's merge changes both")
    yield Case("gemma-lm-head", "gemma", 907, lora(r=3, lora_alpha=6, target_modules=["lm_head", "q_proj"]),
               merge="hf_wrong", notes="tied: the adapter acts on the output side alone; HF's merge changes both")
    yield Case("llama-tied-embed", "llama-tied", 908, lora(r=3, lora_alpha=6, target_modules=["embed_tokens"]), pad="right",
               merge="hf_wrong", save_kwargs={"save_embedding_layers": False},
               notes="tied: the adapter acts on the input side alone; HF's merge changes both")
    yield Case("llama-tied-saved-embed", "llama-tied", 918, lora(r=3, lora_alpha=6, target_modules=["v_proj"]), pad="right",
               save_kwargs={"save_embedding_layers": True}, notes="both sides are saved whole, though nothing sits on them")
    yield Case("llama-tied-ensure-tying", "llama-tied", 909, lora(
        r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True), merge="hf_wrong",
        notes="lm_head gets A = B_emb^T, B = A_emb^T; HF's merge adds the change twice")
    yield Case("gemma-ensure-tying", "gemma", 910, lora(
        r=5, lora_alpha=2, target_modules=["embed_tokens"], ensure_weight_tying=True), merge="hf_wrong",
        notes="lm_head gets A = B_emb^T, B = A_emb^T; HF's merge adds the change twice")

    yield Case("llama-save-lm-head", "llama", 911, lora(r=3, lora_alpha=6, target_modules=QV, modules_to_save=["lm_head"]), pad="right")
    yield Case("qwen2-save-norm", "qwen2", 912, lora(
        r=3, lora_alpha=6, target_modules=QV, modules_to_save=["post_attention_layernorm", "lm_head"]))
    yield Case("gpt2-save-ln-f", "gpt2", 913, lora(
        r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f", "wpe"]))
    yield Case("bert-cls-save-none", "bert-cls", 914, lora(None, r=3, lora_alpha=6, target_modules=["query", "value"]), pad="right",
               notes="no task type: the classifier stays frozen and unsaved")
    yield Case("bert-cls-save-pooler", "bert-cls", 915, lora(
        "SEQ_CLS", r=3, lora_alpha=6, target_modules=["query"], modules_to_save=["pooler"]),
        notes="pooler is a module with children: its parameters are saved under their own names")
    yield Case("llama-tied-save-embed", "llama-tied", 916, lora(
        r=3, lora_alpha=6, target_modules=QV, modules_to_save=["embed_tokens"]),
        notes="tied: the copy replaces the input side alone")
    yield Case("llama-tied-save-tied", "llama-tied", 917, lora(
        r=3, lora_alpha=6, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        notes="tied: one copy replaces both sides")

    tokens = [0, 3, 5, 11, 40]
    yield Case("llama-tokens-list", "llama", 921, lora(r=3, lora_alpha=6, target_modules=QV, trainable_token_indices=tokens), pad="right")
    yield Case("llama-tokens-dict", "llama", 922, lora(
        r=3, lora_alpha=6, target_modules=QV, trainable_token_indices={"embed_tokens": [2, 9, 33], "lm_head": [1, 8]}))
    yield Case("llama-tied-tokens-list", "llama-tied", 923, lora(
        r=3, lora_alpha=6, target_modules=QV, trainable_token_indices=tokens), pad="right",
        notes="tied: the same rows replace both sides")
    yield Case("gemma-tokens-dict", "gemma", 924, lora(
        r=3, lora_alpha=6, target_modules=QV, trainable_token_indices={"embed_tokens": [7, 1, 50]}),
        notes="tied; rows are stored in the order given")
    yield Case("gpt2-tokens-dict", "gpt2", 925, lora(
        r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": tokens}))
    yield Case("bert-cls-tokens-list", "bert-cls", 926, lora(
        "SEQ_CLS", r=3, lora_alpha=6, target_modules=["query"], trainable_token_indices=list(range(0, 60, 2))), pad="right")


def initialisations():
    """Starts that change the base: a load changes it again, before the saved A and B come in."""
    small = dict(noise=0.05)
    yield Case("llama-pissa", "llama", 1001, lora(r=3, lora_alpha=6, target_modules=QV, init_lora_weights="pissa"), **small)
    yield Case("gpt2-pissa", "gpt2", 1002, lora(
        r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa"), **small,
        notes="the rank keeps a gap in every spectrum: a truncated SVD in f32 is as accurate as the gap is wide")
    yield Case("bert-cls-pissa", "bert-cls", 1003, lora("SEQ_CLS", r=5, lora_alpha=3, target_modules=["query"], init_lora_weights="pissa"), **small)
    yield Case("qwen2-pissa-converted", "qwen2", 1004, lora(
        r=3, lora_alpha=6, target_modules=QV, init_lora_weights="pissa"), convert=True, **small,
        notes="saved with path_initial_model_for_weight_conversion: a plain LoRA of twice the rank")
    yield Case("llama-olora", "llama", 1011, lora(r=3, lora_alpha=6, target_modules=QV, init_lora_weights="olora"), **small)
    yield Case("gemma-olora", "gemma", 1012, lora(r=5, lora_alpha=4, target_modules=["o_proj", "up_proj"], init_lora_weights="olora"), **small)
    yield Case("llama-olora-head", "llama", 1014, lora(
        r=3, lora_alpha=4, target_modules=["v_proj", "lm_head"], init_lora_weights="olora"), **small,
        notes="HF saves the head whole as the start left it")
    yield Case("llama-olora-converted", "llama", 1013, lora(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj"], init_lora_weights="olora"), convert=True, **small,
        notes="saved with path_initial_model_for_weight_conversion: a plain LoRA of twice the rank")
    yield Case("llama-orthogonal", "llama", 1021, lora(r=4, lora_alpha=6, target_modules=QV, init_lora_weights="orthogonal"), **small)
    yield Case("bert-orthogonal", "bert", 1022, lora(
        "FEATURE_EXTRACTION", r=6, lora_alpha=6, target_modules=["key"], init_lora_weights="orthogonal"), noise=0.15)
    yield Case("llama-gaussian", "llama", 1031, lora(r=3, lora_alpha=6, target_modules=QV, init_lora_weights="gaussian"))
    yield Case("gpt2-gaussian", "gpt2", 1032, lora(
        r=3, lora_alpha=6, target_modules=["c_proj"], fan_in_fan_out=True, init_lora_weights="gaussian"))


def cases():
    """All of them."""
    yield from plain()
    yield from biases()
    yield from embeddings()
    yield from initialisations()
