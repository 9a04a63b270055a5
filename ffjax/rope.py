"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.config import LinearRopeScaling, ModelConfig, RopeScaling

__all__ = ["apply_rope", "inverse_frequencies"]


def inverse_frequencies(config: ModelConfig, *, local: bool = False) -> np.ndarray:
    """Angle per position of each rotated pair, radians: float32 `[H/2]`.

    Pair i turns by `theta ** (-2i / H)` a position, stretched as
    `config.rope_scaling` says. Computed in float64 and rounded once, so that
    the reference and the fused kernel start from the same numbers.

    Args:
        config: the model's configuration.
        local: those of local layers: with a base of their own, `config.rope_theta_local`,
            they are not stretched (Gemma 3 technical report, arXiv 2503.19786, section 2);
            without one they are those of all layers.
    """
    half = config.head_dim // 2
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.rope_theta_local is not None:
        theta, scaling = config.rope_theta_local, None
    freqs = theta ** (-np.arange(half, dtype=np.float64) / half)
    if isinstance(scaling, LinearRopeScaling):
        freqs = freqs / scaling.factor
    elif scaling is not None:
        freqs = _stretched(freqs, scaling)
    return freqs.astype(np.float32)


def _stretched(freqs: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3's stretching of frequencies, float64 `[H/2]`."""
    wavelength = 2 * math.pi / freqs
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    # 0 where the wavelength is stretched in full, 1 where it is kept.
    keep = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.where(wavelength > low, 0.0, np.where(wavelength < high, 1.0, keep))
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def apply_rope(x: Array, positions: Array, inv_freq: Array | np.ndarray) -> Array:
    """Rotates heads by their position.

    Args:
        x: `[B, T, heads, H]`, any float dtype.
        positions: `[B, T]` int32.
        inv_freq: float32 `[H/2]`, from `inverse_frequencies`.

    Returns:
        float32 `[B, T, heads, H]`. Angles, sines and products are float32: a
        bfloat16 position is exact only up to 256.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * inv_freq  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
