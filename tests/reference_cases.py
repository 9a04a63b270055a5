"""The models that the tests of the reference run: small, random, of sizes that share nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import LayerWeights, Weights

from ffjax.config import (
    LinearRopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from ffjax.model import Transformer

__all__ = [
    "CONFIGS",
    "DTYPES",
    "filled_model",
    "oracle_weights",
    "quick_jit",
    "random_model",
    "random_tokens",
]

DTYPES = ("float32", "bfloat16")

# Of the 7 frequencies of heads of 14, a context of 24 positions keeps one, interpolates one
# and stretches five.
_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=3.0, original_context=24)


def _config(**sizes) -> ModelConfig:
    """Prime sizes where possible: a swapped axis cannot hide."""
    defaults = {
        "vocab_size": 101,
        "num_layers": 3,
        "model_dim": 37,
        "ffw_dim": 53,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 14,
        "rope_theta": 300.0,
        # Far from a rounding error, so that a norm that leaves it out is found out.
        "norm_eps": 1e-2,
    }
    return ModelConfig(**(defaults | sizes))


CONFIGS: dict[str, ModelConfig] = {
    "grouped, untied": _config(),
    "grouped, tied, stretched rope": _config(tied_embeddings=True, rope_scaling=_SCALING),
    "every head its own": _config(num_heads=3, num_kv_heads=3, rope_scaling=_SCALING),
    "one key/value head for all, tied": _config(
        num_heads=5, num_kv_heads=1, head_dim=22, tied_embeddings=True
    ),
    # What the families differ in. Windows are shorter than the sequences of the tests, caps
    # smaller than many of what they hold back, scales exact in bfloat16 and far from 1.
    "every layer local": _config(window=4),
    "biases, the second layer local": _config(
        qkv_bias=True, window=3, window_pattern=(False, True), tied_embeddings=True
    ),
    "every bias": _config(qkv_bias=True, attn_out_bias=True, mlp_bias=True, post_norm=True),
    "heads normed": _config(qk_norm="head"),
    "norms after the blocks, projections normed": _config(
        qk_norm="full", pre_norm=False, post_norm=True
    ),
    "every scale": _config(
        embed_scale=3.25,
        residual_scale=0.375,
        attn_scale=0.5,
        logit_scale=0.2,
        tied_embeddings=True,
        num_heads=3,
        num_kv_heads=1,
    ),
    "caps, norms on both sides, GELU": _config(
        norm_offset=1.0,
        post_norm=True,
        activation="gelu_tanh",
        embed_scale=0.75,
        attn_softcap=1.25,
        logit_softcap=1.5,
        window=5,
        window_pattern=(True, False),
    ),
    # A quarter of every head is rotated, and made longer; by the factors of short texts.
    "part of a head rotated, LongRoPE": _config(
        rotary_pairs=2,
        rope_scaling=LongRopeScaling(
            short_factors=(1.5, 2.0),
            long_factors=(30.0, 4.0),
            original_context=30,
            attention_factor=1.75,
        ),
        window=5,
    ),
    "LongRoPE beyond its context": _config(
        rotary_pairs=6,
        rope_scaling=LongRopeScaling(
            short_factors=(1.0,) * 6,
            long_factors=(1.25, 2.0, 2.5, 3.0, 4.0, 5.0),
            original_context=1,
            attention_factor=0.8,
        ),
    ),
    "every second layer without positions, YaRN": _config(
        rope_pattern=(True, False),
        rope_theta=40.0,
        rope_scaling=YarnRopeScaling(
            factor=4.0, original_context=40, beta_fast=4.0, attention_factor=1.5
        ),
    ),
    "two ropes, one by YaRN, projections normed": _config(
        qk_norm="full",
        pre_norm=False,
        post_norm=True,
        rope_theta=40.0,
        rope_theta_local=40.0,
        rope_scaling=YarnRopeScaling(
            factor=4.0,
            original_context=40,
            beta_fast=4.0,
            beta_slow=0.5,
            truncate=False,
            attention_factor=0.75,
        ),
        window=4,
        window_pattern=(True, True, False),
    ),
    "two ropes, one stretched": _config(
        norm_offset=1.0,
        post_norm=True,
        qk_norm="head",
        rope_theta_local=40.0,
        rope_scaling=LinearRopeScaling(factor=3.0),
        window=4,
        window_pattern=(True, True, False),
    ),
}


def filled_model(config: ModelConfig, weights: dict[str, np.ndarray], dtype: str) -> Transformer:
    """A model of the weights given, by dotted path, rounded to dtype.

    Its own random ones are never drawn: that would take longer than the test.
    """
    skeleton = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(skeleton)
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    assert set(flat) == set(weights)
    filled = []
    for name, (path, leaf) in flat.items():
        assert leaf.shape == weights[name].shape, name
        filled.append((path, leaf.replace(jnp.asarray(weights[name], jnp.dtype(dtype)))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`nnx.jit` of a function of a model and arrays, for what runs once or twice.

    LLVM's optimisations would take longer than they save, and most of the tests' time.
    """

    @functools.partial(
        jax.jit,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    def jitted(graph, state, arguments):
        return function(nnx.merge(graph, state), *arguments)

    return lambda model, *arguments: jitted(*nnx.split(model), arguments)


@functools.cache
def random_model(
    name: str, dtype: str, seed: int = 0, config: tuple[tuple[str, Any], ...] = ()
) -> Transformer:
    """A model of one of CONFIGS, every weight random; `config` sets fields anew.

    Norms of ones would hide a norm mistaken for another. The embedding's rows are as large as
    what a layer adds to them: smaller ones would hide a residual that is left out.
    """
    c, rng = dataclasses.replace(CONFIGS[name], **dict(config)), np.random.default_rng(seed)
    queries, kvs = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm(*shape: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32) - np.float32(c.norm_offset)

    weights = {
        "embed": matrix(c.vocab_size, c.model_dim) * np.float32(np.sqrt(c.model_dim)),
        "layers.qkv": matrix(c.num_layers, queries + 2 * kvs, c.model_dim),
        "layers.attn_out": matrix(c.num_layers, c.model_dim, queries),
        "layers.gate_up": matrix(c.num_layers, 2 * c.ffw_dim, c.model_dim),
        "layers.down": matrix(c.num_layers, c.model_dim, c.ffw_dim),
        "final_norm": norm(c.model_dim),
    }
    if c.pre_norm:
        weights["layers.attn_norm"] = norm(c.num_layers, c.model_dim)
        weights["layers.mlp_norm"] = norm(c.num_layers, c.model_dim)
    if c.post_norm:
        weights["layers.attn_post_norm"] = norm(c.num_layers, c.model_dim)
        weights["layers.mlp_post_norm"] = norm(c.num_layers, c.model_dim)
    if c.qk_norm is not None:
        full = c.qk_norm == "full"
        weights["layers.q_norm"] = norm(c.num_layers, queries if full else c.head_dim)
        weights["layers.k_norm"] = norm(c.num_layers, kvs if full else c.head_dim)
    for name in sorted(c.biased):
        weights[f"layers.{name}_bias"] = norm(c.num_layers, c.matrices[name][0]) - np.float32(1)
    if not c.tied_embeddings:
        weights["head"] = matrix(c.vocab_size, c.model_dim)
    return filled_model(c, weights, dtype)


def random_tokens(config: ModelConfig, batch: int, count: int, seed: int = 5) -> np.ndarray:
    """Token ids, int32 `[B, T]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, (batch, count), dtype=np.int32)


def oracle_weights(model: Transformer) -> Weights:
    """The model's weights as the oracle takes them, not rounded."""
    c = model.config

    def f64(param: nnx.Param) -> np.ndarray:
        return np.asarray(param[...]).astype(np.float64)

    stacked = {n: f64(p) for n, p in vars(model.layers).items() if isinstance(p, nnx.Param)}
    queries, kvs = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    of_q, of_k, of_v = slice(queries), slice(queries, queries + kvs), slice(queries + kvs, None)
    unstacked = []
    for i in range(c.num_layers):
        w = {name: array[i] for name, array in stacked.items()}
        bias = w.get("qkv_bias")
        unstacked.append(
            LayerWeights(
                query=w["qkv"][of_q],
                key=w["qkv"][of_k],
                value=w["qkv"][of_v],
                output=w["attn_out"],
                gate=w["gate_up"][: c.ffw_dim],
                up=w["gate_up"][c.ffw_dim :],
                down=w["down"],
                attn_norm=w.get("attn_norm"),
                mlp_norm=w.get("mlp_norm"),
                attn_post_norm=w.get("attn_post_norm"),
                mlp_post_norm=w.get("mlp_post_norm"),
                query_bias=None if bias is None else bias[of_q],
                key_bias=None if bias is None else bias[of_k],
                value_bias=None if bias is None else bias[of_v],
                output_bias=w.get("attn_out_bias", 0.0),
                gate_bias=w["gate_up_bias"][: c.ffw_dim] if c.mlp_bias else 0.0,
                up_bias=w["gate_up_bias"][c.ffw_dim :] if c.mlp_bias else 0.0,
                down_bias=w.get("down_bias", 0.0),
                query_norm=w.get("q_norm"),
                key_norm=w.get("k_norm"),
            )
        )
    return Weights(
        embedding=f64(model.embed),
        layers=unstacked,
        final_norm=f64(model.final_norm),
        head=None if model.head is None else f64(model.head),
    )
