"""From logits to tokens: all stages, in order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ffjax.sampling import edits
from ffjax.sampling.draw import KeysFrom, sample
from ffjax.sampling.filters import filtered
from ffjax.sampling.history import History
from ffjax.sampling.logprobs import LogProbs, log_probs
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.draw import DrawPlan, draw_tokens, make_draw_plan, no_board
from pallas_kernels.gpu import INTERPRETER

__all__ = ["NOT_FINITE", "Before", "Choice", "choose", "draws_by_kernel", "empty_board", "marked"]

# Of more sequences XLA draws at a temperature alone faster: on an H200, a text of the kernel before
# this one took 4.7 us and XLA 7.4 for 1 sequence, 14.6 and 5.7 for 8.
_MOST_WITHOUT_FILTERS = 2

NOT_FINITE = -1
"""What stands for a token whose logit is NaN or infinite; it stops its sequence."""


class Before(NamedTuple):
    """What a caller's own logits processor is told.

    Attributes:
        lengths: int32 `[B]`, how many tokens each answer holds.
        prompt: bool `[B, V]`, whether the prompt holds a token.
        counts: int32 `[B, V]`, how often the answer does.
    """

    lengths: Array
    prompt: Array
    counts: Array


class Choice(NamedTuple):
    """A token of each sequence.

    Attributes:
        token: int32 `[B]`; what is fed next, whatever its logit is.
        told: int32 `[B]`, the same, NOT_FINITE where the logit is.
        logprobs: None where nobody asked.
        board: what the kernel that draws is given next time; None where none draws.
    """

    token: Array
    told: Array
    logprobs: LogProbs | None
    board: Array | None


def marked(logits: Array, token: Array) -> Array:
    """The tokens int32 `[B]`, NOT_FINITE where the logit `[B, V]` of one is not finite.

    A NaN wins every choice of a token, as in `jnp.argmax`, so one among the logits is seen.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(chosen), token, NOT_FINITE)


def _edited(
    logits: Array, rows: Rows, history: History | None, index: Array, stages: Stages
) -> Array:
    if stages.edits:
        logits = edits.biased(logits, rows.edit_ids, rows.edit_values)
    if stages.forbids_stops:
        logits = edits.without_stops(logits, rows.stop_ids, index < rows.min_tokens)
    if stages.remembers:
        assert history is not None
        if stages.penalizes:
            logits = edits.penalized(logits, history, rows.penalties)
        for processor in stages.processors:
            logits = processor(logits, Before(index, *history))
    return logits


def _draw_plan(batch: int, vocab: int, stages: Stages) -> DrawPlan | None:
    """How the kernel draws; None where XLA does."""
    if stages.gpu is None or not stages.draws:
        return None
    if not stages.filters and batch > _MOST_WITHOUT_FILTERS:
        return None
    return make_draw_plan(batch, vocab, stages.gpu, filters=stages.filters)


def draws_by_kernel(batch: int, vocab: int, stages: Stages) -> bool:
    """Whether a kernel draws, which makes the keys of a draw itself."""
    return _draw_plan(batch, vocab, stages) is not None


def empty_board(batch: int, vocab: int, stages: Stages) -> Array | None:
    """What the first of some choices is given as `board`; None where no kernel draws."""
    plan = _draw_plan(batch, vocab, stages)
    return None if plan is None else no_board(plan)


def _drawn(
    logits: Array,
    likeliest: Array,
    rows: Rows,
    keys: Array | KeysFrom,
    board: Array | None,
    stages: Stages,
) -> tuple[Array, Array | None]:
    """Draws a token of each sequence, int32 `[B]`, by the kernel or, to the same effect, by XLA."""
    batch, vocab = logits.shape
    plan = _draw_plan(batch, vocab, stages)
    if plan is not None:
        own, first = keys if isinstance(keys, KeysFrom) else (keys, None)
        return draw_tokens(
            plan,
            logits,
            likeliest,
            jax.random.key_data(own),
            no_board(plan) if board is None else board,
            rows.temperature,
            rows.top_k,
            rows.nucleus,
            first,
            interpret=stages.gpu == INTERPRETER,
        )
    if stages.filters:
        logits = filtered(logits, rows.temperature, rows.top_k, rows.nucleus)
    assert not isinstance(keys, KeysFrom), "XLA knows no board that counts draws."
    return sample(logits, keys, rows.temperature), board


def choose(
    logits: Array,
    greedy: Array | None,
    rows: Rows,
    keys: Array | KeysFrom | None,
    history: History | None,
    index: Array,
    stages: Stages,
    board: Array | None = None,
) -> Choice:
    """Chooses a token of each sequence.

    Args:
        logits: float32 `[B, V]`, the model's.
        greedy: int32 `[B]`, the likeliest tokens, where a step has found them already.
        rows: the parameters.
        keys: typed keys `[B]` of this token; or what a kernel that draws makes them of, if
            `draws_by_kernel`. None where none is drawn.
        history: what came before; None where no stage asks.
        index: int32 `[B]`, how many tokens each answer holds.
        stages: which stages there are.
        board: of the choice before, in this program; None: there was none.
    """
    edited = _edited(logits, rows, history, index, stages)
    if greedy is not None and not stages.changes_logits:
        likeliest = greedy
    else:
        likeliest = jnp.argmax(edited, axis=-1).astype(jnp.int32)
    token = likeliest
    if stages.draws:
        assert keys is not None
        token, board = _drawn(edited, likeliest, rows, keys, board, stages)
    told = None if stages.logprobs is None else log_probs(logits, token, stages.logprobs)
    return Choice(token, marked(edited, token), told, board)
