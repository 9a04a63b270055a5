"""The reference model: a decoder in Flax NNX, layers stacked; its family is `ModelConfig`'s fields.

Weights are stored once, `[L, out, in]`, and read from there both by this
reference and by the fused kernel of `pallas_kernels`. Matrix products take
inputs in the dtype of the weights and accumulate in float32; norms, RoPE,
softmax, the residual stream and logits are float32.

A matrix that `ModelConfig.weights` says is quantized has an array of scales beside it. Its
integers are read where they lie, and what a product needs of them exists while it is computed:

- int8: the sums of inputs times integers, both exact in bfloat16, are multiplied by their row's
  scale, in float32.
- int4: integers times scales, rounded to the model's dtype, are the weights of the product. In
  bfloat16 this rounding, of 2^-9 of each weight, is the one way in which the result differs from
  that of float32 sums over groups, multiplied by their scales and added up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ffjax.cache import KVCache
from ffjax.config import Activation, ModelConfig
from ffjax.formats import WeightFormat
from ffjax.inputs import checked_inputs, checked_layers, checked_store, checked_tokens
from ffjax.rope import Rope, apply_rope, rope_of
from ffjax.rounding import expand, random_matrix
from ffjax.settings import own_settings

__all__ = [
    "LAST_TENSORS",
    "LAYER_TENSORS",
    "Attend",
    "LayerAt",
    "Layers",
    "Product",
    "Transformer",
    "capped",
    "gated",
    "rms_norm",
]

LAYER_TENSORS = (
    "residual_in",
    "q",
    "k",
    "v",
    "attended",
    "attention_out",
    "residual_mid",
    "hidden",
    "ffw_out",
    "residual_out",
)
"""What `Transformer.observe` sees of each layer, in the order in which it is computed."""

LAST_TENSORS = ("final_norm", "logits")
"""What it sees after the last layer."""


class LayerAt(NamedTuple):
    """A layer while the model is traced.

    Attributes:
        number: int32, from 0.
        is_local: bool, whether it has a window; None where no layer has one.
        weights: its arrays, by their names in `Layers`, without the axis `[L]`.
    """

    number: Array
    is_local: Array | None
    weights: dict[str, Array]


Attend = Callable[[LayerAt, Array, Array, Array, Any], tuple[Array, Any]]
"""Attention of a layer: of its queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, after RoPE,
and the state of the layer before, makes `[B, T, N * H]`, in the queries' dtype, and a state."""

Product = Callable[[LayerAt, Array, str], Array]
"""A product of `[..., in]` with the layer's matrix of a name, float32 or in the model's dtype."""

Note = Callable[[str, Array], None]
"""Told of an intermediate, by name, while the model is traced."""


def _unnoted(name: str, value: Array) -> None:
    """Nobody looks: the program that is compiled has nothing of it."""


def _noting(summary: Callable[[Array], Any] | None, seen: dict[str, Any]) -> Note:
    """Keeps summaries in `seen`, where there are any to make."""
    if (made := summary) is None:
        return _unnoted
    return lambda name, value: seen.update({name: made(value)})


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in float32.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: added to the mean square.
        offset: added to the weight, in float32: beside 1, bfloat16 would drop most of a
            weight near 0.

    Returns:
        float32 `[..., D]`.
    """
    x = x.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32)
    return normed * (weight + offset if offset else weight)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    """An einsum accumulated and returned in float32."""

    def dot(a, b):
        # Without "highest" a GPU would round float32 operands to tf32.
        return jnp.einsum(
            spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )

    def dot_upcast(a, b):
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    # XLA on CPUs has no bfloat16 product with a float32 result for every
    # shape; products of upcast operands are the same numbers.
    return lax.platform_dependent(a, b, cpu=dot_upcast, default=dot)


def _linear(
    x: Array, weight: Array, dtype, *, scale: Array | None = None, format: WeightFormat | None
) -> Array:
    """`x[..., in] @ weight[out, in].T`, inputs of `dtype`, accumulated and returned in float32."""
    if scale is None or format is None:
        return _einsum("...i,oi->...o", x.astype(dtype), weight)
    if format.group_size is None:
        # The row's scale comes after the sum: integers are exact in bfloat16, products are not.
        return _einsum("...i,oi->...o", x.astype(dtype), weight.astype(dtype)) * scale
    return _einsum("...i,oi->...o", x.astype(dtype), expand(weight, scale, format, dtype))


def capped(x: Array, cap: float | None) -> Array:
    """`x` held within (-cap, cap): Gemma 2 technical report, arXiv 2408.00118, section 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def gated(gate: Array, up: Array, activation: Activation) -> Array:
    """The gated feed-forward unit (Shazeer, arXiv 2002.05202), in the inputs' dtype."""
    if activation == "silu":
        return jax.nn.silu(gate) * up
    # 1 + tanh(x) of a gate below zero is a small difference of large numbers, of which
    # bfloat16 would leave little: tests/test_model.py looks there.
    gelu = jax.nn.gelu(gate.astype(jnp.float32), approximate=True)
    return gelu.astype(up.dtype) * up


def _attend(
    q: Array, k: Array, v: Array, visible: Array, scale: float | None, softcap: float | None
) -> Array:
    """Softmax attention of T queries over S slots, grouped-query.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        visible: bool `[B, T, S]`, the slots a query may see.
        scale: multiplies the products of queries and keys; None: 1/sqrt(H).
        softcap: holds the scores within (-softcap, softcap), or None.

    Returns:
        `[B, T, N * H]` in q's dtype.
    """
    b, t, n, h = q.shape
    heads_kv = k.shape[1]
    q = q.reshape(b, t, heads_kv, n // heads_kv, h)
    scores = _einsum("btkgh,bksh->bkgts", q, k)
    scores = scores / math.sqrt(h) if scale is None else scores * scale
    scores = capped(scores, softcap)
    mask = visible[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # A slot that no query sees may hold anything, also NaN: 0 * NaN is NaN.
    seen = visible.any(axis=1)[:, None, :, None]
    out = _einsum("bkgts,bksh->btkgh", probs, jnp.where(seen, v, 0))
    return out.reshape(b, t, n * h).astype(q.dtype)


class Layers(nnx.Module):
    """The weights of all L layers, stacked. What the configuration does not ask for is absent.

    The matrices are these where they are not quantized; `ffjax.formats` has the shapes of those
    that are, and of their scales, which are `qkv_scale` and so on.

    Attributes:
        attn_norm, mlp_norm: `[L, D]`, before each block. Where `config.pre_norm`.
        attn_post_norm, mlp_post_norm: `[L, D]`, after each block. Where `config.post_norm`.
        qkv: `[L, (N + 2K) * H, D]`, rows of queries, then keys, then values.
        qkv_bias: `[L, (N + 2K) * H]`. Where `config.qkv_bias`.
        attn_out_bias: `[L, D]`. Where `config.attn_out_bias`.
        gate_up_bias, down_bias: `[L, 2F]` and `[L, D]`. Where `config.mlp_bias`.
        q_norm, k_norm: `[L, H]` each where `config.qk_norm` is "head"; `[L, N * H]` and
            `[L, K * H]` where it is "full".
        attn_out: `[L, D, N * H]`.
        gate_up: `[L, 2F, D]`, rows of the gate, then of the up projection.
        down: `[L, D, F]`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.bfloat16):
        c = config

        def weight(name: str) -> nnx.Param:
            shape = (c.num_layers, *c.matrices[name])
            inner, format = shape[-1], c.weights.quantized.get(name)
            if format is not None:
                return _quantized(self, name, shape, format, rngs)
            scale = jnp.asarray(1 / math.sqrt(inner), dtype)
            return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * scale)

        def norm(size: int) -> nnx.Param:
            return nnx.Param(jnp.full((c.num_layers, size), 1 - c.norm_offset, dtype))

        if c.pre_norm:
            self.attn_norm, self.mlp_norm = norm(c.model_dim), norm(c.model_dim)
        if c.post_norm:
            self.attn_post_norm, self.mlp_post_norm = norm(c.model_dim), norm(c.model_dim)
        if c.qk_norm is not None:
            full = c.qk_norm == "full"
            self.q_norm = norm(c.num_heads * c.head_dim if full else c.head_dim)
            self.k_norm = norm(c.num_kv_heads * c.head_dim if full else c.head_dim)
        self.qkv = weight("qkv")
        self.attn_out = weight("attn_out")
        self.gate_up = weight("gate_up")
        self.down = weight("down")
        for name in sorted(c.biased):
            zeros = jnp.zeros((c.num_layers, c.matrices[name][0]), dtype)
            setattr(self, f"{name}_bias", nnx.Param(zeros))


def _quantized(
    module: nnx.Module, name: str, shape: tuple[int, ...], format: WeightFormat, rngs: nnx.Rngs
) -> nnx.Param:
    """Random integers; their scales become the module's attribute `{name}_scale`."""
    integers, scale = random_matrix(rngs, shape, format)
    setattr(module, f"{name}_scale", nnx.Param(scale))
    return nnx.Param(integers)


class Transformer(nnx.Module):
    """A decoder-only transformer.

    Attributes:
        config: its sizes, and what its family does differently from Llama.
        embed: `[V, D]`.
        layers: the stacked layers.
        final_norm: `[D]`.
        head: `[V, D]`, or None when the embedding serves as head; where it is quantized,
            integers, with `head_scale` beside them.
    """

    @own_settings()
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.bfloat16):
        """Random weights: normal, of standard deviation 1/sqrt(in) (0.02 for the embedding).

        Norms start as the identity, biases at zero.
        """
        vocab_shape = (config.vocab_size, config.model_dim)

        def table(std: float) -> nnx.Param:
            noise = jax.random.normal(rngs.params(), vocab_shape, dtype)
            return nnx.Param(noise * jnp.asarray(std, dtype))

        self.config = config
        self.embed = table(0.02)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.final_norm = nnx.Param(jnp.full((config.model_dim,), 1 - config.norm_offset, dtype))
        if config.tied_embeddings:
            self.head = None
        elif config.weights.head is None:
            self.head = table(1 / math.sqrt(config.model_dim))
        else:
            self.head = _quantized(self, "head", vocab_shape, config.weights.head, rngs)

    @property
    def dtype(self) -> Any:
        """The dtype of weights that are not quantized and of the inputs to matrix products."""
        return self.embed[...].dtype

    @property
    def head_weight(self) -> Array:
        """`[V, D]`: the head, or the embedding when they are tied; integers if quantized."""
        return (self.embed if self.head is None else self.head)[...]

    @own_settings()
    def __call__(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        *,
        num_tokens: Array | None = None,
        last_only: bool = False,
    ) -> Array | tuple[Array, KVCache]:
        """Logits of every token, and the cache grown by the tokens when one is given.

        Args:
            tokens: int `[B, T]`. Without a cache they are positions 0 to T - 1;
                with one they follow each sequence's live positions.
            cache: what came before, or None.
            num_tokens: int `[B]`, how many of each row's T tokens count; the rest
                of a row is padding, which leaves no trace in the cache's live
                part and whose logits mean nothing. None: all T. Needs a cache.
            last_only: compute only the logits of each row's last token that counts:
                a prefill needs no others, and `[B, T, V]` is large. A row of which
                no token counts gets logits that mean nothing.

        Returns:
            float32 `[B, T, V]`, or `[B, V]` where last_only; with a cache, the pair
            of it and the new cache.
            A sequence that would outgrow the cache gets NaN logits.

        Raises:
            ValueError: tokens are not `[B, T]`; the cache has another batch, is another
                model's, or, where it is no tracer, has a negative length.
            TypeError: tokens are not integers, or the cache has other dtypes.
        """
        tokens = checked_tokens(tokens)
        store = checked_store(tokens, cache, num_tokens, self.config, self.dtype)
        x, store, _ = self._forward(self.embedded(tokens), store, num_tokens, last_only)
        logits = self.logits_of(x)
        return logits if cache is None else (logits, store)

    @own_settings()
    def last_hidden_state(
        self,
        inputs: Array,
        cache: KVCache | None = None,
        *,
        num_tokens: Array | None = None,
        last_only: bool = False,
    ) -> Array | tuple[Array, KVCache]:
        """What the head is given of every token, or of embeddings that are none of a token.

        `model.logits` makes logits of it, and `model.embedded` embeddings of token ids; so
        `model(tokens)` is `model.logits(model.last_hidden_state(model.embedded(tokens)))`.
        Embeddings fill a cache as tokens do, and `ffjax.decode_step` goes on from there by
        whichever implementation.

        Args:
            inputs: token ids int `[B, T]`, or embeddings `[B, T, D]` of a floating dtype, which
                the first layer is given as they are, in float32: a multiplier that a model has
                for its embedding (`config.embed_scale`) is in them already.
            cache: what came before, or None.
            num_tokens: int `[B]`, how many of each row's T inputs count; as in a call of the model.
            last_only: return only that of each row's last input that counts.

        Returns:
            float32 `[B, T, D]`, after the final norm (as the `last_hidden_state` of
            transformers), or `[B, D]` where last_only; with a cache, the pair of it and the new
            cache. A sequence that would outgrow the cache gets NaN.

        Raises:
            ValueError: the inputs have another shape; the cache has another batch, is another
                model's, or, where it is no tracer, has a negative length.
            TypeError: embeddings are integers, or the cache has other dtypes.
        """
        x, store = self._fed(inputs, cache, num_tokens)
        x, store, _ = self._forward(x, store, num_tokens, last_only)
        x = self._norm(x, self.final_norm[...])
        return x if cache is None else (x, store)

    @own_settings()
    def hidden_states(
        self,
        inputs: Array,
        cache: KVCache | None = None,
        *,
        layers: Sequence[int],
        num_tokens: Array | None = None,
    ) -> Array | tuple[Array, KVCache]:
        """The residual after chosen layers, of every token.

        A draft head such as EAGLE-3's (arXiv 2503.01840) reads those of a low, a middle and a high
        layer. `ffjax.decode_step(.., hidden_layers=..)` returns the same of the tokens of a step.

        Args:
            inputs: token ids int `[B, T]`, or embeddings `[B, T, D]`: see `last_hidden_state`.
            cache: what came before, or None.
            layers: n of them, each once, in any order: l is the residual after layer l, 1 to L;
                0 the embedding. They are the `hidden_states[l]` of transformers but for l = L,
                which is before the final norm here.
            num_tokens: int `[B]`, how many of each row's T inputs count; as in a call of the model.

        Returns:
            float32 `[B, T, n, D]`; with a cache, the pair of it and the new cache. A position that
            the cache has no slot for gets NaN.

        Raises:
            ValueError: a layer is not among 0 to L, or named twice; the inputs have another shape;
                the cache has another batch, is another model's, or, where it is no tracer, has a
                negative length.
            TypeError: a layer is no integer, embeddings are integers, or the cache has other
                dtypes.
        """
        chosen = checked_layers(layers, self.config)
        x, store = self._fed(inputs, cache, num_tokens)
        _, store, notes = self._forward(x, store, num_tokens, False, hidden_layers=chosen)
        hidden = notes["hidden_states"]
        return hidden if cache is None else (hidden, store)

    def _fed(
        self, inputs: Any, cache: KVCache | None, num_tokens: Array | None
    ) -> tuple[Array, KVCache]:
        """What the first layer is given of ids or embeddings, float32 `[B, T, D]`; the cache."""
        inputs = checked_inputs(inputs, self.config)
        store = checked_store(inputs, cache, num_tokens, self.config, self.dtype)
        x = self.embedded(inputs) if inputs.ndim == 2 else inputs
        if num_tokens is not None:
            # Of padding, tokens are numbers; embeddings may be NaN, which 0 * NaN would spread.
            counts = jnp.arange(x.shape[1]) < jnp.asarray(num_tokens)[:, None]
            x = jnp.where(counts[..., None], x, 0)
        return x, store

    @own_settings()
    def logits(self, hidden: Array) -> Array:
        """Logits of hidden states.

        Args:
            hidden: float `[..., D]`, from `last_hidden_state`.

        Returns:
            float32 `[..., V]`.
        """
        return self._headed(hidden)

    @own_settings()
    def observe(self, tokens: Array, summary: Callable[[Array], Any]) -> dict[str, Any]:
        """What `summary` makes of every intermediate of the model, for looking for what is wrong.

        Args:
            tokens: int `[B, T]`, positions 0 to T - 1.
            summary: takes an array `[B, T, ...]` and returns arrays. It is traced.

        Returns:
            The summary of each of `LAYER_TENSORS`, its arrays with an axis `[L]` in front, and of
            `LAST_TENSORS`, by name. Queries and keys are those after RoPE, `[B, T, heads, H]`;
            `attended` is what attention makes of the values, `hidden` what the down projection
            takes, `attention_out` and `ffw_out` what the blocks add, before any norm after them.

        Raises:
            ValueError: tokens are not `[B, T]`.
            TypeError: tokens are not integers.
        """
        tokens = checked_tokens(tokens)
        store = checked_store(tokens, None, None, self.config, self.dtype)
        x, _, notes = self._forward(self.embedded(tokens), store, None, False, summary)
        self.logits_of(x, _noting(summary, notes))
        return notes

    def _forward(
        self,
        x: Array,
        cache: KVCache,
        num_tokens: Array | None,
        last_only: bool,
        summary: Callable[[Array], Any] | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> tuple[Array, KVCache, dict[str, Any]]:
        """All layers, and the cache grown: float32 `[B, T, D]`, or `[B, D]` where last_only."""
        count = x.shape[1]
        lengths = cache.lengths + (count if num_tokens is None else num_tokens)
        positions = cache.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)  # [B, T]
        attend = self.attention_over(cache, positions)
        caches = cache.k, cache.v
        how = attend, caches, summary, None, hidden_layers
        x, (k, v), notes = self.run_layers(x, positions, cache.capacity, *how)
        if hidden_layers:
            there = (positions < cache.capacity)[..., None, None]
            notes["hidden_states"] = jnp.where(there, notes["hidden_states"], jnp.nan)
        if last_only:
            last = jnp.maximum(lengths - cache.lengths - 1, 0)[:, None]  # [B, 1]
            x = jnp.take_along_axis(x, last[..., None], axis=1)  # [B, 1, D]
            positions = jnp.take_along_axis(positions, last, axis=1)
        fits = positions < cache.capacity
        x = jnp.where(fits[..., None], x, jnp.nan)
        x = x[:, 0] if last_only else x
        return x, dataclasses.replace(cache, k=k, v=v, lengths=lengths), notes

    def attention_over(self, cache: KVCache, positions: Array) -> Attend:
        """The reference's attention: all scores of a layer at once.

        Its state is the pair of the cache's keys and values.

        Args:
            cache: the cache, whose capacity counts.
            positions: int32 `[B, T]`, of the queries.
        """
        c = self.config
        slots = jnp.arange(cache.capacity)
        visible = slots <= positions[..., None]  # [B, T, S]
        rows = jnp.arange(cache.batch)[:, None]

        def attend(at: LayerAt, q: Array, k: Array, v: Array, caches: Any) -> tuple[Array, Any]:
            k_cache, v_cache = caches
            # A position past the capacity is dropped, never wrapped onto another.
            k_cache = k_cache.at[at.number, rows, :, positions].set(k, mode="drop")
            v_cache = v_cache.at[at.number, rows, :, positions].set(v, mode="drop")
            k_all = lax.dynamic_index_in_dim(k_cache, at.number, keepdims=False)
            v_all = lax.dynamic_index_in_dim(v_cache, at.number, keepdims=False)
            seen = visible
            if at.is_local is not None and c.window is not None:
                # Position p sees the window's positions p - window + 1 to p.
                near = slots > positions[..., None] - c.window
                seen = visible & (near | ~at.is_local)
            attended = _attend(q, k_all, v_all, seen, c.attn_scale, c.attn_softcap)
            return attended, (k_cache, v_cache)

        return attend

    @own_settings()
    def embedded(self, tokens: Array) -> Array:
        """What the first layer is given of tokens: their rows of the embedding, scaled.

        Args:
            tokens: int `[B, T]`.

        Returns:
            float32 `[B, T, D]`.
        """
        x = self.embed[...][tokens].astype(jnp.float32)
        if self.config.embed_scale != 1:
            # transformers rounds Gemma's sqrt(D) so (Gemma3TextScaledWordEmbedding: 55.43
            # becomes 55.5); Granite's multiplier it does not round, and need not: 12.
            x = x * jnp.asarray(self.config.embed_scale, self.dtype).astype(jnp.float32)
        return x

    def run_layers(
        self,
        x: Array,
        positions: Array,
        capacity: int,
        attend: Attend,
        state: Any,
        summary: Callable[[Array], Any] | None = None,
        product: Product | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> tuple[Array, Any, dict[str, Any]]:
        """All layers, whoever attends and multiplies: `ffjax.prefill` does in ways of its own.

        Args:
            x: float32 `[B, T, D]`.
            positions: int32 `[B, T]`.
            capacity: S, slots of the cache: see `ffjax.rope.inverse_frequencies`.
            attend: attention, which keeps keys and values in a state of its own.
            state: what the first layer's `attend` is given.
            summary: see `observe`; or None.
            product: products with the layers' matrices; None: the reference's.
            hidden_layers: n layers, 0 to L, as `hidden_states` takes them.

        Returns:
            float32 `[B, T, D]`, the last layer's state, and the summaries. With layers chosen,
            float32 `[B, T, n, D]` is among these, as "hidden_states".
        """

        def layer(carry, per_layer):
            x, state, index, hidden = carry
            weights, is_local, is_other = per_layer
            notes: dict[str, Any] = {}
            at = LayerAt(index, is_local, weights)
            here = self.rope_at(is_other, capacity)
            how = here, attend, state, product, _noting(summary, notes)
            x, state = self.layer(at, x, positions, *how)
            if hidden is not None:
                hidden = jnp.where(behind == index + 1, x[..., None, :], hidden)
            return (x, state, index + 1, hidden), notes

        hidden = None
        if hidden_layers:
            behind = jnp.array(hidden_layers, jnp.int32)[:, None]  # [n, 1]
            # The embedding; what is after layers takes its place.
            hidden = jnp.repeat(x[..., None, :], len(hidden_layers), axis=-2)
        carry = (x, state, jnp.int32(0), hidden)
        each = self.stacked_weights(), *self.layer_kinds()
        (x, state, _, hidden), notes = lax.scan(layer, carry, each)
        if hidden is not None:
            notes["hidden_states"] = hidden
        return x, state, notes

    def layer_kinds(self) -> tuple[Array | None, Array | None]:
        """Which layers are local, and which rotate otherwise than most: bool `[L]`.

        None where there are no windows, or no layer of the other kind.
        """
        c = self.config
        is_local = None if c.window is None else jnp.array(c.local_layers)
        is_other = jnp.array(c.other_rope_layers) if any(c.other_rope_layers) else None
        return is_local, is_other

    def rope_at(self, is_other: Array | None, capacity: int) -> Rope:
        """How a layer rotates, by whether it is one of `config.other_rope_layers`: see `rope_of`.

        Args:
            is_other: bool; None: no layer is.
            capacity: S, slots of the cache.
        """
        rope = rope_of(self.config, capacity)
        if is_other is None:
            return rope
        other = rope_of(self.config, capacity, other=True)
        return jax.tree.map(lambda a, b: jnp.where(is_other, b, a), rope, other)

    def stacked_weights(self) -> dict[str, Array]:
        """The arrays of all layers, by their names in `Layers`."""
        named = vars(self.layers).items()
        return {name: param[...] for name, param in named if isinstance(param, nnx.Param)}

    def logits_of(self, x: Array, note: Note = _unnoted) -> Array:
        """Logits float32 `[..., V]` of what the last layer returns, float32 `[..., D]`."""
        x = self._norm(x, self.final_norm[...])
        note("final_norm", x)
        logits = self._headed(x)
        note("logits", logits)
        return logits

    def _headed(self, x: Array) -> Array:
        """The head's logits float32 `[..., V]` of what it is given, `[..., D]`."""
        c = self.config
        head = {"head": self.head_weight}
        if c.weights.head is not None:
            head["head_scale"] = vars(self)["head_scale"][...]
        logits = self._multiplied(x, head, "head")
        if c.logit_scale != 1:
            logits = logits * c.logit_scale
        return capped(logits, c.logit_softcap)

    def layer(
        self,
        at: LayerAt,
        x: Array,
        positions: Array,
        rope: Rope,
        attend: Attend,
        state: Any,
        product: Product | None = None,
        note: Note = _unnoted,
    ) -> tuple[Array, Any]:
        """One layer of `run_layers`, which says what the arguments are.

        Args:
            at: which layer.
            x: float32 `[B, T, D]`.
            positions: int32 `[B, T]`.
            rope: how it rotates.
            attend: attention.
            state: of the layer before.
            product: products.
            note: told of each of `LAYER_TENSORS`.

        Returns:
            float32 `[B, T, D]`, and the state.
        """
        c, w = self.config, at.weights
        multiply = self.product if product is None else product

        def projected(x: Array, name: str) -> Array:
            out = multiply(at, x, name)
            return out + w[f"{name}_bias"].astype(jnp.float32) if name in c.biased else out

        batch, count, _ = x.shape
        note("residual_in", x)
        h = self._norm(x, w["attn_norm"]) if c.pre_norm else x
        qkv = projected(h, "qkv").astype(self.dtype).reshape(batch, count, -1, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        if c.qk_norm is not None:
            q, k = self._norm_heads(q, w["q_norm"]), self._norm_heads(k, w["k_norm"])
        q = apply_rope(q, positions, *rope).astype(self.dtype)
        k = apply_rope(k, positions, *rope).astype(self.dtype)
        for name, heads in (("q", q), ("k", k), ("v", v)):
            note(name, heads)
        attended, state = attend(at, q, k, v, state)
        attn_out = projected(attended, "attn_out").astype(self.dtype)
        note("attended", attended)
        note("attention_out", attn_out)
        x = self._add(x, attn_out, w.get("attn_post_norm"))
        note("residual_mid", x)
        h = self._norm(x, w["mlp_norm"]) if c.pre_norm else x
        gate, up = jnp.split(projected(h, "gate_up").astype(self.dtype), 2, axis=-1)
        hidden = gated(gate, up, c.activation)
        down = projected(hidden, "down").astype(self.dtype)
        x = self._add(x, down, w.get("mlp_post_norm"))
        for name, value in (("hidden", hidden), ("ffw_out", down), ("residual_out", x)):
            note(name, value)
        return x, state

    def product(self, at: LayerAt, x: Array, name: str) -> Array:
        """The reference's `Product`: `x[..., in]` times a layer's matrix, float32 `[..., out]`.

        Whatever its format is: of a matrix without scales beside it, that in which it is given.
        """
        return self._multiplied(x, at.weights, name)

    def _multiplied(self, x: Array, w: dict[str, Array], name: str) -> Array:
        scale, format = w.get(f"{name}_scale"), self.config.weights.quantized.get(name)
        return _linear(x, w[name], self.dtype, scale=scale, format=format)

    def _norm(self, x: Array, weight: Array) -> Array:
        return rms_norm(x, weight, self.config.norm_eps, self.config.norm_offset)

    def _norm_heads(self, x: Array, weight: Array) -> Array:
        """Queries or keys `[B, T, heads, H]`, each head normed, or all heads as one vector."""
        if self.config.qk_norm == "head":
            return self._norm(x, weight)
        return self._norm(x.reshape(*x.shape[:2], -1), weight).reshape(x.shape)

    def _add(self, x: Array, block: Array, post_norm: Array | None) -> Array:
        """The stream `[B, T, D]`, a block's output added; float32."""
        if post_norm is not None:
            block = self._norm(block, post_norm)
        if self.config.residual_scale != 1:
            block = block.astype(jnp.float32) * self.config.residual_scale
        return x + block
