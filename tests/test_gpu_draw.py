"""Drawing on a GPU: the tokens that XLA draws, whoever runs beside; and log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draw_cases import DRAWS, check, check_penalties
from live_cases import KINDS, Request, prompt, serve
from logprob_cases import check_likeliest, check_log_probs

from ffjax.benchmark.inputs import random_model
from ffjax.config import ModelConfig
from ffjax.generation import generate
from ffjax.live import LiveBatch
from ffjax.sampling.params import SamplingParams
from pallas_kernels.gpu import Gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("error", "ignore:The Pallas Triton backend:DeprecationWarning"),
]

CONFIG = ModelConfig(
    name="narrow",
    vocab_size=4096,
    num_layers=12,
    model_dim=576,
    ffw_dim=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_context=2048,
)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("vocab", [257, 49152, 128256])
@pytest.mark.parametrize("draws", DRAWS)
def test_it_takes_the_tokens_that_xla_takes(draws, vocab, batch):
    gpu = Gpu.of(jax.devices()[0])
    assert gpu is not None
    check(draws, batch, vocab, gpu, seeds=8)


def test_a_large_vocabulary_and_many_launches():
    gpu = Gpu.of(jax.devices()[0])
    assert gpu is not None
    check("all", 8, 262144, gpu, seeds=200)


@pytest.mark.parametrize(("batch", "vocab"), [(1, 128256), (3, 257), (8, 49152)])
@pytest.mark.parametrize("draws", [None, "temperature", "all"])
def test_it_puts_the_penalties_on_logits_that_xla_does(draws, batch, vocab):
    gpu = Gpu.of(jax.devices()[0])
    assert gpu is not None
    check_penalties(draws, batch, vocab, gpu, seeds=8)


@pytest.mark.parametrize(("vocab", "best"), [(41, 20), (49152, 0), (128256, 5), (262144, 20)])
def test_the_kernel_tells_log_probabilities_of_every_row(vocab, best):
    gpu = Gpu.of(jax.devices()[0])
    assert gpu is not None
    check_log_probs(vocab, best, gpu)


def test_log_probabilities_are_those_that_xla_tells(model, monkeypatch):
    """Of a whole generation, with penalties; of greedy and drawn tokens."""
    params = [
        SamplingParams(logprobs=5),
        SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.2, logprobs=3, seed=1),
        SamplingParams(frequency_penalty=0.4, logprobs=0),
    ]
    prompts = [[5, 6, 7], [9] * 90, [300, 200, 100]]
    first = generate(model, prompts, 60, sampling=params)
    monkeypatch.setattr("ffjax.sampling.rows.DRAW_BY_KERNEL", False)
    second = generate(model, prompts, 60, sampling=params)
    assert first.tokens == second.tokens
    for mine, theirs in zip(first.logprobs, second.logprobs, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(("vocab", "best"), [(128256, 5), (128256, 20), (49152, 5)])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocab, best):
    check_likeliest(vocab, best)


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    monkeypatch.setattr("ffjax.sampling.rows.DRAW_BY_KERNEL", True)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def test_two_generations_draw_the_same_bits(model):
    params = [SamplingParams(temperature=1.0, top_k=40, top_p=0.9, seed=i) for i in range(4)]
    prompts = [[5, 6, 7], [9] * 90, [1], [300, 200, 100]]
    first, second = (generate(model, prompts, 200, sampling=params).tokens for _ in range(2))
    assert first == second
    assert len({tuple(row) for row in first}) == 4


def test_a_sequence_gets_the_same_whoever_comes_and_goes_beside_it(model):
    """Requests of every kind, served twice in opposite orders."""
    vocab = model.config.vocab_size

    def requests():
        lengths = [1, 40, 333, 7, 128, 90, 17, 511, 64, 200]
        return [
            Request(prompt(n, i, vocab), SamplingParams(**kind, seed=i), 20 + 7 * i)
            for i, (n, kind) in enumerate(zip(lengths, [*KINDS.values()] * 2, strict=False))
        ]

    batch = LiveBatch(model, 4, 1024, max_logprobs=3, chunk=128)
    first, second = requests(), requests()
    serve(batch, first)
    serve(batch, second[::-1])
    assert [one.answer for one in first] == [one.answer for one in second]
    assert batch.implementation == "pallas"
    assert batch.prefill_implementation == "pallas"


def test_a_live_batch_gives_what_the_reference_finds_likeliest(model):
    vocab = model.config.vocab_size
    one = [Request(prompt(n, n, vocab), SamplingParams(), 40) for n in (3, 150, 600)]
    serve(LiveBatch(model, 2, 1024, chunk=128), one)
    for request in one:
        tokens = jnp.array([request.tokens + request.answer])
        logits = np.asarray(model(tokens), np.float32)[0, len(request.tokens) - 1 : -1]
        chosen = logits[np.arange(40), request.answer]
        assert (logits.max(-1) - chosen).max() < 0.05 * logits.std()
