"""New keys and values in the cache, and that a step leaves the rest of it as it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.launch import StepState
from pallas_kernels.spec.differences import COMPUTED, STEP_OF_BFLOAT16, Difference, find, rms
from pallas_kernels.spec.heads import new_positions
from pallas_kernels.stream.plan import StreamPlan

__all__ = ["compare_cache", "new_rows"]


def new_rows(plan: StreamPlan, layer: int, lengths: Array, cache: Array) -> np.ndarray:
    """A layer's new keys, or values, in the cache: float32 `[C, K, H]`; of no use without room."""
    sequence = jnp.arange(plan.dims.columns) // plan.dims.tokens
    position = jnp.minimum(new_positions(plan, lengths), plan.dims.capacity - 1)
    return np.asarray(cache[layer, sequence, :, position].astype(jnp.float32))


def compare_cache(
    plan: StreamPlan,
    layer: int,
    lengths: Array,
    before: StepState,
    after: StepState,
    want: dict[str, np.ndarray],
    room: np.ndarray,
) -> Iterator[Difference]:
    """The layer's new keys and values; and whether anything else of the layer has changed."""
    normed = plan.dims.features.qk_norm is not None
    for name, old, new in (("k", before.k, after.k), ("v", before.v, after.v)):
        wanted, rows = want[name].astype(np.float32), new_rows(plan, layer, lengths, new)
        of_norm = normed and name == "k"
        allowed = STEP_OF_BFLOAT16 * np.abs(wanted) + COMPUTED * rms(wanted) if of_norm else 0
        segment = "attention" if of_norm else "qkv"
        found = find(plan, layer, segment, name, rows, wanted, allowed, compared=room)
        if found is not None:
            yield found
        where = _first_changed(plan, jnp.int32(layer), lengths, old, new)
        count, sequence, head, position, element = (int(x) for x in where)
        if count:
            yield Difference(
                layer=layer,
                segment=segment,
                buffer=name,
                sequence=sequence,
                token=0,
                place=(head, element),
                got=float(new[layer, sequence, head, position, element]),
                want=float(old[layer, sequence, head, position, element]),
                allowed=0.0,
                count=count,
                size=int(np.prod(new.shape[1:])),
                layers=plan.dims.num_layers,
                note=f"It is at position {position} of the cache, which is not a new one.",
            )


@functools.partial(jax.jit, static_argnums=0)
def _first_changed(plan: StreamPlan, layer: Array, lengths: Array, old: Array, new: Array) -> Array:
    """How many elements of a layer's cache have changed beside the new positions; the first one's
    sequence, head, position and element: int32 `[5]`.
    """
    old, new = (jax.lax.bitcast_convert_type(x[layer], jnp.int16) for x in (old, new))
    slot = jnp.arange(plan.dims.capacity)
    is_new = (slot >= lengths[:, None]) & (slot < lengths[:, None] + plan.dims.tokens)
    wrong = (old != new) & ~is_new[:, None, :, None]
    first = jnp.unravel_index(jnp.argmax(wrong), wrong.shape)
    return jnp.stack([jnp.sum(wrong), *first]).astype(jnp.int32)
