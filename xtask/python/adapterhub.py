"""Makes the goldens of tests/goldens/adapterhub with the `adapters` package, and checks folders that we wrote in it.

    python xtask/python/adapterhub.py [--out tests/goldens] [--name PART]
    python xtask/python/adapterhub.py --check FOLDER     # each sub-folder: case.json, adapter folders, ours.safetensors

It needs an environment of its own (adapterhub_requirements.txt). The base models are those of tests/goldens/models.
Everything is seeded: a second run on the same machine gives the same files.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import adapters  # noqa: E402
import torch  # noqa: E402
from adapters import composition as comp  # noqa: E402
from adapters import configuration as conf  # noqa: E402
from golden.common import batch_of, fresh_dir, load_base, output_name, run, save_tensors, seed_all, write_json  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SEQ, DOUBLE, PAR = conf.SeqBnConfig, conf.DoubleSeqBnConfig, conf.ParBnConfig
PREFIX, LORA, REFT = conf.PrefixTuningConfig, conf.LoRAConfig, conf.LoReftConfig
BOTH = ("bert-cls", "llama")


class Case:
    """Adapters `{name: config}` on a model; `setup` composes them, `fusion` is the configuration of a fusion layer."""

    def __init__(self, name, configs, models=BOTH, seed=1, head=False, setup=None, fusion=None):
        self.name, self.models, self.seed, self.head, self.fusion = name, models, seed, head, fusion
        self.configs = configs if isinstance(configs, dict) else {"x": configs}
        self.setup = setup


def cases():
    """All cases; every configuration is far from its defaults somewhere."""
    yield from bottlenecks()
    yield from others()
    yield from hybrids()


def bottlenecks():
    """One bottleneck family a case, at three seeds where the family is a method of its own."""
    for seed, factor in ((1, 5.0), (2, 7.0), (3, 1.9)):
        yield Case(f"seq-{seed}", SEQ(reduction_factor=factor), seed=seed, head=seed == 1)
        yield Case(f"double-{seed}", DOUBLE(reduction_factor=factor), seed=seed)
        yield Case(f"par-{seed}", PAR(reduction_factor=factor), seed=seed)
    yield Case("scaled-par", PAR(reduction_factor={"0": 3.0, "default": 7.0}, scaling="learned"), seed=4)
    yield Case("plus-1", conf.AdapterPlusConfig(reduction_factor=5.0, stochastic_depth=0.0), seed=5)
    yield Case("plus-2", conf.AdapterPlusConfig(reduction_factor=3.0, stochastic_depth=0.0, non_linearity="gelu_new"), seed=6)
    yield Case("compacter-1", conf.CompacterConfig(reduction_factor=4.0, phm_dim=2), seed=7)
    yield Case("compacter-2", conf.CompacterConfig(reduction_factor=2.0, phm_dim=4, phm_rank=2), seed=8)
    yield Case("compacter-plus-1", conf.CompacterPlusPlusConfig(reduction_factor=2.0, factorized_phm_rule=True), seed=9)
    yield Case("compacter-plus-2", conf.CompacterPlusPlusConfig(
        reduction_factor=4.0, phm_dim=2, shared_phm_rule=False, factorized_phm_W=False), seed=10)  # fmt: skip
    yield Case("inv-1", conf.SeqBnInvConfig(reduction_factor=5.0), seed=11)
    yield Case("inv-2", conf.DoubleSeqBnInvConfig(reduction_factor=4.0, inv_adapter_reduction_factor=3.0), seed=12)
    yield Case("norm-after", SEQ(reduction_factor=5.0, ln_after=True), seed=13)
    yield Case("norm-before", SEQ(reduction_factor=5.0, ln_before=True, residual_before_ln=False), seed=14)
    yield Case("residual-inside", SEQ(reduction_factor=5.0, ln_after=True, adapter_residual_before_ln=True), seed=15)
    yield Case("post-add", SEQ(reduction_factor=5.0, residual_before_ln="post_add"), models=("bert-cls",), seed=16)
    yield Case("gated", SEQ(reduction_factor=5.0, use_gating=True, scaling=1.5), seed=17)
    yield Case("left-out", DOUBLE(reduction_factor=5.0, leave_out=[1], non_linearity="leakyrelu"), seed=18)


def others():
    """Prefixes, prompts, interventions and low-rank updates."""
    for seed in (21, 22):
        yield Case(f"prefix-{seed}", PREFIX(prefix_length=seed - 18, bottleneck_size=7), seed=seed)
    yield Case("prefix-flat", PREFIX(prefix_length=5, flat=True), seed=23)
    yield Case("prefix-left-out", PREFIX(prefix_length=2, flat=True, leave_out=[0]), seed=24)
    yield Case("prompt", conf.PromptTuningConfig(prompt_length=4), models=("bert-cls",), seed=25)
    yield Case("prompt-after-cls", conf.PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"), models=("bert-cls",), seed=26)
    yield Case("reft-1", REFT(r=3, prefix_positions=2, suffix_positions=3), seed=31)
    yield Case("reft-2", REFT(r=2, prefix_positions=3, suffix_positions=2, tied_weights=True, layers=[1]), seed=32)
    yield Case("reft-3", conf.NoReftConfig(r=4, prefix_positions=1, suffix_positions=1, non_linearity="relu"), seed=33)
    yield Case("lora-1", LORA(r=3, alpha=5, intermediate_lora=True, output_lora=True), seed=41)
    yield Case("lora-2", LORA(r=2, alpha=2, attn_matrices=["q", "k", "v"], leave_out=[0]), seed=42, head=True)
    yield Case("ia3", conf.IA3Config(output_lora=True), seed=43)


def hybrids():
    """Unions and fusions."""
    mam = lambda k: conf.MAMConfig(PREFIX(prefix_length=k, bottleneck_size=5), PAR(reduction_factor=4.0, scaling=2.0))  # noqa: E731
    unipelt = lambda k: conf.UniPELTConfig(  # noqa: E731
        PREFIX(prefix_length=k, bottleneck_size=5), SEQ(reduction_factor=5.0), LORA(r=2, alpha=2 + k))
    for seed in (51, 52):
        yield Case(f"mam-{seed}", mam(seed - 48), seed=seed)
        yield Case(f"unipelt-{seed}", unipelt(seed - 49), seed=seed)
    yield Case("union-lora-bn", conf.ConfigUnion(LORA(r=2, alpha=3), SEQ(reduction_factor=6.0)), seed=53)
    yield Case("union-two-bn", conf.ConfigUnion(
        SEQ(reduction_factor=6.0, mh_adapter=True, output_adapter=False), PAR(reduction_factor=3.0)), seed=54)  # fmt: skip
    members = lambda *factors: {name: SEQ(reduction_factor=f) for name, f in zip("abc", factors)}  # noqa: E731
    yield Case("fusion-1", members(5.0, 3.0), seed=61, fusion=conf.DynamicAdapterFusionConfig())
    yield Case("fusion-2", members(5.0, 3.0, 8.0), seed=62, fusion=conf.DynamicAdapterFusionConfig(query_before_ln=True))
    yield Case("fusion-3", {n: DOUBLE(reduction_factor=4.0) for n in "ab"}, seed=63, fusion=conf.StaticAdapterFusionConfig())
    yield Case("fusion-4", {"a": PAR(reduction_factor=4.0), "b": PAR(reduction_factor=6.0)}, seed=64,
               fusion=conf.DynamicAdapterFusionConfig(value_before_softmax=False))  # fmt: skip
    yield Case("stack", members(5.0, 3.0), seed=65, setup=comp.Stack("a", "b"))


def open_model(name):
    """A base model of the goldens, ready for adapters."""
    model = load_base(f"models/{name}")
    adapters.init(model)
    return model


def own_state(model, match):
    """The tensors of one adapter, shared ones once (prefixes hang at every layer), each with storage of its own."""
    seen, out = set(), {}
    for key, value in model.state_dict().items():
        if not match(key) or ".pool." in key:
            continue
        twice = "adapter_norm_before" in key or ".adapter_down.0." in key
        if value.data_ptr() in seen and not twice:
            continue
        seen.add(value.data_ptr())
        out[key] = value.detach().contiguous().clone()
    return out


def save(model, loader, name, folder):
    """What `save_adapter(use_safetensors=True)` writes; it fails itself where a tensor is in two places."""
    helper = loader.weights_helper
    state = own_state(model, loader.filter_func(name))
    helper.save_weights = lambda directory, _: save_file(state, str(Path(directory) / helper.safe_weights_name))
    loader.save(str(folder), name)


def perturb(model, seed):
    """Moves every parameter of adapters and fusions off its initial value."""
    base = {k for k, _ in load_base(model.folder).named_parameters()}
    gen = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        new = not any(name.replace(mid, ".") in base for mid in (".", ".base_layer."))
        if new or name.startswith("classifier") and model.trained_head:
            size = 0.5 if "phm" in name or "W_" in name or ".W" in name else 0.4 if p.dim() == 1 else 0.9 / p.shape[-1] ** 0.5
            with torch.no_grad():
                move = torch.randn(p.shape, generator=gen) * size
                if name.endswith("parametrizations.weight.original"):
                    # Its diagonal is cut to whole numbers by torch: signs that nothing may move.
                    move.fill_diagonal_(0.0)
                p.add_(move)


def outputs(model, batch):
    """Logits as the tests compare them. In front of a language model's head, `adapters` undoes an invertible adapter in its
    own model classes alone, not in the plain ones used here: it is done by hand."""
    couplings = getattr(model.base_model, "invertible_adapters", {})
    undone = []
    if output_name(model) == "logits" and hasattr(model, "lm_head") and any(n in couplings for n in active(model)):
        hook = lambda _, args: (model.base_model.invertible_adapters_forward(args[0], rev=True),)  # noqa: E731
        undone.append(model.lm_head.register_forward_pre_hook(hook))
    out = run(model, batch)
    for hook in undone:
        hook.remove()
    return {output_name(model): out}


def active(model):
    """Names of the adapters that act."""
    setup = model.adapters_config.active_setup
    return setup.flatten() if setup else []


def make(case, model_name):
    """Writes `adapterhub/<model>-<case>`: one folder an adapter (and `fusion`), `case.json`, `expected.safetensors`."""
    seed_all(case.seed)
    model = open_model(model_name)
    model.folder, model.trained_head = f"models/{model_name}", case.head
    for name, config in case.configs.items():
        model.add_adapter(name, config=config)
    setup = case.setup or list(case.configs)[0]
    if case.fusion is not None:
        setup = comp.Fuse(*case.configs)
        model.add_adapter_fusion(setup, config=case.fusion)
    model.set_active_adapters(setup)
    perturb(model.eval(), case.seed + 100)
    folder = fresh_dir(f"adapterhub/{model_name.removesuffix('-cls')}-{case.name}")
    model.apply_to_adapter_layers(lambda _, layer: layer.pre_save_adapters())
    for name in case.configs:
        save(model, adapters.loading.AdapterLoader(model, use_safetensors=True), name, folder / name)
        if case.head:
            adapters.loading.PredictionHeadLoader(model, False, use_safetensors=True).save(str(folder / name), name)
    if case.fusion is not None:
        save(model, adapters.loading.AdapterFusionLoader(model, use_safetensors=True), setup.name, folder / "fusion")
    batch = batch_of(case.seed + 500, model.config.vocab_size, (11, 7), "right")
    facts = {"model": model_name, "adapters": list(case.configs), "head": case.head, **batch}
    if case.fusion is not None:
        facts["fusion"] = setup.name
    if case.setup is not None:
        facts["compose"] = type(case.setup).__name__.lower()
    write_json(folder / "case.json", facts)
    expected = outputs(model, batch)
    save_tensors(folder / "expected.safetensors", expected)
    base = run(open_model(model_name), batch)
    model.set_active_adapters(None)
    assert case.head or torch.equal(run(model, batch), base), f"{folder}: the base moved"
    off = (expected[output_name(model)] - base).abs().max()
    assert off > 1e-2, f"{folder} does nothing"
    return f"{off:.3f} off the base"


def check(folder):
    """Loads what we wrote into `adapters` and compares its logits with ours; the largest difference."""
    facts = json.loads((folder / "case.json").read_text())
    model = open_model(facts["model"])
    for name in facts["adapters"]:
        info = {}
        model.load_adapter(str(folder / name), load_as=name, use_safetensors=True, loading_info=info, with_head=facts["head"])
        missing = [k for k in info["missing_keys"] if ".pool." not in k and not aliased(k)]
        assert not missing and not info["unexpected_keys"], f"{folder}: missing {missing}, unexpected {info['unexpected_keys']}"
    if "fusion" in facts:
        model.load_adapter_fusion(str(folder / "fusion"), use_safetensors=True)
        model.set_active_adapters(comp.Fuse(*facts["adapters"]))
    elif facts.get("compose") == "stack":
        model.set_active_adapters(comp.Stack(*facts["adapters"]))
    else:
        model.set_active_adapters(facts["adapters"][0])
    model.eval()
    theirs = outputs(model, {k: facts[k] for k in ("input_ids", "attention_mask")})[output_name(model)]
    from safetensors.torch import load_file

    ours = load_file(str(folder / "ours.safetensors"))["logits"]
    keep = torch.tensor(facts["attention_mask"]).bool() if theirs.dim() == 3 else slice(None)
    return (theirs - ours)[keep].abs().max().item()


def aliased(key):
    """Names of tensors that are there under another name as well."""
    return "prefix_tunings" in key and ".self." in key or "self_attn.prefix_tuning.pool" in key


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=root / "tests" / "goldens")
    parser.add_argument("--name", default="", help="part of a case's name")
    parser.add_argument("--check", type=Path, help="a folder of folders that we wrote")
    args = parser.parse_args()
    checked = args.check and args.check.resolve()
    os.chdir(args.out)
    torch.set_num_threads(1)
    if checked:
        gaps = {f.name: check(f) for f in sorted(checked.iterdir()) if args.name in f.name}
        for name, gap in gaps.items():
            print(f"{name}: off by {gap:.1e}", flush=True)
        bad = [name for name, gap in gaps.items() if not gap < 1e-4]
        print(f"{len(gaps) - len(bad)} of {len(gaps)} agree" + (f"; not: {', '.join(bad)}" if bad else ""))
        sys.exit(bool(bad))
    for case in cases():
        for model in case.models:
            if args.name in f"{model}-{case.name}":
                print(f"{model}-{case.name}: {make(case, model)}", flush=True)


if __name__ == "__main__":
    main()
