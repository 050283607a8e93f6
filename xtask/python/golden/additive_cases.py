"""IA3, SHiRA, trained tokens and the soft prompts beyond the foundation's."""

from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    IA3Config,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    TrainableTokensConfig,
)

from .cases import small
from .reparam_cases import CLS, FEATURES, LM, QV, made


def ia3_cases():
    """Outputs scaled, and inputs of the feed-forward's last layer."""
    ia3 = lambda task=LM, **k: made(IA3Config, task, **k)  # noqa: E731
    loud = dict(noise=0.4)
    yield small("llama-ia3", "llama", 1501, ia3(), pad="right", **loud, notes="HF's default targets")
    yield small("gpt2-ia3", "gpt2", 1502, ia3(), pad="right", **loud, notes="HF's default targets; Conv1D with a scaled bias")
    yield small("bert-cls-ia3", "bert-cls", 1503, ia3(CLS), pad="right", **loud,
               notes="output.dense matches the attention's output too: both scale their input")
    yield small("qwen2-ia3-output", "qwen2", 1504, ia3(
        target_modules=["k_proj", "up_proj", "down_proj"], feedforward_modules=["up_proj"], modules_to_save=["norm"]), **loud,
        notes="down_proj is no feed-forward module here: its output is scaled; k_proj's bias is scaled")
    yield small("bert-ia3-regex", "bert", 1505, ia3(
        FEATURES, target_modules=r".*layer\.[01]\.(attention\.self\.value|intermediate\.dense)", feedforward_modules=r".*intermediate.*"),
        pad="right", **loud)


def shira_cases():
    """Sparse changes with their places in the file."""
    shira = lambda task=LM, **k: made(ShiraConfig, task, **k)  # noqa: E731
    yield small("llama-shira", "llama", 1511, shira(r=1, random_seed=7, target_modules=QV), pad="right")
    yield small("qwen2-shira", "qwen2", 1512, shira(r=2, random_seed=2**33 + 1, target_modules=["k_proj", "o_proj"]), pad="right")
    yield small("bert-cls-shira", "bert-cls", 1513, shira(CLS, r=2, target_modules=["query", "output.dense"]), pad="right",
               notes="no seed: the places are the file's")


def token_cases():
    """Rows of the embedding as a method of its own."""
    tokens = lambda task=LM, **k: made(TrainableTokensConfig, task, **k)  # noqa: E731
    yield small("llama-tokens", "llama", 1521, tokens(token_indices=list(range(0, 40, 3))), pad="right")
    yield small("llama-tied-tokens", "llama-tied", 1522, tokens(token_indices=[5, 0, 11, 40]), pad="right",
               notes="tied: the same rows replace both sides, and are in the file twice")
    yield small("gpt2-tokens", "gpt2", 1523, tokens(token_indices=list(range(1, 50, 4)), target_modules=["wte"]), pad="right")
    yield small("bert-cls-tokens", "bert-cls", 1524, tokens(
        CLS, token_indices=list(range(90)), target_modules=["word_embeddings"]), pad="right", noise=0.4)


def prompt_cases():
    """Prompts from encoders, by task, with gates, in context."""
    loud = dict(merge="no", noise=0.5)
    encoder = lambda task=LM, **k: made(PromptEncoderConfig, task, **k)  # noqa: E731
    yield small("llama-ptuning", "llama", 1531, encoder(num_virtual_tokens=3, encoder_hidden_size=9), pad="right", **loud,
               notes="the encoder's output is what is saved")
    yield small("gpt2-ptuning-lstm", "gpt2", 1532, encoder(
        num_virtual_tokens=5, encoder_hidden_size=7, encoder_reparameterization_type="LSTM", encoder_num_layers=2,
        encoder_dropout=0.3), pad="right", **loud)
    yield small("bert-cls-ptuning", "bert-cls", 1533, encoder(CLS, num_virtual_tokens=2, encoder_hidden_size=24), pad="right", **loud)

    multi = lambda task=LM, **k: made(MultitaskPromptTuningConfig, task, **k)  # noqa: E731
    yield small("llama-mpt", "llama", 1541, multi(num_virtual_tokens=3, num_tasks=4, num_ranks=2), pad="right", task_ids=[3, 1], **loud)
    yield small("gpt2-mpt", "gpt2", 1542, multi(num_virtual_tokens=2, num_tasks=2, num_ranks=1), task_ids=[0, 1], **loud)
    yield small("bert-cls-mpt", "bert-cls", 1543, multi(CLS, num_virtual_tokens=5, num_tasks=3, num_ranks=3), pad="right",
               task_ids=[2, 2], **loud)

    gates = lambda task=LM, **k: made(AdaptionPromptConfig, task, **k)  # noqa: E731
    yield small("llama-adaption", "llama", 1551, gates(adapter_len=3, adapter_layers=2), pad="right", **loud)
    yield small("llama-tied-adaption", "llama-tied", 1552, gates(adapter_len=5, adapter_layers=1), pad="left", **loud)
    yield small("gpt2-adaption", "gpt2", 1553, gates(adapter_len=2, adapter_layers=3), pad="right", **loud,
               notes="HF adds the prompt's share behind GPT-2's output projection, which it does not pass")

    cpt = lambda **k: made(CPTConfig, LM, **k)  # noqa: E731
    yield small("llama-cpt", "llama", 1561, cpt(
        cpt_token_ids=[5, 9, 2, 33, 17, 8], cpt_mask=[1] * 6, cpt_tokens_type_mask=[1, 2, 2, 3, 4, 4],
        opt_projection_epsilon=20.0, opt_projection_format_epsilon=9.0), pad="right", **loud,
        notes="rows of types 1 and 3 are held within one radius, 2 within the other, 4 (labels) where they were")
    yield small("gpt2-cpt", "gpt2", 1562, cpt(
        cpt_token_ids=[7, 30, 4, 11], cpt_tokens_type_mask=[1, 6, 3, 8], opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.8, opt_projection_epsilon=15.0, opt_projection_format_epsilon=12.0), **loud)

    yield small("qwen2-cpt", "qwen2", 1563, cpt(
        cpt_token_ids=[40, 3, 3, 12, 60], cpt_mask=[1, 1, 0, 1, 1], cpt_tokens_type_mask=[5, 6, 0, 7, 8],
        opt_projection_epsilon=30.0, opt_projection_format_epsilon=25.0), pad="left", **loud)

    yield small("bert-prefix", "bert", 1571, made(PrefixTuningConfig, FEATURES, num_virtual_tokens=4), pad="right", **loud)
    yield small("bert-cls-prefix-projection", "bert-cls", 1572, made(
        PrefixTuningConfig, CLS, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=11), pad="right", **loud)
    yield small("qwen2-prefix", "qwen2", 1573, made(PrefixTuningConfig, LM, num_virtual_tokens=5), pad="left", **loud)
    yield small("llama-prompt-text", "llama", 1574, made(
        PromptTuningConfig, LM, num_virtual_tokens=7, prompt_tuning_init="TEXT", prompt_tuning_init_text="say what it is",
        tokenizer_name_or_path="tokenizers/words"), pad="right", **loud, notes="a loaded adapter needs no tokenizer")


def cases():
    """All of them."""
    yield from ia3_cases()
    yield from shira_cases()
    yield from token_cases()
    yield from prompt_cases()
