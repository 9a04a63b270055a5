"""The fast prefill: packed tokens through the reference's layers, with a flash attention.

It differs from the reference in three ways: attention is a flash kernel, products are rounded as
they are written, and prompts are not padded to one length but stand one after the other
(`ffjax.prefill.packing`).
Products go to cuBLAS, which reads a layer's matrix where it lies in the stack `[L, out, in]`; of a
matrix that is quantized, one layer's numbers exist at a time. Scores stay within the attention's
kernel (`pallas_kernels.prefill.attention`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.model import LayerAt, Transformer
from ffjax.parcel import Layout, as_words
from ffjax.parts import Parts
from ffjax.prefill.first import first_token
from ffjax.prefill.packing import PackedChunk, chunks_of
from ffjax.prefill.products import products_of
from ffjax.prefill.request import RequestPrefill
from ffjax.programs import Programs
from ffjax.reproducible import compiler_options
from ffjax.sampling.choose import Choice
from ffjax.sampling.history import History, fed
from ffjax.sampling.rows import Rows, Stages
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.prefill import attention
from pallas_kernels.prefill.attention import EVERYTHING, Blocks, blocks_for

__all__ = ["PackedPrefill", "feed"]


def blocks_of(config: ModelConfig, dtype: Any, gpu: Gpu, size: int) -> Blocks:
    """The attention's sizes for a chunk of so many tokens."""
    itemsize = jnp.dtype(dtype).itemsize
    return blocks_for(config.head_dim, itemsize, gpu.shared_memory, size)


def feed(
    model: Transformer,
    cache: KVCache,
    last: Array,
    chunk: PackedChunk,
    gpu: Gpu,
) -> tuple[KVCache, Array]:
    """Feeds one chunk of packed tokens.

    Args:
        model: the model.
        cache: the cache, which holds what came before.
        last: float32 `[B, D]`, what the last layer returned for the last token of each prompt
            that has come to its end.
        chunk: the chunk; its arrays may be traced.
        gpu: what it runs on, for which its tiles were cut; `INTERPRETER`: kernels run on a CPU.

    Returns:
        The cache, grown by the tokens, and `last`, with the prompts that ended here.
    """
    c = model.config
    tokens, rows, positions = chunk.fed
    counts, ends = chunk.rows
    window = jnp.int32(EVERYTHING)

    def attend(at: LayerAt, q: Array, k: Array, v: Array, caches: Any) -> tuple[Array, Any]:
        # Positions of padding are beyond the capacity: they are dropped. No two are the same.
        where = at.number, rows, slice(None), positions
        keys, values = (
            kept.at[where].set(new[0], mode="drop", unique_indices=True)
            for kept, new in zip(caches, (k, v), strict=True)
        )
        seen = window if at.is_local is None else jnp.where(at.is_local, c.window or 0, window)
        out = attention.attend(
            q[0],
            keys,
            values,
            jnp.asarray(chunk.tiles),
            at.number,
            seen,
            blocks=blocks_of(c, model.dtype, gpu, len(tokens)),
            scale=c.attn_scale,
            softcap=c.attn_softcap,
            interpret=gpu == INTERPRETER,
        )
        return out.reshape(1, len(tokens), -1), (keys, values)

    x = model.embedded(tokens[None])
    stacked = model.stacked_weights()
    product = products_of(c, model.dtype, stacked, gpu)
    caches = cache.k, cache.v
    how = cache.capacity, attend, caches
    x, (k, v), _ = model.run_layers(x, positions[None], *how, product=product)
    ended = ends < len(tokens)
    last = jnp.where(ended[:, None], x[0, jnp.where(ended, ends, 0)], last)
    return dataclasses.replace(cache, k=k, v=v, lengths=cache.lengths + counts), last


def _feed_and_choose(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    last: Array,
    chunk: PackedChunk,
    rows: Rows,
    history: History | None,
    *,
    gpu: Gpu,
    stages: Stages,
) -> tuple[KVCache, Array, History | None, Choice]:
    """Feeds a chunk; returns also the token that follows each prompt, once its end has come.

    The head is multiplied in every chunk, for one token a sequence: it is that much cheaper than
    the rest that a program of its own is not worth its compilation.
    """
    model = graphdef.merged(state)
    cache, last = feed(model, cache, last, chunk, gpu)
    if history is not None:
        tokens, owners, positions = chunk.fed
        history = fed(history, jnp.where(positions < cache.capacity, owners, cache.batch), tokens)
    return cache, last, history, first_token(model.logits_of(last), rows, history, stages)


def _opened_and_fed(
    graphdef: Any,
    state: Any,
    cache: KVCache,
    last: Array,
    words: Array,
    history: History | None,
    *,
    layout: Layout,
    **static: Any,
) -> tuple[KVCache, Array, History | None, Choice]:
    """`_feed_and_choose` of a chunk and rows that were sent as one array."""
    chunk, rows = layout.opened(words)
    return _feed_and_choose(graphdef, state, cache, last, chunk, rows, history, **static)


@functools.cache
def _programs(device: Any) -> Programs:
    jitted = jax.jit(
        _opened_and_fed,
        static_argnames=("graphdef", "gpu", "stages", "layout"),
        donate_argnames=("cache", "last", "history"),
        compiler_options=compiler_options(device),
    )
    return Programs(jitted)


class _Parcel(NamedTuple):
    """A chunk as it is sent.

    Attributes:
        size: P.
        words: the chunk and the rows, int32, as `layout` says.
        layout: of the words.
    """

    size: int
    words: np.ndarray
    layout: Layout


class PackedPrefill(RequestPrefill):
    """The fast prefill of one request."""

    name = "pallas"

    def __init__(
        self,
        parts: Parts,
        prompts: tuple[np.ndarray, ...],
        capacity: int,
        rows: Rows,
        stages: Stages,
        last: Array,
    ):
        """Cuts the prompts into chunks. Where there is no GPU, the kernel is interpreted.

        Args:
            parts: the model.
            prompts: token ids of each sequence.
            capacity: S, of the cache.
            rows: how the first token is chosen.
            stages: likewise.
            last: float32 `[B, D]`, room for what the last layer returns at the end of each prompt;
                overwritten.
        """
        super().__init__(parts, rows, stages)
        self._last = last
        self._gpu = Gpu.of(parts.device) or INTERPRETER
        chunks = chunks_of(prompts, capacity, self._tile)
        self._chunks = [_Parcel(chunk.size, *as_words((chunk, rows))) for chunk in chunks]

    def _tile(self, size: int) -> int:
        """Tokens of a tile of the attention, in a chunk of so many."""
        return blocks_of(self._parts.config, self._parts.dtype, self._gpu, size).queries

    def _args(
        self, cache: KVCache, last: Array, chunk: _Parcel, history: History | None
    ) -> tuple[Any, ...]:
        return self._parts.state, cache, last, chunk.words, history

    def compile(self, cache: KVCache, history: History | None, like: Hashable = None) -> None:
        """Compiles what `run` needs, ahead of it."""
        programs = _programs(self._parts.device)
        for chunk in {chunk.size: chunk for chunk in self._chunks}.values():
            args = self._args(cache, self._last, chunk, history)
            static = {"gpu": self._gpu, "layout": chunk.layout}
            self._compile(programs, chunk.size, like, *args, **static)

    def run(
        self, cache: KVCache, history: History | None
    ) -> tuple[KVCache, History | None, Choice]:
        """Feeds the prompts; returns both with them, and the first new tokens."""
        last, choice = self._last, None
        for chunk in self._chunks:
            program = self._compiled[chunk.size]
            cache, last, history, choice = program(*self._args(cache, last, chunk, history))
        assert choice is not None, "a prompt has at least one token"
        return cache, history, choice
