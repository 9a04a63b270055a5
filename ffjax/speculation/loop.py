"""The device's side of a generation that speculates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ffjax.decode import Implementation, step_fault, why_not_fused
from ffjax.loop import Loop, Made, Reader, Step
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.requests import Request
from ffjax.settings import program_settings
from ffjax.speculation.block import Bounds, Going, Source, speculative_block
from ffjax.speculation.lines import Lines

__all__ = ["SpeculativeLoop"]


@functools.cache
def _programs(device: Any) -> Programs:
    jitted = jax.jit(
        speculative_block,
        static_argnames=("graphdef", "stages", "implementation", "source"),
        donate_argnames=("going",),
        compiler_options=compiler_options(device),
    )
    return Programs(jitted)


def _known(request: Request, slots: int) -> np.ndarray:
    """The prompts, int32 `[B, S]`."""
    known = np.zeros((request.batch, slots), np.int32)
    for row, prompt in zip(known, request.prompts, strict=True):
        row[: len(prompt)] = prompt
    return known


class SpeculativeLoop(Loop):
    """A `Loop` whose steps take drafts beside the token that is certain."""

    def __init__(
        self,
        model: Transformer,
        request: Request,
        source: Source,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
    ):
        """Compiles what is not compiled yet.

        Args:
            model: the model.
            request: what is asked for.
            source: where drafts come from, its `tokens` chosen.
            implementation: of the decode steps; see `ffjax.decode_step`.
            prefill: of the prefill; see `ffjax.generate`.

        Raises:
            ValueError: as `Loop`.
            NotImplementedError: as `Loop`; or a fused step of so many tokens cannot run here.
        """
        assert source.tokens is not None, "T is chosen for a batch"
        self._source, self.step_tokens = source, source.tokens
        super().__init__(model, request, implementation, prefill)

    def _prepare(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        prefill: Prefill | None,
    ) -> None:
        super()._prepare(model, request, implementation, prefill)
        batch, slots = self._cache.batch, self._cache.capacity
        if self.implementation == "pallas":
            reason = why_not_fused(model, batch, slots, self.step_tokens)
            if reason is not None:
                raise NotImplementedError(
                    f"Speculation runs steps of {self.step_tokens} tokens of each sequence. "
                    f"{reason} Or leave speculation out."
                )
        self._known = jax.device_put(_known(request, slots))
        # The cache holds the prompt when an answer has its first token.
        begins = np.array([len(prompt) - 1 for prompt in request.prompts], np.int32)
        ends = begins + np.array(request.limits, np.int32)
        self._bounds = jax.device_put(Bounds(begins, ends))

    def _block_args(self) -> tuple[Any, ...]:
        going = Going(self._cache, self._known, self._token, self._history)
        return self._parts.state, going, self._bounds, self._rows

    def _compiled_block(self) -> Any:
        how = {"stages": self._stages, "implementation": self.implementation}
        programs = _programs(self._device)
        return programs.get(self._parts.graphdef, *self._block_args(), **how, source=self._source)

    def decode(self) -> Made:
        """Orders a block of steps; returns the new tokens, int32 `[BLOCK, B, T]`."""
        with jax.default_device(self._device), program_settings():
            going, made = self._block(*self._block_args())
        self._cache, self._known, self._token, self._history = going
        return made.sent()

    def rows(self, blocks: int, reader: Reader) -> Iterator[Step]:
        """Runs up to so many blocks: see `Loop.rows`."""
        lines = Lines(self._request.batch, reader)
        return lines.taken(self._blocks(blocks, lines.would_finish))

    def fault(self) -> str | None:
        """What a step that gave up waiting has said, a sentence; None if none did."""
        if (said := super().fault()) is not None or self.implementation != "pallas":
            return said
        fault = step_fault(self._model, self._cache, self.step_tokens)
        return None if fault is None else str(fault)
