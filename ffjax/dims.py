"""The kernels' sizes of a step, from a model's configuration."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ffjax.config import ModelConfig
from ffjax.rope import rope_scale
from pallas_kernels.dims import Dims, Features, Grouping, WeightBits, WeightGroups

__all__ = ["step_dims", "step_features", "weight_bits", "weight_groups"]


def step_features(config: ModelConfig) -> Features:
    """What a decode step does besides that of the Llama family.

    Args:
        config: the model's.
    """
    c = config
    local = c.local_layers if c.window is not None else ()
    return Features(
        norm_offset=c.norm_offset,
        pre_norm=c.pre_norm,
        post_norm=c.post_norm,
        qk_norm=c.qk_norm,
        qkv_bias=c.qkv_bias,
        attn_out_bias=c.attn_out_bias,
        mlp_bias=c.mlp_bias,
        activation=c.activation,
        # As the reference rounds it, in the only dtype that the kernels take.
        embed_scale=float(np.asarray(c.embed_scale, jnp.bfloat16)),
        residual_scale=c.residual_scale,
        attn_scale=c.attn_scale,
        logit_scale=c.logit_scale,
        attn_softcap=c.attn_softcap,
        logit_softcap=c.logit_softcap,
        window=c.window if any(local) else None,
        local_layers=tuple(local) if any(local) else (),
        other_rope=c.other_rope_layers if any(c.other_rope_layers) else (),
        rope_scale=(scale := rope_scale(c)),
        rotary_pairs=None if scale == 1 else c.rotary_pairs,
    )


def weight_bits(config: ModelConfig) -> WeightBits:
    """Bits of a weight of each matrix, as the kernels are told.

    Args:
        config: the model's.
    """
    return WeightBits(**{name: value.bits for name, value in config.weights.quantized.items()})


def weight_groups(config: ModelConfig) -> WeightGroups:
    """The groups of each matrix, where they are others than its bits have by themselves.

    Args:
        config: the model's.
    """
    groups = {}
    for name, value in config.weights.quantized.items():
        if value.group_size is None:
            continue
        assert value.scale_dtype is not None
        own = Grouping(size=value.group_size, scales=value.scale_dtype, offset=value.offset)
        if value.bits == 8 or own != Grouping():
            groups[name] = own
    return WeightGroups(**groups)


def step_dims(config: ModelConfig, batch: int, capacity: int, tokens: int = 1) -> Dims:
    """The sizes of a decode step.

    Args:
        config: the model's.
        batch: B.
        capacity: S, slots of the cache.
        tokens: T, of each sequence.
    """
    c = config
    return Dims(
        tokens=tokens,
        batch=batch,
        vocab_size=c.vocab_size,
        num_layers=c.num_layers,
        model_dim=c.model_dim,
        ffw_dim=c.ffw_dim,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        capacity=capacity,
        norm_eps=c.norm_eps,
        features=step_features(c),
        weight_bits=weight_bits(c),
        weight_groups=weight_groups(c),
    )
