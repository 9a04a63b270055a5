"""The kernels' sizes of a step, from a model's configuration."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ffjax.config import ModelConfig
from pallas_kernels.dims import GROUP, Dims, Features, WeightBits

__all__ = ["step_dims", "step_features", "unknown_groups", "weight_bits"]


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
        local_rope=any(local) and c.rope_theta_local is not None,
    )


def weight_bits(config: ModelConfig) -> WeightBits:
    """How the matrices are stored, as the kernels are told.

    That int4 weights come in groups of `GROUP` goes without saying there: see `unknown_groups`.

    Args:
        config: the model's.
    """
    return WeightBits(**{name: value.bits for name, value in config.weights.quantized.items()})


def unknown_groups(config: ModelConfig) -> str | None:
    """Why the kernels, and their count of bytes, know no such int4 weights; else None.

    Args:
        config: the model's.
    """
    formats = config.weights
    if all(value.group_size in (None, GROUP) for value in formats.quantized.values()):
        return None
    in_groups = [name for name, value in formats.quantized.items() if value.group_size]
    whole = all(config.matrices[name][1] % GROUP == 0 for name in in_groups)
    instead = f"group_size={GROUP}" if whole else "int8"
    return (
        f"int4 weights are read in groups of {GROUP}; those of {config.name} are quantized "
        f"otherwise ({formats}). Quantize the model with {instead}, or use implementation='xla'."
    )


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
    )
