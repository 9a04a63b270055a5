"""From logits to tokens: all stages, in order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ffjax.sampling import edits
from ffjax.sampling.draw import KeysFrom, sample
from ffjax.sampling.filters import filtered
from ffjax.sampling.history import Fed, History, with_fed
from ffjax.sampling.logprobs import LogProbs, log_probs
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.draw import Before as DrawnBefore
from pallas_kernels.draw import Drawn, DrawPlan, draw_tokens, make_draw_plan, no_board
from pallas_kernels.gpu import INTERPRETER

__all__ = [
    "NOT_FINITE",
    "Before",
    "Choice",
    "choose",
    "draws_by_kernel",
    "empty_board",
    "kept_by_kernel",
    "marked",
]

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
        history: with the token that was fed; None where no stage asks.
        kept: what was given as such, with these logits.
    """

    token: Array
    told: Array
    logprobs: LogProbs | None
    board: Array | None
    history: History | None
    kept: Array | None


def marked(logits: Array, token: Array) -> Array:
    """The tokens int32 `[B]`, NOT_FINITE where the logit `[B, V]` of one is not finite.

    A NaN wins every choice of a token, as in `jnp.argmax`, so one among the logits is seen.
    """
    return _told(jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0], token)


def _told(chosen: Array, token: Array) -> Array:
    """The same, by the logits `[B]` of the tokens."""
    return jnp.where(jnp.isfinite(chosen), token, NOT_FINITE)


def _edited(logits: Array, rows: Rows, index: Array, stages: Stages) -> Array:
    """After the stages that ask for no history."""
    if stages.edits:
        logits = edits.biased(logits, rows.edit_ids, rows.edit_values)
    if stages.forbids_stops:
        logits = edits.without_stops(logits, rows.stop_ids, index < rows.min_tokens)
    return logits


def _remembering(
    logits: Array, rows: Rows, history: History, index: Array, stages: Stages
) -> Array:
    """After the stages that do."""
    if stages.penalizes:
        logits = edits.penalized(logits, history, rows.penalties)
    for processor in stages.processors:
        logits = processor(logits, Before(index, *history))
    return logits


def _draw_plan(batch: int, vocab: int, stages: Stages) -> DrawPlan | None:
    """How the kernel draws; None where XLA does."""
    # Processors come after penalties.
    penalizes = stages.penalizes and not stages.processors
    if stages.gpu is None or not (stages.draws or penalizes):
        return None
    if stages.draws and not stages.filters and batch > _MOST_WITHOUT_FILTERS:
        return None
    how = {"filters": stages.filters, "draws": stages.draws, "penalizes": penalizes}
    return make_draw_plan(batch, vocab, stages.gpu, **how)


def draws_by_kernel(batch: int, vocab: int, stages: Stages) -> bool:
    """Whether a kernel draws, which makes the keys of a draw itself."""
    return stages.draws and _draw_plan(batch, vocab, stages) is not None


def empty_board(batch: int, vocab: int, stages: Stages) -> Array | None:
    """What the first of some choices is given as `board`; None where no kernel draws."""
    plan = _draw_plan(batch, vocab, stages)
    return None if plan is None else no_board(plan)


def kept_by_kernel(batch: int, vocab: int, stages: Stages) -> bool:
    """Whether the kernel that draws is given the model's own logits, and can write them down."""
    if stages.edits or stages.forbids_stops or stages.processors:
        return False
    return _draw_plan(batch, vocab, stages) is not None


def _by_kernel(
    plan: DrawPlan,
    logits: Array,
    likeliest: Array | None,
    rows: Rows,
    keys: Array | KeysFrom | None,
    before: DrawnBefore | None,
    board: Array | None,
    kept: Array | None,
    stages: Stages,
) -> Drawn:
    """Draws a token of each sequence by the kernel."""
    own, first = keys if isinstance(keys, KeysFrom) else (keys, None)
    return draw_tokens(
        plan,
        logits,
        likeliest,
        None if own is None else jax.random.key_data(own),
        no_board(plan) if board is None else board,
        rows.temperature,
        rows.top_k,
        rows.nucleus,
        first,
        before=before,
        kept=kept,
        interpret=stages.gpu == INTERPRETER,
    )


def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def choose(
    logits: Array,
    greedy: Array | None,
    rows: Rows,
    keys: Array | KeysFrom | None,
    history: History | None,
    index: Array,
    stages: Stages,
    board: Array | None = None,
    fed: Fed | None = None,
    kept: Array | None = None,
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
        fed: a token of each answer that `history` does not hold yet, and that counts, too; None
            where there is none, or nobody asks.
        kept: int32 `[n, B, V]`, where the kernel writes the logits of the i-th choice with a board;
            if `kept_by_kernel`.
    """
    batch, vocab = logits.shape
    plan = _draw_plan(batch, vocab, stages)
    edited = _edited(logits, rows, index, stages)
    likeliest = None if stages.edits or stages.forbids_stops else greedy
    if plan is not None and plan.penalizes:
        assert history is not None
        before = DrawnBefore(rows.penalties, history.prompt, history.counts)
        if fed is not None:
            before = before._replace(fed=fed.first, running=fed.running)
        out = _by_kernel(plan, edited, likeliest, rows, keys, before, board, kept, stages)
        token, board, kept = out.token, out.board, out.kept
        assert out.logit is not None
        told = _told(out.logit, token)
        if out.counts is not None:
            history = history._replace(counts=out.counts)
    else:
        if history is not None and fed is not None:
            history = with_fed(history, fed)
        if stages.remembers:
            assert history is not None
            edited, likeliest = _remembering(edited, rows, history, index, stages), None
        token = likeliest = _likeliest(edited) if likeliest is None else likeliest
        if plan is not None:
            out = _by_kernel(plan, edited, likeliest, rows, keys, None, board, kept, stages)
            token, board, kept = out.token, out.board, out.kept
        elif stages.draws:
            assert keys is not None
            assert not isinstance(keys, KeysFrom), "XLA knows no board that counts draws."
            left = edited
            if stages.filters:
                left = filtered(edited, rows.temperature, rows.top_k, rows.nucleus)
            token = sample(left, keys, rows.temperature)
        told = marked(edited, token)
    logprobs = None
    if stages.logprobs is not None:
        logprobs = log_probs(logits, token, stages.logprobs, stages.gpu)
    return Choice(token, told, logprobs, board, history, kept)
