"""The device's side of a generation that speculates."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ffjax.decode import Implementation, is_fused
from ffjax.loop import AHEAD, Loop, Made, Reader, Step, slots_for
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.requests import Request
from ffjax.settings import program_settings
from ffjax.speculation.block import Bounds, Going, plain_block, speculative_block
from ffjax.speculation.fused import check_fused
from ffjax.speculation.lines import Lines
from ffjax.speculation.source import Source

__all__ = ["SpeculativeLoop"]


@functools.cache
def _programs(device: Any) -> tuple[Programs, Programs]:
    """Those of blocks that speculate, and of blocks that do not."""

    def kept(function: Any) -> Programs:
        jitted = jax.jit(
            function,
            static_argnames=("graphdef", "steps", "stages", "implementation", "source"),
            donate_argnames=("going",),
            compiler_options=compiler_options(device),
        )
        return Programs(jitted)

    return kept(speculative_block), kept(plain_block)


def _known(request: Request, slots: int) -> np.ndarray:
    """The prompts, int32 `[B, S]`."""
    known = np.zeros((request.batch, slots), np.int32)
    for row, prompt in zip(known, request.prompts, strict=True):
        row[: len(prompt)] = prompt
    return known


class SpeculativeLoop(Loop):
    """A `Loop` whose steps take drafts beside the token that is certain.

    It has two programs: of blocks that speculate, and of plain ones, where nothing repeats. Where
    the source always has drafts it has one.
    """

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
        # What the source has on the device.
        self._weights: Any = None
        self._held: Any = None
        super().__init__(model, request, implementation, prefill)

    def _prepare(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        prefill: Prefill | None,
    ) -> None:
        super()._prepare(model, request, implementation, prefill)
        batch, slots = request.batch, slots_for(request.capacity)
        if is_fused(self.implementation):
            check_fused(model, batch, slots, self.step_tokens)
        self._known: Any = _known(request, slots)
        self._quiet = False
        # The cache holds the prompt when an answer has its first token.
        begins = np.array([len(prompt) - 1 for prompt in request.prompts], np.int32)
        ends = begins + np.array(request.limits, np.int32)
        self._bounds = Bounds(begins, ends)

    def _block_args(self) -> tuple[Any, ...]:
        going = Going(self._cache, self._known, self._token, self._history, self._held)
        return self._parts.state, going, self._bounds, self._rows, self._weights

    def _compiled_block(self) -> Any:
        how = {"steps": self.block, "stages": self._stages, "implementation": self.implementation}
        args = self._parts.graphdef, *self._block_args()
        # A plain block is ordered, if ever, when the first one has told how it went.
        many = self._request.max_new_tokens - 1 > (1 + AHEAD) * self.block
        needed = 1 + (many and not self._source.always)
        programs = _programs(self._device)[:needed]
        return [one.get(*args, **how, source=self._source) for one in programs]

    def _send(self) -> None:
        super()._send()
        self._known, self._bounds = jax.device_put((self._known, self._bounds))

    def decode(self) -> Made:
        """Orders a block of steps; returns the new tokens, int32 `[steps, B, T]`, or T = 1."""
        with jax.default_device(self._device), program_settings():
            going, made = self._block[self._quiet](*self._block_args())
        self._cache, self._known, self._token, self._history, self._held = going
        return made.sent()

    def rows(self, blocks: int, reader: Reader) -> Iterator[Step]:
        """Runs up to so many blocks: see `Loop.rows`.

        Where no draft of a block was right, and none is there after it, nothing seems to repeat:
        the next block that is ordered has plain steps.
        """
        lines = Lines(self._request.batch, reader)

        def ends(made: Made) -> bool:
            self._quiet = not made.repeats
            return lines.would_finish(made)

        return lines.taken(self._blocks(blocks, ends))
