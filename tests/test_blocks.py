"""How many steps a block has, and that nobody's tokens depend on it."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from generate_cases import TINY
from live_cases import Request, serve
from speculation_cases import CIRCLE, SAMPLINGS, STRAIGHT, float32_model

import ffjax
from ffjax.blocks import BLOCK, block_steps
from ffjax.config import preset
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.generation import generate
from ffjax.live import LiveBatch
from ffjax.model import Transformer
from ffjax.quantization import quantized_config
from ffjax.sampling.params import SamplingParams
from ffjax.streaming import stream

pytestmark = [
    pytest.mark.once("Blocks are cut by Python; what JAX makes of one is tested with 8 steps."),
    pytest.mark.filterwarnings("error"),
]

INT4 = WeightFormats.of_layers(int4(), INT8)


def device(capability: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        platform="gpu", compute_capability=capability, device_kind="a GPU", core_count=100
    )


@pytest.mark.parametrize(
    ("name", "formats", "capability", "steps"),
    [
        ("llama3.2-1b", None, "9.0", 8),
        ("llama3.2-1b", INT4, "9.0", 8),
        ("llama3.2-3b", None, "9.0", 4),
        ("llama3.1-8b", None, "9.0", 2),
        ("llama3.1-8b", INT4, "9.0", 4),
        ("llama3.1-70b", INT4, "9.0", 1),
        ("llama3.2-1b", None, "8.0", 4),
        ("llama3.1-8b", INT4, "8.9", 1),
        ("python-bytes-3m", None, "8.9", 8),
        ("smollm2-135m", None, "9.0", 8),
    ],
)
def test_a_block_takes_milliseconds(name, formats, capability, steps):
    """By the time to read the weights: on an H200, 8B takes 3.6 ms a step, and 70B in int4 9."""
    config = preset(name)
    if formats is not None:
        config = quantized_config(config, formats)
    for batch in (1, 8):
        assert block_steps(config, batch, device(capability), "pallas") == steps
    # The reference's steps have more in common, which XLA may compute once a block.
    assert block_steps(config, 1, device(capability), "xla") == BLOCK
    assert block_steps(config, 1, jax.devices("cpu")[0], "pallas") == BLOCK


@pytest.fixture(scope="module")
def model() -> Transformer:
    return float32_model()


def cut_blocks(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Has blocks so many steps from now on."""
    for module in ("ffjax.loop", "ffjax.live.batch"):
        monkeypatch.setattr(f"{module}.block_steps", lambda *_: steps)


def whole_blocks(count: int, steps: int) -> int:
    return -(-count // steps) * steps


@pytest.mark.drawn("Each length of a block, and every stage.")
@pytest.mark.drawn("Each length of a block, and every stage.")
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", [None, "all", "log-probabilities"])
def test_tokens_are_those_of_longer_blocks(model, name, steps, monkeypatch):
    how: dict[str, Any] = {} if name is None else {"sampling": SAMPLINGS[name]}
    prompts = [STRAIGHT, CIRCLE]
    want = generate(model, prompts, 2 * BLOCK + 2, **how)
    cut_blocks(monkeypatch, steps)
    got = generate(model, prompts, 2 * BLOCK + 2, **how)
    assert (got.tokens, got.finish_reasons) == (want.tokens, want.finish_reasons)
    assert got.steps == whole_blocks(2 * BLOCK + 1, steps)
    for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [at for at, _ in one.top] == [at for at, _ in other.top]
    streamed = zip(*stream(model, prompts, 2 * BLOCK + 2, **how), strict=True)
    assert [[one for one in row if one is not None] for row in streamed] == want.tokens


@pytest.mark.parametrize("steps", [1, 4])
def test_tokens_with_speculation_are_those_of_longer_blocks(model, steps, monkeypatch):
    how = {"temperature": 0.2, "seed": [4, 5]}
    want = generate(model, [CIRCLE, STRAIGHT], 4 * BLOCK, **how)
    cut_blocks(monkeypatch, steps)
    for speculation in (ffjax.Lookup(tokens=4), ffjax.Draft(model, 3)):
        got = generate(model, [CIRCLE, STRAIGHT], 4 * BLOCK, **how, speculation=speculation)
        assert got.tokens == want.tokens
        assert got.accepted is not None and sum(got.accepted) > 0


def test_an_early_end_costs_a_shorter_block(model, monkeypatch):
    """A block that is ordered ahead runs in vain: of 2 steps here, not of 8."""
    how = {"temperature": 2.0, "seed": 3}
    [tokens] = generate(model, [STRAIGHT], 30, **how).tokens
    at = next(i for i in range(9, 30) if tokens[i] not in tokens[:i])
    ordered = {}
    for steps in (2, BLOCK):
        cut_blocks(monkeypatch, steps)
        out = generate(model, [STRAIGHT], 100, **how, stop_token=tokens[at])
        assert out.tokens == [tokens[:at]]
        ordered[steps] = out.steps
    assert ordered == {steps: whole_blocks(at, steps) for steps in (2, BLOCK)}


@pytest.mark.parametrize("steps", [1, 4])
def test_sequences_that_come_and_go_get_what_they_get_alone(steps, monkeypatch):
    cut_blocks(monkeypatch, steps)
    config = dataclasses.replace(TINY, vocab_size=53, num_layers=2)
    model = Transformer(config, rngs=nnx.Rngs(1), dtype=jnp.float32)
    live = LiveBatch(model, 2, 120, chunk=32)
    assert live.block == steps
    kinds = [{}, {"temperature": 0.9}, {"repetition_penalty": 1.2}]
    requests = [
        Request([(7 * i + j) % 53 for j in range(5 + 9 * i)], SamplingParams(**kind, seed=i), 11)
        for i, kind in enumerate([*kinds, {}])
    ]
    serve(live, requests)
    for one in requests:
        alone = generate(model, one.tokens, one.count, sampling=one.params)
        assert one.answer == alone.tokens[0]
