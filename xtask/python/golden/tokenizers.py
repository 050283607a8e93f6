"""A tokenizer of whole words, small enough for the tiny models' vocabularies."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .common import fresh_dir

WORDS = "[UNK] [CLS] [SEP] say what it is the film was good bad great and not a review of this answer yes no".split()


def make():
    """Writes `tokenizers/words`: ids as in WORDS, `[CLS]` in front and `[SEP]` behind."""
    folder = fresh_dir("tokenizers/words")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(str(folder))
    return json.dumps(sorted(p.name for p in folder.iterdir()))
