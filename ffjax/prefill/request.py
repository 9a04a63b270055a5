"""What the prefill of one request is, whoever runs it."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

from jax import Array

from ffjax.cache import KVCache
from ffjax.parts import Parts
from ffjax.prefill.first import Sampling
from ffjax.programs import Programs, temp_bytes

__all__ = ["Prefill", "RequestPrefill"]

Prefill = Literal["pallas", "xla"]
"""Implementations: "pallas", packed tokens and a flash attention in Pallas, `ffjax.prefill.packed`;
"xla", the reference model, `ffjax.prefill.padded`."""


class RequestPrefill(abc.ABC):
    """The prefill of one request: chunks, and a program for each of their sizes."""

    name: ClassVar[Prefill]

    def __init__(self, parts: Parts, sampling: Sampling, *, greedy: bool):
        """Compiles nothing yet.

        Args:
            parts: the model.
            sampling: how the first token is chosen.
            greedy: take the likeliest token.
        """
        self._parts, self._sampling, self._greedy = parts, sampling, greedy
        self._compiled: dict[int, Any] = {}

    def _compile(self, programs: Programs, size: int, *args: Any, **static: Any) -> None:
        """Finds or makes the program for chunks of a size, which takes such arguments."""
        graphdef = self._parts.graphdef
        self._compiled[size] = programs.get(graphdef, *args, greedy=self._greedy, **static)

    @property
    def temp_bytes(self) -> int:
        """Most bytes that one of the compiled programs has for intermediates."""
        return temp_bytes(self._compiled.values())

    @abc.abstractmethod
    def compile(self, cache: KVCache) -> None:
        """Compiles what `run` needs, ahead of it, for such a cache."""

    @abc.abstractmethod
    def run(self, cache: KVCache) -> tuple[KVCache, Array]:
        """Feeds the prompts; returns the cache and the first new tokens, int32 `[B]`."""
