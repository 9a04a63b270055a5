"""The stream: where in the step each tile of a program stands.

A tile is asked for several iterations before it is used, so the loop knows it twice: where it
lies in memory, from its copy descriptor, and its `Place` in the step, which is counted up
from tile to tile. A program has one warp for each of a multiprocessor's schedulers, so that
every instruction of the loop costs its whole latency: both must be had with few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.stream.descriptors import busy_tiles, team_of
from pallas_kernels.stream.env import StreamEnv, pick
from pallas_kernels.stream.plan import Segment

__all__ = [
    "Flush",
    "Place",
    "first_place",
    "flush_of",
    "next_place",
    "next_segment",
]


class Place(NamedTuple):
    """Where in the step a tile stands: scalars, int32."""

    segment: Array
    layer: Array  # of the segment; the head's and the embedding's are L and 0
    number: Array  # of the tile among this program's of the segment
    flush_index: Array  # of the tile among those that are flushed together
    group: Array  # of rows
    split: Array  # which part of the inputs
    teams: Array  # groups to the program's next
    left: Array  # tiles of the segment from this one on
    busy: Array  # of them those that there is a group for: the others are empty

    @property
    def real(self) -> Array:
        """Whether there is such a group; bool scalar."""
        return self.busy > 0

    @property
    def last(self) -> Array:
        """Whether it is the program's last tile of the segment; bool scalar."""
        return self.left <= 1


class Flush(NamedTuple):
    """The tiles whose products are summed up together: scalars, int32."""

    layer: Array
    first_group: Array
    teams: Array
    split: Array
    tiles: Array  # that there is a group for

    def group(self, number: Array) -> Array:
        """Group of the flush's `number`-th tile."""
        return self.first_group + number * self.teams

    def real(self, number: Array) -> Array:
        """Whether there is such a tile; bool."""
        return number < self.tiles


def flush_of(place: Place) -> Flush:
    """The tiles from the last flush up to this place."""
    return Flush(
        layer=place.layer,
        first_group=place.group - place.flush_index * place.teams,
        teams=place.teams,
        split=place.split,
        tiles=jnp.minimum(place.flush_index + 1, place.flush_index + place.busy),
    )


def first_place(env: StreamEnv, segment: Array | int, layer: Array | int) -> Place:
    """The place of this program's first tile of a segment."""
    segment = jnp.asarray(segment, jnp.int32)
    parts = [env.segment(s) for s in sorted(env.plan.segments)]
    beyond = [segment >= number for number in range(1, len(parts))]

    def of(values: Sequence[Array | int]) -> Array:
        return pick(beyond, values)

    team = of([team_of(env, p) for p in parts])
    no_weights = segment == Segment.EMBED
    place = Place(
        segment=segment,
        layer=jnp.asarray(layer, jnp.int32),
        number=jnp.int32(0),
        flush_index=jnp.int32(0),
        group=team,
        split=env.program - team * of([p.splits for p in parts]),
        teams=of([p.teams for p in parts]),
        left=jnp.where(no_weights, 1, of([p.tiles for p in parts])),
        busy=jnp.where(no_weights, 0, of([busy_tiles(env, p) for p in parts])),
    )
    # Pallas lets no plain constant out of a branch.
    return Place(*(x + segment * 0 for x in place))


def next_place(place: Place, *, flushed: bool = False) -> Place:
    """The place of the next tile of the same segment, before or after a flush."""
    return place._replace(
        number=place.number + 1,
        flush_index=place.flush_index * 0 if flushed else place.flush_index + 1,
        group=place.group + place.teams,
        left=place.left - 1,
        busy=place.busy - 1,
    )


def next_segment(env: StreamEnv, place: Place) -> Place:
    """The place of the first tile of the segment that follows; the head follows itself."""
    segment, layer = place.segment, place.layer
    is_down, is_embed = segment == Segment.DOWN, segment == Segment.EMBED
    layer = jnp.where(is_down, layer + 1, layer)
    following = jnp.where(is_down | is_embed, jnp.int32(Segment.QKV), segment + 1)
    following = jnp.where(layer >= env.dims.num_layers, jnp.int32(Segment.HEAD), following)
    return first_place(env, following, layer)
