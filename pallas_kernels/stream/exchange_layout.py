"""Where the buffers of the exchange lie, and how many words they take: see `exchange`."""

from __future__ import annotations

import dataclasses

from pallas_kernels.dims import Dims, WeightBits, WeightGroups, ceil_div
from pallas_kernels.stream.plan import (
    COLUMNS,
    MAX_BATCH,
    MAX_PROGRAMS,
    MAX_SPLITS,
    READ,
    line_of,
)
from pallas_kernels.stream.planner import splits_of
from pallas_kernels.stream.tuning import TILE_BYTES, Tuning

__all__ = ["MAP_WORDS", "Layout", "exchange_words"]

# Keeps the buffers apart by whole lines of 128 bytes, which a tensor map begins at.
_LINE = 32
# Of a tensor map, 128 bytes. Not from `ptx`: to size a cache, no Pallas is imported.
MAP_WORDS = 32
# Tensor maps of a program.
MAPS = 3


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each buffer of the exchange begins in the cache's `counters`, in words.

    Of buffers that a program awaits after the same tile, the one it awaits first lies first: see
    `ptx.giving_up`.

    Attributes:
        steps: the number of finished steps.
        fault: the record of a wait that ran out, 2 words, 0 where none did: see `ptx.giving_up`.
        x_in: residual that enters a layer, B * T * D elements. These, and all others that every
            program reads, in the order of `exchange_order.word_in_exchange`.
        x_head: residual that enters the head, B * T * D elements.
        x_mid: residual between attention and feed-forward, B * T * D elements.
        qkv: queries, keys and values of the new positions, `[B * T, N + 2K, H]`.
        attn: attention's output, B * T * N * H elements.
        ffw: hidden activations, B * T * F elements.
        ffw_copy: their copy, where the tuning has two: every other program reads it.
        attn_block, ffw_block: outputs of the two blocks, B * T * D elements, where they are normed.
        partial: pairs `[B * T, D, splits]`, partial sums of the down projection.
        parts: pairs `[B * T * N, max_splits, H + 2]`: of one KV split the weighted
            values, the sum of the weights and their maximum.
        best: pairs `[P, B * T, 2]`: each program's best logit and its token.
        maps: `[MAPS, P, MAP_WORDS]`: each program's tensor maps of keys, of values, and of the
            matrix that comes by boxes. Nobody exchanges them, but they must lie in global memory.
        words: length of the whole array.
    """

    steps: int
    fault: int
    partial: int
    ffw_block: int
    attn_block: int
    x_in: int
    x_head: int
    x_mid: int
    qkv: int
    parts: int
    attn: int
    ffw: int
    ffw_copy: int
    best: int
    maps: int
    words: int

    @classmethod
    def of(cls, dims: Dims, splits: int, max_splits: int, programs: int) -> Layout:
        """The layout for a step of these sizes."""
        d, b = dims, dims.columns
        residual, hidden = _words_for(b, d.model_dim), _words_for(b, d.ffw_dim)
        sizes = {
            "steps": 1,
            "fault": 2,
            "partial": 2 * b * d.model_dim * splits,
            "ffw_block": residual * d.features.post_norm,
            "attn_block": residual * d.features.post_norm,
            "x_in": residual,
            "x_head": residual,
            "x_mid": residual,
            "qkv": b * d.qkv_dim,
            "parts": 2 * b * d.num_heads * max_splits * (d.head_dim + 2),
            "attn": _words_for(b, d.attn_dim),
            "ffw": hidden,
            "ffw_copy": hidden,
            "best": 2 * programs * b * 2,
            "maps": MAPS * programs * MAP_WORDS,
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            starts[name] = end
            end += _LINE * ceil_div(size, _LINE)
        return cls(**starts, words=end)


def _words_for(columns: int, inputs: int) -> int:
    """Words for so many inputs of each column: whole lines, of several always 8 columns.

    A line is what a warp reads at once, most of int4: so many words are enough for all weights.
    """
    line = line_of(columns == 1, 4) * (8 * READ // 4)
    return line * ceil_div(inputs, line) * (1 if columns == 1 else COLUMNS)


def exchange_words(dims: Dims) -> int:
    """Words of the cache's `counters` for a step of these sizes, on any device.

    A batch that no kernel takes has no exchange.
    """
    if dims.columns > MAX_BATCH:
        return 1
    max_splits = max(1, min(MAX_SPLITS, MAX_PROGRAMS // dims.num_kv_heads))
    # The smallest tiles of the largest weights split most.
    largest = dataclasses.replace(dims, weight_bits=WeightBits(), weight_groups=WeightGroups())
    splits = splits_of(largest, Tuning(tile_bytes=min(TILE_BYTES)))
    words = Layout.of(dims, splits, max_splits, MAX_PROGRAMS).words
    return words + _LINE  # spare: see `ptx`
