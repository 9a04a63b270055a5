"""Flash attention of new tokens over the key/value cache (Dao, arXiv 2307.08691).

The new tokens of all sequences stand one after the other, `[P, N, H]`, and are cut into tiles of
tokens of one sequence. A program takes one tile and one query head, goes through the keys that the
tile sees, in blocks, and keeps a running maximum and sum of each query's scores (Milakov and
Gimelshein, arXiv 1805.02867). No scores leave it. Keys and values are read where they lie in the
cache, which holds those of the new tokens already.

A block of keys that every query of the tile sees needs no mask. Those at both ends, near the
causal edge and near the beginning of a window, are looked at key by key.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.calls import kernel_call
from pallas_kernels.dims import ceil_div, next_power_of_2
from pallas_kernels.primitives import access
from pallas_kernels.program import iota

__all__ = [
    "EVERYTHING",
    "KERNEL_NAME",
    "TILE_FIELDS",
    "Blocks",
    "attend",
    "blocks_for",
    "cut",
    "tiles_for",
]

KERNEL_NAME = "ffjax_prefill_attention"
EVERYTHING = 1 << 30
"""A window wider than any cache: a query sees all positions up to its own."""

TILE_FIELDS = ("start", "count", "row", "position")
"""What a tile says: its first token in the packed order, how many it has, whose they are, and the
first one's position."""

# Stands for minus infinity: it survives a subtraction from itself.
_LOWEST = -1e30
_LOG2_E = math.log2(math.e)
# What tensor cores multiply at least, along any axis.
_LEAST = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the work of a program.

    Attributes:
        queries: tokens of a tile; a power of two, 16 or more.
        keys: of a block; likewise.
        num_warps: warps of a program.
        num_stages: blocks of keys and values that are on their way, or in use.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# From the fastest on, of those tried on an H200: with 8 warps and twice the queries it is as fast
# where a head has 128 numbers, and 10 to 20% slower with 64 and with 256. The first that fits is
# taken.
_SIZES = (
    Blocks(64, 64, 4, 3),
    Blocks(64, 64, 4, 2),
    Blocks(64, 32, 4, 2),
    Blocks(32, 32, 4, 2),
    Blocks(16, 16, 4, 2),
)
# Of shared memory, for what the compiler exchanges between threads.
_SPARE = 2048


def blocks_for(head_dim: int, itemsize: int, shared_memory: int, tokens: int) -> Blocks:
    """The sizes for a kind of head and a GPU.

    Args:
        head_dim: H.
        itemsize: bytes of a number.
        shared_memory: bytes one program may use.
        tokens: P; no tile is larger than it need be.
    """
    width = next_power_of_2(max(head_dim, _LEAST))

    def fits(blocks: Blocks) -> bool:
        held = blocks.queries + 2 * blocks.num_stages * blocks.keys
        return held * width * itemsize <= shared_memory - _SPARE

    blocks = next(filter(fits, _SIZES), _SIZES[-1])
    queries = min(blocks.queries, max(_LEAST, next_power_of_2(tokens)))
    return dataclasses.replace(blocks, queries=queries)


def tiles_for(tokens: int, batch: int, size: int) -> int:
    """How many tiles of `size` tokens P tokens of B sequences are cut into at most."""
    return ceil_div(tokens, size) + batch


def cut(segments: list[tuple[int, int, int]], size: int, count: int) -> np.ndarray:
    """Cuts the new tokens into tiles.

    Args:
        segments: of each sequence with new tokens, in packed order: its row of the cache, how
            many tokens it has, 1 or more, and the first one's position.
        size: tokens of a tile.
        count: tiles there are to be, as `tiles_for` says; those left over are empty.

    Returns:
        int32 `[count, 4]`, the fields of `TILE_FIELDS`; tiles with the most keys come first, so
        that the device ends with small ones.
    """
    tiles: list[tuple[int, int, int, int]] = []
    start = 0
    for row, tokens, position in segments:
        for at in range(0, tokens, size):
            tiles.append((start + at, min(size, tokens - at), row, position + at))
        start += tokens
    tiles.sort(key=lambda tile: -tile[3])
    result = np.zeros((count, len(TILE_FIELDS)), np.int32)
    if tiles:
        result[: len(tiles)] = tiles
    return result


def attend(
    q: Array,
    k: Array,
    v: Array,
    tiles: Array,
    layer: Array,
    window: Array | int,
    *,
    blocks: Blocks,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Array:
    """Softmax attention of packed tokens over the cache of one layer, grouped-query.

    Args:
        q: `[P, N, H]`, after RoPE.
        k: `[L, B, K, S, H]`, the cache's keys, in q's dtype.
        v: `[L, B, K, S, H]`.
        tiles: int32 `[tiles, 4]`, from `cut`.
        layer: int32, of the cache.
        window: int32, how many positions a query sees, its own included.
        blocks: sizes; `blocks.queries` is what the tiles were cut to.
        scale: multiplies the products of queries and keys; None: 1/sqrt(H).
        softcap: holds the scores within (-softcap, softcap), or None.
        interpret: run on a CPU.

    Returns:
        `[P, N, H]` in q's dtype. Of tokens in no tile: anything.
    """
    num_heads = q.shape[1]
    kernel = functools.partial(
        _kernel,
        blocks=blocks,
        scale=1 / math.sqrt(q.shape[2]) if scale is None else scale,
        softcap=softcap,
        interpret=interpret,
    )
    return kernel_call(
        kernel,
        grid=(tiles.shape[0], num_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=interpret,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        name=KERNEL_NAME,
    )(
        q,
        k,
        v,
        tiles,
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.asarray(window, jnp.int32).reshape(1),
    )


def _kernel(
    q_ref,
    k_ref,
    v_ref,
    tiles_ref,
    layer_ref,
    window_ref,
    out_ref,
    *,
    blocks: Blocks,
    scale: float,
    softcap: float | None,
    interpret: bool,
):
    _, num_heads, head_dim = q_ref.shape
    _, _, num_kv_heads, capacity, _ = k_ref.shape
    width = next_power_of_2(max(head_dim, _LEAST))
    tile, head = pl.program_id(0), pl.program_id(1)
    start, count, row, position = (tiles_ref[tile, i] for i in range(len(TILE_FIELDS)))
    layer, window = layer_ref[0], window_ref[0]
    group = lax.div(head, jnp.int32(num_heads // num_kv_heads))
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    # From scores as `block` keeps them to exponents of 2.
    factor = _LOG2_E * (scale if softcap is None else softcap)

    def dot(a, b, contract):
        if interpret:  # CPUs lack a bfloat16 product with a float32 result
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        dims = ((contract[:1], contract[1:]), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    # Of the tile: token, element.
    at = (blocks.queries, width)
    token, element = iota(at, 0), iota(at, 1)
    mine = (token < count) & (element < head_dim)
    where = (start + token, jnp.broadcast_to(head, at), element)
    q = access.load(q_ref.at[where], mask=mine, other=0.0)
    stop = jnp.minimum(position + count, capacity)  # one past the last key that anybody sees

    def load(ref, first, checked):
        shape = (blocks.keys, width)
        slot, element = first + iota(shape, 0), iota(shape, 1)
        view = ref.at[layer, row, group, slot, element]
        if checked:
            # What lies beyond may be anything, also NaN.
            return access.load(view, mask=(slot < stop) & (element < head_dim), other=0.0)
        if width != head_dim:
            return access.load(view, mask=element < head_dim, other=0.0)
        return access.load(view)

    def block(i, state, *, checked):
        top, total, out = state
        first = i * blocks.keys
        keys = load(k_ref, first, checked)
        scores = dot(q, keys, (1, 1))
        if softcap is not None:
            scores = jnp.tanh(scores * (scale / softcap))
        seen = None
        if checked:
            shape = (blocks.queries, blocks.keys)
            ahead = position + iota(shape, 0) - (first + iota(shape, 1))  # query less key
            seen = (ahead >= 0) & (ahead < window)
            scores = jnp.where(seen, scores, _LOWEST)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # One multiplication and addition a score.
        weights = jnp.exp2(scores * factor - (new_top * factor)[:, None])
        if seen is not None:  # a query that has seen nothing yet has the maximum _LOWEST
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp2((top - new_top) * factor)
        total = total * shrink + jnp.sum(weights, axis=1)
        values = load(v_ref, first, checked)
        out = out * shrink[:, None] + dot(weights.astype(q.dtype), values, (1, 0))
        return new_top, total, out

    keys = jnp.int32(blocks.keys)
    first_seen = jnp.maximum(position - window + 1, 0)  # by the first query
    all_see = jnp.maximum(position + count - window, 0)  # the first key that the last query sees
    begin = lax.div(first_seen, keys)
    end = jnp.where(count > 0, lax.div(stop + keys - 1, keys), begin)
    # Blocks from `inner` to `outer` are seen by every query, whole.
    inner = jnp.minimum(lax.div(all_see + keys - 1, keys), end)
    outer = jnp.clip(lax.div(jnp.minimum(position + 1, stop), keys), inner, end)
    state = (
        jnp.full((blocks.queries,), _LOWEST, jnp.float32),
        jnp.zeros((blocks.queries,), jnp.float32),
        jnp.zeros(at, jnp.float32),
    )
    checked, unchecked = (functools.partial(block, checked=one) for one in (True, False))
    state = lax.fori_loop(begin, inner, checked, state)
    state = lax.fori_loop(inner, outer, unchecked, state)
    _, total, out = lax.fori_loop(outer, end, checked, state)
    access.store(out_ref.at[where], (out / total[:, None]).astype(q.dtype), mask=mine)
