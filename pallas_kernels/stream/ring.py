"""The ring: shared memory through which the weights pass, tile after tile.

Copies that the memory system makes by itself fill its slots: bulk copies where the device has them
(compute capability 9.0), else asynchronous ones of 16 bytes a thread (`ptx.async_copy`). A slot is
asked for anew as soon as its tile has been used, whatever segment or layer the next one belongs
to, so that tiles are on their way while the program waits for others.

The compiler has no name for this. It is made to take shared memory for a loop that never runs;
the ring lies at the end of that memory, and what the compiler uses it for elsewhere lies at its
beginning: the plan leaves room for both.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.program import iota
from pallas_kernels.stream import access, ptx
from pallas_kernels.stream.descriptors import (
    make_descriptors,
    weights_of,
)
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_layout import MAP_WORDS
from pallas_kernels.stream.feeding import feed_of, feed_ring
from pallas_kernels.stream.fragment_layout import feeding_thread
from pallas_kernels.stream.kv_splits import make_part_table
from pallas_kernels.stream.layout import FEED_WORDS, ROW_WORDS, SharedLayout
from pallas_kernels.stream.plan import (
    COLUMNS,
    RESERVED_TILE,
    Box,
    Segment,
    StreamPlan,
)

__all__ = [
    "Turn",
    "map_at",
    "most_looks",
    "next_turn",
    "products_address",
    "slot_address",
    "start_ring",
    "tensor_map_of",
    "wait_for_tile",
]


class Turn(NamedTuple):
    """Whose turn it is: int32 scalars."""

    slot: Array
    phase: Array  # 0 in the first round, then 1, 0 and so on


def most_looks(plan: StreamPlan) -> int:
    """How often a wait for a tile looks before it gives up: for some seconds.

    Where there are bulk copies, a look may last some microseconds; else it is over at once.
    """
    return 1 << (22 if plan.bulk else 27)


def next_turn(env: StreamEnv, turn: Turn) -> Turn:
    """The next slot's turn."""
    around = turn.slot == env.plan.slots - 1
    return Turn(
        jnp.where(around, 0, turn.slot + 1),
        jnp.where(around, turn.phase ^ 1, turn.phase),
    )


def slot_address(env: StreamEnv, turn: Turn) -> Array:
    """Where the turn's slot begins in shared memory, int32 scalar."""
    return env.shared + turn.slot * env.plan.slot_bytes


def _barrier(env: StreamEnv, turn: Turn) -> Array:
    return env.shared + SharedLayout.of(env.plan).slot_barriers + 8 * turn.slot


def products_address(env: StreamEnv) -> Array:
    """Where products lie in shared memory until they are summed up, int32 scalar."""
    return env.shared + SharedLayout.of(env.plan).products


def _reserve(env: StreamEnv) -> None:
    """A loop that never runs, and for which the compiler takes the ring's memory.

    Without stages it takes none: so one sees what it takes for everything else.
    """
    if env.plan.num_stages < 2:
        return
    depth = 256
    shape = (RESERVED_TILE // 2 // depth, depth)
    rounds = env.lengths[0]

    @pl.when(rounds < 0)
    def _():
        vectors = jnp.ones((COLUMNS, depth), jnp.bfloat16)

        def step(i, total):
            tile = access.load(env["embed"].at[iota(shape, 0) + i, iota(shape, 1)])
            return total + env.dot(tile, vectors, transpose_b=True)

        total = jnp.zeros((shape[0], COLUMNS), jnp.float32)
        total = lax.fori_loop(jnp.int32(0), -rounds, step, total)
        access.store(env["logits"].at[iota(total.shape, 0) * 0, iota(total.shape, 1)], total)


def start_ring(env: StreamEnv) -> Turn:
    """Asks for the first tiles; returns the first one's turn."""
    plan, at = env.plan, SharedLayout.of(env.plan)
    # Pallas lets no plain constant out of a branch.
    turn = Turn(env.program * 0, env.program * 0)
    make_descriptors(env, env.shared + at.descriptors)
    if env.interpret:
        return turn
    _reserve(env)
    if plan.ragged:
        # What is multiplied by zeros must be numbers.
        ptx.clear_shared(env.shared, at.tiles, plan.threads)
    make_part_table(env, env.shared + at.part_table)
    # Larger programs have registers for one alone.
    alone = plan.sharing > 0 or plan.threads <= 128
    barriers = (at.slot_barriers, plan.slots), (at.tile_barriers, plan.attention.tiles)
    for place, count in barriers:
        ptx.start_barriers(env.shared + place, count, plan.sharing, alone)
    nothing = jnp.zeros((1,), jnp.int32)
    free = nothing + plan.attention.tiles
    firsts = [nothing] * (FEED_WORDS // ROW_WORDS * plan.feeders) + [free] * plan.feeders
    for row, first in enumerate(firsts):
        place = jnp.full((1,), env.shared + at.control + 4 * ROW_WORDS * row)
        ptx.write_row(place, [first, *[nothing] * (ROW_WORDS - 1)], nothing == 0)
    # After what cleared them.
    access.meet()
    control = env.shared + at.control
    ptx.say_where(env.exchange.words, env.exchange.layout.fault, control, env.program)
    access.meet()
    if plan.box is not None:
        place = env.shared + at.control + ptx.MAP_IN_CONTROL
        # In the first slot, and by the feeding warp, which alone needs it.
        matrix, tensor = weights_of(env)[Segment.DOWN], tensor_map_of(plan, plan.box)
        ptx.make_map(env.exchange.words, map_at(env, 0), matrix, env.shared, place, tensor)
    for _ in range(feed_of(plan).in_flight):
        feed_ring(env)
    return turn


def map_at(env: StreamEnv, number: int) -> Array:
    """Where one of the program's tensor maps lies in the exchange, int32; 0 is the boxes'."""
    return env.exchange.layout.maps + MAP_WORDS * (number * env.plan.programs + env.program)


def tensor_map_of(plan: StreamPlan, box: Box) -> ptx.TensorMap:
    """What the copies of boxes know of the down projection, all layers one after the other."""
    part = plan.segments[Segment.DOWN]
    return ptx.TensorMap(
        pieces=part.splits * box.pieces,
        rows=plan.dims.num_layers * part.out,
        box=(box.units, box.pieces, part.rows),
        thread=feeding_thread(plan),
    )


def wait_for_tile(env: StreamEnv, turn: Turn) -> None:
    """Waits until the tile whose turn it is has come."""
    if not env.interpret:
        most = most_looks(env.plan)
        ptx.wait_copies(_barrier(env, turn), turn.phase, most, env.plan.bulk)
