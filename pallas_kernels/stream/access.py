"""What a kernel's body does to arrays and to its threads, whichever compiler takes it."""

from __future__ import annotations

from typing import Any

from jax import Array
from jax._src import core
from jax._src.pallas import primitives

from pallas_kernels.stream.ptx import lowered

__all__ = ["load", "meet", "store"]


def load(ref: Any, *, mask: Array | None = None, other: Any = None) -> Array:
    """Elements of a ref, `ref.at[...]`.

    Args:
        ref: with its indices.
        mask: which are loaded: bool; None: all.
        other: what stands for those that are not.
    """
    return primitives.load(ref, None, mask=mask, other=other)


def store(ref: Any, value: Array, *, mask: Array | None = None) -> None:
    """Stores elements of a ref, `ref.at[...]`.

    Args:
        ref: with its indices.
        value: what is stored.
        mask: which are: bool; None: all.
    """
    primitives.store(ref, None, value, mask=mask)


_meet_p = core.Primitive("ffjax_meet")
_meet_p.multiple_results = True


@_meet_p.def_effectful_abstract_eval
def _():
    return [], {lowered.ORDERED}


@lowered.rule(_meet_p)
def _(ctx):
    lowered.barrier()
    return []


def meet() -> None:
    """Waits for the program's other threads; what they wrote to shared memory is there then."""
    _meet_p.bind()
