"""Log-probabilities of the tokens that were chosen, and of the likeliest ones."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.logprobs import LEAST, MOST_TOKENS, likeliest, ordered, unordered

__all__ = ["LogProbs", "TokenLogprobs", "by_kernel", "likeliest_ids", "log_probs"]

# Tokens of a group, falling: each is a multiple of the next. All groups are compared with each
# other, and then what the best ones hold: of a vocabulary of 128 thousand, with 20 alternatives,
# 251 groups, then 320, then 640 tokens.
_SIZES = 512, 32
_FEWEST_GROUPS = 32


class TokenLogprobs(NamedTuple):
    """What is told of one token.

    Attributes:
        logprob: the token's log-probability, natural.
        top: the likeliest tokens' ids and log-probabilities, falling.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class LogProbs(NamedTuple):
    """What is told of one token of each sequence.

    Attributes:
        chosen: float32 `[B]`.
        top_ids: int32 `[B, n]`.
        top: float32 `[B, n]`, falling.
    """

    chosen: Array
    top_ids: Array
    top: Array

    def of(self, row: int, best: int) -> TokenLogprobs:
        """Of one sequence and so many alternatives; the arrays are numpy's."""
        pairs = zip(self.top_ids[row, :best].tolist(), self.top[row, :best].tolist(), strict=True)
        return TokenLogprobs(float(self.chosen[row]), tuple(pairs))


def _best_ids(values: Array, ids: Array, best: int) -> Array:
    """The ids `[B, n]` of the n greatest values, falling, of equals the lowest first.

    Each is compared with each, which for a thousand values is less work to wait for than a sort.

    Args:
        values: int32 `[B, N]`.
        ids: int32 `[B, N]`, all different in a row.
        best: n.
    """
    one, other = (values[:, :, None], ids[:, :, None]), (values[:, None], ids[:, None])
    ahead = (other[0] > one[0]) | ((other[0] == one[0]) & (other[1] < one[1]))
    rank = jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    chosen = rank[:, None] == jnp.arange(best)[:, None]
    return jnp.sum(jnp.where(chosen, ids[:, None], 0), axis=-1)


def likeliest_ids(logits: Array, best: int) -> Array:
    """The ids that `lax.top_k` finds, without a sort of all V: of equal logits the lowest first.

    The n likeliest tokens lie in those n groups, of tokens side by side, whose own likeliest are
    ahead: for each group before them has a token that is ahead of all the rest. Within these, the
    same is true of smaller groups.

    Args:
        logits: float32 `[B, V]`.
        best: n, how many, at least 1.

    Returns:
        int32 `[B, n]`, the likeliest first.
    """
    batch, vocab = logits.shape
    sizes = [size for size in _SIZES if -(-vocab // size) >= max(best, _FEWEST_GROUPS)]
    if not sizes:
        return lax.top_k(logits, best)[1]
    room = (0, 0), (0, -vocab % sizes[0])
    # What fills the last group up is after every logit.
    values = [jnp.pad(ordered(logits), room, constant_values=LEAST)]
    # Of each size, from tokens up, what the groups' likeliest are.
    for inner, size in itertools.pairwise([1, *sizes[::-1]]):
        values.append(jnp.max(values[-1].reshape(batch, -1, size // inner), axis=-1))
    near = values.pop()
    ids = jnp.broadcast_to(jnp.arange(near.shape[-1], dtype=jnp.int32), near.shape)
    for size, inner in itertools.pairwise([*sizes, 1]):
        ahead, each = _best_ids(near, ids, best)[:, :, None], size // inner
        held = values.pop().reshape(batch, -1, each)
        near = jnp.take_along_axis(held, ahead, axis=1).reshape(batch, -1)
        ids = (ahead * each + jnp.arange(each, dtype=jnp.int32)).reshape(batch, -1)
    return _best_ids(near, ids, best)


def by_kernel(vocab_size: int, gpu: Gpu | None) -> bool:
    """Whether a kernel finds log-probabilities on a device; None: XLA does."""
    return gpu is not None and vocab_size <= MOST_TOKENS


def log_probs(logits: Array, tokens: Array, best: int, gpu: Gpu | None = None) -> LogProbs:
    """Log-probabilities by the model's own logits.

    Args:
        logits: float32 `[B, V]`; or int32, as `pallas_kernels.logprobs.ordered` has them.
        tokens: int32 `[B]`, those chosen. What stands for a token that is none, less than 0, has
            a log-probability that means nothing.
        best: how many alternatives.
        gpu: the device, where a kernel is to find them; None: XLA does.
    """
    if by_kernel(logits.shape[-1], gpu):
        chosen, ids, top = likeliest(logits, tokens, best, interpret=gpu == INTERPRETER)
        return LogProbs(chosen, ids, top)
    if logits.dtype == jnp.int32:
        logits = unordered(logits)
    tokens = jnp.maximum(tokens, 0)
    if best:
        ids = likeliest_ids(logits, best)
        most = jnp.take_along_axis(logits, ids[:, :1], axis=-1)
    else:
        ids = jnp.zeros((logits.shape[0], 0), jnp.int32)
        most = jnp.max(logits, axis=-1, keepdims=True)
    # jax.nn.logsumexp, which would look for the likeliest once more.
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    total = jnp.log(jnp.sum(jnp.exp(logits - most), axis=-1, keepdims=True)) + most
    asked = jnp.concatenate([tokens[:, None], ids], axis=-1)
    told = jnp.take_along_axis(logits, asked, axis=-1) - total
    return LogProbs(told[:, 0], ids, told[:, 1:])
