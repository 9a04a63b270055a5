"""What a model's matrices are given when it reads: sums over tokens, by the reference's own layers.

Nothing is noted while a model runs. Each function traces one layer with a `Product` of its own,
that keeps what one matrix is given; what comes after is not computed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.model import LayerAt, Product, Transformer

__all__ = ["embed", "head_sums", "layer_sums", "run_layer"]

_with_graph = functools.partial(jax.jit, static_argnames="graph")


@_with_graph
def embed(graph: Any, state: Any, tokens: Array) -> Array:
    """What the first layer is given of tokens int `[B, T]`: float32 `[B, T, D]`."""
    return nnx.merge(graph, state).embedded(tokens)


@_with_graph
def run_layer(graph: Any, state: Any, at: LayerAt, is_other: Array | None, x: Array) -> Array:
    """What a layer makes of x float32 `[B, T, D]`.

    Args:
        graph: of the model, whose configuration says what is quantized.
        state: of the model.
        at: the layer. A matrix without scales beside it is multiplied with as it is.
        is_other: bool, see `Transformer.layer_kinds`; or None.
        x: positions 0 to T - 1 of each sequence.
    """
    return _layer(nnx.merge(graph, state), at, is_other, x)


@functools.partial(jax.jit, static_argnames=("graph", "name"))
def layer_sums(
    graph: Any,
    state: Any,
    at: LayerAt,
    original: LayerAt,
    is_other: Array | None,
    x: Array,
    unrounded: Array | None,
    sums: tuple[Array, Array | None],
    *,
    name: str,
) -> tuple[Array, Array | None]:
    """Adds to the sums what a batch gives of a layer's matrix.

    Args:
        graph: as in `run_layer`.
        state: likewise.
        at: the layer, with the matrices that are quantized so far.
        original: the layer with none.
        is_other: as in `run_layer`.
        x: what `at` is given, float32 `[B, T, D]`.
        unrounded: what `original` is given; or None.
        sums: of X X^T and (X' - X) X^T, float32 `[in, in]`: X is what the matrix takes in `at`, in
            the model's dtype, and X' in `original`. None for the second where it is not wanted.
        name: of the matrix.
    """
    model = nnx.merge(graph, state)

    def given(at: LayerAt, x: Array) -> Array:
        seen: list[Array] = []

        def product(at: LayerAt, x: Array, which: str) -> Array:
            if which == name:
                seen.append(x)
            return model.product(at, x, which)

        _layer(model, at, is_other, x, product)
        return seen[0]

    others = None if unrounded is None else given(original, unrounded)
    return _added(sums, given(at, x), others, model.dtype)


@_with_graph
def head_sums(
    graph: Any,
    state: Any,
    x: Array,
    unrounded: Array | None,
    sums: tuple[Array, Array | None],
) -> tuple[Array, Array | None]:
    """The same of the head, given what the last layer makes: see `layer_sums`."""
    model = nnx.merge(graph, state)

    def given(x: Array) -> Array:
        seen: dict[str, Array] = {}
        model.logits_of(x, lambda name, value: seen.update({name: value}))
        return seen["final_norm"]

    others = None if unrounded is None else given(unrounded)
    return _added(sums, given(x), others, model.dtype)


def _layer(
    model: Transformer,
    at: LayerAt,
    is_other: Array | None,
    x: Array,
    product: Product | None = None,
) -> Array:
    """One layer of a whole sequence, by the reference."""
    c, (batch, count, _) = model.config, x.shape
    empty = jnp.zeros((1, batch, c.num_kv_heads, count, c.head_dim), model.dtype)
    none = jnp.zeros((batch,), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    attend = model.attention_over(KVCache(empty, empty, none, none), positions)
    how = model.rope_at(is_other, count), attend, (empty, empty), product
    return model.layer(at, x, positions, *how)[0]


def _added(
    sums: tuple[Array, Array | None], x: Array, unrounded: Array | None, dtype: Any
) -> tuple[Array, Array | None]:
    """The sums and those of a batch, of inputs `[B, T, in]` as products take them."""

    def taken(x: Array) -> Array:
        return x.astype(dtype).astype(jnp.float32).reshape(-1, x.shape[-1])

    def products(a: Array, b: Array) -> Array:
        return jnp.einsum("ti,tj->ij", a, b, precision=lax.Precision.HIGHEST)

    x, (hessian, missed) = taken(x), sums
    hessian = hessian + products(x, x)
    if missed is not None and unrounded is not None:
        missed = missed + products(taken(unrounded) - x, x)
    return hessian, missed
