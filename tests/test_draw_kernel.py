"""The kernel that draws, interpreted, takes the tokens that `sample` takes of filtered logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw_cases import DRAWS, check, check_penalties
from flax import nnx
from generate_cases import TINY

from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.sampling.draw import sequence_keys, words_of
from ffjax.sampling.params import SamplingParams
from pallas_kernels.draw import make_draw_plan
from pallas_kernels.draw.exchange import meeting_tag
from pallas_kernels.draw.mass import halves, mass_bits, masses, whole
from pallas_kernels.draw.threefry import folded, gumbel, random_bits
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.targets import target

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_its_noise_is_jaxs",
            "test_it_takes_the_tokens_that_sampling_of_filtered_logits_takes[all-3]",
            "test_masses_of_equal_logits_do_not_overflow",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


def test_its_noise_is_jaxs():
    key = sequence_keys(words_of(7, 1))[0]
    words = tuple(jax.random.key_data(key))
    index = jnp.arange(5000, dtype=jnp.uint32)
    with jax.threefry_partitionable(True):
        bits = jax.random.bits(key, (5000,), jnp.uint32)
        noise = jax.random.gumbel(key, (5000,), jnp.float32, mode="low")
    assert (random_bits(words, index) == bits).all()
    np.testing.assert_allclose(gumbel(words, index), noise, rtol=1e-6, atol=1e-6)
    later = jax.random.key_data(jax.random.fold_in(key, 12345))
    assert [int(word) for word in folded(words, jnp.uint32(12345))] == later.tolist()


@pytest.mark.drawn("Each filter, and each batch.")
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("draws", DRAWS)
def test_it_takes_the_tokens_that_sampling_of_filtered_logits_takes(draws, batch):
    check(draws, batch, 700, INTERPRETER, seeds=4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("draws", [None, "temperature", "all"])
def test_it_puts_the_penalties_on_logits_that_xla_does(draws, batch):
    check_penalties(draws, batch, 257 + 100 * batch, INTERPRETER, seeds=6)


@pytest.mark.parametrize("spread", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [700, 128256, 262144])
def test_masses_sum_up_to_probabilities_however_the_vocabulary_is_cut(vocab, spread):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=vocab).astype(np.float32) * spread
    bits = mass_bits(vocab)
    most = logits.max()
    mass = masses(logits, most, jnp.float32(0.8), jnp.arange(vocab, dtype=jnp.int32), bits)
    want = np.exp((logits.astype(np.float64) - most) / 0.8)
    sums = functools.partial(_sums, mass, bits)
    for part in (np.arange(vocab), np.argsort(-logits)[:50], rng.permutation(vocab)[: vocab // 2]):
        high, low = sums(part)
        assert max(high, low) < 2**31
        cut = [sums(one) for one in np.array_split(part, 7)]
        assert (sum(each[0] for each in cut), sum(each[1] for each in cut)) == (high, low)
        got = float(whole(jnp.int32(high), jnp.int32(low), bits))
        assert got == pytest.approx(want[part].sum(), rel=4e-6, abs=1e-5)


def _sums(mass, bits: int, part: np.ndarray) -> tuple[int, int]:
    """Of both halves of some tokens' masses."""
    high, low = (np.asarray(half).astype(np.int64).sum() for half in halves(mass[part], bits))
    return int(high), int(low)


def test_masses_of_equal_logits_do_not_overflow():
    vocab = 262144
    bits = mass_bits(vocab)
    ids = jnp.arange(vocab, dtype=jnp.int32)
    mass = masses(jnp.zeros(vocab), jnp.float32(0), jnp.float32(1), ids, bits)
    high, low = _sums(mass, bits, np.arange(vocab))
    assert max(high, low) < 2**31
    assert float(whole(jnp.int32(high), jnp.int32(low), bits)) == pytest.approx(vocab)


def test_a_word_of_another_meeting_is_not_taken_for_one_of_this():
    tags = [int(meeting_tag(jnp.int32(meeting))) for meeting in range(12)]
    assert all(0 < tag < 4 for tag in tags)  # zeros are nobody's
    # A buffer holds words of this meeting or of the one before the last.
    assert all(before != tag for before, tag in zip(tags, tags[2:], strict=False))


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
        SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=2, logprobs=2),
        SamplingParams(frequency_penalty=0.3),
    ]
    prompts = [[1, 2, 3], [9] * 20, [250]]
    before = generate(model, prompts, 20, sampling=params)
    want, told = before.tokens, before.logprobs[1]
    monkeypatch.setattr("ffjax.loop.drawing_gpu", lambda *_: INTERPRETER)
    out = generate(model, prompts, 20, sampling=params)
    assert out.tokens == want
    for one, other in zip(out.logprobs[1], told, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    # The keys of drafts and of what is kept of them are not those of one draw after another.
    how = {"sampling": params, "speculation": "lookup"}
    assert generate(model, prompts, 20, **how).tokens == want
