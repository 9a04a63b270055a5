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

from ffjax.config import (
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)

__all__ = [
    "LayerWeights",
    "Weights",
    "forward",
    "layer",
    "next_logits",
    "rope_angles",
    "rotate",
    "through_layers",
]


class LayerWeights(NamedTuple):
    """One layer's weights, float64, matrices as `[out, in]`; None: the model has none."""

    query: np.ndarray  # [N * H, D]
    key: np.ndarray  # [K * H, D]
    value: np.ndarray  # [K * H, D]
    output: np.ndarray  # [D, N * H]
    gate: np.ndarray  # [F, D]
    up: np.ndarray  # [F, D]
    down: np.ndarray  # [D, F]
    attn_norm: np.ndarray | None = None  # [D], before attention
    mlp_norm: np.ndarray | None = None  # [D], before the feed-forward block
    attn_post_norm: np.ndarray | None = None  # [D], after attention
    mlp_post_norm: np.ndarray | None = None  # [D], after the feed-forward block
    query_bias: np.ndarray | None = None  # [N * H]
    key_bias: np.ndarray | None = None  # [K * H]
    value_bias: np.ndarray | None = None  # [K * H]
    output_bias: np.ndarray | float = 0.0  # [D]
    gate_bias: np.ndarray | float = 0.0  # [F]
    up_bias: np.ndarray | float = 0.0  # [F]
    down_bias: np.ndarray | float = 0.0  # [D]
    query_norm: np.ndarray | None = None  # [H] for each head, or [N * H] for all at once
    key_norm: np.ndarray | None = None  # [H], or [K * H]


class Weights(NamedTuple):
    """A model's weights, float64."""

    embedding: np.ndarray  # [V, D]
    layers: list[LayerWeights]
    final_norm: np.ndarray  # [D]
    head: np.ndarray | None  # [V, D], or None: the embedding serves (Press, Wolf, 1608.05859)


class LayerOutput(NamedTuple):
    """What a layer gives for T positions."""

    x: np.ndarray  # [T, D], the residual stream after it
    keys: np.ndarray  # [T, K, H], after RoPE
    values: np.ndarray  # [T, K, H]


def _normalised(x: np.ndarray, gain: np.ndarray | None, config: ModelConfig) -> np.ndarray:
    """RMSNorm of a vector: Zhang and Sennrich, arXiv 1910.07467, equation 4.

    The gain is stored less `norm_offset`. Without a gain there is no norm.
    """
    if gain is None:
        return x
    return x / math.sqrt(float(x @ x) / x.size + config.norm_eps) * (config.norm_offset + gain)


def _stretched(angle: float, scaling: RopeScaling | LinearRopeScaling) -> float:
    """One angle per position, stretched: as Chen et al., arXiv 2306.15595, or as Llama 3.1."""
    if isinstance(scaling, LinearRopeScaling):
        return angle / scaling.factor  # position m stands where m / factor stood
    turns = scaling.original_context * angle / (2 * math.pi)  # in the context of pretraining
    if turns < scaling.low_freq_factor:
        return angle / scaling.factor
    if turns > scaling.high_freq_factor:
        return angle
    smooth = turns - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * angle / scaling.factor + smooth * angle


def _by_parts(pair: int, size: int, base: float, scaling: YarnRopeScaling) -> float:
    """One angle of YaRN's: Peng et al., arXiv 2309.00071, section 3.2, with a ramp over pairs.

    Equation 13 has the ramp over turns; released models have it over the numbers of pairs.
    """
    angle = math.pow(base, -2 * pair / size)

    def where_turns(turns: float) -> float:  # the angle whose wave turns so often, as a pair
        return math.log(scaling.original_context / (2 * math.pi * turns), base) * size / 2

    fast, slow = where_turns(scaling.beta_fast), where_turns(scaling.beta_slow)
    if scaling.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, size - 1)
    ramp = min(max((pair - fast) / (slow - fast), 0.0), 1.0)
    return angle * (1 - ramp) + angle / scaling.factor * ramp


def rope_angles(config: ModelConfig, local: bool = False) -> list[float]:
    """Radians per position of each rotated pair: Su et al., arXiv 2104.09864, section 3.4.

    Local layers may have a base of their own, and are then not stretched: Gemma 3's report,
    arXiv 2503.19786, section 2. LongRoPE (Ding et al., arXiv 2402.13753) has two sets of factors:
    an original context of 1 stands for one that every cache outgrows, any other for one that
    none does.
    """
    base, scaling = config.rope_theta, config.rope_scaling
    if local and config.rope_theta_local is not None:
        base, scaling = config.rope_theta_local, None
    size = config.head_dim if config.rotary_pairs is None else 2 * config.rotary_pairs
    angles = []
    for i in range(size // 2):
        angle = 1.0 / math.pow(base, 2 * i / size)
        if isinstance(scaling, YarnRopeScaling):
            angle = _by_parts(i, size, base, scaling)
        elif isinstance(scaling, LongRopeScaling):
            long = scaling.original_context == 1
            angle /= (scaling.long_factors if long else scaling.short_factors)[i]
        elif scaling is not None:
            angle = _stretched(angle, scaling)
        angles.append(angle)
    return angles


def rotate(head: np.ndarray, position: int, angles: list[float], length: float = 1.0) -> np.ndarray:
    """RoPE of one head `[H]`: elements i and i + H/2 are a complex number that turns.

    There may be fewer angles than pairs: the others stay. What turns is made `length` as long
    (YaRN, section 3.4).
    """
    half, turning = head.size // 2, len(angles)
    turned = head[:half] + 1j * head[half:]
    turned[:turning] *= length * np.exp(1j * position * np.array(angles))
    return np.concatenate([turned.real, turned.imag])


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    """Gemma 2's report, arXiv 2408.00118, section 2: soft_cap * tanh(logits / soft_cap)."""
    return x if cap is None else cap * np.tanh(x / cap)


def _attended(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, config: ModelConfig
) -> np.ndarray:
    """One query `[H]` over keys and values `[t, H]`: Vaswani et al., 1706.03762, equation 1."""
    scale = 1 / math.sqrt(query.size) if config.attn_scale is None else config.attn_scale
    scores = _capped(keys @ query * scale, config.attn_softcap)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values


def _heads(
    x: np.ndarray,
    matrix: np.ndarray,
    bias: np.ndarray | None,
    gain: np.ndarray | None,
    config: ModelConfig,
) -> np.ndarray:
    """A vector `[D]` projected to heads `[heads, H]`, normed together or each by itself."""
    out = matrix @ x if bias is None else matrix @ x + bias
    if config.qk_norm == "full":
        # OLMo 2's report, arXiv 2501.00656: over the whole projection.
        out = _normalised(out, gain, config)
    heads = out.reshape(-1, config.head_dim)
    if config.qk_norm == "head":
        # Dehghani et al., arXiv 2302.05442, section 2, as Qwen 3 and Gemma 3 have it.
        heads = np.stack([_normalised(head, gain, config) for head in heads])
    return heads


def _activated(gate: np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.activation == "silu":
        return gate / (1 + np.exp(-gate))  # swish: Shazeer, 2002.05202, section 1
    # GELU: Hendrycks and Gimpel, arXiv 1606.08415, section 2, the first approximation.
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + np.tanh(cubic))


def layer(
    x: np.ndarray,
    w: LayerWeights,
    config: ModelConfig,
    local: bool = False,
    rotates: bool = True,
) -> LayerOutput:
    """One layer over a whole sequence: `x` is the residual stream `[T, D]` before it.

    A layer that does not rotate knows no positions: Kazemnejad et al., arXiv 2305.19466. A local
    layer's queries see `config.window` positions, the last of them their own: Beltagy et al.,
    arXiv 2004.05150, section 3.1, of which a decoder has the half behind it.
    """
    positions = x.shape[0]
    angles = rope_angles(config, local) if rotates else []
    own = local and config.rope_theta_local is not None
    scaling = None if own else config.rope_scaling
    stretched = isinstance(scaling, YarnRopeScaling | LongRopeScaling)
    length = scaling.attention_factor if stretched else 1.0
    group = config.num_heads // config.num_kv_heads
    normed = [_normalised(row, w.attn_norm, config) for row in x]
    keys = np.empty((positions, config.num_kv_heads, config.head_dim))
    values = np.empty_like(keys)
    for t in range(positions):
        heads = _heads(normed[t], w.key, w.key_bias, w.key_norm, config)
        keys[t] = [rotate(head, t, angles, length) for head in heads]
        bias = 0 if w.value_bias is None else w.value_bias
        values[t] = (w.value @ normed[t] + bias).reshape(keys[t].shape)
    out = np.empty_like(x)
    for t in range(positions):
        # A position sees itself and those before it, or the last few of them.
        first = max(0, t + 1 - config.window) if local and config.window is not None else 0
        seen = slice(first, t + 1)
        queries = _heads(normed[t], w.query, w.query_bias, w.query_norm, config)
        attended = []
        for n, head in enumerate(queries):
            shared = n // group  # Ainslie et al., 2305.13245: G neighbours share a KV head
            query = rotate(head, t, angles, length)
            attended.append(_attended(query, keys[seen, shared], values[seen, shared], config))
        out_of_heads = w.output @ np.concatenate(attended) + w.output_bias
        block = _normalised(out_of_heads, w.attn_post_norm, config)
        middle = x[t] + config.residual_scale * block
        h = _normalised(middle, w.mlp_norm, config)
        # Gated linear units: Shazeer, 2002.05202, equation 5, in most models without biases.
        gate, up = w.gate @ h + w.gate_bias, w.up @ h + w.up_bias
        block = w.down @ (_activated(gate, config) * up) + w.down_bias
        out[t] = middle + config.residual_scale * _normalised(block, w.mlp_post_norm, config)
    return LayerOutput(out, keys, values)


def forward(
    tokens: list[int], weights: Weights, config: ModelConfig
) -> tuple[np.ndarray, list[LayerOutput]]:
    """Logits `[T, V]` of one sequence's tokens, and what every layer gave."""
    x = np.stack([weights.embedding[token] * config.embed_scale for token in tokens])
    hidden, outputs = through_layers(x, weights, config)
    head = weights.embedding if weights.head is None else weights.head
    logits = np.stack([head @ row for row in hidden])
    return _capped(logits * config.logit_scale, config.logit_softcap), outputs


def through_layers(
    x: np.ndarray, weights: Weights, config: ModelConfig
) -> tuple[np.ndarray, list[LayerOutput]]:
    """What the head is given `[T, D]` of embeddings `[T, D]`, and what every layer gave."""
    outputs = []
    for i, w in enumerate(weights.layers):
        pattern = config.window_pattern
        local = config.window is not None and pattern[i % len(pattern)]
        rotates = config.rope_pattern[i % len(config.rope_pattern)]
        outputs.append(layer(x, w, config, local, rotates))
        x = outputs[-1].x
    return np.stack([_normalised(row, weights.final_norm, config) for row in x]), outputs


def next_logits(tokens: list[int], weights: Weights, config: ModelConfig) -> np.ndarray:
    """Logits `[V]` that follow the tokens: a decode step, by computing everything again."""
    return forward(tokens, weights, config)[0][-1]
