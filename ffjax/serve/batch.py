"""What the scheduler needs of a batch: the part of `ffjax.live.LiveBatch` that it calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ffjax.sampling.params import SamplingParams

__all__ = ["Batch", "Block", "Chosen", "Fed"]


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

    @property
    def drafted(self) -> bool:
        """Whether it was a draft that was right."""
        ...


class Fed(Protocol):
    """A chunk of a prompt that the device was told to feed."""

    @property
    def row(self) -> int:
        """Whose it is."""
        ...

    @property
    def done(self) -> bool:
        """Whether the prompt ends with it."""
        ...

    @property
    def fed(self) -> int:
        """Tokens in it."""
        ...

    def read(self) -> Chosen:
        """The first new token, where it is done; waits for the device."""
        ...


class Block(Protocol):
    """Steps that the device was told to run."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Which rows take part."""
        ...

    def read(self) -> Sequence[Mapping[int, Any]]:
        """Step by step, what each row got, where it got something; waits for the device."""
        ...


class Batch(Protocol):
    """See `ffjax.live.LiveBatch`; one thread owns it."""

    rows: int
    capacity: int
    block: int

    def check(self, tokens: Sequence[int], params: SamplingParams) -> object:
        """Refuses a request that cannot be placed; asks nothing of the device."""
        ...

    def place(
        self,
        row: int,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        eos: Sequence[int] = (),
        keep: int = 0,
    ) -> None:
        """A request enters a free row, whose cache holds the first `keep` tokens."""
        ...

    def feed(self) -> Fed | None:
        """Orders a chunk of a prompt; None: none waits."""
        ...

    def decode(self) -> Block | None:
        """Orders a block of steps of all rows whose prompt is fed; None: there are none."""
        ...

    def fault(self) -> str | None:
        """What a kernel that gave up waiting has said; None if none did."""
        ...

    def release(self, row: int) -> None:
        """The row is free again."""
        ...
