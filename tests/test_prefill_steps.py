"""Short prompts by steps of several tokens, with the reference's step in the kernel's place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close
from prefill_cases import fed, model_of, prompts_of

from ffjax.cache import KVCache
from ffjax.decode import default_device, reference_step
from ffjax.generation import generate
from ffjax.live import LiveBatch
from ffjax.parts import Parts
from ffjax.prefill import choice, stepwise
from ffjax.prefill.choice import resolve_prefill, resolve_prefill_of
from ffjax.prefill.padded import PaddedPrefill
from ffjax.prefill.stepwise import StepwisePrefill, step_tokens
from ffjax.programs import Programs
from ffjax.sampling.draw import words_of
from ffjax.sampling.history import History
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, rows_of

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_it_leaves_what_the_references_prefill_leaves[lengths3]",
            "test_who_cannot_have_it_is_told",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


@pytest.fixture
def reference(monkeypatch):
    """Programs know nothing of what is patched: none is kept."""

    def step(model, cache, tokens, live, *, implementation):
        assert implementation == "pallas"
        return reference_step(model, cache, tokens, live)

    monkeypatch.setattr(stepwise, "decode_step", step)
    stepwise._programs.cache_clear()
    yield
    stepwise._programs.cache_clear()


@pytest.mark.drawn(
    "One sequence, two, and four of different lengths.",
    sample=[
        "test_it_leaves_what_the_references_prefill_leaves[lengths1]",
        "test_it_leaves_what_the_references_prefill_leaves[lengths3]",
        "test_it_leaves_what_the_references_prefill_leaves[lengths6]",
    ],
)
@pytest.mark.parametrize("lengths", [(1,), (8,), (17,), (5, 4), (1, 9), (2, 1, 5), (3, 1, 2, 2)])
@pytest.mark.usefixtures("reference")
def test_it_leaves_what_the_references_prefill_leaves(lengths):
    model = model_of("llama", "float32")
    prompts = prompts_of(model.config, lengths)
    got = fed(StepwisePrefill, model, prompts, 32, temperature=1.0, seed=3)
    want = fed(PaddedPrefill, model, prompts, 32, temperature=1.0, seed=3)
    assert got.token == want.token
    assert got.cache.lengths.tolist() == list(lengths)
    for kept in ("k", "v"):
        assert_close(got.live(kept), want.live(kept), "packed_vs_padded_float32")


@pytest.mark.usefixtures("reference")
def test_what_was_said_is_remembered():
    model = model_of("llama", "float32")
    config, prompts = model.config, prompts_of(model.config, (9, 3))
    params = [SamplingParams(frequency_penalty=1.5)] * 2
    stages = Stages.of(params)
    rows = rows_of(params, [()] * 2, words_of(0, 2), stages)
    ended = []
    for kind in (StepwisePrefill, PaddedPrefill):
        last = np.zeros((2, config.model_dim), np.float32)
        prefill = kind(Parts.of(model), prompts, 32, rows, stages, jnp.asarray(last))
        cache = KVCache.create(config, 2, 32, model.dtype)
        history = History.empty(2, config.vocab_size)
        prefill.compile(cache, history)
        _, history, _ = prefill.run(cache, history)
        ended.append([np.asarray(x).tolist() for x in jax.tree.leaves(history)])
    assert ended[0] == ended[1]


@pytest.mark.usefixtures("reference")
def test_the_first_token_takes_one_array_and_one_program(monkeypatch):
    model, prompt = model_of("llama", "float32"), [3] * 11
    monkeypatch.setattr(choice, "why_not_fused_config", lambda *_: None)
    events: list[Any] = []

    def told(event, function):
        def call(*args):
            sent = [x for x in jax.tree.leaves(args) if isinstance(x, np.ndarray)]
            events.append((event, len(sent)))
            return function(*args)

        return call

    def get(self, *args, **static):
        return told(self._function.__name__, found(self, *args, **static))

    found = Programs.get
    monkeypatch.setattr(Programs, "get", get)
    monkeypatch.setattr(jax, "device_put", told("put", jax.device_put))
    how: Any = {"implementation": "xla", "prefill": "steps"}
    generate(model, prompt, 1, **how)  # compiles
    for sampling in (None, SamplingParams(temperature=0.5, top_p=0.9, seed=2)):
        events.clear()
        alone = generate(model, prompt, 1, sampling=sampling, **how)
        assert events == [("_feed_and_choose", 1)]
        events.clear()
        longer = generate(model, prompt, 2, sampling=sampling, **how)
        # What blocks draw by is put there when the prefill has its orders: seed, temperature,
        # top-k and nucleus. A block's own is how many tokens there are.
        drawn = [("put", 4)] if sampling is not None else []
        assert events == [("_feed_and_choose", 1), *drawn, ("decode_block", 1)]
        assert longer.tokens[0][:1] == alone.tokens[0]


def resolved(monkeypatch, prompts, prefill=None, asked=None, reason=None):
    monkeypatch.setattr(choice, "why_not_fused_config", lambda *_: reason)
    monkeypatch.setattr(choice, "_why_not", lambda *_: None)
    parts = Parts.of(model_of("llama", "bfloat16"))
    request: Any = SimpleNamespace(prompts=prompts, batch=len(prompts))
    return resolve_prefill_of(parts, request, 64, asked, prefill)


def test_steps_are_taken_where_they_are_asked_for(monkeypatch):
    short, long = [[1] * 5], [[1] * 40]
    assert resolved(monkeypatch, short) == "pallas"
    assert resolved(monkeypatch, short, asked="xla") == "xla"
    assert resolved(monkeypatch, short, prefill="steps") == "steps"
    assert resolved(monkeypatch, long, prefill="steps") == "steps"
    assert [step_tokens(batch) for batch in (1, 2, 3, 4, 5, 9)] == [8, 4, 2, 2, 1, 1]
    with pytest.raises(NotImplementedError, match="no room"):
        resolved(monkeypatch, short, prefill="steps", reason="There is no room.")


def test_who_cannot_have_it_is_told():
    model = model_of("llama", "bfloat16")
    with pytest.raises(ValueError, match="where sequences come and go"):
        resolve_prefill(model.dtype, default_device(), None, "steps")
    with pytest.raises(ValueError, match="where sequences come and go"):
        LiveBatch(model, 2, 64, prefill="steps")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="runs on NVIDIA GPUs"):
            generate(model, [1, 2], 2, prefill="steps")
