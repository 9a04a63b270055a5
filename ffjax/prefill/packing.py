"""Cuts prompts into chunks of packed tokens.

The tokens of all prompts stand one after the other, whatever their lengths, so that a short
prompt beside a long one costs what its own tokens cost. They are fed in chunks of a few sizes,
since each size is a program of its own. A chunk may end in the middle of a prompt: the next one
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.prefill.attention import cut, tiles_for

__all__ = ["LARGEST", "SMALLEST", "PackedChunk", "chunk_of_row", "chunks_of", "sizes_of"]

LARGEST = 2048
"""Tokens of a full chunk: products of as many run at the rate of larger ones."""
SMALLEST = 32
"""Fewer tokens cost the same: it is the weights that are read."""


class PackedChunk(NamedTuple):
    """What one call feeds; arrays of int32, of numpy or of JAX.

    Attributes:
        fed: `[3, P]`: tokens, the row of the cache that each belongs to, and its position. Those
            of padding lie beyond the capacity.
        tiles: `[tiles, 4]`, see `pallas_kernels.prefill.attention.cut`.
        rows: `[2, B]`: how many tokens each sequence gets, and where in the chunk the last token
            of its prompt is; P where that is in another chunk.
    """

    fed: Any
    tiles: Any
    rows: Any

    @property
    def size(self) -> int:
        """P."""
        return self.fed.shape[1]


def sizes_of(total: int) -> list[int]:
    """Sizes of the chunks for so many tokens, first to last.

    All but the last are full. That one is a power of two, so that there are few programs.
    """
    full, rest = divmod(total, LARGEST)
    sizes = [LARGEST] * full
    if rest:
        sizes.append(max(SMALLEST, 1 << (rest - 1).bit_length()))
    return sizes


def chunks_of(
    prompts: Sequence[np.ndarray], capacity: int, tile_of: Callable[[int], int]
) -> list[PackedChunk]:
    """The chunks that feed the prompts, first to last.

    Args:
        prompts: token ids of each sequence.
        capacity: S, of the cache, which is empty.
        tile_of: how many tokens a tile of the attention has, in a chunk of so many.
    """
    tokens = np.concatenate(prompts)
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = np.cumsum(lengths)
    begins = ends - lengths
    rows = np.repeat(np.arange(len(prompts)), lengths)
    positions = np.arange(len(tokens)) - begins[rows]
    chunks, start = [], 0
    for size in sizes_of(len(tokens)):
        stop = min(start + size, len(tokens))
        chunks.append(
            _chunk(tokens, rows, positions, ends, start, stop, size, capacity, tile_of(size))
        )
        start = stop
    return chunks


def chunk_of_row(
    tokens: np.ndarray,
    row: int,
    first: int,
    *,
    batch: int,
    ends: bool,
    size: int,
    capacity: int,
    tile: int,
) -> PackedChunk:
    """One chunk that feeds a single sequence of a batch.

    Args:
        tokens: int32 `[n]`, n up to `size`.
        row: which sequence.
        first: the position of the first token.
        batch: B.
        ends: whether the prompt ends with them.
        size: P.
        capacity: S, of the cache.
        tile: tokens of a tile of the attention, in a chunk of so many.
    """
    count = len(tokens)
    rows, positions = np.full(count, row), first + np.arange(count)
    end = np.full(batch, -1)
    end[row] = count if ends else -1
    return _chunk(tokens, rows, positions, end, 0, count, size, capacity, tile)


def _chunk(
    tokens: np.ndarray,
    rows: np.ndarray,
    positions: np.ndarray,
    ends: np.ndarray,
    start: int,
    stop: int,
    size: int,
    capacity: int,
    tile: int,
) -> PackedChunk:
    """The chunk of `size` that holds the packed tokens from `start` to `stop`."""
    count = stop - start
    fed = np.zeros((3, size), np.int32)
    fed[:, :count] = tokens[start:stop], rows[start:stop], positions[start:stop]
    # Each somewhere else: then no two writes into the cache can meet.
    fed[2, count:] = capacity + np.arange(size - count)
    batch = len(ends)
    counts = np.bincount(rows[start:stop], minlength=batch)
    here = (ends > start) & (ends <= stop)
    last = np.where(here, ends - 1 - start, size)
    segments, at = [], start
    for row in np.flatnonzero(counts):
        segments.append((int(row), int(counts[row]), int(positions[at])))
        at += counts[row]
    tiles = cut(segments, tile, tiles_for(size, batch, tile))
    return PackedChunk(fed, tiles, np.stack([counts, last]).astype(np.int32))
