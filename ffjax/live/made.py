"""What the device has made for a live batch, as its owner reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax

from ffjax.loop import NO_TOKEN, Made, Step
from ffjax.sampling.logprobs import TokenLogprobs
from ffjax.sampling.params import SamplingParams

__all__ = ["Block", "Chosen", "Fed", "Repeats"]


class Chosen(NamedTuple):
    """One new token of a sequence.

    Attributes:
        token: its id; `ffjax.loop.NOT_FINITE` where the logits were NaN or infinite.
        logprobs: None where the request did not ask.
        drafted: whether it came beside the first of its step, as a draft that was right.
    """

    token: int
    logprobs: TokenLogprobs | None
    drafted: bool = False


def _chosen(step: Step, at: int, params: SamplingParams, drafted: bool = False) -> Chosen:
    told = None
    if step.logprobs is not None and params.logprobs is not None:
        told = step.logprobs.of(at, params.logprobs)
    return Chosen(step.tokens[at], told, drafted)


class Fed(NamedTuple):
    """A chunk of a prompt that the device has orders to feed.

    Attributes:
        row: whose.
        fed: tokens in it.
        done: whether the prompt ends with it.
        made: the first new token, on the device; None while there is more to feed.
        params: of the sequence.
    """

    row: int
    fed: int
    done: bool
    made: Made | None
    params: SamplingParams

    def read(self) -> Chosen:
        """The first new token, of a chunk that ends a prompt; waits for the device."""
        if self.made is None:
            raise ValueError("The first new token comes when the whole prompt has been fed.")
        return _chosen(jax.device_get(self.made).step(), 0, self.params)


@dataclasses.dataclass
class Repeats:
    """Whether the texts of a batch seem to repeat themselves, so that drafts are worth a look.

    Attributes:
        seen: as far as blocks have been read.
    """

    seen: bool = True


class Block(NamedTuple):
    """Steps that the device has orders to run.

    Attributes:
        rows: which sequences take part.
        made: what came of them, on the device.
        params: of those sequences.
        repeats: is told what the block says of it; None without speculation.
    """

    rows: tuple[int, ...]
    made: Made
    params: tuple[SamplingParams, ...]
    repeats: Repeats | None = None

    def read(self) -> list[dict[int, Chosen]]:
        """The new tokens, step by step and by row; waits for the device.

        With speculation a step is as many as it has made tokens for a row at most, and a row is
        where it has one.
        """
        made = jax.device_get(self.made)
        each = [*zip(self.rows, self.params, strict=True)]
        if self.repeats is None:
            return [{row: _chosen(step, row, own) for row, own in each} for step in made.steps()]
        self.repeats.seen = made.repeats
        steps = (
            {
                row: _chosen(step, row, own, number > 0)
                for row, own in each
                if step.tokens[row] != NO_TOKEN
            }
            for number, step in _columns(made)
        )
        return [step for step in steps if step]


def _columns(made: Made) -> Iterator[tuple[int, Step]]:
    """Of tokens `[steps, B, T]`: step by step, the t-th token of each sequence, and t."""
    for i, step in enumerate(made.tokens):
        for t in range(step.shape[1]):
            told = jax.tree.map(lambda a, i=i, t=t: a[i, :, t], made.logprobs)
            yield t, Step(step[:, t].tolist(), told)
