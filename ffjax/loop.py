"""The device's side of a generation: the prefill, then blocks of decode steps.

What is compiled depends on the model, the batch, the cache's capacity (rounded up, so
that similar requests share it) and whether tokens are drawn; lengths, temperature and
seeds are arguments. It is compiled with the options of `ffjax.reproducible`:
the same request gets the same tokens in every process.

A block has a fixed number of steps, so that the device runs it without asking the host, and the
host orders the next one while it runs. It is the host that looks whether all sequences have ended.
The device never waits to be looked at; after an early end it runs the block that it has.

A token whose logit is not finite comes back as `NOT_FINITE`. That adds no launch to a step: the
look at one number a sequence is part of the launch that writes the token down.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, get_args

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
    resolve_implementation,
    step_fault,
)
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.prefill.choice import Prefill, prefill_of
from ffjax.prefill.first import NOT_FINITE, Sampling, marked
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.requests import Request
from ffjax.sampling import sample, sequence_keys, step_keys, words_of
from ffjax.settings import program_settings
from pallas_kernels.dims import ceil_div
from pallas_kernels.support import MAX_BATCH

__all__ = ["BLOCK", "NOT_FINITE", "Loop"]

BLOCK = 8
"""Decode steps that the device is given at a time."""
# Blocks ordered beyond the one that the host waits for. With one, the device always has work, as
# long as the host comes back within the time of a block; more would run in vain after an end.
_AHEAD = 1
# Capacities are rounded up to a multiple of this.
_CAPACITY_STEP = 256


def _decode_block(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    token: Array,
    index: Array,
    sampling: Sampling,
    *,
    greedy: bool,
    implementation: Implementation,
) -> tuple[KVCache, Array, Array, Array]:
    """Runs a block of steps.

    A sequence that has stopped keeps stepping; what it says is for nobody.

    Args:
        graphdef: the model's structure.
        state: its weights.
        cache: the cache.
        token: int32 `[B]`, chosen but not yet fed.
        index: int32, how many tokens a sequence has got, `token` included.
        sampling: how tokens are chosen.
        greedy: take the step's own greedy token.
        implementation: of the steps.

    Returns:
        Cache, token and index to go on from, and the new tokens, int32 `[BLOCK, B]`.
    """
    model = nnx.merge(graphdef, state)
    indices = index + jnp.arange(BLOCK, dtype=jnp.int32)
    # All keys of the block at once: one by one, each would cost a launch or more.
    keys = None
    if not greedy:
        own = sequence_keys(sampling.seeds, cache.batch)
        keys = jax.vmap(lambda at: step_keys(own, at))(indices)

    def step(carry, keys):
        cache, token = carry
        out = decode_step(model, cache, token, implementation=implementation)
        token = out.token
        if not greedy:
            token = sample(out.logits, keys, sampling.temperature)
        return (out.cache, token), marked(out.logits, token)

    (cache, token), made = lax.scan(step, (cache, token), keys, length=BLOCK)
    return cache, token, index + BLOCK, made


@functools.cache
def _programs(device: Any) -> Programs:
    """The programs of blocks for a device: XLA's options depend on it."""
    return Programs(
        jax.jit(
            _decode_block,
            static_argnames=("graphdef", "greedy", "implementation"),
            donate_argnames=("cache",),
            compiler_options=compiler_options(device),
        )
    )


def _start(
    config: ModelConfig, batch: int, capacity: int, dtype: Any
) -> tuple[KVCache, Array, Array, Array]:
    """An empty cache, no token yet, and room for what `ffjax.prefill.packed.feed` calls last."""
    cache = KVCache.create(config, batch, capacity, dtype)
    token, index = jnp.zeros((batch,), jnp.int32), jnp.int32(1)
    return cache, token, index, jnp.zeros((batch, config.model_dim), jnp.float32)


@functools.cache
def _started(device: Any) -> Any:
    """Makes what a generation begins with, in one launch."""
    options = compiler_options(device)
    return jax.jit(_start, static_argnums=(0, 1, 2, 3), compiler_options=options)


def _on_its_way(tokens: Array) -> Array:
    """The tokens, whose copy to the host is ordered with what makes them.

    A copy that is ordered when the host asks for the tokens takes 0.45 ms on an H200, though all is
    computed: as long as a whole step of Llama 3.2 1B in int4. This one runs beside the next steps.
    """
    tokens.copy_to_host_async()
    return tokens


class Loop:
    """One generation on the device: makes the cache, compiles, then runs.

    Calls return as soon as the device has its orders; reading a result waits for it.

    Attributes:
        implementation: which one runs the decode steps.
        compile_seconds: spent on compiling.
        steps: decode steps whose tokens have come back.
    """

    def __init__(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
    ):
        """Compiles what is not compiled yet.

        Args:
            model: the model.
            request: what is asked for.
            implementation: of the decode steps; see `ffjax.decode_step`.
            prefill: of the prefill; see `ffjax.generate`.

        Raises:
            ValueError: the named implementation does not take so many sequences, or there is none
                of that name.
            NotImplementedError: a named implementation cannot run here.
        """
        if implementation in get_args(Kernel) and request.batch > MAX_BATCH:
            raise ValueError(
                f"The fused kernel takes 1 to {MAX_BATCH} sequences; there are {request.batch} "
                "prompts. Split them, or use implementation='xla'."
            )
        # A step's plan is made for the device that JAX runs things on by default, where the
        # weights are traced: see `decode.device_of`.
        self._parts = Parts.of(model)
        self._device = self._parts.device
        with jax.default_device(self._device), program_settings():
            self._prepare(model, request, implementation, prefill)
            start = time.perf_counter()
            self._prefill.compile(self._cache)
            if request.max_new_tokens > 1:
                self._block = self._compiled_block()
            self.compile_seconds = time.perf_counter() - start

    def _prepare(
        self,
        model: Transformer,
        request: Request,
        implementation: Implementation | None,
        prefill: Prefill | None,
    ) -> None:
        # A block may run past the last token asked for: it has room for that too.
        capacity = ceil_div(request.capacity + BLOCK, _CAPACITY_STEP) * _CAPACITY_STEP
        self._model = model
        self._request = request
        size = request.batch, capacity
        start = _started(self._device)(model.config, *size, model.dtype)
        self._cache, self._token, self._index, last = start
        chosen = resolve_implementation(model, self._cache, implementation)
        self.implementation: Implementation = chosen
        # On the device, where every block takes them: arrays of numpy would be sent with each.
        drawn = Sampling(words_of(request.seed), np.float32(request.temperature))
        self._sampling = jax.device_put(drawn)
        self._greedy = request.temperature == 0
        self.steps = 0
        self._prefill = prefill_of(
            self._parts,
            request,
            capacity,
            self._sampling,
            last,
            implementation,
            prefill,
        )

    def _block_args(self) -> tuple[Any, ...]:
        return self._parts.state, self._cache, self._token, self._index, self._sampling

    def _compiled_block(self) -> Any:
        how = {"greedy": self._greedy, "implementation": self.implementation}
        return _programs(self._device).get(self._parts.graphdef, *self._block_args(), **how)

    @property
    def cache(self) -> KVCache:
        """The cache as it is now; the next call uses it up."""
        return self._cache

    @property
    def prefill_temp_bytes(self) -> int:
        """Most bytes that one of the prefill's programs has for intermediates.

        Weights, cache and results are not among them.
        """
        return self._prefill.temp_bytes

    @property
    def prefill_implementation(self) -> Prefill:
        """Which implementation runs the prefill."""
        return self._prefill.name

    def prefill(self) -> Array:
        """Feeds the prompts; returns the first new token of each, int32 `[B]`, or NOT_FINITE."""
        with jax.default_device(self._device), program_settings():
            self._cache, self._token = self._prefill.run(self._cache)
            return _on_its_way(self._token)

    def decode(self) -> Array:
        """Orders a block of steps.

        Returns:
            The new tokens, int32 `[BLOCK, B]`, NOT_FINITE for those whose logits are not finite.
        """
        with jax.default_device(self._device), program_settings():
            self._cache, self._token, self._index, made = self._block(*self._block_args())
            return _on_its_way(made)

    def rows(self, blocks: int, ends: Callable[[list[list[int]]], bool]) -> Iterator[list[int]]:
        """Runs up to so many blocks, the device ahead of who takes the tokens.

        The first block is ordered at once, every other one before the block ahead of it is waited
        for.

        Args:
            blocks: how many, at most.
            ends: whether all sequences have ended with a block's tokens, `[BLOCK][B]`: then no
                other is ordered.

        Returns:
            An iterator over the new tokens of all sequences, step by step.
        """
        ordered = deque(self.decode() for _ in range(min(blocks, 1)))
        return self._taken(ordered, blocks - len(ordered), ends)

    def _taken(
        self, ordered: deque[Array], left: int, ends: Callable[[list[list[int]]], bool]
    ) -> Iterator[list[int]]:
        def order() -> None:
            nonlocal left
            while left > 0 and len(ordered) <= _AHEAD:
                ordered.append(self.decode())
                left -= 1

        while ordered:
            order()
            made = jax.device_get(ordered.popleft()).tolist()
            self.steps += BLOCK
            if ends(made):
                left = 0
            order()  # before the reader is given these, who may take long
            yield from made

    def fault(self) -> str | None:
        """What a step that gave up waiting has said, a sentence; None if none did."""
        if self.implementation != "pallas_stream":
            return None
        fault = step_fault(self._model, self._cache)
        return None if fault is None else str(fault)
