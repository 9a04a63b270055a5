"""What each segment of a layer makes of what it is handed, by the names of the exchange's buffers.

Each function stands for one segment, takes the buffers that it reads and returns those that it
writes, in the exact form in which they are handed over, and what lies between, by names of its own.
`NAMES` says what each one is. Products are summed in float32; in which order is no part of the
definition.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dims import DecodeWeights
from pallas_kernels.spec.attention import attend_splits, combine_splits, splits_of
from pallas_kernels.spec.handed import as_plain, as_residual
from pallas_kernels.spec.heads import handed_heads, ready_heads
from pallas_kernels.spec.inputs import mean_square_scale, normed_inputs, plain_inputs
from pallas_kernels.spec.weights import bias_of, matrix_of, norm_weight, product
from pallas_kernels.stream.plan import Segment, StreamPlan

__all__ = [
    "NAMES",
    "Buffers",
    "attention",
    "attn_out",
    "down",
    "embed",
    "gate_up",
    "head",
    "qkv",
    "splits_there",
]

Buffers = dict[str, Array]

NAMES = {
    "residual": "what enters the layer, as its owners keep it; float32 [C, D]",
    "x_in": "the same as it is handed over; [C, D]",
    "qkv_input": "x_in, normed and rounded for the product; [C, D]",
    "qkv": "queries, keys and values of the new positions; [C, N + 2K, H]",
    "k": "new keys, as the cache holds them; [C, K, H]",
    "v": "new values, likewise; [C, K, H]",
    "parts": "of each KV split H weighted values, their weights' sum, the largest score; "
    "[C, N, splits, H + 2]",
    "attn": "attention's output; [C, N * H]",
    "attn_out_input": "attn, rounded for the product; [C, N * H]",
    "attn_block": "the block's output, handed over where a norm stands after it; [C, D]",
    "attn_added": "what attention adds to the residual; float32 [C, D]",
    "residual_mid": "the residual inside the layer, as its owners keep it; float32 [C, D]",
    "x_mid": "the same as it is handed over; [C, D]",
    "gate_up_input": "x_mid, normed and rounded for the product; [C, D]",
    "ffw": "hidden activations; [C, F]",
    "down_input": "ffw, rounded for the product; [C, F]",
    "partial": "sums over each part of the inputs, where these are split; float32 [C, D, parts]",
    "ffw_block": "the block's output, handed over where a norm stands after it; [C, D]",
    "ffw_added": "what the feed-forward block adds to the residual; float32 [C, D]",
    "residual_out": "the residual after the layer, as its owners keep it; float32 [C, D]",
    "x_out": "the same as it is handed over: the next layer's x_in, or x_head; [C, D]",
    "head_input": "x_head, normed and rounded for the product; [C, D]",
    "logits": "float32 [C, V]; NaN for a token that the cache has no room for",
    "best": "each program's best logit, float32 [P, C]; -inf where it has none",
    "best_token": "its token, int32 [P, C]",
    "token": "the greedy token, int32 [C]",
}


def embed(plan: StreamPlan, weights: DecodeWeights, tokens: Array) -> Buffers:
    """The residual begins as the tokens' rows of the embedding; ids are clamped into it."""
    rows = weights.embed[jnp.clip(tokens, 0, plan.dims.vocab_size - 1)].astype(jnp.float32)
    residual = rows * plan.dims.features.embed_scale
    return {"residual": residual, "x_in": as_residual(plan, residual)}


def qkv(
    plan: StreamPlan, weights: DecodeWeights, layer: Array, lengths: Array, x_in: Array
) -> Buffers:
    """Queries, keys and values of the normed residual; RoPE, unless a norm comes first."""
    inputs = normed_inputs(plan, Segment.QKV, x_in, norm_weight(plan, weights, "attn_norm", layer))
    rows = product(inputs, matrix_of(plan, weights, Segment.QKV, layer))
    rows += bias_of(weights, "qkv_bias", layer)
    return {"qkv_input": inputs, "qkv": handed_heads(plan, weights, layer, lengths, rows)}


def attention(
    plan: StreamPlan,
    weights: DecodeWeights,
    layer: Array,
    lengths: Array,
    k: Array,
    v: Array,
    qkv: Array,
    parts: Array | None = None,
) -> Buffers:
    """Attention; and the new keys and values, as they go to the cache.

    Args:
        plan: the step's.
        weights: the weights.
        layer: int32 scalar.
        lengths: int32 `[B]`.
        k: the layer's cached keys, `[B, K, S, H]`.
        v: likewise its values.
        qkv: the buffer.
        parts: that buffer, as another has made it; None: what is computed here is combined.
    """
    heads = ready_heads(plan, weights, layer, lengths, qkv)
    made = attend_splits(plan, layer, lengths, heads, k, v)
    there = splits_there(plan, layer, lengths)
    combined = made
    if parts is not None:  # a single split is not handed over
        combined = jnp.where(jnp.sum(there, 1)[:, None, None, None] > 1, parts, made)
    attn = as_plain(plan, combine_splits(plan, there, combined))
    return {"parts": made, "attn": attn, "k": heads.keys, "v": heads.values}


def splits_there(plan: StreamPlan, layer: Array, lengths: Array) -> Array:
    """Which KV splits each column's sequence has in a layer: bool `[C, max_splits]`."""
    number = jnp.repeat(splits_of(plan, layer, lengths).number, plan.dims.tokens)
    return jnp.arange(plan.attention.max_splits) < number[:, None]


def attn_out(
    plan: StreamPlan,
    weights: DecodeWeights,
    layer: Array,
    residual: Array,
    attn: Array,
    attn_block: Array | None = None,
) -> Buffers:
    """Attention's output projected, and added to the residual.

    Args:
        plan: the step's.
        weights: the weights.
        layer: int32 scalar.
        residual: that which enters the layer.
        attn: the buffer.
        attn_block: that buffer, as another has made it; None: as it is made here.
    """
    inputs = plain_inputs(plan, Segment.ATTN_OUT, attn)
    block = product(inputs, matrix_of(plan, weights, Segment.ATTN_OUT, layer))
    block += bias_of(weights, "attn_out_bias", layer)
    made = _added(plan, norm_weight(plan, weights, "attn_post_norm", layer), block, attn_block)
    x = residual + made[1]
    names = "attn_block", "attn_added", "residual_mid", "x_mid"
    return {"attn_out_input": inputs} | _named(names, (*made, x, as_residual(plan, x)))


def gate_up(plan: StreamPlan, weights: DecodeWeights, layer: Array, x_mid: Array) -> Buffers:
    """Hidden activations: the gated unit (Shazeer, arXiv 2002.05202) of the normed residual."""
    inputs = normed_inputs(
        plan, Segment.GATE_UP, x_mid, norm_weight(plan, weights, "mlp_norm", layer)
    )
    rows = product(inputs, matrix_of(plan, weights, Segment.GATE_UP, layer))
    gate, up = jnp.split(rows + bias_of(weights, "gate_up_bias", layer), 2, axis=1)
    if plan.dims.features.activation == "silu":
        gate = jax.nn.silu(gate)
    else:
        gate = jax.nn.gelu(gate, approximate=True)
    return {"gate_up_input": inputs, "ffw": as_plain(plan, gate * up)}


def down(
    plan: StreamPlan,
    weights: DecodeWeights,
    layer: Array,
    residual_mid: Array,
    ffw: Array,
    partial: Array | None = None,
    ffw_block: Array | None = None,
) -> Buffers:
    """Hidden activations projected, and added to the residual.

    Args:
        plan: the step's.
        weights: the weights.
        layer: int32 scalar.
        residual_mid: the residual inside the layer.
        ffw: the buffer.
        partial: that buffer, as another has made it; None: as it is made here.
        ffw_block: likewise.
    """
    part, inputs = plan.segments[Segment.DOWN], plain_inputs(plan, Segment.DOWN, ffw)
    matrix = matrix_of(plan, weights, Segment.DOWN, layer)
    starts = [part.width * n for n in range(part.splits)]
    sums = [product(inputs[:, x : x + part.width], matrix[:, x : x + part.width]) for x in starts]
    made_partial = jnp.stack(sums, axis=-1)
    block = jnp.sum(made_partial if partial is None else partial, axis=-1)
    block += bias_of(weights, "down_bias", layer)
    made = _added(plan, norm_weight(plan, weights, "mlp_post_norm", layer), block, ffw_block)
    x = residual_mid + made[1]
    names = "ffw_block", "ffw_added", "residual_out", "x_out"
    others = {"down_input": inputs, "partial": made_partial if part.splits > 1 else None}
    named = _named(names, (*made, x, as_residual(plan, x)))
    return {name: x for name, x in others.items() if x is not None} | named


def head(
    plan: StreamPlan,
    weights: DecodeWeights,
    fits: Array,
    x_head: Array,
    logits: Array | None = None,
) -> Buffers:
    """Logits, and the greedy token: the lowest id of equal logits, and NaN wins.

    Args:
        plan: the step's.
        weights: the weights.
        fits: bool `[C]`, whether the cache has room for the column's token.
        x_head: the buffer.
        logits: as another has made them, from which to choose; None: as they are made here.
    """
    d, features, part = plan.dims, plan.dims.features, plan.segments[Segment.HEAD]
    inputs = normed_inputs(plan, Segment.HEAD, x_head, norm_weight(plan, weights, "final_norm"))
    rows = product(inputs, matrix_of(plan, weights, Segment.HEAD, jnp.int32(0)))
    rows = rows * features.logit_scale
    if (cap := features.logit_softcap) is not None:
        rows = cap * jnp.tanh(rows / cap)
    made = jnp.where(fits[:, None], rows, jnp.nan)
    known = made if logits is None else logits
    # NaN counts as infinite, and a program's rows are every P-th group.
    known = jnp.where(jnp.isnan(known), jnp.inf, known)
    owner = jnp.arange(d.vocab_size) // part.rows % plan.programs
    own = jnp.where(owner == jnp.arange(plan.programs)[:, None, None], known, -jnp.inf)
    return {
        "head_input": inputs,
        "logits": made,
        "best": jnp.max(own, axis=-1),
        "best_token": jnp.argmax(own, axis=-1).astype(jnp.int32),
        "token": jnp.argmax(known, axis=-1).astype(jnp.int32),
    }


def _added(
    plan: StreamPlan, norm: Array | None, block: Array, handed: Array | None
) -> tuple[Array | None, Array]:
    """What a block hands over to be normed, None where it is not; what is added to the residual.

    Each owner norms its own float32, by the mean square of what all have handed over.
    """
    made = None
    if norm is not None:
        made = as_residual(plan, block)
        block = block * mean_square_scale(plan, made if handed is None else handed) * norm
    return made, block * plan.dims.features.residual_scale


def _named(names: tuple[str, ...], values: tuple[Array | None, ...]) -> Buffers:
    return {name: x for name, x in zip(names, values, strict=True) if x is not None}
