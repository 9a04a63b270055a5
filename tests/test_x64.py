"""With 64-bit types enabled, steps and generations compute what they compute without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import QUICK_COMPILE, filled_cache, random_model, random_tokens, small_config
from flax import nnx

from ffjax.decode import fused_step
from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.speculation.draft import Draft
from ffjax.streaming import stream

pytestmark = [
    pytest.mark.once(
        "A sample of generations; all steps.",
        sample=[
            "test_a_fused_step_is_the_same_to_the_bit",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


@pytest.mark.by_numpy
def test_a_fused_step_is_the_same_to_the_bit():
    config = small_config(num_layers=1)
    graph, params = nnx.split(random_model(config))
    inputs = filled_cache(config, [5, 0], 20), random_tokens(config, 2)

    def bare(params, cache, tokens):
        return fused_step(nnx.merge(graph, params), cache, tokens, interpret=True)

    step = jax.jit(bare, compiler_options=QUICK_COMPILE)
    mapped = jax.jit(jax.vmap(bare, (None, None, 0)), compiler_options=QUICK_COMPILE)
    want = step(params, *inputs)
    with jax.enable_x64(True):
        assert jnp.arange(2).dtype == jnp.int64  # they are enabled
        got = step(params, *inputs)
        several = mapped(params, inputs[0], inputs[1][None])
    for one, first, other in zip(*map(jax.tree.leaves, (got, several, want)), strict=True):
        assert one.dtype == first.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert np.asarray(first[0]).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_generation_has_the_same_tokens(temperature):
    config = small_config(num_layers=1)
    model = Transformer(config, rngs=nnx.Rngs(1), dtype=jnp.float32)
    options = {"temperature": temperature, "seed": 5, "stop_token": 3}
    want = generate(model, [[1, 2], [4]], 20, **options).tokens
    with jax.enable_x64(True):
        assert generate(model, [[1, 2], [4]], 20, **options).tokens == want
        for speculation in ("lookup", Draft(model)):
            drafted = generate(model, [[1, 2], [4]], 20, speculation=speculation, **options)
            assert drafted.tokens == want
        steps = stream(model, [[1, 2], [4]], 20, **options)
        assert list(steps)
        assert steps.output.tokens == want
