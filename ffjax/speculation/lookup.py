"""Drafts without a second model: how a sequence went on where its last tokens stood before."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax.numpy as jnp
from jax import Array

__all__ = ["Lookup"]

_MOST_MATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lookup:
    """Speculation by looking up: the draft is what followed the last tokens when they came before.

    The longest run of tokens counts that ends the sequence and stands in it once more, in the
    prompt or in the answer; of runs of equal length, the latest. Where what followed comes to the
    end of the sequence, it is repeated: a text that goes round in a circle goes on so.

    Attributes:
        min_match: tokens of the shortest run that counts. A wrong draft makes a step slower, a
            right one saves a step. In prose and code, cut into words, 0.5 to 0.7 drafts are right
            after a match of 2 words, twice as many after 3, 0.2 to 0.3 after one alone.
        max_match: tokens of the longest run that is told from longer ones. After 8 most drafts are
            right, and each token more costs time.
        tokens: T, tokens that a step takes of each sequence, drafts and the one that is certain.
            None: as many as there is room for, 8 for all sequences together.

    Raises:
        ValueError: a number is out of its range.
        TypeError: it is no integer.
    """

    min_match: int = 2
    max_match: int = 8
    tokens: int | None = None

    def __post_init__(self):
        for name in ("min_match", "max_match", "tokens"):
            value = getattr(self, name)
            if value is None and name == "tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name} of a Lookup is an integer, got {value!r}.")
            object.__setattr__(self, name, int(value))
        if not 1 <= self.min_match <= self.max_match <= _MOST_MATCH:
            raise ValueError(
                f"A Lookup takes matches of 1 to {_MOST_MATCH} tokens, min_match at most "
                f"max_match; got min_match={self.min_match} and max_match={self.max_match}."
            )
        if self.tokens is not None and self.tokens < 2:
            raise ValueError(
                "A step that speculates takes 2 tokens of a sequence or more; got "
                f"tokens={self.tokens}. Give more, or leave speculation out."
            )

    @property
    def always(self) -> bool:
        """No: where nothing repeats there is no draft."""
        return False

    def drafts(
        self,
        known: Array,
        lengths: Array,
        weights: Any = None,
        state: Any = None,
        choosing: Any = None,
    ) -> tuple[Array, Array, Any]:
        """Drafts of what comes next.

        Args:
            known: int32 `[B, S]`, the tokens of each sequence: prompt and answer.
            lengths: int32 `[B]`, how many those are, at least 1; what lies beyond is not looked at.
            weights: none; see `ffjax.speculation.source.Source`.
            state: none.
            choosing: of no matter: what was said is there.

        Returns:
            Drafts int32 `[B, T - 1]`; how many of them count, int32 `[B]`, all or none; `state`.
        """
        assert self.tokens is not None, "T is chosen for a batch"
        bits = max(known.shape[1] - 1, 1).bit_length()
        best = jnp.max(self._scores(known, lengths, bits), axis=1)
        found = best >= 0
        end = jnp.where(found, best & ((1 << bits) - 1), 0)
        # After the match as far as the sequence goes, and from there on round and round.
        period = jnp.maximum(lengths - 1 - end, 1)
        ahead = jnp.arange(self.tokens - 1) % period[:, None]
        drafts = jnp.take_along_axis(known, end[:, None] + 1 + ahead, axis=1, mode="clip")
        return drafts, jnp.where(found, jnp.int32(self.tokens - 1), 0), state

    def _scores(self, known: Array, lengths: Array, bits: int) -> Array:
        """What a match that ends at each position is worth, int32 `[B, S]`; -1: there is none.

        Its length, and in the lower `bits` its position: the greatest is the longest, the latest
        of equals. It is written so that one maximum is all that XLA has to launch.
        """
        most = self.max_match
        last = lengths[:, None] - 1
        suffix = jnp.take_along_axis(
            known, jnp.maximum(last - jnp.arange(most), 0), axis=1, mode="clip"
        )
        # No token is -1: a match ends where the sequence begins.
        padded = jnp.pad(known, ((0, 0), (most - 1, 0)), constant_values=-1)
        positions = jnp.arange(known.shape[1], dtype=jnp.int32)
        matches = positions < last
        length = jnp.zeros(known.shape, jnp.int32)
        for back in range(most):
            start = most - 1 - back
            shifted = padded[:, start : start + known.shape[1]]
            matches = matches & (shifted == suffix[:, back : back + 1])
            length = length + matches
        return jnp.where(length >= self.min_match, (length << bits) | positions, -1)
