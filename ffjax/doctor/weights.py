"""Weights that are not finite, by tensor and layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ffjax.model import Transformer

__all__ = ["BadWeights", "bad_weights"]


@dataclasses.dataclass(frozen=True)
class BadWeights:
    """NaN or infinity in one layer of one tensor.

    Attributes:
        name: the tensor's dotted name in the model, as "layers.down"; scales of a quantized
            matrix are one too, "layers.down_scale".
        layer: its layer; None of a tensor that no layer has.
        count: values that are not finite.
        size: values in all.
        first: where the first of them stands, without the layer: of a matrix, row and column.
        value: the first of them: "nan", "inf" or "-inf".
    """

    name: str
    layer: int | None
    count: int
    size: int
    first: tuple[int, ...]
    value: str


def bad_weights(model: Transformer) -> list[BadWeights]:
    """Looks at every weight of the model once; integers are always finite.

    Args:
        model: its arrays of any dtype.
    """
    found: list[BadWeights] = []
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = param[...]
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        name = ".".join(map(str, path))
        stacked = path[0] == "layers"
        counts = np.atleast_1d(np.asarray(_count(array, stacked)))
        for layer in np.flatnonzero(counts).tolist():
            part = array[layer] if stacked else array
            at = int(_first(part))
            where = tuple(int(i) for i in np.unravel_index(at, part.shape))
            found.append(
                BadWeights(
                    name=name,
                    layer=layer if stacked else None,
                    count=int(counts[layer]),
                    size=part.size,
                    first=where,
                    value=str(float(part[where])),
                )
            )
    return found


def _count(array: Array, stacked: bool) -> Array:
    """Values that are not finite: int32, of each layer where they are stacked."""
    # An array a layer: a large model's stacked ones have more values than int32 can count.
    return _count_stacked(array) if stacked else _count_all(array)


# Programs of their own, that an array of flags need not exist.
_count_all = jax.jit(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32))
_count_stacked = jax.jit(
    lambda x: jnp.sum(~jnp.isfinite(x), axis=tuple(range(1, x.ndim)), dtype=jnp.int32)
)
_first = jax.jit(lambda x: jnp.argmax(~jnp.isfinite(x)))
