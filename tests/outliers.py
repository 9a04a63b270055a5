"""Models with one channel far larger than the others, as trained ones have.

A few channels of a trained model's residual are hundreds to thousands of times the others ("massive
activations", Sun et al., arXiv 2402.17762), and the weights behind them take that back. Random
weights show nothing of the kind.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from ffjax.config import ModelConfig
from ffjax.fidelity import random_model
from ffjax.model import Transformer

__all__ = ["RATIOS", "Where", "with_outlier"]

RATIOS = (1, 128, 1024, 4096)
Where = Literal["residual", "hidden"]


def with_outlier(
    config: ModelConfig, channel: int, ratio: float, where: Where = "residual"
) -> Transformer:
    """A random bfloat16 model with one channel `ratio` times the others.

    Args:
        config: the model's; of the Llama family, its embedding not tied to its head.
        channel: of the residual, below D, or of the hidden activations, below F.
        ratio: a power of two, so that the weights behind the channel are as exact as before.
        where: which activations have the channel.
    """
    assert not config.tied_embeddings, "A tied head would read the channel again."
    model = nnx.merge(*nnx.split(random_model(config)))
    layers, d, f = model.layers, config.model_dim, config.ffw_dim
    if where == "hidden":
        up, down = layers.gate_up, layers.down
        up[...] = up[...].at[:, f + channel].multiply(ratio)
        down[...] = down[...].at[:, :, channel].multiply(1 / ratio)
        return model
    # Blocks add less than there is: with the channel in the norms' mean square, nothing keeps the
    # others from growing from layer to layer.
    for weight in (layers.attn_out, layers.down):
        weight[...] = weight[...] / 8
    embed = model.embed[...] * 64
    signed = jnp.where(embed[:, channel] < 0, -ratio, ratio)
    model.embed[...] = embed.at[:, channel].set(signed.astype(embed.dtype))
    # The mean square is the channel's: what the norm makes of the others is as large as before.
    gain = math.sqrt((d - 1 + ratio**2) / d)
    for norm in (layers.attn_norm, layers.mlp_norm, model.final_norm):
        weight = norm[...].astype(jnp.float32) * gain
        norm[...] = weight.at[..., channel].multiply(1 / ratio).astype(norm[...].dtype)
    return model
