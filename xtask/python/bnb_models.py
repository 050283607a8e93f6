"""Tiny random models that bitsandbytes 0.50.2 quantised and transformers 5.23 saved, with their logits.

Writes to crates/peft-models/testdata: bnb_nf4, bnb_fp4 and bnb_int8, each a folder with config.json, model.safetensors
and golden.safetensors (input_ids, logits). The logits are those of the dequantised weights in f32: with fewer rounding
steps than bitsandbytes' own products, which are bf16 or int8 on some processors. Run: python bnb_models.py [OUT]
"""

import pathlib
import sys
import tempfile

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
)
KINDS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def dequantised(weight):
    if isinstance(weight, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "crates/peft-models/testdata")
    torch.manual_seed(3)
    ids = torch.randint(0, 40, (2, 9))
    plain = AutoModelForCausalLM.from_config(CONFIG)
    for kind, config in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
            model.save_pretrained(out / f"bnb_{kind}")
            float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        count = 0
        for name, module in model.named_modules():
            if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                float_model.get_submodule(name).weight.data = dequantised(module.weight).float()
                count += 1
        with torch.no_grad():
            logits, own = float_model(ids).logits, model(ids).logits
        print(kind, count, "modules; bitsandbytes' own forward differs by", (logits - own).abs().max().item())
        save_file({"input_ids": ids, "logits": logits}, out / f"bnb_{kind}" / "golden.safetensors")
        (out / f"bnb_{kind}" / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
