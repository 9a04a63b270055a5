"""Decode steps in a row, with fresh caches now and then, and a digest of all that they computed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

import checkpoints
from ffjax.benchmark.inputs import random_model
from ffjax.cache import KVCache
from ffjax.config import preset
from ffjax.decode import (
    Implementation,
    decode_step,
    resolve_implementation_config,
    why_not_fused,
)
from ffjax.formats import DEFAULT_GROUP, Offset, WeightFormats
from ffjax.model import Transformer
from ffjax.quantization import Kind, named_format, quantize, quantized_config

__all__ = ["NOT_FINITE", "Walk", "Walker"]

NOT_FINITE = "not finite"
"""The digest of a block that has such logits."""

# Steps of one call, whose digests are kept together.
_BLOCK = 250
# Positions of a cache: it is full after so many steps, and a fresh one begins.
_CAPACITY = 2000
_GO = "go\n"


@dataclasses.dataclass(frozen=True)
class Walk:
    """What to take.

    Attributes:
        config: name of a preset, with random weights; None: the shipped model.
        weights: format of the layers' matrices: "bfloat16", "int8" or "int4".
        batch: B.
        tokens: steps: tokens of each sequence, rounded up to whole blocks.
        implementation: of the steps; None: the best that can run.
        together: T. If it is more than 1, a step of T tokens, of which the first is kept, stands
            before each step of one token.
        group_size: of int4, inputs that share a scale.
        offset: of int4, the second number of a group.
    """

    config: str | None
    weights: str
    batch: int
    tokens: int
    implementation: Implementation | None = None
    together: int = 1
    group_size: int = DEFAULT_GROUP
    offset: Offset | None = None

    def model(self) -> Transformer:
        """Loads the model, or makes it."""
        kind = cast(Kind, self.weights) if self.weights in get_args(Kind) else None
        if self.config is None:
            model = checkpoints.load(checkpoints.SHIPPED_MODEL, dtype=jnp.bfloat16)
            if kind is None:
                return model
            return quantize(model, kind, self.group_size, offset=self.offset)
        config = preset(self.config)
        if kind is not None:
            form = named_format(kind, self.group_size, offset=self.offset)
            config = quantized_config(config, WeightFormats.of_layers(form))
        return random_model(config)


class Walker:
    """Takes walks with one model, as often as wanted, also from several threads."""

    def __init__(self, walk: Walk, model: Transformer):
        """Compiles nothing yet.

        Args:
            walk: what to take.
            model: its model, from `walk.model()`.

        Raises:
            NotImplementedError: the implementation cannot run here.
        """
        config = model.config
        kept = 1 + (walk.together > 1)  # tokens of each sequence, in a turn
        dropped = walk.together - 1
        longest = (min(_CAPACITY, config.max_context) - dropped) // kept
        self.block = min(_BLOCK, walk.tokens, longest)
        self.blocks = -(-walk.tokens // self.block)
        longest //= self.block
        self._config, self._batch, self._dtype = config, walk.batch, model.dtype
        self._together = walk.together
        self._capacity = longest * self.block * kept + dropped
        # Lives of caches, in blocks: a long one, then short ones, whose tags are young.
        self._lives = [longest, 1, max(longest // 2, 1)]
        self.implementation = resolve_implementation_config(
            config, model.dtype, walk.batch, self._capacity, walk.implementation
        )
        if walk.together > 1 and self.implementation != "xla":
            reason = why_not_fused(model, walk.batch, self._capacity, walk.together)
            if reason is not None:
                raise NotImplementedError(reason)
        self._graph, self._state = nnx.split(model)

    def take(self, between: Callable[[], None] = lambda: None) -> list[str]:
        """Takes the walk from its beginning.

        Args:
            between: is called before every block, while the device is busy with the last one.

        Returns:
            A digest of each block: of all its tokens, and of the bits of all its logits.
        """
        made, left, life, cache, token = [], 0, 0, None, None
        for _ in range(self.blocks):
            if left == 0:
                cache = KVCache.create(
                    self._config,
                    self._batch,
                    self._capacity,
                    self._dtype,
                    tokens=self._together,
                )
                token = jnp.asarray(self._first_tokens(life))
                left = self._lives[life % len(self._lives)]
                life += 1
            between()
            cache, token, seen = _take(
                self._graph,
                self._state,
                cache,
                token,
                self.block,
                self.implementation,
                self._together,
            )
            made.append(seen)
            left -= 1
        return [_digest(jax.device_get(seen)) for seen in made]

    def _first_tokens(self, life: int) -> np.ndarray:
        rng = np.random.default_rng([life, self._batch])
        return rng.integers(0, self._config.vocab_size, self._batch).astype(np.int32)


def _digest(seen: tuple[np.ndarray, np.ndarray, np.ndarray]) -> str:
    tokens, sums, finite = seen
    if not finite.all():
        return NOT_FINITE
    return hashlib.sha256(tokens.tobytes() + sums.tobytes()).hexdigest()[:16]


@functools.partial(
    jax.jit,
    static_argnames=("graph", "steps", "implementation", "together"),
    donate_argnames="cache",
)
def _take(
    graph: Any,
    state: Any,
    cache: KVCache,
    token: Array,
    steps: int,
    implementation: Implementation,
    together: int,
) -> tuple[KVCache, Array, tuple[Array, Array, Array]]:
    model = nnx.merge(graph, state)

    def digest(logits: Array) -> tuple[Array, Array]:
        """Sums `[B]`, and whether all are finite."""
        bits = lax.bitcast_convert_type(logits, jnp.int32).reshape(len(logits), -1)
        # Sums wrap, and tell places apart: each bit of each logit is in them.
        place = 2 * jnp.arange(bits.shape[1], dtype=jnp.int32) + 1
        return jnp.sum(bits * place, axis=1, dtype=jnp.int32), jnp.isfinite(logits).all()

    def step(carry, _):
        cache, token = carry
        before = jnp.int32(0), jnp.bool_(True)
        if together > 1:
            fed = token[:, None] + jnp.arange(together, dtype=jnp.int32)
            fed = fed % model.config.vocab_size
            one = jnp.ones_like(token)
            out = decode_step(model, cache, fed, one, implementation=implementation)
            cache, token, before = out.cache, out.token[:, 0], digest(out.logits)
        out = decode_step(model, cache, token, implementation=implementation)
        sums, finite = digest(out.logits)
        seen = out.token, sums + 3 * before[0], finite & before[1]
        return (out.cache, out.token), seen

    (cache, token), seen = lax.scan(step, (cache, token), length=steps)
    return cache, token, seen


def main(asked: str) -> None:
    """Takes a walk, given as JSON, when stdin says so; prints its digests as JSON."""
    walk = Walk(**json.loads(asked))
    walker = Walker(walk, walk.model())
    walker.take()  # compiles
    print(json.dumps("ready"), flush=True)
    if sys.stdin.readline() != _GO:
        return
    print(json.dumps(walker.take()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
