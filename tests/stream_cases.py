"""What the tests of the fused kernel share: plans, steps of one program and of several."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode_cases import QUICK_COMPILE, dims_of, kernel_inputs, small_config
from numerics import assert_close
from step_cases import bits, newest, untouched

from ffjax.cache import KVCache
from ffjax.config import LongRopeScaling, YarnRopeScaling, preset
from ffjax.decode import DecodeOutput
from pallas_kernels.dims import Dims, Grouping, WeightBits, WeightGroups
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.launch import StepState
from pallas_kernels.stream import stages
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange import Exchange
from pallas_kernels.stream.launch import layout_of, stream_step
from pallas_kernels.stream.plan import StreamPlan
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import Tuning

__all__ = [
    "BFLOAT16",
    "FAMILIES",
    "H200",
    "INT4",
    "INT8",
    "PLANS",
    "WINDOW",
    "check",
    "check_several",
    "env_of",
    "in_groups",
    "machine",
    "preset_dims",
    "run_stages",
    "stream",
    "streamed",
]

H200 = Gpu.named("H200", "9.0", 132)
RTX = Gpu.named("RTX 4090", "8.9", 128)
BFLOAT16, INT8, INT4 = (
    WeightBits(**dict.fromkeys(("qkv", "attn_out", "gate_up", "down", "head"), bits))
    for bits in (16, 8, 4)
)


def machine(programs: int) -> Gpu:
    return Gpu.named("made up", "9.0", programs)


def preset_dims(name: str, batch: int, bits: WeightBits = BFLOAT16) -> Dims:
    return dataclasses.replace(dims_of(preset(name), batch, 1024), weight_bits=bits)


def in_groups(dims: Dims, size: int, offset: str | None = None) -> Dims:
    """The same sizes, all matrices in groups with float16 scales."""
    grouping = Grouping(size=size, scales="float16", offset=offset)
    groups = WeightGroups(**dict.fromkeys(dataclasses.asdict(dims.weight_bits), grouping))
    return dataclasses.replace(dims, weight_groups=groups)


def env_of(plan: StreamPlan, program: int) -> StreamEnv:
    """Enough of an environment to ask where tiles stand."""
    nothing: Any = None
    return StreamEnv(
        plan=plan,
        refs={},
        program=jnp.int32(program),
        lengths=(),
        interpret=True,
        step=jnp.int32(0),
        exchange=Exchange(nothing, layout_of(plan), True, plan.threads),
        shared=nothing,
    )


PLANS = {
    "1B on an H200": lambda: make_stream_plan(preset_dims("llama3.2-1b", 1), H200),
    "8B on an H200": lambda: make_stream_plan(preset_dims("llama3.1-8b", 1), H200),
    "8B on an H200, 2 sequences": lambda: make_stream_plan(preset_dims("llama3.1-8b", 2), H200),
    "3B, tiles of 8 KiB": lambda: make_stream_plan(
        preset_dims("llama3.2-3b", 1), H200, Tuning(tile_bytes=8192)
    ),
    "attention wider than the model": lambda: make_stream_plan(
        preset_dims("qwen3-0.6b", 1), H200, Tuning(tile_bytes=16384)
    ),
    "odd sizes, 7 programs": lambda: make_stream_plan(
        dims_of(small_config(ffw_dim=2320), 3, 64), machine(7)
    ),
    "a group of the down projection in 4 tiles": lambda: make_stream_plan(
        dims_of(small_config(ffw_dim=2064), 1, 64), machine(4)
    ),
    "odd sizes, 1 program": lambda: make_stream_plan(dims_of(small_config(), 1, 64), INTERPRETER),
    "the shipped model": lambda: make_stream_plan(preset_dims("python-bytes-3m", 1), H200),
    "1B, int8": lambda: make_stream_plan(preset_dims("llama3.2-1b", 1, INT8), H200),
    "8B, int4": lambda: make_stream_plan(preset_dims("llama3.1-8b", 1, INT4), H200),
    "8B, int4, 2 sequences": lambda: make_stream_plan(preset_dims("llama3.1-8b", 2, INT4), H200),
    "1B, int4, 8 sequences": lambda: make_stream_plan(preset_dims("llama3.2-1b", 8, INT4), H200),
    "8B, int8, 8 sequences": lambda: make_stream_plan(preset_dims("llama3.1-8b", 8, INT8), H200),
    "8B, int8, on an RTX 4090": lambda: make_stream_plan(preset_dims("llama3.1-8b", 1, INT8), RTX),
    "8B, int8 in tiles of 8 KiB": lambda: make_stream_plan(
        preset_dims("llama3.1-8b", 1, INT8), H200, Tuning(tile_bytes=8192)
    ),
    "8B, int4 in groups of 32": lambda: make_stream_plan(
        in_groups(preset_dims("llama3.1-8b", 1, INT4), 32), H200
    ),
    "1B, int8 in groups of 32, on an RTX 4090": lambda: make_stream_plan(
        in_groups(preset_dims("llama3.2-1b", 1, INT8), 32), RTX
    ),
    "mixed, groups of the down projection in several tiles": lambda: make_stream_plan(
        preset_dims("qwen2.5-1.5b", 2, WeightBits(qkv=8, attn_out=4, down=8, head=4)), H200
    ),
    "int4 rows that are split, 7 programs": lambda: make_stream_plan(
        dataclasses.replace(
            dims_of(small_config(model_dim=256, ffw_dim=2432), 3, 64), weight_bits=INT4
        ),
        machine(7),
    ),
}


@functools.lru_cache
def stream(plan: StreamPlan):
    run = functools.partial(stream_step, plan, interpret=True)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


def streamed(model, cache: KVCache, tokens, tuning: Tuning | None = None):
    """A step of tokens `[B]`, or `[B, T]`."""
    each = tokens[0].size
    dims = dims_of(model.config, cache.batch, cache.capacity, each)
    plan = make_stream_plan(dims, INTERPRETER, tuning or Tuning())
    weights, state = kernel_inputs(model, cache, each)
    logits, token, state, _ = stream(plan)(weights, state, tokens.reshape(-1))
    return _like(tokens, logits, token, cache, state)


def _like(tokens, logits, token, cache: KVCache, state: StepState):
    """What a step makes, of the tokens' shape."""
    made = state._asdict()
    if tokens.ndim == 2:
        made["wide_counters"] = made.pop("counters")
    logits, token = logits.reshape(*tokens.shape, -1), token.reshape(tokens.shape)
    return logits, token, dataclasses.replace(cache, **made)


def check(config, got, want, lengths):
    logits, token, cache = got
    assert_close(logits, want.logits, "fused_vs_model")
    assert_close(newest(cache), newest(want.cache), "fused_vs_model")
    assert bits(untouched(cache)) == bits(untouched(want.cache))
    assert token.tolist() == np.argmax(logits, axis=-1).tolist()
    assert cache.lengths.tolist() == [n + 1 for n in lengths]


def check_several(got: DecodeOutput, want: DecodeOutput, before: KVCache, tokens: int):
    """The same of steps of several tokens, from a cache on."""
    assert_close(got.logits, want.logits, "fused_vs_model")
    assert got.token.tolist() == np.argmax(got.logits, axis=-1).tolist()
    caches = before, got.cache, want.cache
    (_, old), (new, others), (wanted, _) = (_parted(x, before.lengths, tokens) for x in caches)
    assert_close(new, wanted, "fused_vs_model")
    assert bits(others) == bits(old)
    assert got.cache.lengths.tolist() == want.cache.lengths.tolist()


def _parted(cache: KVCache, lengths: jax.Array, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the new positions, as far as there are slots; and of the others."""
    both = np.stack([np.asarray(x.astype(jnp.float32)) for x in (cache.k, cache.v)])
    slot = np.arange(cache.capacity) - np.asarray(lengths)[:, None]  # [B, S]
    new = ((slot >= 0) & (slot < tokens))[:, None, :, None]
    rows = both.transpose(2, 4, 0, 1, 3, 5)[new[:, 0, :, 0]]
    return rows, np.where(new, 0, both)


# A window of 40 positions; lengths at its edge, and where the query of a local layer sees
# less than the cache holds.
WINDOW = [39, 40, 100]
FAMILIES = {
    "mistral": {"window": 40},
    "qwen2": {"qkv_bias": True, "num_heads": 4, "num_kv_heads": 2},
    "qwen3": {"qk_norm": "head", "num_heads": 4, "num_kv_heads": 2},
    "olmo2": {
        "qk_norm": "full",
        "pre_norm": False,
        "post_norm": True,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "granite": {
        "embed_scale": 3.0,
        "residual_scale": 0.6,
        "attn_scale": 0.6,
        "logit_scale": 0.125,
    },
    "gemma2": {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": "gelu_tanh",
        "attn_softcap": 2.0,
        "logit_softcap": 3.0,
        "window": 40,
        "window_pattern": (True, False),
        "embed_scale": 2.02,  # rounded to bfloat16
        "attn_scale": 0.6,
    },
    "gemma3": {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": "gelu_tanh",
        "qk_norm": "head",
        "window": 40,
        "window_pattern": (True, True, False),
        "num_layers": 3,
        "rope_theta_local": 100.0,
    },
    # A cache of more than 16 slots takes the long factors.
    "phi3": {
        "rotary_pairs": 10,
        "rope_scaling": LongRopeScaling(
            short_factors=(1.0,) * 10,
            long_factors=tuple(1 + i / 2 for i in range(10)),
            original_context=16,
            attention_factor=1.3,
        ),
    },
    "granite_code": {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True},
    "smollm3": {"rope_pattern": (True, True, True, False), "num_layers": 8},
    "olmo3": {
        "qk_norm": "full",
        "pre_norm": False,
        "post_norm": True,
        "window": 40,
        "window_pattern": (True, True, True, False),
        "num_layers": 8,
        "rope_theta_local": 10_000.0,
        "rope_scaling": YarnRopeScaling(factor=8.0, original_context=64, attention_factor=1.3),
        "num_heads": 4,
        "num_kv_heads": 2,
    },
}


def run_stages(plan: StreamPlan, model, cache: KVCache, tokens):
    """A step of several programs: one launch a stage, so that nobody has to wait."""
    weights, state = kernel_inputs(model, cache, plan.dims.tokens)
    made = stages.run_stages(plan, weights, state, tokens.reshape(-1))
    return _like(tokens, made.logits, made.token, cache, made.state)
