"""JAX's configuration, as this library's own arithmetic wants it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["own_settings", "program_settings"]


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """What is traced and called within it is the same whatever JAX's configuration says.

    Strict promotion of dtypes and ranks, and a guard against transfers, look for slips in a
    program's own arithmetic; a library's mixed dtypes, broadcasting and constants are none.
    Which of its two ways Threefry fills an array is decided when a program is lowered, by nothing
    that a key or a function of `jax.random` could say.

    Also a decorator.
    """
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
        jax.threefry_partitionable(True),
    ):
        yield


@contextlib.contextmanager
def program_settings() -> Iterator[None]:
    """`own_settings`, for programs that are compiled as a whole and whose results are looked at.

    Without jit there is no program to compile. Where logits are NaN or infinite, the generation
    says so, with what came before; JAX's own look at every result would break it off within.
    """
    with own_settings(), jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        yield
