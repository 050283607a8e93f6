"""What peft's matcher answers: targets, rank patterns, all-linear and the default targets of model types."""

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.other import get_pattern_key

from .common import load_base, write_json
from .models import MODELS

LLAMA = [
    f"model.layers.{i}.{m}"
    for i in (0, 1, 2, 11)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "input_layernorm")
] + ["model.embed_tokens", "model.norm", "lm_head"]
GPT2 = [f"transformer.h.{i}.{m}" for i in range(3) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "ln_1")] + [
    "transformer.wte", "transformer.ln_f", "lm_head",
]  # fmt: skip
BERT = [f"bert.encoder.layer.{i}.{m}" for i in range(2) for m in (
    "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense", "output.LayerNorm")] + [
    "bert.pooler.dense", "bert.embeddings.word_embeddings", "classifier",
]  # fmt: skip
MOE = [f"model.layers.{i}.mlp.experts.{j}.{m}" for i in range(2) for j in range(3) for m in ("w1", "w2")] + [
    "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"
]  # fmt: skip
TOP = ["layers.0.q", "layers.1.q", "layers.1.xq", "blocks.1.q", "q", "layers.10.q", "h.1.layers.0.q"]
DOTS = ["a.q", "a.xq", "q", "b.a.q", "ba.q", "a.q.lin", "aq", "a.qq", "A.q", "a-q", "a_q"]
HEADS = ["head", "forehead", "body.head", "body.head.dense", "head.dense", "heads", "body.forehead.dense", "xhead.dense"]


def entries():
    """`(modules, config)` pairs."""
    yield LLAMA, dict(target_modules=["q_proj", "v_proj"])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=["layers.1.self_attn.q_proj"])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=["1.self_attn.q_proj"])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=r".*layers\.1\..*")
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=r"layers\.1\..*")
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=["q_proj"])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=["v_proj"])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=[])
    yield LLAMA, dict(target_modules=r".*\.(q|v)_proj")
    yield LLAMA, dict(target_modules=r".*q_proj|.*up_proj")
    yield LLAMA, dict(target_modules="q_proj")
    yield LLAMA, dict(target_modules=r"model\.layers\.[01]\.self_attn\.q_proj")
    yield LLAMA, dict(target_modules=r"model\.layers\.1\d?\.self_attn\.q_proj")
    yield LLAMA, dict(target_modules=r".*\.\d{2}\.mlp\.\w+")
    yield LLAMA, dict(target_modules=r"(?i).*Q_PROJ")
    yield LLAMA, dict(target_modules=r"^model\..*v_proj$")
    yield LLAMA, dict(target_modules=r"model.*norm")
    yield LLAMA, dict(target_modules=r"[^.]+")
    yield LLAMA, dict(target_modules=r"(?:model\.)?(?:norm|embed_tokens|lm_head)")
    yield LLAMA, dict(target_modules=[r".*q_proj"])
    yield LLAMA, dict(target_modules=["self_attn.q_proj", "mlp"])
    yield LLAMA, dict(target_modules=["proj", "q_pro", "norm"])
    yield LLAMA, dict(target_modules=["model.layers.2.self_attn.q_proj", "up_proj"])
    yield LLAMA, dict(target_modules=["lm_head"])
    yield LLAMA, dict(target_modules=["q_proj", "no_such"])
    yield LLAMA, dict(target_modules=["no_such"])
    yield LLAMA, dict(target_modules=[])
    yield LLAMA, dict(target_modules="")
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=1)
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[1])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[1, 11], layers_pattern="layers")
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[1, 11], layers_pattern=["h", "layers"])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="h")
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers", "h"])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layer.")
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=[])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="")
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=[7])
    yield LLAMA, dict(target_modules=["q_proj"], layers_to_transform=0)
    yield LLAMA, dict(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[2])
    yield LLAMA, dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[2])
    yield LLAMA, dict(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[2])
    yield LLAMA, dict(target_modules=r".*q_proj", layers_to_transform=[1])
    yield LLAMA, dict(target_modules=r".*q_proj", layers_pattern="layers")
    yield LLAMA, dict(target_modules=["q_proj"], layers_pattern="layers")
    yield LLAMA, dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    yield LLAMA, dict(target_modules=["q_proj", "v_proj"], modules_to_save=["self_attn"])
    yield LLAMA, dict(target_modules=["q_proj", "input_layernorm"], modules_to_save=["norm"])
    yield LLAMA, dict(target_modules=["q_proj"], modules_to_save=[r"layers\.1"])
    yield LLAMA, dict(target_modules=["q_proj"], modules_to_save=[])
    yield LLAMA, dict(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"], layers_to_transform=[0, 1])
    yield GPT2, dict(target_modules=["c_attn"])
    yield GPT2, dict(target_modules=["c_proj"])
    yield GPT2, dict(target_modules=["mlp.c_proj"], layers_to_transform=[0, 2], layers_pattern="h")
    yield GPT2, dict(target_modules=["attn.c_proj", "wte"], exclude_modules=r"transformer\.h\.2\..*")
    yield GPT2, dict(target_modules=["ln_1", "ln_f"], layers_to_transform=[1])
    yield BERT, dict(target_modules=["dense"])
    yield BERT, dict(target_modules=["output.dense"])
    yield BERT, dict(target_modules=["attention.output.dense", "query"], layers_to_transform=[1], layers_pattern="layer")
    yield BERT, dict(target_modules=["query", "dense"], modules_to_save=["classifier", "pooler"])
    yield BERT, dict(target_modules=r".*\.layer\.\d+\.(?!attention).*dense")
    yield MOE, dict(target_modules=["w1"], layers_to_transform=[1])
    yield MOE, dict(target_modules=["w1", "gate"], layers_to_transform=[1], layers_pattern="layers")
    yield MOE, dict(target_modules=["w2"], layers_to_transform=[2], layers_pattern="experts")
    yield MOE, dict(target_modules=["0.w1", "experts.2.w2"])
    yield TOP, dict(target_modules=["q"])
    yield TOP, dict(target_modules=["q"], layers_to_transform=[1])
    yield TOP, dict(target_modules=["q"], layers_to_transform=[1], layers_pattern="layers")
    yield TOP, dict(target_modules=["q"], layers_to_transform=[0], layers_pattern=["layers"])
    yield TOP, dict(target_modules=["q"], layers_to_transform=[1], layers_pattern=["layers", "blocks"])
    yield DOTS, dict(target_modules=["q"])
    yield DOTS, dict(target_modules=["a.q"])
    yield DOTS, dict(target_modules="a.q")
    yield DOTS, dict(target_modules=r"a\.q")
    yield DOTS, dict(target_modules=".*q")
    yield DOTS, dict(target_modules=["q", "lin"], exclude_modules="a.q")
    yield DOTS, dict(target_modules=["q"], exclude_modules=["a.q"])
    yield HEADS, dict(target_modules=r".*", modules_to_save=["head"])
    yield HEADS, dict(target_modules=["head", "dense"], modules_to_save=["body"])
    yield HEADS, dict(target_modules=["head", "dense"], exclude_modules=["head"])


def expected(modules, config):
    """The matched names in the order given, or "error" where the config itself is refused."""
    try:
        lora = LoraConfig(**config)
        return [name for name in modules if is_match(lora, name)]
    except (ValueError, TypeError):
        return "error"


def is_match(lora, name):
    """Whether peft would adapt a module of this name."""
    found = check_target_module_exists(lora, name)
    return not isinstance(found, _ExcludedModule) and bool(found)


PATTERNS = [
    (["q_proj"], "model.layers.0.self_attn.q_proj"),
    (["proj"], "model.layers.0.self_attn.q_proj"),
    (["self_attn.q_proj"], "model.layers.0.self_attn.q_proj"),
    (["self_attn.q_proj"], "model.layers.0.self_attn_q_proj"),
    (["layers.1.self_attn.q_proj", "q_proj"], "model.layers.1.self_attn.q_proj"),
    (["q_proj", "layers.1.self_attn.q_proj"], "model.layers.1.self_attn.q_proj"),
    (["layers.1.self_attn.q_proj", "q_proj"], "model.layers.11.self_attn.q_proj"),
    (["q_proj|k_proj"], "model.layers.0.self_attn.k_proj"),
    ([r".*\.[02]\..*"], "model.layers.2.mlp.up_proj"),
    (["^model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
    (["^layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
    (["^up_proj"], "up_proj"),
    (["up_proj$"], "model.up_proj"),
    (["up_"], "model.up_proj"),
    ([r"layers\.\d+\.mlp"], "model.layers.0.mlp.up_proj"),
    ([r"h\.\d\..*c_proj"], "transformer.h.2.mlp.c_proj"),
    (["c_proj", "mlp.c_proj"], "transformer.h.2.mlp.c_proj"),
    ([], "model.q_proj"),
    (["model.q_proj"], "model.q_proj"),
    (["Q_PROJ"], "model.q_proj"),
    ([""], "model.q_proj"),
    (["k_proj|gate"], "model.layers.0.mlp.gate_proj"),
    (["k_proj|.*gate_proj"], "model.layers.0.mlp.gate_proj"),
]


def all_linear(name):
    """What `all-linear` stands for on one of the tiny models, and how peft then writes the targets of a config."""
    base = load_base(f"models/{name}")
    task = "SEQ_CLS" if name == "bert-cls" else None
    config = LoraConfig(target_modules="all-linear", task_type=task)
    full = sorted(_maybe_include_all_linear_layers(config, base).target_modules)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type=task))
    return {"model": name, "task_type": task, "expected": full, "saved": sorted(model.peft_config["default"].target_modules)}


def make():
    """Writes matcher.json."""
    matches = [{"modules": m, "config": c, "expected": expected(m, c)} for m, c in entries()]
    for entry in matches:
        # Linear-time engines have no look-around: there a clear error is the right answer.
        if "(?!" in str(entry["config"]):
            entry["lookaround"] = True
    sections = {"match": matches, "pattern_key": [], "all_linear": [all_linear(name) for name in MODELS]}
    for keys, module in PATTERNS:
        found = get_pattern_key(keys, module)
        # peft answers with the module's own name where no pattern matches.
        sections["pattern_key"].append({"keys": keys, "module": module, "expected": found if found in keys else None})
    types = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "phi", "gpt2", "bert", "roberta", "distilbert", "t5")
    lora_targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    norm_targets = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    sections["default_targets"] = {t: lora_targets.get(t) for t in types}
    sections["default_norm_targets"] = {t: norm_targets.get(t) for t in types}
    write_json("matcher.json", sections)
    return f"{len(matches)} match entries, {sum(e['expected'] == 'error' for e in matches)} of them errors"
