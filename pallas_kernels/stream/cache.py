"""The cache's tiles: keys and values on their way through shared memory, beside the ring.

All but the new position lie in the cache when the step begins, so that a layer's first tiles
are asked for long before its queries are known. Each tile is asked for when another has been
used, whatever part it belongs to.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.stream import ptx
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.fragment_layout import feeding_thread
from pallas_kernels.stream.kv_splits import Share, row_of, share_of
from pallas_kernels.stream.layout import FEED_WORDS, SharedLayout
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.ring import map_at, most_looks

__all__ = ["attend_split", "feed_cache", "layer_share", "start_cache"]


def _feed_of(plan: StreamPlan) -> ptx.CacheFeed:
    """What asking for the cache's tiles, and using them, needs to know."""
    at, d, cut = SharedLayout.of(plan), plan.dims, plan.attention
    return ptx.CacheFeed(
        head_dim=d.head_dim,
        block=cut.block,
        warps=cut.warps,
        stages=cut.tiles,
        layer_rows=d.batch * d.num_kv_heads * d.capacity,
        query_pitch=at.query_pitch,
        out_pitch=at.out_pitch,
        abreast=cut.abreast,
        tokens=d.tokens,
        q_per_kv=d.q_per_kv,
        windowed=d.tokens > 1 and d.features.window is not None,
        paired=plan.paired,
        softcap=d.features.attn_softcap,
        tiles=at.tiles,
        barriers=at.tile_barriers,
        maps=at.maps,
        control=at.control + 4 * FEED_WORDS * plan.feeders,
        queries=at.queries,
        new=at.new,
        out=at.products,
        sums=at.sums,
        thread=feeding_thread(plan),
        by_lane=plan.asks_by_lane,
        sharing=plan.sharing,
    )


def layer_share(env: StreamEnv, layer: Array) -> Share:
    """This program's share of a layer's attention."""
    table = None if env.interpret else env.shared + SharedLayout.of(env.plan).part_table
    return share_of(env, layer, table)


def start_cache(env: StreamEnv) -> None:
    """Asks for the first layer's keys and values; copies of boxes are told where all lie first."""
    if env.plan.bulk and not env.interpret:
        at, tensor = SharedLayout.of(env.plan), _feed_of(env.plan).tensor_map(env.dims.num_layers)
        # Made by the feeding warp, which alone uses them, where tiles will come.
        for number, name in enumerate("kv"):
            scratch = env.shared + at.tiles + ptx.MAP_BYTES * number
            place = env.shared + at.maps + 8 * number
            where = map_at(env, 1 + number)
            ptx.make_map(env.exchange.words, where, env[name], scratch, place, tensor)
    feed_cache(env, jnp.int32(0))


def feed_cache(env: StreamEnv, layer: Array) -> None:
    """Asks for a layer's first keys and values, where there is such a layer."""
    if env.interpret:
        return

    def feed() -> Array:
        rows = layer_share(env, layer).rows
        ptx.feed_cache(env["k"], env["v"], env.shared, rows, layer, _feed_of(env.plan))
        return rows

    lax.cond(layer < env.dims.num_layers, feed, lambda: jnp.int32(0) + layer * 0)


def attend_split(env: StreamEnv, layer: Array, share: Share, j: Array) -> None:
    """Attention over the KV split of the j-th of this program's parts of a layer.

    Queries and what is new lie in shared memory; so does what each warp has made, afterwards.
    """
    feed = _feed_of(env.plan)
    ptx.attend_split(
        env["k"],
        env["v"],
        env.shared,
        share.rows,
        row_of(share, j),
        layer,
        feed,
        most_looks(env.plan),
    )
