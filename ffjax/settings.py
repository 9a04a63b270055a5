"""JAX's configuration, as this library's own arithmetic wants it."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax

__all__ = ["own_settings", "program_settings"]

_OWN: dict[str, tuple[Any, ...]] = {
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_numpy_rank_promotion": ("allow",),
    # None: as JAX's runtime has it, which allows transfers.
    "jax_transfer_guard": (None, "allow"),
    "jax_transfer_guard_host_to_device": (None, "allow"),
    "jax_transfer_guard_device_to_device": (None, "allow"),
    "jax_transfer_guard_device_to_host": (None, "allow"),
    "jax_threefry_partitionable": (True,),
}
"""What `own_settings` sets, and what says the same."""

_PROGRAMS: dict[str, tuple[Any, ...]] = {
    **_OWN,
    "jax_disable_jit": (False,),
    "jax_debug_nans": (False,),
    "jax_debug_infs": (False,),
}
"""The same of `program_settings`."""


def _look(settings: dict[str, tuple[Any, ...]]) -> Callable[[], bool]:
    """Asks whether all settings are as wanted already, in this thread.

    A request enters them several times. To look takes a third of the time of setting them.
    """
    values = operator.attrgetter(*settings)
    wanted = frozenset(itertools.product(*settings.values()))
    return lambda: values(jax.config) in wanted


_own_hold, _programs_hold = _look(_OWN), _look(_PROGRAMS)


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """What is traced and called within it is the same whatever JAX's configuration says.

    Strict promotion of dtypes and ranks, and a guard against transfers, look for slips in a
    program's own arithmetic; a library's mixed dtypes, broadcasting and constants are none.
    Which of its two ways Threefry fills an array is decided when a program is lowered, by nothing
    that a key or a function of `jax.random` could say.

    Also a decorator.
    """
    if _own_hold():
        yield
        return
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
    if _programs_hold():
        yield
        return
    with own_settings(), jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        yield
