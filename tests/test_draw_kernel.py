"""The kernel that draws, interpreted, takes the tokens that `sample` takes of filtered logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw_cases import DRAWS, check
from flax import nnx
from generate_cases import TINY

from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.sampling.draw import sequence_keys, words_of
from ffjax.sampling.params import SamplingParams
from pallas_kernels.draw import make_draw_plan
from pallas_kernels.draw.threefry import gumbel, random_bits
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.targets import target

pytestmark = pytest.mark.filterwarnings("error")


def test_its_noise_is_jaxs():
    key = sequence_keys(words_of(7, 1))[0]
    words = tuple(jax.random.key_data(key))
    index = jnp.arange(5000, dtype=jnp.uint32)
    with jax.threefry_partitionable(True):
        bits = jax.random.bits(key, (5000,), jnp.uint32)
        noise = jax.random.gumbel(key, (5000,), jnp.float32, mode="low")
    assert (random_bits(words, index) == bits).all()
    np.testing.assert_allclose(gumbel(words, index), noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("draws", DRAWS)
def test_it_takes_the_tokens_that_sampling_of_filtered_logits_takes(draws, batch):
    check(draws, batch, 700, INTERPRETER, seeds=4)


@pytest.mark.parametrize("name", ["h200", "a100", "l4", "rtx5090"])
def test_its_programs_are_all_on_the_device_at_once(name):
    gpu = target(name).gpu
    for batch in (1, 2, 5, 8):
        for vocab in (257, 32000, 49152, 128256, 262144):
            plan = make_draw_plan(batch, vocab, gpu)
            if plan is not None:
                assert plan.programs <= gpu.cores
                assert plan.parts * plan.width >= vocab
    assert make_draw_plan(8, 128256, target("h200").gpu) is not None


def test_a_generation_that_it_draws_is_the_one_that_xla_draws(monkeypatch):
    model = Transformer(TINY, rngs=nnx.Rngs(1), dtype=jnp.float32)
    params = [
        SamplingParams(temperature=1.0, top_k=20, top_p=0.8, seed=1),
        SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=2),
        SamplingParams(),
    ]
    prompts = [[1, 2, 3], [9] * 20, [250]]
    want = generate(model, prompts, 20, sampling=params).tokens
    monkeypatch.setattr("ffjax.loop.drawing_gpu", lambda *_: INTERPRETER)
    assert generate(model, prompts, 20, sampling=params).tokens == want
