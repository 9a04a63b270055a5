"""The device's side of a generation: the prefill, then blocks of decode steps.

What is compiled depends on the model, the batch, the cache's capacity (rounded up, so that similar
requests share it) and the stages by which tokens are chosen (`ffjax.sampling.rows.Stages`);
lengths, parameters and seeds are arguments. It is compiled with the options of
`ffjax.reproducible`: the same request gets the same tokens in every process.

A block has a fixed number of steps (`ffjax.blocks`), so that the device runs it without asking the
host, and the host orders the next one while it runs. It is the host that looks whether all
sequences have ended. The device never waits to be looked at; after an early end it runs the block
that it has.

A token whose logit is not finite comes back as `NOT_FINITE`. That adds no launch to a step: the
look at one number a sequence is part of the launch that writes the token down.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ffjax.blocks import BLOCK, block_steps
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import (
    Implementation,
    decode_step,
    is_fused,
    resolve_implementation_config,
    step_fault,
)
from ffjax.in_flight import note
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.prefill.choice import Prefill, prefill_of, resolve_prefill_of
from ffjax.prefill.stepwise import step_tokens
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.requests import Request
from ffjax.sampling.choose import (
    NOT_FINITE,
    Choice,
    choose,
    draws_by_kernel,
    empty_board,
    kept_by_kernel,
)
from ffjax.sampling.draw import KeysFrom, sequence_keys, step_keys
from ffjax.sampling.history import Fed, History
from ffjax.sampling.logprobs import LogProbs, log_probs
from ffjax.sampling.rows import Rows, Stages, drawing_gpu, rows_of
from ffjax.settings import program_settings
from pallas_kernels.dims import ceil_div
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.logprobs import ordered, room
from pallas_kernels.support import MAX_BATCH

__all__ = [
    "AHEAD",
    "BLOCK",
    "NOT_FINITE",
    "NO_TOKEN",
    "Loop",
    "Made",
    "Reader",
    "Step",
    "capacity_within",
    "decode_block",
    "fault_in",
    "slots_for",
]

NO_TOKEN = -2
"""What stands where a sequence has no token, and where it takes none."""
AHEAD = 1
"""Blocks ordered beyond the one that the host waits for. With one, the device always has work, as
long as the host comes back within the time of a block; more would run in vain after an end."""
# Capacities are rounded up to a multiple of this.
_CAPACITY_STEP = 256


class Made(NamedTuple):
    """What a block of steps, or a prefill, has made; on the device, or of numpy.

    Attributes:
        tokens: int32 `[steps, B]`, of a prefill `[B]`: NOT_FINITE where logits are not finite. Of
            steps that speculate, `[steps, B, T]`: see `ffjax.speculation.block`.
        logprobs: of each; None where nobody asked.
        drafted: bool, whether a draft is there to go on with; None without speculation.
    """

    tokens: Any
    logprobs: LogProbs | None
    drafted: Any = None

    @classmethod
    def of(cls, choice: Choice) -> Made:
        """Of one choice, or of those of a block."""
        return cls(choice.told, choice.logprobs)

    def sent(self) -> Made:
        """The same, whose copy to the host is ordered with what makes it.

        A copy that is ordered when the host asks for the tokens takes 0.45 ms on an H200, though
        all is computed: as long as a whole step of Llama 3.2 1B in int4. This one runs beside the
        next steps.
        """
        for array in jax.tree.leaves(self):
            array.copy_to_host_async()
        note(self.tokens)
        return self

    @property
    def repeats(self) -> bool:
        """Whether a draft of a block was right, or one is there after it; the arrays are numpy's.

        Else nothing seems to repeat, and plain steps cost less.
        """
        return bool(self.drafted) or bool((self.tokens[..., 1:] != NO_TOKEN).any())

    def step(self) -> Step:
        """What a prefill has made; the arrays are numpy's."""
        return Step(self.tokens.tolist(), self.logprobs)

    def steps(self) -> list[Step]:
        """Step by step; the arrays are numpy's, and those of a block."""
        tokens = self.tokens.tolist()
        if self.logprobs is None:
            return [Step(row, None) for row in tokens]
        return [
            Step(row, jax.tree.map(lambda a, i=i: a[i], self.logprobs))
            for i, row in enumerate(tokens)
        ]


class Step(NamedTuple):
    """The next token of each sequence, on the host.

    Attributes:
        tokens: B ids, or NOT_FINITE; NO_TOKEN of one that has ended, where steps speculate.
        logprobs: of numpy; None where nobody asked.
        drafted: whether each came beside the first of its step; None: there was no speculation.
    """

    tokens: list[int]
    logprobs: LogProbs | None
    drafted: list[bool] | None = None


class Reader(Protocol):
    """Who takes the tokens of a loop, and knows what ends a sequence."""

    def would_finish(self, columns: Sequence[Sequence[int]]) -> bool:
        """Whether no sequence would take another token after these, of each sequence."""
        ...

    def has_ended(self, row: int) -> bool:
        """Whether a sequence takes no more tokens."""
        ...


def decode_block(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    token: Array,
    index: Array,
    rows: Rows,
    history: History | None,
    *,
    steps: int,
    stages: Stages,
    implementation: Implementation,
    running: Array | None = None,
) -> tuple[KVCache, Array, Array, History | None, Made]:
    """Runs a block of steps.

    A sequence that has stopped keeps stepping; what it says is for nobody.

    Args:
        graphdef: the model's structure.
        state: its weights.
        cache: the cache.
        token: int32 `[B]`, chosen but not yet fed.
        index: int32 `[B]`, how many tokens a sequence has got, `token` included.
        rows: how tokens are chosen.
        history: what came before `token`; None where no stage asks.
        steps: of the block.
        stages: how tokens are chosen.
        implementation: of the steps.
        running: bool `[B]`, whose tokens go into the history; None: all.

    Returns:
        Cache, token, index and history to go on from, and what was made.
    """
    model = graphdef.merged(state)
    indices = index + jnp.arange(steps, dtype=jnp.int32)[:, None]
    keys = by_kernel = None
    if stages.draws:
        own = sequence_keys(rows.seeds)
        if draws_by_kernel(token.shape[0], model.config.vocab_size, stages):
            # An array of each step's own would cost a launch: the kernel counts the steps.
            by_kernel = KeysFrom(own, index)
        else:
            # All keys of the block at once: one by one, each would cost a launch or more.
            keys = jax.vmap(lambda at: step_keys(own, at))(indices)

    untold = dataclasses.replace(stages, logprobs=None)
    shape = token.shape[0], model.config.vocab_size
    kept = None if stages.logprobs is None else _room((steps, *shape), stages.gpu)
    mine = kept is not None and not kept_by_kernel(*shape, untold)

    def step(carry, each):
        cache, token, history, board, kept = carry
        at, index, keys = each
        fed = Fed(token, first, running) if stages.remembers else None
        out = decode_step(model, cache, token, implementation=implementation)
        keys = keys if by_kernel is None else by_kernel
        how = keys, history, index, untold, board, fed, None if mine else kept
        choice = choose(out.logits, out.token, rows, *how)
        if mine:
            # As they are, XLA would copy them by a launch that it takes into no graph of launches.
            kept = lax.dynamic_update_index_in_dim(kept, ordered(out.logits), at, 0)
        else:
            kept = choice.kept
        return (out.cache, choice.token, choice.history, choice.board, kept), choice.told

    first, board = token, empty_board(*shape, stages)
    start = cache, token, history, board, kept
    out, tokens = lax.scan(
        step, start, (np.arange(steps, dtype=np.int32), indices, keys), length=steps
    )
    cache, token, history, _, kept = out
    told = None
    if stages.logprobs is not None and kept is not None:
        # Of all steps at once: step by step, each launch that they take would be one a token.
        kept = kept.reshape(-1, kept.shape[-1])
        found = log_probs(kept, tokens.reshape(-1), stages.logprobs, stages.gpu)
        told = LogProbs(*(x.reshape(*tokens.shape, *x.shape[1:]) for x in found))
    return cache, token, index + steps, history, Made(tokens, told)


def _room(shape: tuple[int, ...], gpu: Gpu | None) -> Array:
    """Where logits are kept, int32: each step writes its own."""
    return (
        jnp.zeros(shape, jnp.int32)
        if gpu is None
        else room(shape, jnp.int32, interpret=gpu == INTERPRETER)
    )


def slots_for(capacity: int) -> int:
    """S of a cache for so many positions: with room for a block that runs past them, rounded up."""
    return ceil_div(capacity + BLOCK, _CAPACITY_STEP) * _CAPACITY_STEP


def capacity_within(slots: int) -> int:
    """The most positions whose cache, as `slots_for` makes it, has at most so many slots."""
    return max(0, slots // _CAPACITY_STEP * _CAPACITY_STEP - BLOCK)


def fault_in(model: Transformer, cache: KVCache, tokens: int) -> str | None:
    """What a fused step that gave up waiting has said, a sentence; None if none did.

    Args:
        model: the model.
        cache: the cache, as steps of one token and of T left it.
        tokens: T; 1 where there were none of several.
    """
    # Steps of one token, and those of several, each have an exchange of their own.
    for each in sorted({1, tokens}):
        if (fault := step_fault(model, cache, each)) is not None:
            return str(fault)
    return None


@functools.cache
def _programs(device: Any) -> Programs:
    """The programs of blocks for a device: XLA's options depend on it."""
    return Programs(
        jax.jit(
            decode_block,
            static_argnames=("graphdef", "steps", "stages", "implementation"),
            donate_argnames=("cache", "history"),
            compiler_options=compiler_options(device),
        )
    )


class _Start(NamedTuple):
    """What a generation begins with: an empty cache.

    `last` is room for what `ffjax.prefill.packed.feed` calls so.
    """

    cache: KVCache
    last: Array
    history: History | None


def _start(
    config: ModelConfig, batch: int, capacity: int, dtype: Any, remembers: bool, tokens: int
) -> _Start:
    return _Start(
        cache=KVCache.create(config, batch, capacity, dtype, tokens=tokens),
        last=jnp.zeros((batch, config.model_dim), jnp.float32),
        history=History.empty(batch, config.vocab_size) if remembers else None,
    )


@functools.cache
def _started(device: Any) -> Any:
    """Makes what a generation begins with, in one launch."""
    options = compiler_options(device)
    return jax.jit(_start, static_argnums=(0, 1, 2, 3, 4, 5), compiler_options=options)


@functools.lru_cache
def _start_shapes(*args: Any) -> Any:
    """The shapes of it, where the prefill makes it."""
    return jax.eval_shape(functools.partial(_start, *args))


class Loop:
    """One generation on the device: makes the cache, compiles, then runs.

    Calls return as soon as the device has its orders; reading a result waits for it.

    Attributes:
        implementation: which one runs the decode steps.
        step_tokens: T, tokens that a step may take of each sequence.
        block: decode steps that are ordered at a time.
        compile_seconds: spent on compiling.
        steps: decode steps whose tokens have come back.
    """

    step_tokens: int = 1

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
        if is_fused(implementation) and request.batch > MAX_BATCH:
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
            self._prefill.compile(self._cache, self._history, self._like)
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
        capacity = slots_for(request.capacity)
        self._model = model
        self._request = request
        size = request.batch, capacity
        gpu = drawing_gpu(self._device, implementation)
        self._stages = stages = Stages.of(request.params, request.processors, gpu)
        config, dtype = self._parts.config, self._parts.dtype
        sizes = config, dtype, *size
        self.implementation: Implementation = resolve_implementation_config(*sizes, implementation)
        wide = step_tokens(request.batch)
        name = resolve_prefill_of(
            self._parts,
            request,
            capacity,
            implementation,
            prefill,
            # A cache has room for one kind of step beside that of one token.
            steps=self.step_tokens in (1, wide),
        )
        self.block = block_steps(config, request.batch, self._device, self.implementation)
        self._widest = wide if name == "steps" else self.step_tokens
        how = dtype, stages.remembers, self._widest
        begin = _start_shapes if name == "steps" else _started(self._device)
        self._cache, last, self._history = begin(config, *size, *how)
        # No token yet, and then one.
        self._token, self._index = np.zeros(size[0], np.int32), np.ones(size[0], np.int32)
        seeds = request.seeds if stages.draws else None
        self._rows = rows_of(request.params, request.stop_tokens, seeds, stages)
        # What the shapes of all of them follow from, beside the model and the stages.
        self._like = *size, self._widest
        self.steps = 0
        self._prefill = prefill_of(
            self._parts,
            request,
            capacity,
            self._rows,
            stages,
            last,
            name,
        )

    def _block_args(self) -> tuple[Any, ...]:
        state = self._parts.state
        return state, self._cache, self._token, self._index, self._rows, self._history

    def _compiled_block(self) -> Any:
        how = {"steps": self.block, "stages": self._stages, "implementation": self.implementation}
        known_by = self._parts.kinds, self._like, *how.values()
        args = self._parts.graphdef, *self._block_args()
        return _programs(self._device).get(*args, known_by=known_by, **how)

    def _send(self) -> None:
        """Sends what every block takes, which would else be sent with each.

        Ordered after the prefill, which the first token waits for.
        """
        if not self._stages.plain:
            self._rows = jax.device_put(self._rows)

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

    def prefill(self) -> Made:
        """Feeds the prompts; returns the first new token of each."""
        with jax.default_device(self._device), program_settings():
            run = self._prefill.run(self._cache, self._history)
            if self._request.max_new_tokens > 1:
                self._send()
        self._cache, self._history, choice = run
        self._token = choice.token
        return Made.of(choice).sent()

    def decode(self) -> Made:
        """Orders a block of steps; returns the new tokens."""
        with jax.default_device(self._device), program_settings():
            out = self._block(*self._block_args())
        self._cache, self._token, self._index, self._history, made = out
        return made.sent()

    def rows(self, blocks: int, reader: Reader) -> Iterator[Step]:
        """Runs up to so many blocks, the device ahead of who takes the tokens.

        The first block is ordered at once, every other one before the block ahead of it is waited
        for. None is ordered once all sequences have ended with the tokens that are here.

        Args:
            blocks: how many, at most.
            reader: who takes the tokens.

        Returns:
            An iterator over the new tokens of all sequences, step by step.
        """

        def ends(made: Made) -> bool:
            return reader.would_finish(made.tokens.T.tolist())

        made = self._blocks(blocks, ends)
        return itertools.chain.from_iterable(one.steps() for one in made)

    def _blocks(self, blocks: int, ends: Callable[[Made], bool]) -> Iterator[Made]:
        """Orders blocks; returns an iterator over what they have made, on the host."""
        ordered = deque(self.decode() for _ in range(min(blocks, 1)))
        return self._taken(ordered, blocks - len(ordered), ends)

    def _taken(
        self, ordered: deque[Made], left: int, ends: Callable[[Made], bool]
    ) -> Iterator[Made]:
        def order() -> None:
            nonlocal left
            while left > 0 and len(ordered) <= AHEAD:
                ordered.append(self.decode())
                left -= 1

        while ordered:
            order()
            made = jax.device_get(ordered.popleft())
            self.steps += self.block
            if ends(made):
                left = 0
            order()  # before the reader is given these, who may take long
            yield made

    def fault(self) -> str | None:
        """What a step that gave up waiting has said, a sentence; None if none did."""
        if not is_fused(self.implementation):
            return None
        return fault_in(self._model, self._cache, self._widest)
