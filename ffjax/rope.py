"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from ffjax.config import (
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

__all__ = ["Rope", "apply_rope", "inverse_frequencies", "rope_of", "rope_scale"]


class Rope(NamedTuple):
    """How a layer rotates.

    Attributes:
        inv_freq: angle per position of each pair, radians: float32 `[H/2]`.
        scale: what cosines and sines of each pair are multiplied by: float32 `[H/2]`; or None.
    """

    inv_freq: Array | np.ndarray
    scale: Array | np.ndarray | None = None


def inverse_frequencies(
    config: ModelConfig, capacity: int | None = None, *, other: bool = False
) -> np.ndarray:
    """Angle per position of each pair of a head, radians: float32 `[H/2]`.

    Pair i turns by `theta ** (-2i / R)` a position, where R is the number of elements that are
    rotated, stretched as `config.rope_scaling` says. Pairs that are not rotated turn by 0.
    Computed in float64 and rounded once, so that the reference and the fused kernel start from
    the same numbers.

    Args:
        config: the model's configuration.
        capacity: S, slots of the cache, on which LongRoPE depends.
        other: those of `config.other_rope_layers`. Local layers with a base of their own,
            `config.rope_theta_local`, are not stretched (Gemma 3 technical report, arXiv
            2503.19786, section 2); layers that do not rotate have angles of 0. Where there are
            no such layers, they are those of all layers.

    Raises:
        ValueError: the model has LongRoPE, and no capacity is given.
    """
    half = config.head_dim // 2
    pairs = half if config.rotary_pairs is None else config.rotary_pairs
    theta, scaling = config.rope_theta, config.rope_scaling
    if other and config.rope_theta_local is not None:
        theta, scaling = config.rope_theta_local, None
    elif other and not all(config.rope_pattern):
        return np.zeros(half, np.float32)
    freqs = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    match scaling:
        case LinearRopeScaling():
            freqs = freqs / scaling.factor
        case RopeScaling():
            freqs = _stretched(freqs, scaling)
        case YarnRopeScaling():
            freqs = _yarn(freqs, theta, scaling)
        case LongRopeScaling():
            freqs = freqs / _long_factors(scaling, capacity)
    return np.pad(freqs, (0, half - pairs)).astype(np.float32)


def rope_scale(config: ModelConfig) -> float:
    """What the cosines and sines of rotated pairs are multiplied by.

    Those of `config.other_rope_layers` are not.
    """
    scaling = config.rope_scaling
    if isinstance(scaling, YarnRopeScaling | LongRopeScaling):
        return scaling.attention_factor
    return 1.0


def rope_of(config: ModelConfig, capacity: int, *, other: bool = False) -> Rope:
    """How layers rotate: see `inverse_frequencies` and `rope_scale`.

    Args:
        config: the model's configuration.
        capacity: S, slots of the cache.
        other: whether `config.other_rope_layers` are meant.
    """
    frequencies = inverse_frequencies(config, capacity, other=other)
    if (scale := rope_scale(config)) == 1:
        return Rope(frequencies)
    rotated = np.arange(len(frequencies)) < (config.rotary_pairs or len(frequencies))
    here = rotated & (not other or not any(config.other_rope_layers))
    return Rope(frequencies, np.where(here, scale, 1.0).astype(np.float32))


def _long_factors(scaling: LongRopeScaling, capacity: int | None) -> np.ndarray:
    """LongRoPE's factors for a cache of so many slots: float64 `[pairs]`."""
    if capacity is None:
        raise ValueError(
            "LongRoPE's frequencies depend on the cache: give its capacity. Up to "
            f"{scaling.original_context} slots have the short factors."
        )
    short = capacity <= scaling.original_context
    return np.array(scaling.short_factors if short else scaling.long_factors, np.float64)


def _yarn(freqs: np.ndarray, theta: float, scaling: YarnRopeScaling) -> np.ndarray:
    """YaRN's stretching of frequencies, float64 `[pairs]`."""
    size = 2 * len(freqs)

    def pair_of(turns: float) -> float:
        """The pair, or what is between two, that turns so many times in the original context."""
        longest = scaling.original_context / (turns * 2 * math.pi)
        return size * math.log(longest) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    # 0 where a wave is kept, 1 where it is stretched in full.
    stretch = np.clip((np.arange(len(freqs)) - first) / ((last - first) or 0.001), 0, 1)
    return freqs * (1 - stretch) + freqs / scaling.factor * stretch


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


def apply_rope(
    x: Array,
    positions: Array,
    inv_freq: Array | np.ndarray,
    scale: Array | np.ndarray | None = None,
) -> Array:
    """Rotates heads by their position.

    Args:
        x: `[B, T, heads, H]`, any float dtype.
        positions: `[B, T]` int32.
        inv_freq: float32 `[H/2]`, from `inverse_frequencies`.
        scale: float32 `[H/2]`, multiplies cosines and sines; or None.

    Returns:
        float32 `[B, T, heads, H]`. Angles, sines and products are float32: a
        bfloat16 position is exact only up to 256.
    """
    angles = positions.astype(jnp.float32)[..., None, None] * inv_freq  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scale is not None:
        cos, sin = cos * scale, sin * scale
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
