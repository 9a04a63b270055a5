"""Drafts of a second model, on the device.

The draft model has a cache of its own. Say the text has n tokens, the last of them not yet fed to
the model. The draft model feeds the last two, at positions n - 2 and n - 1, in one step, and has
the first draft. Each draft but the last is fed in turn, at n and after, and gives the next one. So
T - 1 drafts take T - 1 steps.

Then k tokens are kept, 1 to T: k - 1 drafts, and the token that follows them. The next first step
is at n + k - 2, and the cache holds the text before it: the drafts that were fed end at n + T - 3,
which is far enough if all T - 1 were right. The first wrong draft, if any, lies at n + k - 1, where
another token is fed now. So the length is set back to the same place whatever was right, and
nothing asks how many were.

So of the text that the model's cache holds, the draft model's has to hold all but the last token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.decode import (
    Implementation,
    decode_step,
    is_fused,
    resolve_implementation_config,
    why_not_fused_config,
)
from ffjax.parts import Parts
from ffjax.speculation.source import Choosing

__all__ = ["FIRST_TOKENS", "ModelSource", "draft_implementation"]

FIRST_TOKENS = 2
"""Tokens of each sequence that the first of the draft model's steps takes."""


def draft_implementation(
    parts: Parts, batch: int, slots: int, named: Implementation | None
) -> Implementation:
    """Which one runs a draft model's steps, of one token and of FIRST_TOKENS.

    Args:
        parts: the draft model.
        batch: B.
        slots: S.
        named: what was asked for; None: the best that can run.

    Raises:
        ValueError: there is none of that name.
        NotImplementedError: the named one cannot run here.
    """
    size = parts.config, parts.dtype, batch, slots
    chosen = resolve_implementation_config(*size, None if is_fused(named) else named)
    reasons = (why_not_fused_config(*size, tokens) for tokens in (1, FIRST_TOKENS))
    reason = next(filter(None, reasons), None)
    if reason is None or chosen == "xla" == named:
        return chosen
    if named is None:
        return "xla"
    raise NotImplementedError(f"Of the draft model {parts.config.name}: {reason}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A draft model, without its arrays.

    Attributes:
        graphdef: its structure.
        tokens: T.
        implementation: of its steps.
    """

    graphdef: Any
    tokens: int
    implementation: Implementation
    always: bool = True

    def drafts(
        self,
        known: Array,
        lengths: Array,
        weights: Any,
        state: KVCache,
        choosing: Choosing | None,
    ) -> tuple[Array, Array, KVCache]:
        """Drafts of what comes next.

        Args:
            known: int32 `[B, S]`, the tokens of each sequence.
            lengths: int32 `[B]`, how many those are, at least 2; of a sequence with fewer, what is
                returned is of no use.
            weights: of the draft model.
            state: its cache, made for steps of FIRST_TOKENS.
            choosing: how the model's tokens are chosen.

        Returns:
            Drafts int32 `[B, T - 1]`, how many of them count, int32 `[B]`: all; and the cache.
        """
        assert choosing is not None, "drafts are for a step"
        model = self.graphdef.merged(weights)
        # Whatever the cache holds after this is of no use.
        start = jnp.maximum(lengths - FIRST_TOKENS, 0)
        at = start[:, None] + jnp.arange(FIRST_TOKENS)
        newest = jnp.take_along_axis(known, at, axis=1, mode="clip")
        out = decode_step(
            model,
            dataclasses.replace(state, lengths=start),
            newest,
            implementation=self.implementation,
        )
        token, memory = self._chosen(
            choosing, choosing.memory, newest[:, -1], out.logits[:, -1], out.token[:, -1], 0
        )

        def step(carry: Any, number: Array) -> tuple[Any, Array]:
            cache, token, memory = carry
            out = decode_step(model, cache, token, implementation=self.implementation)
            token, memory = self._chosen(choosing, memory, token, out.logits, out.token, number)
            return (out.cache, token, memory), token

        cache, drafts = out.cache, token[:, None]
        if self.tokens > FIRST_TOKENS:
            numbers = jnp.arange(1, self.tokens - 1)
            (cache, _, _), others = lax.scan(step, (cache, token, memory), numbers)
            drafts = jnp.concatenate([drafts, others.T], axis=1)
        return drafts, jnp.full(lengths.shape, self.tokens - 1, jnp.int32), cache

    def _chosen(
        self,
        choosing: Choosing,
        memory: Any,
        fed: Array,
        logits: Array,
        greedy: Array,
        number: Any,
    ) -> tuple[Array, Any]:
        token, memory = choosing.next(memory, fed, logits, greedy, jnp.asarray(number, jnp.int32))
        # A step that gave up has chosen none, -1: then the draft is any other, and wrong.
        return jnp.maximum(token, 0), memory
