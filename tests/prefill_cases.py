"""Prompts and models for the packed prefill, and the comparison with the reference's."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_cases import small_config
from flax import nnx
from numerics import assert_close
from quantize_cases import FOR_KERNELS, GROUPED, kernel_config
from stream_cases import FAMILIES

from ffjax.cache import KVCache
from ffjax.config import ModelConfig
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.prefill.packed import PackedPrefill
from ffjax.prefill.padded import PaddedPrefill
from ffjax.prefill.stepwise import StepwisePrefill, step_tokens
from ffjax.sampling.draw import words_of
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, rows_of

__all__ = ["CONFIGS", "Fed", "check", "fed", "model_of", "prompts_of"]

CONFIGS: dict[str, ModelConfig] = {
    "llama": small_config(),
    "one query head a key head": small_config(num_heads=2, num_kv_heads=2),
    "heads of 24": small_config(head_dim=24, num_heads=3, num_kv_heads=1),
    **{name: small_config(**fields) for name, fields in FAMILIES.items()},
    "int8": kernel_config(FOR_KERNELS["int8 and its head"]),
    "int4": kernel_config(FOR_KERNELS["int4 and its head"]),
    "mixed": kernel_config(FOR_KERNELS["mixed"]),
    "small groups": kernel_config(
        WeightFormats(qkv=int4(32), attn_out=int4(64), gate_up=INT8, down=int4(32))
    ),
    **{name: kernel_config(formats) for name, formats in GROUPED.items()},
    "int8 and a bias": dataclasses.replace(
        kernel_config(WeightFormats.of_layers(INT8)), qkv_bias=True
    ),
}


@functools.cache
def model_of(name: str, dtype: str) -> Transformer:
    model = Transformer(CONFIGS[name], rngs=nnx.Rngs(3), dtype=jnp.dtype(dtype))
    for name in sorted(model.config.biased):
        bias = getattr(model.layers, f"{name}_bias")
        bias[...] = jax.random.normal(jax.random.key(5), bias.shape, bias.dtype)
    return model


def prompts_of(config: ModelConfig, lengths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(len(lengths))
    return tuple(rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths)


@dataclasses.dataclass(frozen=True)
class Fed:
    """What a prefill left behind."""

    cache: KVCache
    token: list[int]
    temp_bytes: int

    def live(self, name: str) -> np.ndarray:
        """Keys or values of live positions, `[L, positions of all sequences, K, H]`."""
        kept = np.asarray(getattr(self.cache, name).astype(jnp.float32))
        lengths = np.asarray(self.cache.lengths)
        rows = [kept[:, b, :, :n].swapaxes(1, 2) for b, n in enumerate(lengths)]
        return np.concatenate(rows, axis=1)


def fed(
    kind: type[PackedPrefill] | type[PaddedPrefill] | type[StepwisePrefill],
    model: Transformer,
    prompts: tuple[np.ndarray, ...],
    capacity: int,
    fill: float = 0.0,
    **sampling: Any,
) -> Fed:
    """Feeds prompts into a cache whose slots hold `fill`."""
    batch = len(prompts)
    params = [SamplingParams(temperature=sampling.get("temperature", 0))] * batch
    seeds, stages = words_of(sampling.get("seed", 0), batch), Stages.of(params)
    rows = rows_of(params, [()] * batch, seeds, stages)
    ended = jnp.full((batch, model.config.model_dim), fill, jnp.float32)
    prefill = kind(Parts.of(model), prompts, capacity, rows, stages, ended)
    tokens = step_tokens(batch) if kind is StepwisePrefill else 1
    cache = KVCache.create(model.config, batch, capacity, model.dtype, tokens=tokens)
    full = (jnp.full_like(kept, fill) for kept in (cache.k, cache.v))
    cache = dataclasses.replace(cache, **dict(zip(("k", "v"), full, strict=True)))
    prefill.compile(cache, None)
    cache, _, choice = prefill.run(cache, None)
    return Fed(cache, choice.told.tolist(), prefill.temp_bytes)


def check(name: str, dtype: str, lengths: tuple[int, ...], capacity: int) -> tuple[Fed, Fed]:
    """Compares the packed prefill with the reference's, on a cache of NaN."""
    model = model_of(name, dtype)
    prompts = prompts_of(model.config, lengths)
    got = fed(PackedPrefill, model, prompts, capacity, fill=np.nan)
    want = fed(PaddedPrefill, model, prompts, capacity)
    assert got.cache.lengths.tolist() == list(lengths) == want.cache.lengths.tolist()
    deep = "_deep" if dtype == "bfloat16" and model.config.num_layers > 4 else ""
    for kept in ("k", "v"):
        assert_close(got.live(kept), want.live(kept), f"packed_vs_padded_{dtype}{deep}")
        # Nothing is written that nobody asked for.
        written = np.isfinite(np.asarray(getattr(got.cache, kept).astype(jnp.float32)))
        slots = np.arange(capacity) < np.array(lengths)[:, None]
        assert (written == slots[None, :, None, :, None]).all()
    return got, want
