"""When the ring is fed: what the feed is told of the plan, and who asks for tiles meanwhile."""

from __future__ import annotations

import dataclasses

from jax import Array

from pallas_kernels.stream import ptx
from pallas_kernels.stream.descriptors import most_copies, weights_of
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange import Meanwhile
from pallas_kernels.stream.fragment_layout import feeding_thread
from pallas_kernels.stream.layout import ALIGNMENT, SharedLayout
from pallas_kernels.stream.plan import Segment, StreamPlan
from pallas_kernels.stream.tuning import TILE_BYTES

__all__ = ["fed_otherwise", "feed_more", "feed_of", "feed_ring", "with_ring"]


def with_ring(env: StreamEnv) -> StreamEnv:
    """The program's view once it knows where its ring lies, which is fed while it waits for words.

    Interpreted, there is no ring.
    """
    if env.interpret:
        return env
    base, feed = ptx.ring_base(SharedLayout.of(env.plan).size, ALIGNMENT), feed_of(env.plan)
    exchange = dataclasses.replace(
        env.exchange, meanwhile=Meanwhile(weights_of(env)[0], base, feed)
    )
    return dataclasses.replace(env, exchange=exchange, shared=base)


def feed_of(plan: StreamPlan) -> ptx.Feed:
    """What feeding the ring needs to know."""
    at = SharedLayout.of(plan)
    return ptx.Feed(
        slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        descriptors=at.descriptors,
        barriers=at.slot_barriers,
        control=at.control,
        layer_tiles=plan.layer_tiles,
        layers=plan.dims.num_layers,
        head_tiles=plan.segments[Segment.HEAD].tiles,
        total=plan.total_tiles,
        in_flight=min(plan.in_flight, plan.slots),
        thread=feeding_thread(plan),
        by_lane=plan.asks_by_lane,
        copies=most_copies(plan),
        has_scales=plan.quantized,
        l2_tiles=plan.tuning.l2_tiles,
        l2_bytes=plan.tuning.l2_bytes,
        sharing=plan.sharing,
        scale_unit=plan.scale_unit,
        matrix_rows=0 if plan.box is None else plan.segments[Segment.DOWN].out,
    )


def feed_ring(env: StreamEnv, used: Array | None = None, ahead: Array | None = None) -> None:
    """Asks for the next tile if a slot is free and few tiles are on their way.

    Too many on their way, and whoever waits for other programs' words waits behind them.

    Args:
        env: the program's view.
        used: int32 scalar, tiles that all threads have done with: a barrier of the program
            stands between. None: as many as last time.
        ahead: int32 scalar, tiles beyond those that may have been asked for; None: as many as there
            are slots.
    """
    if env.exchange.meanwhile is not None:
        ptx.feed_ring(*env.exchange.meanwhile, used, ahead)


def fed_otherwise(env: StreamEnv, **changes: int) -> StreamEnv:
    """The program's view, with other numbers of `ptx.Feed` for the ring to be fed with."""
    exchange = env.exchange
    if exchange.meanwhile is None:
        return env
    feed = dataclasses.replace(exchange.meanwhile.feed, **changes)
    exchange = dataclasses.replace(exchange, meanwhile=exchange.meanwhile._replace(feed=feed))
    return dataclasses.replace(env, exchange=exchange)


def feed_more(env: StreamEnv, tiles: int) -> None:
    """Asks for some tiles; where the ring is full, for a whole copy of each into the L2 cache."""
    by_copies = fed_otherwise(env, l2_bytes=max(TILE_BYTES))
    for _ in range(tiles):
        feed_ring(by_copies)
