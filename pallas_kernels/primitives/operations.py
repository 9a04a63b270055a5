"""Primitives of JAX that a kernel's body may have, and the effects that keep them in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax._src import effects, state
from jax._src.pallas import core as pallas_core
from jax.core import ShapedArray
from jax.extend.core import Primitive

__all__ = ["ORDERED", "Primitive", "effectful", "made", "pure", "reads", "writes"]


class _Ordered(effects.Effect):
    """That of what the kernel does besides computing."""


ORDERED = _Ordered()
"""Nothing with this effect is dropped, merged or moved across another that has it."""
pallas_core.kernel_local_effects.add_type(_Ordered)
effects.control_flow_allowed_effects.add_type(_Ordered)


def reads(number: int) -> Any:
    """The effect of reading the operand of that number, a ref."""
    return state.ReadEffect(number)


def writes(number: int) -> Any:
    """The effect of writing it."""
    return state.WriteEffect(number)


def made(shape: Sequence[int], dtype: Any) -> ShapedArray:
    """What a rule says of a result: its shape and dtype."""
    return ShapedArray(tuple(shape), jnp.dtype(dtype))


def effectful(name: str, rule: Callable[..., Any], *, results: bool = True) -> Primitive:
    """A primitive with effects.

    Args:
        name: the primitive's.
        rule: of the operands' shapes and the parameters: what is made, see `made`, and a set of
            effects.
        results: whether the rule gives a list of results, and not a single one.
    """
    primitive = Primitive(name)
    primitive.multiple_results = results
    primitive.def_effectful_abstract_eval(rule)
    return primitive


def pure(name: str, rule: Callable[..., Any], *, results: bool = True) -> Primitive:
    """A primitive that only computes: likewise, without effects."""
    primitive = Primitive(name)
    primitive.multiple_results = results
    primitive.def_abstract_eval(rule)
    return primitive
