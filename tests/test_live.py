"""A live batch gives each sequence what it would get alone, whoever comes and goes beside it."""

import dataclasses
import itertools
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from generate_cases import TINY
from live_cases import KINDS, Request, serve
from live_cases import prompt as prompt_of

from ffjax.config import ModelConfig
from ffjax.generation import generate
from ffjax.live import LiveBatch
from ffjax.loop import BLOCK, NOT_FINITE
from ffjax.model import Transformer
from ffjax.sampling.params import SamplingParams

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_a_batch_may_compile_what_a_request_needs",
            "test_sizes_that_no_batch_has_are_refused",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = dataclasses.replace(TINY, vocab_size=53, num_layers=2, num_heads=4, num_kv_heads=2)
CAPACITY = 120


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Float32: greedy choices then hang on no rounding that a batch could change.
    return Transformer(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module", params=["xla", "pallas"])
def batch(request, model) -> LiveBatch:
    live = LiveBatch(model, 3, CAPACITY, max_logprobs=4, chunk=32)
    if request.param == "pallas":  # interpreted here
        live = packed(model)
    return live


def packed(model: Transformer, rows: int = 3) -> LiveBatch:
    """A batch with the packed prefill, interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ffjax.live.batch.resolve_prefill", lambda *_: "pallas")
        return LiveBatch(model, rows, CAPACITY, max_logprobs=4, chunk=32)


def prompt(length: int, seed: int) -> list[int]:
    return prompt_of(length, seed, CONFIG.vocab_size)


def alone(model: Transformer, one: Request) -> list[int | str]:
    """What it gets by `ffjax.generate`, with the token that ended it."""
    out = generate(model, one.tokens, one.count, sampling=one.params, stop_token=one.eos, seed=(0,))
    [tokens], [reason] = out.tokens, out.stop_reasons
    return tokens + ([] if reason is None else [reason])


def test_every_request_gets_what_it_gets_alone(model, batch):
    """22 requests of every kind on three rows: blocks of every kind, rows used again."""
    requests = [
        Request(
            prompt(length, i),
            SamplingParams(**kind, seed=i),
            count,
            (7, 11) if i % 2 else (),
        )
        for i, (length, count, kind) in enumerate(
            zip(
                [1, 5, 32, 33, 70, 17, 64, 2, 96, 31, 40] * 2,
                [3, 20, 1, 9, 50, 8, 17, 40, 24, 2, 30] * 2,
                itertools.cycle(KINDS.values()),
                strict=False,
            )
        )
    ]
    with compilations() as compiled:
        serve(batch, requests)
    assert compiled == []
    for i, one in enumerate(requests):
        assert one.answer == alone(model, one), (i, [*KINDS][i % len(KINDS)])
    assert batch.free == (0, 1, 2)


def test_a_kept_beginning_is_not_fed_again(model, batch):
    """A conversation's next turn feeds what is new, beside another sequence."""
    first = Request(prompt(40, 1), SamplingParams(), 12)
    other = Request(prompt(9, 2), SamplingParams(seed=4, temperature=1.0), 40)
    serve(batch, [first, other])
    # The row's cache holds the prompt and all of the answer but its last token.
    said = first.tokens + first.answer
    penalties = SamplingParams(repetition_penalty=1.4)
    turn = Request(said + prompt(5, 3), penalties, 10)
    batch.place(1, prompt(50, 4), SamplingParams())
    batch.place(0, turn.tokens, turn.params, keep=len(said) - 1)
    counts = []
    while (fed := batch.feed()) is not None:
        if fed.row == 0:
            counts.append(fed.fed)
            turn.take(fed.read())
        batch.decode()
    assert counts == [6]
    batch.release(1)
    # The blocks ordered meanwhile were not read; a row that is placed again begins anew.
    batch.release(0)
    batch.place(0, turn.tokens, turn.params, keep=len(said) - 1)
    fed = batch.feed()
    assert fed is not None and fed.done and fed.fed == 6
    again = Request(turn.tokens, turn.params, 10)
    again.take(fed.read())
    for _ in range(2):
        block = batch.decode()
        assert block is not None and block.rows == (0,)
        for step in block.read():
            again.take(step[0])
    batch.release(0)
    assert again.answer == alone(model, again)


def test_log_probabilities_are_those_of_the_model(model, batch):
    one = Request(prompt(12, 8), SamplingParams(logprobs=3, temperature=1.0, seed=1, top_k=5), 11)
    two = Request(prompt(12, 8), SamplingParams(temperature=1.0, seed=1, top_k=5), 11)
    serve(batch, [one, two])
    assert one.answer == two.answer == alone(model, one)
    assert all(chosen.logprobs is None for chosen in two.got)
    tokens = one.tokens + one.answer
    logits = np.asarray(model(jnp.array([tokens])), np.float64)[0, len(one.tokens) - 1 : -1]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for chosen, row in zip(one.got, want, strict=True):
        assert chosen.logprobs is not None
        assert chosen.logprobs.logprob == pytest.approx(row[chosen.token], abs=1e-5)
        best = np.argsort(-row)[:3]
        assert [token for token, _ in chosen.logprobs.top] == best.tolist()
        assert [p for _, p in chosen.logprobs.top] == pytest.approx(row[best].tolist(), abs=1e-5)


def test_a_sequence_may_fill_the_cache(model, batch):
    one = Request(prompt(CAPACITY - 21, 5), SamplingParams(), 21)
    serve(batch, [one])
    assert one.answer == alone(model, one)


def test_what_cannot_be_placed_is_refused(batch):
    batch.place(0, [1, 2])
    cases = [
        ((0, [1]), {}, "Row 0 has a request"),
        ((3, [1]), {}, "Rows are 0 to 2, got 3"),
        ((1, []), {}, "at least one token"),
        ((1, [53]), {}, "0 to 52; the prompt has 53"),
        ((1, [1] * CAPACITY), {}, "room for 120 tokens together; the prompt has 120"),
        ((1, [1, 2]), {"keep": 2}, "0 to 1 may be kept, got 2"),
        ((1, [1], SamplingParams(logprobs=5)), {}, "of up to 4 alternatives"),
        ((1, [1], SamplingParams(stop_token_ids=(53,))), {}, "stop_token_ids must be in the"),
    ]
    for args, more, message in cases:
        with pytest.raises(ValueError, match=message):
            batch.place(*args, **more)
    batch.release(0)
    batch.release(0)
    assert batch.free == (0, 1, 2)
    assert batch.feed() is None
    assert batch.decode() is None


def test_the_next_call_is_of_the_weights_that_the_model_holds_then():
    model, other = (Transformer(CONFIG, rngs=nnx.Rngs(i), dtype=jnp.float32) for i in (3, 4))
    live = LiveBatch(model, 1, CAPACITY, ahead=False, chunk=32)

    def served() -> list[int]:
        one = Request([1, 2, 3], SamplingParams(), 12, ())
        serve(live, [one])
        return one.answer

    first, want = served(), alone(other, Request([1, 2, 3], SamplingParams(), 12, ()))
    assert first != want
    old = weakref.ref(model.embed.get_raw_value())
    for name in ("embed", "final_norm", "head"):
        getattr(model, name)[...] = getattr(other, name)[...]
    model.layers = other.layers
    assert old() is None, "weights that were replaced are still there"
    assert served() == want
    model.final_norm.set_value(model.final_norm[...].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="another shape, dtype or structure"):
        live.place(0, [1, 2, 3])
        live.feed()


def test_logits_without_numbers_are_marked_in_their_row_alone(model):
    graph, state = nnx.split(model)
    broken = nnx.merge(graph, state)
    broken.embed[...] = broken.embed[...].at[5].set(jnp.nan)
    live = LiveBatch(broken, 2, CAPACITY, chunk=32, ahead=False)
    live.place(0, [1, 2, 3], SamplingParams(bad_token_ids=(5,)))
    live.place(1, [4, 5, 6])
    first = {}
    while (fed := live.feed()) is not None:
        first[fed.row] = fed.read().token
    assert first[1] == NOT_FINITE
    live.reset()
    assert live.free == (0, 1)
    assert live.decode() is None


def test_a_batch_may_compile_what_a_request_needs(model):
    with compilations() as compiled:
        live = LiveBatch(model, 2, CAPACITY, ahead=False, chunk=32)
        assert live.compile_seconds == 0
        one = Request(prompt(9, 3), SamplingParams(), 5)
        serve(live, [one])
        after, spent = len(compiled), live.compile_seconds
        serve(live, [again := Request(prompt(9, 3), SamplingParams(), 5)])
        assert (len(compiled), live.compile_seconds) == (after, pytest.approx(spent, abs=0.05))
        serve(live, [drawn := Request(prompt(9, 3), SamplingParams(temperature=1.0), 5)])
        assert len(compiled) > after
    assert one.answer == again.answer == alone(model, one)
    assert drawn.answer == alone(model, drawn)


def test_sizes_that_no_batch_has_are_refused(model):
    small: ModelConfig = dataclasses.replace(CONFIG, max_context=64)
    with pytest.raises(ValueError, match="takes up to 64 tokens"):
        LiveBatch(Transformer(small, rngs=nnx.Rngs(0)), 2, 65)
    with pytest.raises(ValueError, match="rows and chunks of 1 and more, got 0"):
        LiveBatch(model, 0, 64)
    with pytest.raises(ValueError, match="1 to 8 sequences; got 9"):
        LiveBatch(model, 9, 64, implementation="pallas")


assert BLOCK == 8, "the numbers above are made for it"
