"""The baseline: the same decode step in plain JAX, laid out as XLA likes it.

XLA copies every slice of a stacked weight before it multiplies by it, which takes 1.3 to 2.6
times the time of a step without such copies. Here each layer has arrays of its own, for its
weights and for its keys and values, and the layers are a Python loop: what a careful user
would write for speed without a kernel. It rounds where the reference model rounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import DecodeOutput
from ffjax.model import Transformer, rms_norm
from ffjax.rope import apply_rope, inverse_frequencies

__all__ = [
    "BaselineWeights",
    "LayerCaches",
    "LayerWeights",
    "baseline_step",
    "split_cache",
    "split_weights",
    "why_no_baseline",
]

# What it takes as it comes: names, and what reaches it as numbers or frequencies. Of every
# other field of a configuration that has a default, it knows the default.
_ANY_VALUE = frozenset(
    {
        *("name", "family", "norm_eps", "tied_embeddings", "max_context"),
        *("rope_theta", "rope_scaling"),
    }
)


class LayerWeights(NamedTuple):
    """The weights of one layer.

    Attributes:
        attn_norm: `[D]`.
        qkv: `[(N + 2K) * H, D]`.
        attn_out: `[D, N * H]`.
        mlp_norm: `[D]`.
        gate_up: `[2F, D]`.
        down: `[D, F]`.
    """

    attn_norm: Array
    qkv: Array
    attn_out: Array
    mlp_norm: Array
    gate_up: Array
    down: Array


class BaselineWeights(NamedTuple):
    """All weights, an array a layer.

    Attributes:
        embed: `[V, D]`, the model's own array.
        layers: L layers.
        final_norm: `[D]`, the model's own array.
        head: `[V, D]`, the model's own array: the embedding where they are tied.
    """

    embed: Array
    layers: tuple[LayerWeights, ...]
    final_norm: Array
    head: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """Keys and values, an array a layer.

    Attributes:
        k: L arrays `[B, K, S, H]`, keys after RoPE.
        v: L arrays `[B, K, S, H]`. What lies beyond the live positions is multiplied by
            zero: it may be anything finite. To hide NaN there, as the reference does, would
            cost the baseline time that its users do not spend.
        lengths: int32 `[B]`, live positions of each sequence.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    lengths: Array


def why_no_baseline(config: ModelConfig) -> str | None:
    """Why there is no baseline for such a model, as a sentence; None where there is one."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or field.name in _ANY_VALUE:
            continue
        if value != field.default:
            return (
                "The XLA baseline computes models of the Llama family; "
                f"{config.name} has {field.name}={value!r}. Leave --compare out."
            )
    return None


def split_weights(model: Transformer) -> BaselineWeights:
    """The model's weights, each layer's copied out of the stack."""
    unstack = jax.jit(lambda stacked: tuple(stacked))
    layers = model.layers
    params: list[nnx.Param] = [getattr(layers, name) for name in LayerWeights._fields]
    stacks = [unstack(param[...]) for param in params]
    return BaselineWeights(
        embed=model.embed[...],
        layers=tuple(LayerWeights(*arrays) for arrays in zip(*stacks, strict=True)),
        final_norm=model.final_norm[...],
        head=model.head_weight,
    )


@jax.jit
def split_cache(cache: KVCache) -> LayerCaches:
    """A copy of the cache, an array a layer, with zeros beyond the live positions."""
    live = jnp.arange(cache.capacity) < cache.lengths[:, None]  # [B, S]
    live = live[:, None, :, None]
    return LayerCaches(
        k=tuple(jnp.where(live, k, 0) for k in cache.k),
        v=tuple(jnp.where(live, v, 0) for v in cache.v),
        lengths=cache.lengths,
    )


def _einsum(spec: str, a: Array, b: Array) -> Array:
    """An einsum of bfloat16, accumulated and returned in float32."""

    def dot(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def dot_upcast(a, b):
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    # XLA on CPUs has no bfloat16 product with a float32 result for every shape.
    return lax.platform_dependent(a, b, cpu=dot_upcast, default=dot)


def _linear(x: Array, weight: Array) -> Array:
    """`x[B, in] @ weight[out, in].T`, accumulated in float32, returned in weight's dtype."""
    return _einsum("bi,oi->bo", x.astype(weight.dtype), weight).astype(weight.dtype)


def _append(cache: Array, new: Array, positions: Array) -> Array:
    """`cache [B, K, S, H]` with `new [B, K, H]` at each sequence's position `[B]`."""
    if cache.shape[0] == 1:  # a plain store, which XLA can join to what computes `new`
        return lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, positions[0], 0))
    rows = jnp.arange(cache.shape[0])
    return cache.at[rows, :, positions].set(
        new, mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True
    )


def _attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Softmax attention of one query a sequence: `[B, N, H]` to `[B, N * H]`, in q's dtype.

    Args:
        q: `[B, N, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        visible: bool `[B, S]`.
    """
    batch, heads, size = q.shape
    q = q.reshape(batch, k.shape[1], -1, size)  # [B, K, G, H]
    scores = _einsum("bkgh,bksh->bkgs", q, k) / math.sqrt(size)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = _einsum("bkgs,bksh->bkgh", probs, v)
    return out.reshape(batch, heads * size).astype(q.dtype)


def baseline_step(
    config: ModelConfig, weights: BaselineWeights, cache: LayerCaches, tokens: Array
) -> DecodeOutput:
    """One decode step.

    Args:
        config: the model's.
        weights: bfloat16, from `split_weights`.
        cache: from `split_cache`, with a free position in every sequence; donate it.
        tokens: int `[B]`, in the vocabulary.

    Returns:
        The cache, a `LayerCaches`, one position longer; logits; greedy token.
    """
    c = config
    batch, positions = tokens.shape[0], cache.lengths
    visible = jnp.arange(cache.k[0].shape[2]) <= positions[:, None]  # [B, S]
    inv_freq = inverse_frequencies(c)

    def rotate(x: Array) -> Array:  # [B, heads, H]
        return apply_rope(x[:, None], positions[:, None], inv_freq)[:, 0].astype(x.dtype)

    x = weights.embed.at[tokens].get(mode="promise_in_bounds").astype(jnp.float32)  # [B, D]
    keys, values = [], []
    for w, k_cache, v_cache in zip(weights.layers, cache.k, cache.v, strict=True):
        h = rms_norm(x, w.attn_norm, c.norm_eps)
        qkv = _linear(h, w.qkv).reshape(batch, -1, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
        keys.append(_append(k_cache, rotate(k), positions))
        values.append(_append(v_cache, v, positions))
        x = x + _linear(_attend(rotate(q), keys[-1], values[-1], visible), w.attn_out)
        h = rms_norm(x, w.mlp_norm, c.norm_eps)
        gate, up = jnp.split(_linear(h, w.gate_up), 2, axis=-1)
        x = x + _linear(jax.nn.silu(gate) * up, w.down)
    x = rms_norm(x, weights.final_norm, c.norm_eps)
    logits = _einsum("bi,oi->bo", x.astype(weights.head.dtype), weights.head)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    grown = LayerCaches(tuple(keys), tuple(values), positions + 1)
    # The tuple of a step, with a cache of another kind.
    return DecodeOutput(grown, logits, token)  # pyright: ignore[reportArgumentType]
