"""Kernels in which one program skips a hand-over, as a fault of ours would have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from jax.experimental import pallas as pl

from pallas_kernels.stream import exchange
from pallas_kernels.stream.exchange import Exchange
from pallas_kernels.stream.exchange_layout import Layout

__all__ = ["FEW_LOOKS", "skipping"]

# Looks before a program gives up: some ms instead of seconds.
FEW_LOOKS = 1 << 14


@contextlib.contextmanager
def skipping(buffer: str, tag: int, program: int | None = None) -> Iterator[None]:
    """Steps traced meanwhile lack the words of one hand-over.

    Args:
        buffer: the field of `Layout` that they belong to.
        tag: of the hand-over: that of a layer in the first step is the layer's number and 1.
        program: whose words are lacking; None: everybody's.
    """

    def hidden(words: Exchange, at: Any, this: Any, mask: Any) -> Any:
        starts = sorted(getattr(words.layout, name) for name in Layout.__dataclass_fields__)
        first = getattr(words.layout, buffer)
        end = next(start for start in starts if start > first)
        lacking = (at >= first) & (at < end) & (this == tag)
        if program is not None:
            lacking &= pl.program_id(0) == program
        return mask & ~lacking

    def without(method: Any) -> Any:
        def publish(self: Exchange, offsets: Any, *values: Any) -> None:
            *numbers, this, mask = values
            method(self, offsets, *numbers, this, hidden(self, offsets, this, mask))

        return publish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "MAX_POLLS", FEW_LOOKS)
        for name in ("publish", "publish_half2", "publish_pair"):
            patch.setattr(Exchange, name, without(getattr(Exchange, name)))
        yield
