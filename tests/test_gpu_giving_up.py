"""A hand-over that never comes, on a GPU: who waited says which, the step ends, JAX lives on."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, filled_cache, random_model, random_tokens, small_config
from flax import nnx
from quantize_cases import kernel_config
from skipping import skipping
from stream_cases import FAMILIES

from ffjax.broken import NotFiniteError
from ffjax.config import ModelConfig
from ffjax.decode import default_device, fused_step
from ffjax.formats import INT8, WeightFormats
from ffjax.generation import generate
from ffjax.programs import forget_programs
from ffjax.streaming import stream
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream.faults import fault_of
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.tuning import tuning_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

DEEP = small_config(num_layers=6, model_dim=576, ffw_dim=1536, num_heads=9, num_kv_heads=3)
POST_NORM = small_config(**{**FAMILIES["olmo2"], "num_layers": 3})
# A down projection of so many inputs is split, of one sequence too.
SPLIT = small_config(ffw_dim=16384, num_layers=3)
SPLIT_INTEGERS = kernel_config(WeightFormats.of_layers(INT8), ffw_dim=4096, num_layers=3)
LONG = [1200, 700]  # positions: some KV splits a head

# The buffer, the layer, and a step that hands something over there.
CASES: dict[str, tuple[str, int, ModelConfig, list[int]]] = {
    **{
        f"{name} of {len(lengths)}": (name, 1, DEEP, lengths)
        for name in ("x_in", "qkv", "attn", "x_mid", "ffw")
        for lengths in ([40], [40, 0, 7])
    },
    "the first residual": ("x_in", 0, DEEP, [40]),
    "the last layer": ("ffw", 5, DEEP, [40, 7]),
    "the head's residual": ("x_head", 6, DEEP, [40]),
    "the head's residual of 2": ("x_head", 6, DEEP, [40, 7]),
    "best": ("best", 6, DEEP, [40]),
    "KV splits": ("parts", 2, DEEP, LONG),
    "a normed attention block": ("attn_block", 1, POST_NORM, [40, 7]),
    "a normed feed-forward block": ("ffw_block", 2, POST_NORM, [40]),
    "partial sums": ("partial", 1, SPLIT, [40]),
    "partial sums of 2": ("partial", 2, SPLIT_INTEGERS, [40, 7]),
}


def step_of(config: ModelConfig, graph):
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, cache, tokens):
        return fused_step(nnx.merge(graph, params), cache, tokens)

    return step


@pytest.mark.parametrize("name", CASES)
def test_a_hand_over_that_never_comes_is_named_and_jax_lives_on(name):
    buffer, layer, config, lengths = CASES[name]
    graph, params = nnx.split(random_model(config))
    tokens = random_tokens(config, len(lengths))

    def cache():
        return filled_cache(config, lengths, 2048)

    whole = step_of(config, graph)
    want = np.asarray(whole(params, cache(), tokens).logits)
    assert np.isfinite(want).all()
    tag = 1 if buffer == "x_head" else layer + 1
    with skipping(buffer, tag):
        out = step_of(config, graph)(params, cache(), tokens)
        record = np.asarray(out.cache.counters)
    dims = dims_of(config, len(lengths), 2048)
    gpu = Gpu.of(default_device())
    assert gpu is not None
    plan = make_stream_plan(dims, gpu, tuning_for(gpu.name, dims))
    layout = layout_of(plan)
    fault = fault_of(plan, record[layout.fault : layout.fault + 2], layout)
    assert fault is not None
    assert (fault.buffer.removesuffix("_copy"), fault.layer) == (buffer, layer), str(fault)
    assert fault.program < plan.programs
    # What depends on it is no number, the choice of a token shows it, and the check says why.
    with pytest.raises(NotFiniteError, match=re.escape(str(fault))):
        out.check(nnx.merge(graph, params))
    # Later steps end as well, and the record stays.
    again = whole(params, out.cache, jnp.maximum(out.token, 0))
    assert np.asarray(again.cache.counters)[layout.fault :][:2].tolist() == (
        record[layout.fault :][:2].tolist()
    )
    # With a fresh cache all is well.
    np.testing.assert_array_equal(whole(params, cache(), tokens).logits, want)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_generation_ends_with_what_is_missing(way):
    # As deep as no other case: a loop that is compiled already would lack nothing.
    config = dataclasses.replace(DEEP, num_layers=7 if way == "generate" else 5)
    model, prompts = random_model(config), [[1, 2, 3], [4, 5]]
    with skipping("ffw", 3), pytest.raises(NotFiniteError, match="layer 2: hidden activations"):
        if way == "generate":
            generate(model, prompts, 8, implementation="pallas")
        else:
            list(stream(model, prompts, 8, implementation="pallas"))
    forget_programs()
    jax.clear_caches()
    out = generate(model, prompts, 8, implementation="pallas")
    assert [len(tokens) for tokens in out.tokens] == [8, 8]
