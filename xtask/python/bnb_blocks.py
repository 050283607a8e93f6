"""Goldens of bitsandbytes' formats, made by bitsandbytes 0.50.2 and torch on the CPU.

Writes to crates/peft-tensor/testdata:
  bnb_nf4_<rows>x<cols>.bin   the values (f32), codes, scales (f32), the values they decode to (f32)
  bnb_fp4_<rows>x<cols>.bin   the same
  bnb_int8_<rows>x<cols>.bin  the values (f32), signed bytes, scales (f32), the values they decode to (f32)
  bnb_nested.bin              scales (f32), their 8-bit codes, second scales (f32), the offset (f32), the map (f32), the
                              scales that come back (f32)
Run: python bnb_blocks.py [OUT]
"""

import pathlib
import sys

import bitsandbytes.functional as F
import torch


def floats(*tensors):
    return b"".join(t.detach().float().contiguous().numpy().astype("<f4").tobytes() for t in tensors)


def values(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows * cols, generator=generator)
    # Scales far apart, a block of zeros, and ties: middles of neighbouring codes beside a block's largest value.
    x *= 10.0 ** torch.randint(-6, 3, (x.numel(),), generator=generator)[torch.arange(x.numel()) // 64]
    if x.numel() >= 320:
        x[64:128] = 0
        code = F.get_4bit_type("nf4", device="cpu")
        x[128:192] = 1
        x[128:143] = (code[:-1] + code[1:]) / 2
        x[143:159] = code
        x[160] = -0.0
    return x.view(rows, cols)


def four(kind, rows, cols, seed):
    x = values(rows, cols, seed)
    if kind == "nf4" and (rows, cols) == (1, 65):
        x[0, 64] = 0  # the last block is one zero
    codes, state = F.quantize_4bit(x, quant_type=kind, blocksize=64)
    back = F.dequantize_4bit(codes, state)
    return floats(x) + codes.numpy().tobytes() + floats(state.absmax, back)


def int8(rows, cols, seed):
    x = values(rows, cols, seed)
    x[-1] = 0
    codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(x, 0.0)
    back = F.int8_vectorwise_dequant(codes, scales)
    return floats(x) + codes.numpy().tobytes() + floats(scales, back)


def nested():
    scales = torch.rand(260, generator=torch.Generator().manual_seed(9)) * 0.1
    offset = scales.mean()
    codes, state = F.quantize_blockwise(scales - offset, blocksize=256)
    back = F.dequantize_blockwise(codes, state) + offset
    return floats(scales) + codes.numpy().tobytes() + floats(state.absmax, offset.view(1), state.code, back)


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "crates/peft-tensor/testdata")
    out.mkdir(parents=True, exist_ok=True)
    for seed, (rows, cols) in enumerate([(8, 64), (5, 96), (7, 50), (5, 7), (1, 65), (3, 192)]):
        (out / f"bnb_nf4_{rows}x{cols}.bin").write_bytes(four("nf4", rows, cols, seed))
    (out / "bnb_fp4_5x96.bin").write_bytes(four("fp4", 5, 96, 7))
    (out / "bnb_int8_6x75.bin").write_bytes(int8(6, 75, 8))
    (out / "bnb_nested.bin").write_bytes(nested())


if __name__ == "__main__":
    main()
