"""Compiled programs, kept by what they were compiled for."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jax import Array

__all__ = ["Programs", "forget_programs", "kind_of", "temp_bytes"]


class Programs:
    """What a jitted function has been compiled to.

    `jax.jit` finds its program anew at each call, by hashing a model's structure among others,
    and `lower` writes the whole program down once more before it finds that it is compiled. Here
    a request looks once, and then calls what it found.
    """

    def __init__(self, function: Any):
        """Takes a jitted function."""
        self._function = function
        self._compiled: dict[Any, Any] = {}
        self._known: dict[Any, Any] = {}
        _all.add(self)

    def get(self, *args: Any, known_by: Hashable = None, **static: Any) -> Any:
        """The program for arguments of these shapes, dtypes and devices; compiled if it has to be.

        Args:
            args: of the function: pytrees of arrays, but for one that is static and comes first,
                `graphdef`.
            known_by: what shapes, dtypes and devices of all arguments, and the static ones, follow
                from. They are looked at only where no program is known by it. None: they are.
            static: its static arguments.

        Returns:
            The program. It takes the arguments that are not static. With weights on several devices
            jit chooses how results are sharded, so that a program which was compiled for the first
            inputs may not take the next ones: then it is jit's own function.
        """
        if known_by is None:
            return self._found(args, static)
        program = self._known.get(known_by)
        if program is None:
            program = self._known[known_by] = self._found(args, static)
        return program

    def _found(self, args: tuple[Any, ...], static: dict[str, Any]) -> Any:
        graphdef, *arrays = args
        leaves, structure = jax.tree.flatten(arrays)
        if any(len(leaf.sharding.device_set) > 1 for leaf in leaves if isinstance(leaf, Array)):
            self._function.lower(*args, **static).compile()  # jit finds it, at its first call
            return functools.partial(self._function, graphdef, **static)
        key = (graphdef, structure, tuple(map(kind_of, leaves)), tuple(sorted(static.items())))
        program = self._compiled.get(key)
        if program is None:
            program = self._function.lower(*args, **static).compile()
            self._compiled[key] = program
        return program


_all: weakref.WeakSet[Programs] = weakref.WeakSet()


def forget_programs() -> None:
    """Lets go of all programs that are kept in this process; `jax.clear_caches` does not."""
    for programs in _all:
        programs._compiled.clear()
        programs._known.clear()


def kind_of(leaf: Any) -> tuple[Any, ...]:
    """What of an array a program depends on; one of numpy goes where the others are."""
    if not isinstance(leaf, Array):
        return leaf.shape, leaf.dtype
    # Whether an array may be moved to where the others are is not told by its sharding.
    return jax.typeof(leaf), leaf.sharding, leaf.committed


def temp_bytes(programs: Iterable[Any]) -> int:
    """Most bytes that one of some programs has for intermediates; 0 of what is not compiled yet."""
    known = (getattr(program, "memory_analysis", lambda: None)() for program in programs)
    return max((one.temp_size_in_bytes for one in known if one is not None), default=0)
