"""What a launch of a decode step is given, by name."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from pallas_kernels.dims import DecodeWeights

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_decode_step"

__all__ = ["KERNEL_NAME", "StepState", "named_weights"]


class StepState(NamedTuple):
    """What a step updates in place.

    Attributes:
        k: `[L, B, K, S, H]`.
        v: `[L, B, K, S, H]`.
        lengths: int32 `[B]`.
        counters: int32, the exchange: see `pallas_kernels.stream.exchange`.
    """

    k: Array
    v: Array
    lengths: Array
    counters: Array


def named_weights(weights: DecodeWeights) -> dict[str, Array]:
    """The arrays that a model has, by their names in `DecodeWeights`."""
    return {name: array for name, array in weights._asdict().items() if array is not None}
