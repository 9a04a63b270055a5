"""Requests to a live batch, and an owner who serves them."""

import dataclasses
import itertools

import numpy as np

from ffjax.live import Chosen, LiveBatch
from ffjax.sampling.params import SamplingParams

__all__ = ["KINDS", "Request", "prompt", "serve"]

KINDS = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    "penalties": {
        "temperature": 0.9,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
    },
    "greedy penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.6},
    "edits": {"logit_bias": {3: 5.0, 9: -4.0}, "bad_token_ids": (1, 2), "temperature": 0.7},
    "stops": {"stop_token_ids": tuple(range(0, 53, 4)), "min_tokens": 6, "temperature": 1.5},
}


def prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    """A prompt of random tokens."""
    return np.random.default_rng(seed).integers(vocab_size, size=length).tolist()


@dataclasses.dataclass
class Request:
    """A request, and what it has got."""

    tokens: list[int]
    params: SamplingParams
    count: int
    eos: tuple[int, ...] = ()
    got: list[Chosen] = dataclasses.field(default_factory=list)

    @property
    def over(self) -> bool:
        ends = {*self.params.stop_token_ids, *(() if self.params.ignore_eos else self.eos)}
        return len(self.got) == self.count or bool(self.got and self.got[-1].token in ends)

    def take(self, chosen: Chosen) -> None:
        if not self.over:
            self.got.append(chosen)

    @property
    def answer(self) -> list[int]:
        return [one.token for one in self.got]


def serve(batch: LiveBatch, requests: list[Request]) -> None:
    """Serves requests as they find rows, each block ordered before the last is read."""
    queue, rows, ordered = iter(requests), {}, None
    for turn in itertools.count():
        assert turn < 500
        for row in batch.free:
            if (one := next(queue, None)) is not None:
                batch.place(row, one.tokens, one.params, eos=one.eos)
                rows[row] = one
        fed = batch.feed()
        if fed is not None and fed.done:
            rows[fed.row].take(fed.read())
        owners = dict(rows)
        before, ordered = ordered, batch.decode()
        if ordered is not None:
            ordered = ordered, owners
        if before is not None:
            block, owned = before
            for step in block.read():
                for row, chosen in step.items():
                    owned[row].take(chosen)
        for row, one in [*rows.items()]:
            if one.over:
                batch.release(row)
                del rows[row]
        if not rows and ordered is None:
            return
