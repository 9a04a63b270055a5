"""How a layer's attention is dealt out: KV splits, and the table of each program's parts.

As in flash decoding, a head's cached positions are split among programs. A part of the work is one
sequence, one key/value head with up to 8 of the queries that share it (of several tokens a step, as
many times 8 as there are warps for, unless there are programs for them), and one KV split.
The number of a head's splits depends on the sequence's length alone. Parts are dealt out in turn,
to the last program first: program P - 1 - p has parts p, p + P and so on. For the last programs
have the fewest tiles of weights.

What parts a program has is the same in every layer, or every local one and every other: it
is worked out once a step, as rows of a table in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.dims import next_power_of_2
from pallas_kernels.program import iota
from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.layout import ROW_WORDS, part_table_rows
from pallas_kernels.stream.plan import LOT

__all__ = ["Part", "Share", "make_part_table", "num_splits_of", "part_of", "row_of", "share_of"]


class Part(NamedTuple):
    """One part: int32."""

    sequence: Array  # b
    head: Array  # of K
    first_query: Array  # of the T * G that share it: token t's g-th one is number t * G + g
    lots: Array | int  # how many times 8 of them it has
    split: Array  # which of the head's KV splits
    num_splits: Array  # how many it has
    position: Array  # the first new one
    start: Array  # first cached position of the split
    stop: Array  # one past its last cached position

    @property
    def has_new(self) -> Array:
        """Whether the new positions are this part's."""
        return self.split == self.num_splits - 1


class Share(NamedTuple):
    """A program's share of a layer: int32 scalars."""

    parts: Array
    combines: Array  # whether some head has several KV splits
    rows: Array  # where the rows of its parts lie in shared memory


class _Extent(NamedTuple):
    """What one sequence's first query sees of the cache in a layer: scalars, int32."""

    first: Array  # first position seen
    live: Array  # how many, new ones not counted


def _ceil_div(a: Array, b: Array | int) -> Array:
    return lax.div(a + (b - 1), jnp.asarray(b, jnp.int32))


def _extents(env: StreamEnv, local: Array | bool, lengths: Sequence[Array]) -> list[_Extent]:
    """Of sequences of these lengths. A full cache's new position is not stored."""
    live = [jnp.minimum(length, env.dims.capacity) for length in lengths]
    if (window := env.features.window) is None:
        return [_Extent(n * 0, n) for n in live]
    first = [jnp.where(local, jnp.maximum(n - (window - 1), 0), 0) for n in live]
    return [_Extent(start, n - start) for start, n in zip(first, live, strict=True)]


def _split_size(env: StreamEnv, live: Array) -> Array:
    """Positions of a split, where `live` positions and a new one are seen.

    Further new ones lie beyond the last split's end.
    """
    cut = env.plan.attention
    equal = _ceil_div(_ceil_div(live + 1, cut.max_splits), cut.block) * cut.block
    return jnp.maximum(equal, cut.min_split)


def _num_splits(env: StreamEnv, live: Array) -> Array:
    """KV splits of one head of a sequence."""
    return _ceil_div(live + 1, _split_size(env, live))


def num_splits_of(env: StreamEnv, layer: Array, sequence: Array) -> Array:
    """KV splits of a head of a sequence, int32."""
    local = env.is_local(layer)
    if not env.plan.bulk:
        # From layer to layer the compiler would keep all sequences' numbers of splits, beside their
        # lengths: 8 registers of a thread where there are too few. See `StreamEnv.iota`.
        [extent] = _extents(env, local, [env.length_of(sequence)])
        return _num_splits(env, extent.live)
    num_splits = sequence * 0
    for b, extent in enumerate(_extents(env, local, env.lengths)):
        num_splits = jnp.where(sequence == b, _num_splits(env, extent.live), num_splits)
    return num_splits


def _turn(env: StreamEnv) -> Array:
    """How many programs have their turn before this one, int32."""
    return env.plan.programs - 1 - env.program


def _lots(env: StreamEnv, extents: list[_Extent]) -> tuple[Array | int, Array | int]:
    """Parts of a split of a key/value head; and how many times 8 queries each has.

    Of long sequences all programs have something to do, and keys and values are best read once. Of
    short ones most would have nothing while some work for all.
    """
    cut = env.plan.attention
    if cut.abreast == 1:
        return cut.lots, 1
    num_splits = [_num_splits(env, extent.live) for extent in extents]
    parts = sum(num_splits[1:], num_splits[0]) * (env.dims.num_kv_heads * cut.lots)
    divided, pieces = jnp.int32(1), 2
    while pieces <= cut.abreast:
        divided = jnp.where(parts * pieces <= env.plan.programs, jnp.int32(pieces), divided)
        pieces *= 2
    return divided * cut.lots, lax.div(jnp.int32(cut.abreast), divided)


def _deal(env: StreamEnv, extents: list[_Extent]) -> tuple[Array, Array]:
    """Parts of a layer, and the most splits of a head."""
    num_splits = [_num_splits(env, extent.live) for extent in extents]
    heads = env.dims.num_kv_heads * _lots(env, extents)[0]
    most = num_splits[0]
    for one in num_splits[1:]:
        most = jnp.maximum(most, one)
    return sum(num_splits[1:], num_splits[0]) * heads, most


def _part(env: StreamEnv, extents: list[_Extent], number: Array) -> Part:
    """The `number`-th part of the layer: sequences in order, then splits, then heads."""
    lots, each = _lots(env, extents)
    heads = env.dims.num_kv_heads * lots
    offset = before = sequence = first = live = number * 0
    for b, extent in enumerate(extents):
        here = number >= offset
        before = jnp.where(here, offset, before)
        sequence = jnp.where(here, b, sequence)
        first = jnp.where(here, extent.first, first)
        live = jnp.where(here, extent.live, live)
        offset = offset + _num_splits(env, extent.live) * heads
    within = number - before
    index = lax.div(within, jnp.int32(heads))
    size = _split_size(env, live)
    start = first + index * size
    head = within - index * heads
    return Part(
        sequence=sequence,
        head=lax.div(head, jnp.int32(lots)),
        first_query=lax.rem(head, jnp.int32(lots)) * (LOT * each),
        lots=each,
        split=index,
        num_splits=_num_splits(env, live),
        position=first + live,
        start=start,
        stop=jnp.minimum(start + size, first + live),
    )


# The table in shared memory


def _kinds(env: StreamEnv) -> list[bool]:
    """Whether layers of each kind that the model has are local."""
    return sorted(set(env.features.local_layers)) or [False]


def _query_word(env: StreamEnv, part: Part, local: bool) -> Array:
    """A part's first query; of several tokens, above it its lots, and where windows begin.

    Token t's window begins t positions after the first one's; but where the first one's reaches
    beyond the sequence's beginning, by as many fewer.
    """
    d, window = env.dims, env.features.window
    if d.tokens == 1:
        return part.first_query
    query = part.first_query | lax.shift_left(jnp.int32(0) + part.lots, 8)
    if window is None:
        return query
    beyond = jnp.minimum(window - 1 - part.position, d.tokens)
    spare = jnp.maximum(beyond, 0) if local else jnp.full_like(part.position, d.tokens)
    # Further on no position is before a window.
    spare = jnp.where(part.split == 0, spare, d.tokens)
    return query | lax.shift_left(spare, 16)


def make_part_table(env: StreamEnv, table: Array) -> None:
    """Works out this program's parts; see `ptx.CacheFeed` for the first words of a row.

    Args:
        env: the program's view.
        table: int32 scalar, where the table begins in shared memory.
    """
    d, plan = env.dims, env.plan
    row = iota((next_power_of_2(part_table_rows(plan)),), 0)
    unit = ptx.UNIT // 2  # elements
    for kind, local in enumerate(_kinds(env)):
        extents = _extents(env, local, env.lengths)
        total, most = _deal(env, extents)
        part = _part(env, extents, _turn(env) + (row - 1) * plan.programs)
        live = jnp.maximum(part.stop - part.start, 0)
        new = part.has_new.astype(jnp.int32) * d.tokens
        cache_head = part.sequence * d.num_kv_heads + part.head
        words = [
            (cache_head * d.capacity + part.start) * (d.head_dim // unit),
            live,
            _ceil_div(live + new, plan.attention.block),
            new,
            cache_head,
            _query_word(env, part, local),
            part.split | lax.shift_left(part.num_splits, 16),
            part.position,
        ]
        before = [jnp.broadcast_to(x, row.shape) for x in (env.share(total, _turn(env)), most)]
        for number, word in enumerate(before):
            words[number] = jnp.where(row == 0, word, words[number])
        there = (row == 0) | (row <= env.share(total, _turn(env)))
        at = table + 4 * ROW_WORDS * (kind * part_table_rows(plan) + row)
        ptx.write_row(at, words, there & (row < part_table_rows(plan)))
    access.meet()


def share_of(env: StreamEnv, layer: Array, table: Array | None) -> Share:
    """This program's share of a layer's attention.

    Args:
        env: the program's view.
        layer: int32 scalar.
        table: where the table begins in shared memory; None where there is none.
    """
    if table is None:
        total, most = _deal(env, _extents(env, env.is_local(layer), env.lengths))
        return Share(env.share(total, _turn(env)), most > 1, layer * 0)
    rows = table
    if len(_kinds(env)) > 1:
        local = env.is_local(layer).astype(jnp.int32)
        rows += local * (4 * ROW_WORDS * part_table_rows(env.plan))
    mine, most, *_ = ptx.read_row(rows)
    return Share(mine, most > 1, rows)


def part_of(env: StreamEnv, layer: Array, share: Share, j: Array) -> Part:
    """The j-th of this program's parts of a layer."""
    if env.interpret:
        extents = _extents(env, env.is_local(layer), env.lengths)
        return _part(env, extents, _turn(env) + j * env.plan.programs)
    _, live, _, _, cache_head, query, numbers, position = ptx.read_row(row_of(share, j))
    sequence = lax.div(cache_head, jnp.int32(env.dims.num_kv_heads))
    return Part(
        sequence=sequence,
        head=cache_head - sequence * env.dims.num_kv_heads,
        first_query=query if env.dims.tokens == 1 else query & 0xFF,
        lots=1 if env.dims.tokens == 1 else lax.shift_right_logical(query, 8) & 0xFF,
        split=numbers & 0xFFFF,
        num_splits=lax.shift_right_logical(numbers, 16),
        position=position,
        start=position - live,  # of the last split; nobody asks for another's
        stop=position,
    )


def row_of(share: Share, j: Array) -> Array:
    """Address of the row of the j-th of this program's parts."""
    return share.rows + 4 * ROW_WORDS * (1 + j)
