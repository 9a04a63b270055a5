"""The device's side of a generation: prefill by chunks, then blocks of decode steps.

What is compiled depends on the model, the batch, the cache's capacity (rounded up, so
that similar requests share it) and whether tokens are drawn; lengths, temperature,
seeds and stop tokens are arguments. It is compiled with the options of `ffjax.reproducible`:
the same request gets the same tokens in every process.

A token whose logit is not finite comes back as `NOT_FINITE`. That adds no launch to a step: the
look at one number a sequence is part of the launch that writes the token down.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import (
    Implementation,
    Kernel,
    decode_step,
    device_of,
    resolve_implementation,
    step_fault,
)
from ffjax.model import Transformer
from ffjax.reproducible import compiler_options
from ffjax.requests import MAX_STOP_TOKENS, Request
from ffjax.sampling import sample, sequence_keys, step_keys
from ffjax.settings import own_settings
from pallas_kernels.dims import ceil_div
from pallas_kernels.support import MAX_BATCH

__all__ = ["BLOCK", "NOT_FINITE", "Loop", "chunk_sizes"]

# Decode steps between two looks at whether every sequence has stopped. A GPU's loop
# with a fixed number of steps runs without asking the host; the look does ask.
BLOCK = 8
# What stands for a token whose logit is NaN or infinite; it stops its sequence.
NOT_FINITE = -1
# Capacities are rounded up to a multiple of this.
_CAPACITY_STEP = 256
# A prompt is fed in pieces of two sizes: the large one, and for what is left over the
# small one where it suffices. Two sizes are two compilations, whatever the lengths.
_LARGE_CHUNK = 256
_SMALL_CHUNK = 32
# The reference keeps the attention scores of a chunk, float32 [B, N, T, S].
_MAX_SCORE_BYTES = 1 << 30


def chunk_sizes(config: ModelConfig, longest: int, batch: int, capacity: int) -> list[int]:
    """Sizes of the chunks in which prompts are fed, first to last.

    Args:
        config: the model's.
        longest: tokens of the longest prompt.
        batch: B.
        capacity: S.
    """
    large = _LARGE_CHUNK
    while large > _SMALL_CHUNK and 4 * batch * config.num_heads * large * capacity > (
        _MAX_SCORE_BYTES
    ):
        large //= 2
    rest = longest % large
    sizes = [large] * (longest // large)
    return [_SMALL_CHUNK if rest <= _SMALL_CHUNK else large, *sizes] if rest else sizes


def _marked(logits: Array, token: Array) -> Array:
    """The tokens int32 `[B]`, NOT_FINITE where the logit `[B, V]` of one is not finite.

    A NaN wins every choice of a token, as in `jnp.argmax`, so one among the logits is seen.
    """
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(chosen), token, NOT_FINITE)


def _prefill_chunk(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    tokens: Array,
    num_tokens: Array,
    keys: Array,
    temperature: Array,
    *,
    greedy: bool,
) -> tuple[KVCache, Array]:
    """Feeds `tokens [B, T]`, of which `num_tokens [B]` count; also the token that follows."""
    model = nnx.merge(graphdef, state)
    logits, cache = model(tokens, cache, num_tokens=num_tokens, last_only=True)
    if greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        token = sample(logits, step_keys(keys, 0), temperature)
    return cache, _marked(logits, token)


def _decode_blocks(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    token: Array,
    done: Array,
    index: Array,
    keys: Array,
    temperature: Array,
    stop_tokens: Array,
    num_blocks: Array,
    *,
    max_blocks: int,
    greedy: bool,
    implementation: Implementation,
) -> tuple[KVCache, Array, Array, Array, Array]:
    """Runs up to `num_blocks` blocks of steps, fewer where all sequences have stopped.

    A sequence that has stopped keeps stepping; what it says is for nobody. Where there is room
    for one block alone it runs in any case: no look at the sequences then keeps the host waiting
    until the device has come so far.

    Args:
        graphdef: the model's structure.
        state: its weights.
        cache: the cache.
        token: int32 `[B]`, chosen but not yet fed.
        done: bool `[B]`, which sequences have stopped before `token`.
        index: int32, how many tokens a sequence has got, `token` included.
        keys: `[B]`.
        temperature: float32.
        stop_tokens: int32 `[n]`, any of which stops a sequence, as NOT_FINITE does; other
            negative ids stop none.
        num_blocks: int32, at most `max_blocks`; not looked at where that is 1.
        max_blocks: blocks there is room for in the result.
        greedy: take the step's own greedy token.
        implementation: of the steps.

    Returns:
        Cache, token, done and index to go on from, and the new tokens, int32
        `[max_blocks * BLOCK, B]`, of which the index says how many were made.
    """
    model = nnx.merge(graphdef, state)

    def stops(token):
        return (token == NOT_FINITE) | jnp.any(token[..., None] == stop_tokens, axis=-1)

    def step(carry, index):
        cache, token = carry
        out = decode_step(model, cache, token, implementation=implementation)
        token = out.token
        if not greedy:
            token = sample(out.logits, step_keys(keys, index), temperature)
        return (out.cache, token), _marked(out.logits, token)

    def unfinished(carry):
        block, _, _, done, _, _ = carry
        return (block < num_blocks) & ~jnp.all(done)

    def run_block(carry):
        block, cache, token, done, index, made = carry
        indices = index + jnp.arange(BLOCK, dtype=jnp.int32)
        (cache, token), fresh = lax.scan(step, (cache, token), indices)
        done |= jnp.any(stops(fresh), axis=0)
        made = lax.dynamic_update_slice_in_dim(made, fresh, block * BLOCK, axis=0)
        return block + 1, cache, token, done, index + BLOCK, made

    made = jnp.zeros((max_blocks * BLOCK, token.shape[0]), jnp.int32)
    done |= stops(token)
    carry = (jnp.int32(0), cache, token, done, index, made)
    carry = run_block(carry) if max_blocks == 1 else lax.while_loop(unfinished, run_block, carry)
    _, cache, token, done, index, made = carry
    return cache, token, done, index, made


class _Programs(NamedTuple):
    """The jitted functions."""

    prefill_chunk: Any
    decode_blocks: Any


@functools.cache
def _programs(device: Any) -> _Programs:
    """The programs for a device: XLA's options depend on it."""
    options = compiler_options(device)
    return _Programs(
        prefill_chunk=jax.jit(
            _prefill_chunk,
            static_argnames=("graphdef", "greedy"),
            donate_argnames=("cache",),
            compiler_options=options,
        ),
        decode_blocks=jax.jit(
            _decode_blocks,
            static_argnames=("graphdef", "max_blocks", "greedy", "implementation"),
            donate_argnames=("cache",),
            compiler_options=options,
        ),
    )


class Loop:
    """One generation on the device: makes the cache, compiles, then runs.

    Calls return as soon as the device has its orders, but for `decode`; reading a result waits
    for it.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        *,
        max_blocks: int | None = None,
    ):
        """Compiles what is not compiled yet.

        Args:
            model: the model.
            request: what is asked for.
            implementation: of the decode steps; see `ffjax.decode_step`.
            max_blocks: blocks one call of `decode` may run. None: as many as the
                cache has room for.

        Raises:
            ValueError: the named implementation does not take so many sequences.
            NotImplementedError: the named implementation cannot run here.
        """
        if implementation in get_args(Kernel) and request.batch > MAX_BATCH:
            raise ValueError(
                f"The fused kernel takes 1 to {MAX_BATCH} sequences; there are {request.batch} "
                "prompts. Split them, or use implementation='xla'."
            )
        # A step's plan is made for the device that JAX runs things on by default, where the
        # weights are traced: see `decode.device_of`.
        self._device = device_of(model)
        self._programs = _programs(self._device)
        with jax.default_device(self._device), own_settings():
            self._prepare(model, request, implementation, max_blocks)
            self.compile_seconds = self._compile()

    def _prepare(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        max_blocks: int | None,
    ) -> None:
        config = model.config
        # A block may run past the last token asked for: it has room for that too.
        capacity = ceil_div(request.capacity + BLOCK, _CAPACITY_STEP) * _CAPACITY_STEP
        self._model = model
        self._request = request
        self._cache = KVCache.create(config, request.batch, capacity, model.dtype)
        chosen = resolve_implementation(model, self._cache, implementation)
        self.implementation: Implementation = chosen
        self.max_blocks = max_blocks or capacity // BLOCK
        self._graphdef, self._state = nnx.split(model)
        self._keys = sequence_keys(request.seed, request.batch)
        self._temperature = jnp.float32(request.temperature)
        stops = np.full(MAX_STOP_TOKENS, NOT_FINITE, np.int32)
        stops[: len(request.stop_tokens)] = request.stop_tokens
        self._stops = jnp.asarray(stops)
        self._greedy = request.temperature == 0
        self._token = jnp.zeros((request.batch,), jnp.int32)
        self._done = jnp.zeros((request.batch,), bool)
        self._index = jnp.int32(1)
        self._settle(model)
        self._chunks = chunk_sizes(config, request.longest, request.batch, capacity)

    def _settle(self, model: Transformer) -> None:
        """Commits what a step passes on to the next to the model's device.

        Results of a model that is committed to a device are too, and jit compiles anew
        for an argument that has become so.
        """
        devices = model.embed[...].devices()
        if len(devices) == 1:
            moving = self._cache, self._token, self._done, self._index
            moving = jax.device_put(moving, *devices)
            self._cache, self._token, self._done, self._index = moving

    def _prefill_args(self, tokens: np.ndarray, num_tokens: np.ndarray) -> tuple[Any, ...]:
        fed = jnp.asarray(tokens), jnp.asarray(num_tokens)
        return self._graphdef, self._state, self._cache, *fed, self._keys, self._temperature

    def _decode_args(self, num_blocks: int) -> tuple[Any, ...]:
        at = self._cache, self._token, self._done, self._index
        how = self._keys, self._temperature, self._stops, jnp.int32(num_blocks)
        return self._graphdef, self._state, *at, *how

    def _decode_options(self) -> dict[str, Any]:
        return {
            "max_blocks": self.max_blocks,
            "greedy": self._greedy,
            "implementation": self.implementation,
        }

    def _compile(self) -> float:
        """Compiles ahead of the calls, which find the result in jit's own caches."""
        start = time.perf_counter()
        batch = self._request.batch
        for size in sorted(set(self._chunks)):
            args = self._prefill_args(np.zeros((batch, size), np.int32), np.zeros(batch, np.int32))
            self._programs.prefill_chunk.lower(*args, greedy=self._greedy).compile()
        if self._request.max_new_tokens > 1:
            args = self._decode_args(0)
            self._programs.decode_blocks.lower(*args, **self._decode_options()).compile()
        return time.perf_counter() - start

    def prefill(self) -> Array:
        """Feeds the prompts; returns the first new token of each, int32 `[B]`, or NOT_FINITE.

        All prompts end with the last chunk, so that its logits serve every one:
        a shorter prompt has fewer or no tokens in the first chunks.
        """
        prompts = self._request.prompts
        after = sum(self._chunks)  # how many positions this chunk and those behind it hold
        for size in self._chunks:
            tokens = np.zeros((len(prompts), size), np.int32)
            counts = np.zeros(len(prompts), np.int32)
            for row, prompt in enumerate(prompts):
                start = max(len(prompt) - after, 0)
                stop = max(len(prompt) - (after - size), 0)
                counts[row] = stop - start
                tokens[row, : stop - start] = prompt[start:stop]
            with jax.default_device(self._device), own_settings():
                args = self._prefill_args(tokens, counts)
                done = self._programs.prefill_chunk(*args, greedy=self._greedy)
            self._cache, self._token = done
            after -= size
        return self._token

    def decode(self, num_blocks: int) -> tuple[Array, Array]:
        """Runs up to `num_blocks` blocks of steps.

        On a GPU the call lasts as long as the steps where there is room for several blocks: the
        device asks the host between them whether to go on.

        Returns:
            The new tokens, int32 `[max_blocks * BLOCK, B]`, NOT_FINITE for those whose logits
            are not finite; and how many tokens each sequence has got so far, int32: what stands
            behind them is not tokens.
        """
        with jax.default_device(self._device), own_settings():
            args = self._decode_args(num_blocks)
            done = self._programs.decode_blocks(*args, **self._decode_options())
        self._cache, self._token, self._done, self._index, made = done
        return made, self._index

    def fault(self) -> str | None:
        """What a step that gave up waiting has said, a sentence; None if none did."""
        if self.implementation != "pallas_stream":
            return None
        fault = step_fault(self._model, self._cache)
        return None if fault is None else str(fault)
