"""What the prefill of one request is, whoever runs it."""

from __future__ import annotations

import abc
from collections.abc import Hashable
from typing import Any, ClassVar, Literal

from ffjax.cache import KVCache
from ffjax.parts import Parts
from ffjax.programs import Programs, temp_bytes
from ffjax.sampling.choose import Choice
from ffjax.sampling.history import History
from ffjax.sampling.rows import Rows, Stages

__all__ = ["Prefill", "RequestPrefill"]

Prefill = Literal["pallas", "steps", "xla"]
"""Implementations: "pallas", packed tokens and a flash attention in Pallas, `ffjax.prefill.packed`;
"steps", fused decode steps of several tokens, `ffjax.prefill.stepwise`; "xla", the reference model,
`ffjax.prefill.padded`."""


class RequestPrefill(abc.ABC):
    """The prefill of one request: chunks, and a program for each of their sizes."""

    name: ClassVar[Prefill]

    def __init__(self, parts: Parts, rows: Rows, stages: Stages):
        """Compiles nothing yet.

        Args:
            parts: the model.
            rows: how the first token is chosen.
            stages: likewise.
        """
        self._parts, self._rows, self._stages = parts, rows, stages
        self._compiled: dict[int, Any] = {}

    def _compile(
        self, programs: Programs, size: int, like: Hashable, *args: Any, **static: Any
    ) -> None:
        """Finds or makes the program for chunks of a size, which takes such arguments."""
        static["stages"] = self._stages
        known_by = None
        if like is not None:
            known_by = self._parts.kinds, like, size, *static.values()
        args = self._parts.graphdef, *args
        self._compiled[size] = programs.get(*args, known_by=known_by, **static)

    @property
    def temp_bytes(self) -> int:
        """Most bytes that one of the compiled programs has for intermediates."""
        return temp_bytes(self._compiled.values())

    @abc.abstractmethod
    def compile(self, cache: KVCache, history: History | None, like: Hashable = None) -> None:
        """Compiles what `run` needs, ahead of it.

        Args:
            cache: one as `run` will have; it may be abstract.
            history: likewise.
            like: what the shapes of both follow from, beside the model and the stages; None: they
                are looked at.
        """

    @abc.abstractmethod
    def run(
        self, cache: KVCache, history: History | None
    ) -> tuple[KVCache, History | None, Choice]:
        """Feeds the prompts.

        Args:
            cache: an empty one; used up.
            history: an empty one, or None where no stage asks for it; used up.

        Returns:
            Both with the prompts, and the first new tokens.
        """
