"""What lies where in the shared memory of which the compiler knows nothing."""

from __future__ import annotations

import dataclasses

from pallas_kernels.dims import ceil_div
from pallas_kernels.stream.plan import COLUMNS, LOT, MAX_ROWS, Segment, StreamPlan, query_pitch

__all__ = [
    "ALIGNMENT",
    "FEED_WORDS",
    "ROW_WORDS",
    "SPARE_BYTES",
    "SharedLayout",
    "descriptor_rows",
    "descriptor_words",
    "offset_pitch",
    "part_table_rows",
]

ALIGNMENT = 128
# Words of a row of the tables that lie there.
ROW_WORDS = 8
# Control words of a feed of weights.
FEED_WORDS = 16
# A thread puts aside a float32 of each row of a tile.
SPARE_BYTES = 4 * MAX_ROWS


def descriptor_rows(plan: StreamPlan) -> int:
    """Of a program; the first is that of the embedding, empty; the last two are the head's."""
    return 1 + plan.layer_tiles + 2


def descriptor_words(plan: StreamPlan) -> int:
    """Of a descriptor: as many again where tiles have scales."""
    return 2 * ROW_WORDS if plan.quantized else ROW_WORDS


def offset_pitch(plan: StreamPlan) -> int:
    """Bytes of a warp's sums of the activations of groups; 0 where no weights have offsets."""
    return max(plan.offset_bytes(segment) for segment in plan.segments)


def part_table_rows(plan: StreamPlan) -> int:
    """Of a layer's attention: one for each part of a program, and one before them."""
    return 1 + plan.most_parts


@dataclasses.dataclass(frozen=True)
class SharedLayout:
    """Where everything begins, in bytes from the first slot on.

    Attributes:
        slots: of the ring, and after them what reading a whole span reaches.
        tiles: keys and values.
        products: of tiles of weights, not summed up yet; or what attention's warps have made,
            `plan.attended_rows` each: the two are never wanted at the same time.
        spare: where threads put what is of no use, `SPARE_BYTES` a warp.
        sums: of those rows, the maximum and the sum of the weights.
        offsets: of a warp's groups, the sums of their activations' digits, where weights have
            offsets: see `ptx.sum_groups`.
        squares: of several sequences' residuals, each warp's sums of the squares of what it holds.
        queries: the bfloat16 of `LOT` queries, then what they leave of float32; and so on.
        new: the new positions' keys, and their values. Queries and these lie where `products` do:
            they are not wanted any more when something is put there.
        descriptors: see `descriptors`.
        part_table: see `kv_splits`.
        slot_barriers: 8 bytes a slot.
        tile_barriers: 8 bytes a tile of keys and values.
        maps: addresses of the tensor maps of keys and of values, 8 bytes each.
        control: of the feeds, 16 words for weights, 8 for keys and values; as many for each warp
            where all of them feed.
        query_pitch: from a query to the next.
        out_pitch: from a row that attention has made to the next.
        tile_bytes: of the keys and values of a tile.
        size: of everything, and of what it takes to begin at a multiple of `ALIGNMENT`.
    """

    slots: int
    tiles: int
    products: int
    spare: int
    sums: int
    offsets: int
    squares: int
    queries: int
    new: int
    descriptors: int
    part_table: int
    slot_barriers: int
    tile_barriers: int
    maps: int
    control: int
    query_pitch: int
    out_pitch: int
    tile_bytes: int
    size: int

    @classmethod
    def of(cls, plan: StreamPlan) -> SharedLayout:
        """The layout of a plan."""
        cut, row = plan.attention, 2 * plan.dims.head_dim
        pitches = {
            "query_pitch": query_pitch(plan.dims.head_dim),
            "out_pitch": 2 * row + 16,
            "tile_bytes": 2 * cut.block * row,
        }
        down = plan.segments[Segment.DOWN]
        of_down = down.run * plan.products_bytes(Segment.DOWN)
        others = (plan.products_bytes(s) for s in plan.segments if s != Segment.DOWN)
        products = plan.flush * max(*others, of_down)
        kinds = len(set(plan.dims.features.local_layers)) or 1
        queries = 2 * LOT * cut.abreast * pitches["query_pitch"]
        new = 2 * row * plan.dims.tokens
        made = cut.warps * plan.attended_rows
        attends = max(made * pitches["out_pitch"], queries + new)
        sizes = {
            "slots": plan.slots * plan.slot_bytes + plan.tail_bytes,
            "tiles": cut.tiles * pitches["tile_bytes"],
            "products": max(products, attends),
            "spare": SPARE_BYTES * plan.num_warps if plan.chunked else 0,
            "sums": made * 8,
            "offsets": plan.product_warps * offset_pitch(plan),
            "squares": 0 if plan.chunked else 4 * COLUMNS * plan.num_warps,
            "descriptors": 4 * descriptor_words(plan) * descriptor_rows(plan),
            "part_table": 4 * ROW_WORDS * kinds * part_table_rows(plan),
            "slot_barriers": 8 * plan.slots,
            "tile_barriers": 8 * cut.tiles,
            "maps": 16 if plan.bulk else 0,
            "control": plan.feeders * 4 * (FEED_WORDS + ROW_WORDS),
        }
        starts, end = {}, 0
        for name, size in sizes.items():
            if name == "tiles":  # boxes come to such addresses alone
                end = ALIGNMENT * ceil_div(end, ALIGNMENT)
            starts[name] = end
            end += 16 * ceil_div(size, 16)
        starts["queries"] = starts["products"]
        starts["new"] = starts["queries"] + queries
        return cls(**starts, **pitches, size=end + ALIGNMENT)
