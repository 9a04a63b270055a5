"""What a launch of a decode step is given, by name."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from pallas_kernels.dims import DecodeWeights

# The kernel's name in compiled programs and in profiles.
KERNEL_NAME = "ffjax_decode_step"

__all__ = ["KERNEL_NAME", "StepState", "named_weights"]

# Names the kernel uses for the arrays of DecodeWeights, in its order.
_WEIGHT_NAMES = (
    "embed",
    "attn_norm",
    "w_qkv",
    "w_attn_out",
    "mlp_norm",
    "w_gate_up",
    "w_down",
    "final_norm",
    "w_head",
    "inv_freq",
    "inv_freq_other",
    "qkv_bias",
    "attn_out_bias",
    "gate_up_bias",
    "down_bias",
    "q_norm",
    "k_norm",
    "attn_post_norm",
    "mlp_post_norm",
    "qkv_scale",
    "attn_out_scale",
    "gate_up_scale",
    "down_scale",
    "head_scale",
)


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
    """The arrays that a model has, by the names the kernel uses."""
    pairs = zip(_WEIGHT_NAMES, weights, strict=True)
    return {name: array for name, array in pairs if array is not None}
