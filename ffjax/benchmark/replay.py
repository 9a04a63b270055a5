"""Drafts that are right with a chance that is asked for: what speculation would be worth.

Random weights draft nothing that is right. Here the answer is known beforehand, and a draft is the
token of it, or another one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.decode import Implementation
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.requests import Request
from ffjax.speculation.draft import Draft
from ffjax.speculation.draft_loop import DraftLoop
from ffjax.speculation.drafting import ModelSource
from ffjax.speculation.loop import SpeculativeLoop
from ffjax.speculation.source import Choosing, Source
from pallas_kernels.support import MAX_BATCH

__all__ = ["Replay", "replay_loop"]

_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """A source that knows what comes. Its weights are those of `inner`, and what `_told` returns.

    Attributes:
        tokens: T.
        inner: a source that runs for its time alone; None: there is none.
    """

    tokens: int
    inner: Source | None = None
    always: bool = True

    def drafts(
        self, known: Array, lengths: Array, weights: Any, state: Any, choosing: Choosing | None
    ) -> tuple[Array, Array, Any]:
        """Drafts of what comes next, as `Source` says: all of them count."""
        mine, (truth, right) = weights
        ahead = lengths[:, None] + jnp.arange(self.tokens - 1)
        drafts = jnp.take_along_axis(truth, ahead, axis=1, mode="clip")
        if self.inner is not None:
            found, _, state = self.inner.drafts(known, lengths, mine, state, choosing)
            # Never so: but for XLA, what is found is needed.
            drafts = jnp.where(drafts == _NO_TOKEN, found, drafts)
        wrong = jnp.where(drafts > 0, drafts - 1, 1)
        drafts = jnp.where(right[lengths, : self.tokens - 1], drafts, wrong)
        return drafts, jnp.full(lengths.shape, self.tokens - 1, jnp.int32), state


def _told(request: Request, answers: list[list[int]], slots: int, chance: float) -> Any:
    """The texts int32 `[B, S]`, and whether drafts are right, bool `[S, 8]`, by a text's length."""
    texts = np.zeros((request.batch, slots), np.int32)
    for row, prompt, answer in zip(texts, request.prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    right = np.random.default_rng(0).random((slots, MAX_BATCH)) < chance
    return jax.device_put((texts, right))


def replay_loop(
    model: Transformer,
    request: Request,
    answers: list[list[int]],
    chance: float,
    tokens: int,
    *,
    draft: Transformer | None = None,
    implementation: Implementation | None = None,
    prefill: Prefill | None = None,
) -> SpeculativeLoop:
    """A generation whose drafts are right with a chance.

    Args:
        model: the model.
        request: what is asked for.
        answers: what the model says, of each prompt.
        chance: of each draft after right ones to be right, 0 to 1.
        tokens: T.
        draft: a draft model that runs beside, and whose drafts are not taken; None: there is none.
        implementation: of the decode steps.
        prefill: of the prefill.
    """

    def told(loop: Any) -> None:
        loop._weights = loop._weights, _told(request, answers, loop.cache.capacity, chance)

    class Alone(SpeculativeLoop):
        def _prepare(self, *args: Any, **how: Any) -> None:
            super()._prepare(*args, **how)
            told(self)

    class WithDraft(DraftLoop):
        def _prepare(self, *args: Any, **how: Any) -> None:
            super()._prepare(*args, **how)
            told(self)

    how = implementation, prefill
    if draft is None:
        return Alone(model, request, Replay(tokens=tokens), *how)

    def make(**fields: Any) -> Replay:
        return Replay(tokens=tokens, inner=ModelSource(**fields))

    return WithDraft(model, request, Draft(draft, tokens), *how, make=make)
