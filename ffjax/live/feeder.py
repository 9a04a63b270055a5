"""A model of a live batch: its weights as they are now, and the programs that feed it prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ffjax.live.programs import PaddedChunk, live_programs
from ffjax.model import Transformer
from ffjax.parcel import Layout, as_words
from ffjax.parts import Parts
from ffjax.prefill.choice import Prefill
from ffjax.prefill.packed import blocks_of
from ffjax.prefill.packing import chunk_of_row
from pallas_kernels.gpu import INTERPRETER, Gpu

__all__ = ["Feeder"]


class Feeder:
    """Feeds chunks of prompts to a model, each to a row of its cache.

    It holds no arrays. What it takes and returns as `state` has a `cache` and a `last`: see
    `ffjax.live.state`.

    Attributes:
        parts: of the model, without arrays: those that are replaced need not stay.
        prefill: implementation of the prefill.
    """

    def __init__(self, model: Transformer, prefill: Prefill, rows: int, slots: int):
        """Compiles nothing yet.

        Args:
            model: the model.
            prefill: "pallas" or "xla".
            rows: B.
            slots: S.
        """
        parts = Parts.of(model)
        self._model, self._shapes = model, _shapes(parts)
        self.parts = parts._replace(state=())
        self.prefill: Prefill = prefill
        self._rows, self._slots = rows, slots
        self._gpu = Gpu.of(parts.device) or INTERPRETER
        self._programs: dict[int, Any] = {}

    @property
    def weights(self) -> tuple[Any, ...]:
        """The model's arrays as they are now: they may be replaced while the batch is there.

        Raises:
            ValueError: they are of other shapes or dtypes, or other ones.
        """
        now = Parts.of(self._model)
        if now.kinds is not self.parts.kinds and _shapes(now) != self._shapes:
            raise ValueError(
                f"A batch is compiled for its model's weights; those of {now.config.name} have "
                "another shape, dtype or structure than when the batch was made. Numbers may "
                "change; for other weights make another batch, or session."
            )
        return now.state

    def compile(self, size: int, state: Any, say: Callable[[], object]) -> None:
        """Compiles a chunk of P tokens, where it is not compiled yet.

        Args:
            size: P.
            state: that `fed` will be given, or one like it.
            say: called before it compiles.
        """
        if size in self._programs:
            return
        say()
        words, layout = self._sent(0, np.zeros(1, np.int32), 0, True, size)
        args = self.parts.graphdef, self.weights, state, words
        programs = live_programs(self.parts.device)
        self._programs[size] = (
            programs.feed_packed.get(*args, layout=layout, gpu=self._gpu)
            if self.prefill == "pallas"
            else programs.feed_padded.get(*args, layout=layout)
        )

    def fed(
        self,
        weights: tuple[Any, ...],
        state: Any,
        row: int,
        tokens: np.ndarray,
        first: int,
        ends: bool,
        size: int,
    ) -> Any:
        """Orders one chunk.

        Args:
            weights: the model's arrays.
            state: where the model's sequences are; used up.
            row: whose tokens.
            tokens: int32 `[n]`, n from 1 to `size`.
            first: position of the first one: the length of the row's cache.
            ends: whether the prompt ends with them.
            size: P, for which it is compiled.

        Returns:
            The state after it.
        """
        words, _ = self._sent(row, tokens, first, ends, size)
        return self._programs[size](weights, state, words)

    def _sent(
        self, row: int, tokens: np.ndarray, first: int, ends: bool, size: int
    ) -> tuple[np.ndarray, Layout]:
        """Some tokens of a row, as they are sent."""
        if self.prefill == "pallas":
            blocks = blocks_of(self.parts.config, self.parts.dtype, self._gpu, size)
            chunk = chunk_of_row(
                tokens,
                row,
                first,
                batch=self._rows,
                ends=ends,
                size=size,
                capacity=self._slots,
                tile=blocks.queries,
            )
        else:
            padded = np.zeros((1, size), np.int32)
            padded[0, : len(tokens)] = tokens
            chunk = PaddedChunk(padded, np.array([len(tokens)], np.int32))
        return as_words((chunk, np.int32(row)))


def _shapes(parts: Parts) -> tuple[Any, ...]:
    """Structure, shapes and dtypes of a model."""
    return parts.graphdef, [(array.shape, array.dtype) for array in parts.state]
