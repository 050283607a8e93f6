"""Goldens of ggml's block formats, made by the `gguf` package (0.19.0) and numpy.

Writes to crates/peft-tensor/testdata:
  gguf_<format>.bin         the blocks, then the values they decode to (f32)
  gguf_encode_<format>.bin  the values (f32), then the blocks they encode to
The number of blocks follows from the file's size. Run: python gguf_blocks.py [OUT]
"""

import pathlib
import sys

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

# Byte offsets of the f16 scales of a block: random bits there would be infinite or NaN.
SCALES = {
    T.F16: [0], T.BF16: [], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}
ENCODED = [T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0]


def scales(rng, n):
    """f16 scales of both signs, some subnormal, some zero."""
    values = rng.normal(size=n) * 10.0 ** rng.integers(-7, 2, size=n)
    values[::7] = 0
    return values.astype(np.float16).view(np.uint8).reshape(n, 2)


def decoded(rng, kind):
    length, size = GGML_QUANT_SIZES[kind]
    n = 512 if length == 1 else 3 if length == 256 else 12
    blocks = rng.integers(0, 256, size=(n, size), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = scales(rng, n)
    if kind == T.BF16:
        blocks[(blocks[:, 1] & 127) == 127, 1] = 1
    return blocks.tobytes() + dequantize(blocks, kind).astype("<f4").tobytes()


def encoded(rng, kind):
    values = (rng.normal(size=(12, 32)) * 10.0 ** rng.integers(-6, 3, size=(12, 1))).astype(np.float32)
    values[0] = 0
    values[1] = 0.25
    values[2, :16] = 0
    values[3] = np.abs(values[3])
    # Ties of the rounding, and equal magnitudes of both signs.
    values[4] = np.arange(-16, 16) / 2
    values[5] = np.where(np.arange(32) % 2, -1.5, 1.5)
    return values.tobytes() + quantize(values, kind).tobytes()


def main():
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "crates/peft-tensor/testdata")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20)
    for kind in SCALES:
        (out / f"gguf_{kind.name.lower()}.bin").write_bytes(decoded(rng, kind))
    for kind in ENCODED:
        (out / f"gguf_encode_{kind.name.lower()}.bin").write_bytes(encoded(rng, kind))


main()
