"""The sizes of one fused decode step, and the arrays it is given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "GROUP",
    "WORD_SHIFTS",
    "DecodeWeights",
    "Dims",
    "Features",
    "Grouping",
    "Stored",
    "WeightBits",
    "WeightGroups",
    "ceil_div",
    "next_power_of_2",
]

# Inputs of a row of int4 weights that share a scale, where nothing else is said.
GROUP = 128
# Where in a word each of its eight inputs begins, in bits: `ffjax.packing` says why.
WORD_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What a model's step does besides that of the Llama family; by default, nothing.

    Attributes:
        norm_offset: added to the weights of every RMSNorm.
        pre_norm: whether a block reads the normed residual.
        post_norm: whether a block's output is normed before it is added to the residual.
        qk_norm: RMSNorm of queries and keys before RoPE: "head", each by itself; "full", the
            whole projection at once; or None.
        qkv_bias: whether queries, keys and values have a bias.
        attn_out_bias: whether attention's output has one, after its projection.
        mlp_bias: whether the gate, the up and the down projection have one.
        activation: of the gate: "silu" or "gelu_tanh".
        embed_scale: multiplies a token's embedding; as rounded to the weights' dtype.
        residual_scale: multiplies a block's output before it is added to the residual.
        attn_scale: multiplies the products of queries and keys; None: 1/sqrt(H).
        logit_scale: multiplies the logits.
        attn_softcap: c, which makes scores c * tanh(score / c), or None.
        logit_softcap: the same of the logits, after logit_scale.
        window: positions that a query of a local layer sees, its own included, or None.
        local_layers: which of the L layers are local; empty without a window.
        other_rope: which of the L layers have rotary frequencies of their own; empty: none.
        rope_scale: multiplies cosines and sines, but not those of layers of `other_rope`.
        rotary_pairs: of a head's H/2 pairs, the first that it multiplies; None: all.
    """

    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attn_scale: float | None = None
    logit_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    other_rope: tuple[bool, ...] = ()
    rope_scale: float = 1.0
    rotary_pairs: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightBits:
    """Bits of a weight of each matrix: 16 (bfloat16), 8 or 4 (integers with scales).

    int8 matrices have a float32 scale a row; int4 ones, eight inputs an int32 word as
    `ffjax.packing` has them, a bfloat16 scale for every `GROUP` inputs of a row: unless
    `WeightGroups` says otherwise.
    """

    qkv: int = 16
    attn_out: int = 16
    gate_up: int = 16
    down: int = 16
    head: int = 16

    @property
    def quantized(self) -> bool:
        """Whether some matrix is."""
        return any(bits != 16 for bits in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """The groups of a quantized matrix whose scales are 16-bit numbers.

    An int4 integer n of 0 to 15 stands for s * (n - 8), or with an offset for s * (n - z) or
    s * n + m; an int8 one for s * n.

    Attributes:
        size: inputs of a row that share a scale: of int4 32, 64 or 128; of int8 32.
        scales: dtype of the scales, and of what stands beside them: "bfloat16" or "float16".
        offset: second number of a group, after its scale: "zero", z; "minimum", m; None: none.
    """

    size: int = GROUP
    scales: str = "bfloat16"
    offset: str | None = None

    @property
    def bytes(self) -> int:
        """Of a group's scale, and of what stands beside it."""
        return 2 if self.offset is None else 4


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a matrix is stored.

    Attributes:
        bits: of a weight: 16, 8 or 4.
        groups: of its scales; None where it has none, or a float32 scale a row.
    """

    bits: int
    groups: Grouping | None = None

    @property
    def fine(self) -> bool:
        """Whether its groups have fewer inputs than the threads of a row read side by side."""
        return self.groups is not None and (self.bits == 8 or self.groups.size < GROUP)

    def scale_bytes(self, inner: int) -> int:
        """Bytes of the scales of a row of so many inputs, and of what stands beside them."""
        if self.groups is not None:
            return self.groups.bytes * (inner // self.groups.size)
        return {16: 0, 8: 4}[self.bits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightGroups:
    """The groups of each quantized matrix. None: those that its bits have by themselves.

    These are of int4 `Grouping()`; int8 has none by itself, but a float32 scale a row.
    """

    qkv: Grouping | None = None
    attn_out: Grouping | None = None
    gate_up: Grouping | None = None
    down: Grouping | None = None
    head: Grouping | None = None


class DecodeWeights(NamedTuple):
    """The weights as the model stores them, and the rotary frequencies.

    A tied head is passed as the embedding once more: the same buffer. What a model does not
    have is None. Quantized matrices have the shapes of `ffjax.formats`: int8 ones their own, int4
    ones an eighth of the inputs; `WeightBits` says more.

    Attributes:
        embed: `[V, D]`.
        attn_norm: `[L, D]`.
        qkv: `[L, (N + 2K) * H, D]`.
        attn_out: `[L, D, N * H]`.
        mlp_norm: `[L, D]`.
        gate_up: `[L, 2F, D]`.
        down: `[L, D, F]`.
        final_norm: `[D]`.
        head: `[V, D]`.
        inv_freq: float32 `[H/2]`, radians a position.
        inv_freq_other: the same for the layers of `Features.other_rope`.
        qkv_bias: `[L, (N + 2K) * H]`.
        attn_out_bias: `[L, D]`.
        gate_up_bias: `[L, 2F]`.
        down_bias: `[L, D]`.
        q_norm: `[L, H]`, or `[L, N * H]` where the whole projection is normed at once.
        k_norm: `[L, H]` or `[L, K * H]`.
        attn_post_norm: `[L, D]`.
        mlp_post_norm: `[L, D]`.
        qkv_scale, attn_out_scale, gate_up_scale, down_scale, head_scale: of quantized matrices:
            `[L, out]`, `[L, out, in / group]` or `[L, out, in / group, 2]`; the head's without L.
    """

    embed: Array
    attn_norm: Array | None
    qkv: Array
    attn_out: Array
    mlp_norm: Array | None
    gate_up: Array
    down: Array
    final_norm: Array
    head: Array
    inv_freq: Array
    inv_freq_other: Array | None = None
    qkv_bias: Array | None = None
    attn_out_bias: Array | None = None
    gate_up_bias: Array | None = None
    down_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    attn_post_norm: Array | None = None
    mlp_post_norm: Array | None = None
    qkv_scale: Array | None = None
    attn_out_scale: Array | None = None
    gate_up_scale: Array | None = None
    down_scale: Array | None = None
    head_scale: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes known when the kernel is traced. Letters as in every shape of ffjax.

    Attributes:
        batch: B, the sequences of a step.
        tokens: T, of each sequence that a step takes.
        vocab_size: V.
        num_layers: L.
        model_dim: D.
        ffw_dim: F.
        num_heads: N, query heads.
        num_kv_heads: K.
        head_dim: H.
        capacity: S, cache slots a sequence.
        norm_eps: added to the mean square in RMSNorm.
        features: what the model does besides Llama.
        weight_bits: how the matrices are stored.
        weight_groups: how their scales are.
    """

    batch: int
    vocab_size: int
    num_layers: int
    model_dim: int
    ffw_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    norm_eps: float
    features: Features = Features()
    weight_bits: WeightBits = WeightBits()
    weight_groups: WeightGroups = WeightGroups()
    tokens: int = 1

    def stored(self, name: str) -> Stored:
        """How a matrix is stored: "qkv" and so on."""
        bits, groups = getattr(self.weight_bits, name), getattr(self.weight_groups, name)
        if bits == 4 and groups is None:
            groups = Grouping()
        return Stored(bits, None if bits == 16 else groups)

    @property
    def columns(self) -> int:
        """B * T, the tokens of a step: token t of sequence b has column b * T + t."""
        return self.batch * self.tokens

    @property
    def q_per_kv(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def queries(self) -> int:
        """T * G, the queries of a step that one key/value head of a sequence answers."""
        return self.tokens * self.q_per_kv

    @property
    def attn_dim(self) -> int:
        """N * H, the width of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """(N + 2K) * H, the rows of the fused projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def cache_elements(self) -> int:
        """Elements of the cache's keys, or values."""
        return self.num_layers * self.batch * self.num_kv_heads * self.capacity * self.head_dim

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of weights a step reads: each once, one embedding row a token."""
        weights = self.abstract_weights()._replace(embed=None, inv_freq=None, inv_freq_other=None)
        read = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weights))
        return read + 2 * self.columns * self.model_dim

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of bfloat16 keys and values a step reads for sequences of these lengths.

        Args:
            lengths: live positions of each sequence; a local layer reads its window's.
        """
        local = sum(self.features.local_layers)
        near = (self.features.window or 1) - 1  # the new position is not read
        positions = (self.num_layers - local) * sum(lengths)
        positions += local * sum(min(length, near) for length in lengths)
        return 2 * 2 * self.num_kv_heads * self.head_dim * positions

    def abstract_weights(self, dtype=jnp.bfloat16) -> DecodeWeights:
        """The weights' shapes and dtypes, for tracing without arrays.

        Args:
            dtype: of what is not quantized.
        """
        d, f, n_layers, features = self.model_dim, self.ffw_dim, self.num_layers, self.features
        full = features.qk_norm == "full"

        def spec(*shape: int, dtype=dtype, there: bool = True) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype) if there else None

        def norm(size: int, there: bool) -> Any:
            return spec(n_layers, size, there=there)

        def frequencies(there: bool) -> Any:
            return spec(self.head_dim // 2, dtype=jnp.float32, there=there)

        def matrix(name: str, *shape: int) -> dict[str, Any]:
            bits = getattr(self.weight_bits, name)
            *rows, inner = shape
            if bits == 16:
                return {name: spec(*shape)}
            integers = (*rows, inner // 8) if bits == 4 else shape
            made = {name: spec(*integers, dtype=jnp.int32 if bits == 4 else jnp.int8)}
            if (groups := self.stored(name).groups) is None:
                return made | {f"{name}_scale": spec(*rows, dtype=jnp.float32)}
            pair = () if groups.offset is None else (2,)
            scale = spec(*rows, inner // groups.size, *pair, dtype=jnp.dtype(groups.scales))
            return made | {f"{name}_scale": scale}

        normed = features.qk_norm is not None
        kv_dim = self.num_kv_heads * self.head_dim
        return DecodeWeights(
            embed=spec(self.vocab_size, d),
            attn_norm=norm(d, features.pre_norm),
            **matrix("qkv", n_layers, self.qkv_dim, d),
            **matrix("attn_out", n_layers, d, self.attn_dim),
            mlp_norm=norm(d, features.pre_norm),
            **matrix("gate_up", n_layers, 2 * f, d),
            **matrix("down", n_layers, d, f),
            final_norm=spec(d),
            **matrix("head", self.vocab_size, d),
            inv_freq=frequencies(True),
            inv_freq_other=frequencies(bool(features.other_rope)),
            qkv_bias=norm(self.qkv_dim, features.qkv_bias),
            attn_out_bias=norm(d, features.attn_out_bias),
            gate_up_bias=norm(2 * f, features.mlp_bias),
            down_bias=norm(d, features.mlp_bias),
            q_norm=norm(self.attn_dim if full else self.head_dim, normed),
            k_norm=norm(kv_dim if full else self.head_dim, normed),
            attn_post_norm=norm(d, features.post_norm),
            mlp_post_norm=norm(d, features.post_norm),
        )
