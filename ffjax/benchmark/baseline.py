"""The baseline: the same decode step in plain JAX, laid out as XLA likes it.

XLA copies every slice of a stacked weight before it multiplies by it, which takes 1.3 to 2.6
times the time of a step without such copies. Here each layer has arrays of its own, for its
weights and for its keys and values, and the layers are a Python loop: what a careful user
would write for speed without a kernel. It computes every family and rounds where the reference
model rounds. Quantized matrices are multiplied out where they are used, inside the step, so that
XLA may join that to the product.

A local layer keeps a ring, position p in slot p modulo the ring's size, and attends over all
of it. A slice of the window out of a cache of the whole capacity would be copied first, as the
weights are: compiled for a GPU, both products of Mistral 7B's attention have a `dynamic_slice`
of their own in front of them, or a gather where there are several sequences, so that the window
would move three times. A mask alone would read the capacity, which may be many windows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ffjax.benchmark.inputs import capacity_for
from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.decode import DecodeOutput
from ffjax.formats import WeightFormat
from ffjax.model import Transformer, capped, gated, rms_norm
from ffjax.rope import Rope, apply_rope, rope_of
from ffjax.rounding import expand

__all__ = [
    "BaselineWeights",
    "LayerCaches",
    "LayerWeights",
    "baseline_step",
    "split_cache",
    "split_weights",
]


class LayerWeights(NamedTuple):
    """The weights of one layer: those of `ffjax.model.Layers`, None where the model has none.

    Attributes:
        attn_norm: `[D]`.
        qkv: `[(N + 2K) * H, D]`.
        attn_out: `[D, N * H]`.
        mlp_norm: `[D]`.
        gate_up: `[2F, D]`.
        down: `[D, F]`.
        qkv_bias: `[(N + 2K) * H]`.
        attn_out_bias: `[D]`.
        gate_up_bias: `[2F]`.
        down_bias: `[D]`.
        q_norm: `[H]` or `[N * H]`.
        k_norm: `[H]` or `[K * H]`.
        attn_post_norm: `[D]`.
        mlp_post_norm: `[D]`.
        qkv_scale, attn_out_scale, gate_up_scale, down_scale: of quantized matrices, whose shapes
            `ffjax.formats` has.
    """

    attn_norm: Array | None
    qkv: Array
    attn_out: Array
    mlp_norm: Array | None
    gate_up: Array
    down: Array
    qkv_bias: Array | None
    attn_out_bias: Array | None
    gate_up_bias: Array | None
    down_bias: Array | None
    q_norm: Array | None
    k_norm: Array | None
    attn_post_norm: Array | None
    mlp_post_norm: Array | None
    qkv_scale: Array | None
    attn_out_scale: Array | None
    gate_up_scale: Array | None
    down_scale: Array | None


class BaselineWeights(NamedTuple):
    """All weights, an array a layer.

    Attributes:
        embed: `[V, D]`, the model's own array.
        layers: L layers.
        final_norm: `[D]`, the model's own array.
        head: `[V, D]`, the model's own array: the embedding where they are tied.
        head_scale: of a quantized head, the model's own array; else None.
    """

    embed: Array
    layers: tuple[LayerWeights, ...]
    final_norm: Array
    head: Array
    head_scale: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """Keys and values, an array a layer.

    Attributes:
        k: L arrays `[B, K, S, H]`, keys after RoPE; in local layers S is the size of the ring.
        v: L arrays `[B, K, S, H]`. What lies beyond the live positions is multiplied by
            zero: it may be anything finite. To hide NaN there, as the reference does, would
            cost the baseline time that its users do not spend.
        lengths: int32 `[B]`, live positions of each sequence.
        capacity: S, slots of the cache that these are copies of.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    lengths: Array
    capacity: int = dataclasses.field(metadata={"static": True})


def split_weights(model: Transformer) -> BaselineWeights:
    """The model's weights, each layer's copied out of the stack."""
    unstack = jax.jit(lambda stacked: tuple(stacked))

    def arrays(name: str) -> tuple[Array | None, ...]:
        param = getattr(model.layers, name, None)
        return (None,) * model.config.num_layers if param is None else unstack(param[...])

    columns = map(arrays, LayerWeights._fields)
    head_scale = getattr(model, "head_scale", None)
    return BaselineWeights(
        embed=model.embed[...],
        layers=tuple(LayerWeights(*layer) for layer in zip(*columns, strict=True)),
        final_norm=model.final_norm[...],
        head=model.head_weight,
        head_scale=None if head_scale is None else head_scale[...],
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def split_cache(config: ModelConfig, cache: KVCache, steps: int) -> LayerCaches:
    """A copy of the cache, an array a layer, with zeros beyond the live positions.

    Args:
        config: the model's.
        cache: what to copy.
        steps: how many can be taken and taken again: a local layer's ring has room for them
            beside the window, so that they overwrite nothing that the first of them sees.
    """
    live = jnp.arange(cache.capacity) < cache.lengths[:, None]  # [B, S]
    newest = cache.lengths - 1
    ring = cache.capacity
    if config.window is not None:
        ring = min(ring, capacity_for(config.window, steps))
    held = newest[:, None] - _age(newest, ring)  # the position in each slot

    def split(layer: Array, local: bool) -> Array:  # [B, K, S, H]
        if not local or ring == cache.capacity:
            return jnp.where(live[:, None, :, None], layer, 0)
        rolled = jax.vmap(lambda row, at: row[:, at])(layer, jnp.maximum(held, 0))
        return jnp.where((held >= 0)[:, None, :, None], rolled, 0)

    k, v = (tuple(map(split, stack, config.local_layers)) for stack in (cache.k, cache.v))
    return LayerCaches(k, v, cache.lengths, cache.capacity)


def _age(position: Array, slots: int) -> Array:
    """How many positions before `position`, the newest, each slot of a ring was written.

    Returns:
        int32 `[B, slots]` for positions `[B]`; more than `position` where nothing was written.
    """
    return (position[:, None] - jnp.arange(slots)) % slots


class _Reach(NamedTuple):
    """What local layers share, or the others.

    Attributes:
        slot: int32 `[B]`, where new keys and values go.
        visible: bool `[B, S]`, the slots that a query sees.
    """

    slot: Array
    visible: Array


def _reach(config: ModelConfig, positions: Array, slots: int, local: bool) -> _Reach:
    window = config.window if local else None
    if window is None:
        return _Reach(positions, jnp.arange(slots) <= positions[:, None])
    age = _age(positions, slots)
    visible = (age < window) & (age <= positions[:, None])
    return _Reach(positions % slots, visible)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    """An einsum of bfloat16, accumulated and returned in float32."""

    def dot(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def dot_upcast(a, b):
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    # XLA on CPUs has no bfloat16 product with a float32 result for every shape.
    return lax.platform_dependent(a, b, cpu=dot_upcast, default=dot)


def _product(
    x: Array, weight: Array, scale: Array | None, format: WeightFormat | None, dtype: Any
) -> Array:
    """`x[B, in] @ weight[out, in].T`, of operands in `dtype`, accumulated: float32 `[B, out]`."""
    if scale is None or format is None:
        return _einsum("bi,oi->bo", x.astype(dtype), weight)
    if format.group_size is None:  # a scale a row, which is the sum's as well
        return _einsum("bi,oi->bo", x.astype(dtype), weight.astype(dtype)) * scale
    return _einsum("bi,oi->bo", x.astype(dtype), expand(weight, scale, format, dtype))


def _append(cache: Array, new: Array, slots: Array) -> Array:
    """`cache [B, K, S, H]` with `new [B, K, H]` in each sequence's slot `[B]`."""
    if cache.shape[0] == 1:  # a plain store, which XLA can join to what computes `new`
        return lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, slots[0], 0))
    rows = jnp.arange(cache.shape[0])
    return cache.at[rows, :, slots].set(
        new, mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True
    )


def _attend(config: ModelConfig, q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Softmax attention of one query a sequence: `[B, N, H]` to `[B, N * H]`, in q's dtype.

    Args:
        config: the model's.
        q: `[B, N, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        visible: bool `[B, S]`.
    """
    batch, heads, size = q.shape
    q = q.reshape(batch, k.shape[1], -1, size)  # [B, K, G, H]
    scores, scale = _einsum("bkgh,bksh->bkgs", q, k), config.attn_scale
    scores = scores / math.sqrt(size) if scale is None else scores * scale
    scores = capped(scores, config.attn_softcap)
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
        weights: from `split_weights`; what is not quantized is bfloat16.
        cache: from `split_cache`, with a free position in every sequence; donate it.
        tokens: int `[B]`, in the vocabulary.

    Returns:
        The cache, a `LayerCaches`, one position longer; logits; greedy token.
    """
    c, dtype = config, weights.embed.dtype
    batch, positions = tokens.shape[0], cache.lengths
    # All local layers are alike, and so are all others.
    slots = {local: k.shape[2] for local, k in zip(c.local_layers, cache.k, strict=True)}
    reaches = {local: _reach(c, positions, count, local) for local, count in slots.items()}

    def linear(x: Array, w: LayerWeights, name: str) -> Array:
        weight, scale, bias = (getattr(w, f"{name}{part}") for part in ("", "_scale", "_bias"))
        out = _product(x, weight, scale, getattr(c.weights, name), dtype)
        return (out if bias is None else out + bias.astype(jnp.float32)).astype(dtype)

    def norm(x: Array, weight: Array | None) -> Array:
        return x if weight is None else rms_norm(x, weight, c.norm_eps, c.norm_offset)

    def norm_heads(x: Array, weight: Array | None) -> Array:  # [B, heads, H]
        whole = c.qk_norm == "full"
        return norm(x.reshape(batch, -1), weight).reshape(x.shape) if whole else norm(x, weight)

    ropes = {other: rope_of(c, cache.capacity, other=other) for other in (False, True)}

    def rotate(x: Array, rope: Rope) -> Array:  # [B, heads, H]
        return apply_rope(x[:, None], positions[:, None], *rope)[:, 0].astype(dtype)

    def add(x: Array, block: Array, post_norm: Array | None) -> Array:  # [B, D]
        block = norm(block, post_norm)
        if c.residual_scale != 1:
            block = block.astype(jnp.float32) * c.residual_scale
        return x + block

    x = weights.embed.at[tokens].get(mode="promise_in_bounds").astype(jnp.float32)  # [B, D]
    if c.embed_scale != 1:
        x = x * jnp.asarray(c.embed_scale, dtype).astype(jnp.float32)
    keys, values = [], []
    kinds = c.local_layers, c.other_rope_layers
    for w, k_cache, v_cache, local, other in zip(
        weights.layers, cache.k, cache.v, *kinds, strict=True
    ):
        reach, rope = reaches[local], ropes[other]
        qkv = linear(norm(x, w.attn_norm), w, "qkv").reshape(batch, -1, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
        q, k = norm_heads(q, w.q_norm), norm_heads(k, w.k_norm)
        keys.append(_append(k_cache, rotate(k, rope), reach.slot))
        values.append(_append(v_cache, v, reach.slot))
        attended = _attend(c, rotate(q, rope), keys[-1], values[-1], reach.visible)
        x = add(x, linear(attended, w, "attn_out"), w.attn_post_norm)
        gate, up = jnp.split(linear(norm(x, w.mlp_norm), w, "gate_up"), 2, axis=-1)
        x = add(x, linear(gated(gate, up, c.activation), w, "down"), w.mlp_post_norm)
    x = norm(x, weights.final_norm)
    logits = _product(x, weights.head, weights.head_scale, c.weights.head, dtype)
    if c.logit_scale != 1:
        logits = logits * c.logit_scale
    logits = capped(logits, c.logit_softcap)
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    grown = LayerCaches(tuple(keys), tuple(values), positions + 1, cache.capacity)
    # The tuple of a step, with a cache of another kind.
    return DecodeOutput(grown, logits, token)  # pyright: ignore[reportArgumentType]
