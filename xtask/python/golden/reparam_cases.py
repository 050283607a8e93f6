"""The reparameterised methods beside plain LoRA: low-rank, Kronecker, orthogonal and spectral changes of weights."""

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
)
from peft.tuners.boft import layer as boft_layer

from .cases import small

QV = ["q_proj", "v_proj"]
LM, CLS, FEATURES = "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"


def made(cls, task=LM, **kwargs):
    """A maker of one config."""
    return lambda: cls(task_type=task, **kwargs)


def dora(task=LM, **kwargs):
    """A maker of LoRA configs with a trained magnitude."""
    return made(LoraConfig, task, use_dora=True, **kwargs)


def dora_cases():
    """Linear, Conv1D and Embedding; magnitudes at 1 to 4 here, so the noise on them is relative to that."""
    yield small("llama-dora", "llama", 1401, dora(r=3, lora_alpha=6, target_modules=QV), pad="right")
    yield small("qwen2-dora-patterns", "qwen2", 1402, dora(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "gate_proj"], rank_pattern={"k_proj": 5},
        alpha_pattern={"layers.1.mlp.gate_proj": 9}, layers_to_transform=[1, 2]), pad="right", notes="k_proj has a bias: the magnitude leaves it alone")
    yield small("gpt2-dora", "gpt2", 1403, dora(
        r=5, lora_alpha=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, layers_to_transform=[0, 2],
        layers_pattern="h"), pad="right")
    yield small("gpt2-dora-wpe", "gpt2", 1404, dora(r=3, lora_alpha=6, target_modules=["wpe", "c_fc"], fan_in_fan_out=True),
               notes="an embedding's magnitude has a number per column")
    yield small("llama-dora-embed", "llama", 1405, dora(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"]),
               save_kwargs={"save_embedding_layers": False})
    yield small("bert-cls-dora-bias-all", "bert-cls", 1406, dora(
        CLS, r=3, lora_alpha=6, target_modules=["query", "value"], bias="all", lora_dropout=0.2), pad="right")
    yield small("bert-dora", "bert", 1407, dora(
        FEATURES, r=5, lora_alpha=4, target_modules=r".*\.layer\.1\..*dense", modules_to_save=["pooler"]), pad="right")


def adalora(task=LM, **kwargs):
    """A maker of AdaLoRA configs."""
    return made(AdaLoraConfig, task, **{"total_step": 20, **kwargs})


def pruned(model):
    """Gives the adapter a rank pattern as a finished run leaves it: uneven, and nothing left of one module."""
    config = model.peft_config["default"]
    names = sorted(n for n, _ in model.base_model.model.named_parameters() if ".lora_E." in n)
    gen = torch.Generator().manual_seed(len(names))
    config.rank_pattern = {}
    for i, name in enumerate(names):
        keep = [False] * config.init_r if i == 1 else (torch.rand(config.init_r, generator=gen) < 0.6).tolist()
        config.rank_pattern[name] = keep
        with torch.no_grad():
            e = model.base_model.model.get_parameter(name)
            e[~torch.tensor(keep)] = 0.0


def adalora_cases():
    """The scale is alpha over the first rank; a rank pattern cuts the tensors of the file."""
    loud = dict(noise=0.6)
    yield small("llama-adalora", "llama", 1411, adalora(init_r=5, target_r=3, lora_alpha=7, target_modules=QV), pad="right", **loud)
    yield small("gpt2-adalora", "gpt2", 1412, adalora(init_r=3, target_r=2, lora_alpha=8), pad="right", **loud,
               notes="HF's default targets; fan_in_fan_out turned on by HF")
    yield small("bert-cls-adalora", "bert-cls", 1413, adalora(
        CLS, init_r=6, target_r=4, lora_alpha=5, target_modules=["query", "output.dense"]), pad="right", **loud)
    yield small("llama-adalora-pruned", "llama", 1414, adalora(init_r=6, target_r=3, lora_alpha=9, target_modules=QV),
               prepare=pruned, pad="right", **loud, notes="the scale stays that of the first rank; one module keeps no rank")
    yield small("bert-adalora-pruned", "bert", 1415, adalora(
        FEATURES, init_r=4, target_r=2, lora_alpha=6, target_modules=["key", "intermediate.dense"], bias="lora_only"),
        prepare=pruned, **loud)


def vera(task=LM, **kwargs):
    """A maker of VeRA configs."""
    return made(VeraConfig, task, **kwargs)


def vera_cases():
    """Projections from torch's generator, shared and sliced."""
    loud = dict(noise=0.4)
    yield small("llama-vera", "llama", 1421, vera(r=5, target_modules=QV), pad="right", **loud)
    yield small("llama-vera-lean", "llama", 1422, vera(
        r=7, target_modules=["k_proj", "down_proj"], save_projection=False, projection_prng_key=42), pad="right", **loud,
        notes="projections are not in the file: they follow from projection_prng_key; the widest layers size them, the others slice")
    yield small("gpt2-vera", "gpt2", 1423, vera(
        r=3, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, projection_prng_key=1234567890123), **loud)
    yield small("bert-cls-vera-lean", "bert-cls", 1424, vera(
        CLS, r=6, target_modules=["query", "intermediate.dense"], save_projection=False, d_initial=0.7, bias="vera_only",
        projection_prng_key=3), pad="right", **loud)
    yield small("bert-vera", "bert", 1425, vera(FEATURES, r=9, target_modules="all-linear", projection_prng_key=7), **loud)


def lycoris_cases():
    """LoHa and LoKr."""
    loha = lambda task=LM, **k: made(LoHaConfig, task, **k)  # noqa: E731
    lokr = lambda task=LM, **k: made(LoKrConfig, task, **k)  # noqa: E731
    loud = dict(noise=0.3)
    yield small("llama-loha", "llama", 1431, loha(r=3, alpha=7, target_modules=QV, layers_to_transform=[0, 2]), pad="right", **loud)
    yield small("qwen2-loha-patterns", "qwen2", 1432, loha(
        r=2, alpha=3, target_modules=["k_proj", "up_proj"], rank_pattern={"k_proj": 5}, alpha_pattern={"layers.0.mlp.up_proj": 9},
        rank_dropout=0.2, module_dropout=0.1, layers_to_transform=[0, 1]), pad="right", **loud)
    yield small("bert-cls-loha", "bert-cls", 1433, loha(CLS, r=5, alpha=4, target_modules=["query", "output.dense"]), pad="right", **loud)
    yield small("bert-loha-layers", "bert", 1434, loha(
        FEATURES, r=1, alpha=2, target_modules=["key", "intermediate.dense"], layers_to_transform=[1]), **loud)
    yield small("llama-lokr", "llama", 1441, lokr(r=3, alpha=7, target_modules=QV + ["down_proj"]), pad="right", **loud,
               notes="44 = 4 x 11, 32 = 4 x 8: one factor whole, the other of rank 3")
    yield small("mistral-lokr-both", "mistral", 1442, lokr(
        r=1, alpha=2, decompose_both=True, target_modules=["q_proj", "k_proj"]), pad="right", lengths=(10, 7), **loud)
    yield small("bert-cls-lokr-whole", "bert-cls", 1443, lokr(CLS, r=16, alpha=5, target_modules=["query"]), pad="right", **loud,
               notes="the rank is so large that both factors are whole; the scale stays alpha over r")
    yield small("bert-lokr-factor", "bert", 1444, lokr(
        FEATURES, r=2, alpha=3, decompose_factor=4, init_weights="lycoris", target_modules=["value", "output.dense"],
        rank_pattern={"value": 1}, alpha_pattern={"layer.0.output.dense": 8}), pad="right", **loud)
    yield small("qwen2-lokr-both", "qwen2", 1445, lokr(
        r=2, alpha=5, decompose_both=True, decompose_factor=8, rank_dropout=0.3, rank_dropout_scale=True,
        target_modules=["gate_proj", "v_proj"]), **loud)


class BlockDiagonal:
    """Stands in for the CUDA extension without which HF sets `boft_n_butterfly_factor` to 1."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


def with_factors(config):
    """Makes a BOFT config with several butterfly factors HF computes on a CPU."""

    def build():
        boft_layer._FBD_CUDA = BlockDiagonal
        return config()

    return build


def without_factors(config):
    """The extension is missing again."""

    def build():
        boft_layer._FBD_CUDA = False
        return config()

    return build


def rotation_cases():
    """OFT, BOFT and HRA."""
    oft = lambda task=LM, **k: made(OFTConfig, task, **k)  # noqa: E731
    boft = lambda task=LM, **k: made(BOFTConfig, task, **k)  # noqa: E731
    hra = lambda task=LM, **k: made(HRAConfig, task, **k)  # noqa: E731
    yield small("llama-oft", "llama", 1451, oft(oft_block_size=8, target_modules=QV), pad="right",
               notes="five terms of the Cayley transform's Neumann series: HF's default")
    yield small("llama-oft-exact", "llama", 1452, oft(
        r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"]), pad="right",
        notes="r is the number of blocks; the exact transform is the series' transpose")
    yield small("qwen2-oft-shared", "qwen2", 1453, oft(
        oft_block_size=4, block_share=True, num_cayley_neumann_terms=3, target_modules=["k_proj", "up_proj"]))
    yield small("bert-cls-oft-coft", "bert-cls", 1454, oft(
        CLS, oft_block_size=6, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=["query", "value"]), pad="right",
        notes="constrained: HF projects the stored rows themselves, on the first forward after a load")
    yield small("bert-oft", "bert", 1455, oft(
        FEATURES, oft_block_size=5, bias="oft_only", target_modules=["key"], module_dropout=0.3), pad="right")
    yield small("llama-oft-adjusted", "llama", 1456, oft(oft_block_size=6, target_modules=["o_proj"]),
               notes="6 does not divide 32: HF takes a block size near it that does")
    yield small("llama-oft-embed", "llama", 1457, oft(oft_block_size=16, target_modules=["embed_tokens", "k_proj"]), pad="right",
                save_kwargs={"save_embedding_layers": False}, notes="rows of the table are turned as they are looked up")
    yield small("llama-boft", "llama", 1461, without_factors(boft(boft_block_size=4, target_modules=QV)), pad="right")
    yield small("qwen2-boft-num", "qwen2", 1462, without_factors(boft(
        boft_block_size=0, boft_block_num=4, target_modules=["k_proj", "gate_proj"], bias="boft_only", boft_dropout=0.2,
        layers_to_transform=[0, 2])), pad="right")
    yield small("bert-cls-boft", "bert-cls", 1463, without_factors(boft(
        CLS, boft_block_size=12, target_modules=["query", "intermediate.dense"])), pad="right")
    yield small("llama-boft-butterfly", "llama", 1464, with_factors(boft(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj"], layers_to_transform=[0, 2])), pad="right",
        notes="three factors; HF's code with the block diagonal of its CUDA extension done by torch.block_diag")
    yield small("bert-boft-butterfly", "bert", 1465, with_factors(boft(
        FEATURES, boft_block_size=0, boft_block_num=2, boft_n_butterfly_factor=2, target_modules=["value", "intermediate.dense"])),
        notes="two factors, as above")
    yield small("llama-hra", "llama", 1471, hra(r=4, target_modules=QV), pad="right")
    yield small("qwen2-hra-odd", "qwen2", 1472, hra(r=3, target_modules=["k_proj", "down_proj"]), pad="right")
    yield small("bert-cls-hra-gs", "bert-cls", 1473, hra(CLS, r=5, apply_GS=True, target_modules=["query", "output.dense"]), pad="right",
               notes="Gram-Schmidt makes the reflections commute")
    yield small("bert-hra", "bert", 1474, hra(FEATURES, r=2, bias="hra_only", target_modules=["value"]), pad="right")


def fourier_cases():
    """FourierFT: places from torch's permutation of all of them."""
    fourier = lambda task=LM, **k: made(FourierFTConfig, task, **k)  # noqa: E731
    yield small("llama-fourier", "llama", 1481, fourier(n_frequency=19, target_modules=QV), pad="right")
    yield small("llama-fourier-patterns", "llama", 1484, fourier(
        n_frequency=19, target_modules=["k_proj", "v_proj", "up_proj"], n_frequency_pattern={
            "^model.layers.0.self_attn.v_proj": 3, "model.layers.1.self_attn.v_proj": 5, "mlp|nothing": 7, r"0\..*k_proj": 4}),
        pad="right", notes="asked with `.*\\.` in front: the first never matches, a whole path only as it stands")
    yield small("gpt2-fourier", "gpt2", 1482, fourier(
        n_frequency=31, scaling=90.0, random_loc_seed=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), pad="right")
    yield small("bert-cls-fourier", "bert-cls", 1483, fourier(
        CLS, n_frequency=40, scaling=60.0, random_loc_seed=2**40 + 3, target_modules=["query", "output.dense"],
        n_frequency_pattern={"query": 7}, bias="fourierft_only"), pad="right")


def cases():
    """All of them."""
    yield from dora_cases()
    yield from adalora_cases()
    yield from vera_cases()
    yield from lycoris_cases()
    yield from rotation_cases()
    yield from fourier_cases()
