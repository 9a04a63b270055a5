"""What the scheduler needs of a batch: the part of `ffjax.live.LiveBatch` that it calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ffjax.sampling.params import SamplingParams

__all__ = ["Batch", "Chosen", "Ordered"]


class Chosen(Protocol):
    """A token, or `ffjax.loop.NOT_FINITE`, and its log-probabilities where a row asked for them."""

    @property
    def token(self) -> int:
        """Its id."""
        ...

    @property
    def logprobs(self) -> Any:
        """None, or an object with `logprob` and `top`, pairs of id and log-probability."""
        ...


class _Fed(Protocol):
    row: int
    done: bool
    fed: int

    def read(self) -> Chosen: ...


class Ordered(Protocol):
    """A block of steps that the device was told to run."""

    rows: tuple[int, ...]

    def read(self) -> Sequence[Mapping[int, Chosen]]:
        """Step by step, what each row got; waits for the device."""
        ...


class Batch(Protocol):
    """See `ffjax.live.LiveBatch`; one thread owns it."""

    rows: int
    capacity: int

    def warm_up(self) -> None:
        """Compiles whatever requests may need."""
        ...

    def place(
        self,
        row: int,
        tokens: Sequence[int],
        params: SamplingParams,
        eos: Sequence[int] = (),
        keep: int = 0,
    ) -> None:
        """A request enters a free row, whose cache holds the first `keep` tokens."""
        ...

    def feed(self) -> Any:
        """Orders a chunk of a prompt; None: none waits."""
        ...

    def decode(self) -> Ordered | None:
        """Orders a block of steps of all rows whose prompt is fed; None: there are none."""
        ...

    def release(self, row: int) -> None:
        """The row is free again."""
        ...
