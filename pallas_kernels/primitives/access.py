"""Loads and stores of a kernel's arrays, with masks."""

from __future__ import annotations

from typing import Any

from jax import Array
from jax._src.pallas import primitives

__all__ = ["load", "store"]


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
