"""The model in numpy float64, from the papers' equations: slow, plain, and independent.

One sequence at a time, one head and one position at a time, no cache: what a token sees is
computed again from the tokens before it. Weights have names and shapes of their own, one
array a projection, so that a row of the model's stacked arrays taken for another shows.
`T`, `D`, `F`, `N`, `K`, `H` and `V` are the letters of ffjax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ffjax.config import ModelConfig, RopeScaling

__all__ = ["LayerWeights", "Weights", "forward", "layer", "next_logits", "rope_angles", "rotate"]


class LayerWeights(NamedTuple):
    """One layer's weights, float64, matrices as `[out, in]`."""

    attn_norm: np.ndarray  # [D]
    query: np.ndarray  # [N * H, D]
    key: np.ndarray  # [K * H, D]
    value: np.ndarray  # [K * H, D]
    output: np.ndarray  # [D, N * H]
    mlp_norm: np.ndarray  # [D]
    gate: np.ndarray  # [F, D]
    up: np.ndarray  # [F, D]
    down: np.ndarray  # [D, F]


class Weights(NamedTuple):
    """A model's weights, float64."""

    embedding: np.ndarray  # [V, D]
    layers: list[LayerWeights]
    final_norm: np.ndarray  # [D]
    head: np.ndarray | None  # [V, D], or None: the embedding serves (Press, Wolf, 1608.05859)


class LayerOutput(NamedTuple):
    """What a layer gives for T positions."""

    x: np.ndarray  # [T, D], the residual stream behind it
    keys: np.ndarray  # [T, K, H], after RoPE
    values: np.ndarray  # [T, K, H]


def _normalised(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of a vector: Zhang and Sennrich, arXiv 1910.07467, equation 4."""
    return x / math.sqrt(float(x @ x) / x.size + eps) * gain


def _stretched(angle: float, scaling: RopeScaling) -> float:
    """Llama 3.1's stretching of one angle per position, by its wavelength in positions."""
    turns = scaling.original_context * angle / (2 * math.pi)  # in the context of pretraining
    if turns < scaling.low_freq_factor:
        return angle / scaling.factor
    if turns > scaling.high_freq_factor:
        return angle
    smooth = turns - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * angle / scaling.factor + smooth * angle


def rope_angles(config: ModelConfig) -> list[float]:
    """Radians per position of each of the H/2 pairs: Su et al., arXiv 2104.09864, section 3.4."""
    angles = []
    for i in range(config.head_dim // 2):
        angle = 1.0 / math.pow(config.rope_theta, 2 * i / config.head_dim)
        scaling = config.rope_scaling
        angles.append(angle if scaling is None else _stretched(angle, scaling))
    return angles


def rotate(head: np.ndarray, position: int, angles: list[float]) -> np.ndarray:
    """RoPE of one head `[H]`: elements i and i + H/2 are a complex number that turns."""
    half = head.size // 2
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * position * np.array(angles))
    return np.concatenate([turned.real, turned.imag])


def _attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One query `[H]` over keys and values `[t, H]`: Vaswani et al., 1706.03762, equation 1."""
    weights = np.exp(keys @ query / math.sqrt(query.size))
    return (weights / weights.sum()) @ values


def layer(x: np.ndarray, w: LayerWeights, config: ModelConfig) -> LayerOutput:
    """One layer over a whole sequence: `x` is the residual stream `[T, D]` before it."""
    positions, size = x.shape[0], config.head_dim
    angles = rope_angles(config)
    group = config.num_heads // config.num_kv_heads
    normed = [_normalised(row, w.attn_norm, config.norm_eps) for row in x]
    keys = np.empty((positions, config.num_kv_heads, size))
    values = np.empty_like(keys)
    for t in range(positions):
        for j in range(config.num_kv_heads):
            rows = slice(j * size, (j + 1) * size)
            keys[t, j] = rotate(w.key[rows] @ normed[t], t, angles)
            values[t, j] = w.value[rows] @ normed[t]
    out = np.empty_like(x)
    for t in range(positions):
        seen = slice(t + 1)  # a position sees itself and those before
        heads = []
        for n in range(config.num_heads):
            query = rotate(w.query[n * size : (n + 1) * size] @ normed[t], t, angles)
            shared = n // group  # Ainslie et al., 2305.13245: G neighbours share a KV head
            heads.append(_attended(query, keys[seen, shared], values[seen, shared]))
        middle = x[t] + w.output @ np.concatenate(heads)
        h = _normalised(middle, w.mlp_norm, config.norm_eps)
        gate = w.gate @ h
        # SwiGLU: Shazeer, 2002.05202, equation 6 (no biases); swish is z / (1 + exp(-z)).
        out[t] = middle + w.down @ (gate / (1 + np.exp(-gate)) * (w.up @ h))
    return LayerOutput(out, keys, values)


def forward(
    tokens: list[int], weights: Weights, config: ModelConfig
) -> tuple[np.ndarray, list[LayerOutput]]:
    """Logits `[T, V]` of one sequence's tokens, and what every layer gave."""
    x = np.stack([weights.embedding[token] for token in tokens])
    outputs = []
    for w in weights.layers:
        outputs.append(layer(x, w, config))
        x = outputs[-1].x
    head = weights.embedding if weights.head is None else weights.head
    logits = [head @ _normalised(row, weights.final_norm, config.norm_eps) for row in x]
    return np.stack(logits), outputs


def next_logits(tokens: list[int], weights: Weights, config: ModelConfig) -> np.ndarray:
    """Logits `[V]` that follow the tokens: a decode step, by computing everything again."""
    return forward(tokens, weights, config)[0][-1]
