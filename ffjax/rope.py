"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.config import ModelConfig

__all__ = ["apply_rope", "inverse_frequencies"]


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair, radians: float32 `[H/2]`.

    Pair i turns by `theta ** (-2i / H)` a position, stretched as
    `config.rope_scaling` says. Computed in float64 and rounded once, so that
    the reference and the fused kernel start from the same numbers.
    """
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if (scaling := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / freqs
        low = scaling.original_context / scaling.low_freq_factor
        high = scaling.original_context / scaling.high_freq_factor
        # 0 where the wavelength is stretched in full, 1 where it is kept.
        keep = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.where(wavelength > low, 0.0, np.where(wavelength < high, 1.0, keep))
        freqs = (1 - keep) * freqs / scaling.factor + keep * freqs
    return freqs.astype(np.float32)


def apply_rope(x: Array, positions: Array, inv_freq: np.ndarray) -> Array:
    """Rotates heads by their position.

    Args:
        x: `[B, T, heads, H]`, any float dtype.
        positions: `[B, T]` int32.
        inv_freq: `[H/2]` from `inverse_frequencies`.

    Returns:
        float32 `[B, T, heads, H]`. Angles, sines and products are float32: a
        bfloat16 position is exact only up to 256.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * inv_freq  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
