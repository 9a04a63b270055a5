"""What the search, or somebody, has found: cases that were wrong, and neighbours that were right.

The GPU tests run them all. A case that the search prints goes in here as it is.
"""

from __future__ import annotations

from .draw import Case

__all__ = ["FOUND"]

_INT8, _INT4 = (8, 8, 8, 8, 16), (4, 4, 4, 4, 16)


def _narrow(
    layers: int, bits: tuple[int, ...], lengths: tuple[int, ...], vocab: int = 4096
) -> Case:
    """The sizes of SmolLM2-135M: most programs have no tile in any layer."""
    # int4 weights come in groups of 128, which 576 inputs are not.
    dim = 576 if bits == _INT8 else 512
    heads, kv_heads = (9, 3) if bits == _INT8 else (8, 4)
    return Case(
        layers=layers,
        model_dim=dim,
        ffw_dim=1536,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        bits=bits,
        lengths=lengths,
        capacity=64,
    )


_TWO, _EIGHT = (5, 17), (0, 1, 5, 17, 30, 31, 32, 40)

FOUND: dict[str, Case] = {
    "narrow, 30 layers, int8, 2": _narrow(30, _INT8, _TWO, 49_152),
    "narrow, 30 layers, int8, 8": _narrow(30, _INT8, _EIGHT),
    "narrow, 8 layers, int8, 2": _narrow(8, _INT8, _TWO),
    "narrow, 8 layers, int8, 8": _narrow(8, _INT8, _EIGHT),
    "narrow, 30 layers, int4, 2": _narrow(30, _INT4, _TWO),
    "narrow, 30 layers, int4, 8": _narrow(30, _INT4, _EIGHT),
    "narrow, 8 layers, int4, 2": _narrow(8, _INT4, _TWO),
    "narrow, 8 layers, int4, 8": _narrow(8, _INT4, _EIGHT),
    "512 wide, 30 layers, int8, 2": Case(
        layers=30,
        model_dim=512,
        ffw_dim=1536,
        heads=8,
        kv_heads=4,
        vocab=4096,
        bits=_INT8,
        lengths=_TWO,
    ),
    # These were right.
    "narrow, 4 layers, int8, 2": _narrow(4, _INT8, _TWO),
    "narrow, 30 layers, int8, 1": _narrow(30, _INT8, (5,)),
    "narrow, 30 layers, bfloat16, 2": Case(
        layers=30,
        model_dim=576,
        ffw_dim=1536,
        heads=9,
        kv_heads=3,
        vocab=4096,
        lengths=_TWO,
    ),
    "960 wide, int8, 2": Case(
        layers=30,
        model_dim=960,
        ffw_dim=2560,
        heads=15,
        kv_heads=5,
        vocab=4096,
        bits=_INT8,
        lengths=_TWO,
    ),
    "1024 wide, int8, 2": Case(
        layers=30,
        model_dim=1024,
        ffw_dim=2048,
        heads=16,
        kv_heads=8,
        vocab=4096,
        bits=_INT8,
        lengths=_TWO,
    ),
    "1024 wide, 3072, int4, 2": Case(
        layers=12,
        model_dim=1024,
        ffw_dim=3072,
        heads=16,
        kv_heads=8,
        vocab=4096,
        bits=_INT4,
        lengths=_TWO,
    ),
    # Found by the search: the last part of a split row in bfloat16 is shorter than the others, and
    # integers lie after it.
    "seed 91": Case(
        layers=2,
        model_dim=1152,
        ffw_dim=4352,
        heads=12,
        kv_heads=3,
        head_dim=128,
        vocab=3168,
        bits=(4, 4, 8, 16, 4),
        lengths=(7, 56),
        step=999,
        seed=91,
    ),
}
