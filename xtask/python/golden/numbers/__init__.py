"""Numbers for methods that Hugging Face PEFT has not: from the papers' formulas, in double precision.

Each makes an adapter's tensors under their documented keys, works out what they do to a tiny model's weights or hidden
states, and runs that model in f64. Nothing here is the code under test, nor made from it.
"""

from . import hidden, weights


def numbers():
    """All of them."""
    yield from weights.numbers()
    yield from hidden.numbers()
