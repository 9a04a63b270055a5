"""A live batch that looks drafts up gives each sequence what it would get without them."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx
from generate_cases import TINY
from live_cases import Request, serve

from ffjax.generation import generate
from ffjax.live import LiveBatch
from ffjax.live.made import Repeats
from ffjax.model import Transformer
from ffjax.sampling.params import SamplingParams
from ffjax.speculation.lookup import Lookup

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_what_cannot_speculate_is_refused",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = dataclasses.replace(TINY, vocab_size=53, num_layers=2, num_heads=4, num_kv_heads=2)
CAPACITY = 120
# Prompts that repeat, and one that does not.
ROUND = [3, 14, 15, 9, 26, 5] * 4
KINDS = {
    "greedy": {},
    "penalties": {"temperature": 0.6, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "stops": {"stop_token_ids": tuple(range(0, 53, 9)), "min_tokens": 6, "temperature": 0.8},
    "told": {"temperature": 0.7, "top_k": 9, "logprobs": 2},
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Float32: greedy choices then hang on no rounding that a step of several tokens could change.
    return Transformer(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module")
def batch(model) -> LiveBatch:
    return LiveBatch(
        model,
        2,
        CAPACITY,
        max_logprobs=2,
        chunk=32,
        speculation=Lookup(min_match=1),
        ahead=False,
    )


def alone(model: Transformer, one: Request) -> list[int | str]:
    """What it gets by `ffjax.generate` without drafts, with the token that ended it."""
    how = {"sampling": one.params, "stop_token": one.eos, "seed": (0,)}
    out = generate(model, one.tokens, one.count, **how)
    [tokens], [reason] = out.tokens, out.stop_reasons
    return tokens + ([] if reason is None else [reason])


def asked(number: int) -> Request:
    name = [*KINDS][number % len(KINDS)]
    tokens = ROUND[number:] if number % 3 else [7, 1, 30 + number, 8, 2]
    params = SamplingParams(**KINDS[name], seed=number, max_tokens=20 + 3 * number)
    return Request(tokens, params, 20 + 3 * number, (11,) if number % 2 else ())


def test_every_request_gets_what_it_gets_without_drafts(model, batch, monkeypatch):
    """On two rows, so that each is used again, beside all kinds of others."""
    seen = []
    record = Repeats.__setattr__
    monkeypatch.setattr(
        Repeats, "__setattr__", lambda self, *to: seen.append(to[1]) or record(self, *to)
    )
    requests = [asked(number) for number in range(8)]
    serve(batch, requests)
    for number, one in enumerate(requests):
        assert one.answer == alone(model, one), number
    drafted = [sum(chosen.drafted for chosen in one.got) for one in requests]
    assert sum(drafted) > 10
    assert not any(one.got[0].drafted for one in requests)
    # Some blocks had nothing to look up, and plain ones came after them.
    assert True in seen and False in seen
    told = [chosen.logprobs for chosen in requests[3].got]
    assert all(x is not None and len(x.top) == 2 for x in told)


def test_plain_blocks_do_without_drafts_and_know_the_text_behind_them(model, batch):
    one = Request(ROUND, SamplingParams(max_tokens=60), 60)
    batch.place(0, one.tokens, one.params)
    fed = batch.feed()
    one.take(fed.read())
    lengths, drafted = [], []
    for turn in range(6):
        batch._repeats.seen = turn % 2 == 1  # as if nothing repeated, every other time
        block = batch.decode()
        before = len(one.got)
        for step in block.read():
            one.take(step[0])
        lengths.append(len(one.got) - before)
        drafted.append(sum(chosen.drafted for chosen in one.got[before:]))
    batch.release(0)
    assert lengths[0] == lengths[2] == 8
    assert drafted[0] == drafted[2] == 0 < drafted[1]
    assert one.answer == alone(model, one)[: len(one.got)]


@pytest.mark.parametrize("seen", [True, False])
def test_a_prompt_that_is_fed_beside_steps_is_left_as_it_is(model, batch, seen):
    """Its tokens, and its counts, of which penalties are reckoned."""
    long = Request((ROUND * 4)[:75], SamplingParams(frequency_penalty=1.5, max_tokens=9), 9)
    beside = Request(ROUND, SamplingParams(presence_penalty=0.01, max_tokens=70), 70)
    batch.place(0, beside.tokens, beside.params)
    beside.take(batch.feed().read())
    batch._repeats.seen = False
    batch.place(1, long.tokens, long.params)
    assert batch._repeats.seen
    while not (fed := batch.feed()).done:  # chunks of 32
        assert fed.row == 1
        batch._repeats.seen = seen
        for step in batch.decode().read():
            beside.take(step[0])
    long.take(fed.read())
    assert batch._state.known[1, :75].tolist() == long.tokens
    while not long.over:
        for step in batch.decode().read():
            for row, chosen in step.items():
                (beside, long)[row].take(chosen)
    for row in range(2):
        batch.release(row)
    assert long.answer == alone(model, long)
    assert beside.answer == alone(model, beside)[: len(beside.got)]


def test_a_kept_beginning_is_known_to_who_looks_drafts_up(model, batch):
    first = Request(ROUND, SamplingParams(max_tokens=9), 9)
    serve(batch, [first])
    said = first.tokens + first.answer
    turn = Request([*said, 3, 14], SamplingParams(max_tokens=30), 30)
    batch.place(0, turn.tokens, turn.params, keep=len(said) - 1)
    fed = batch.feed()
    assert fed is not None and fed.done and fed.fed == 3
    turn.take(fed.read())
    while not turn.over:
        block = batch.decode()
        assert block is not None
        for step in block.read():
            turn.take(step[0])
    batch.release(0)
    assert turn.answer == alone(model, turn)


def test_a_sequence_may_fill_the_cache(model, batch):
    """Its last steps take drafts for which it has no room."""
    tokens = (ROUND * 5)[: CAPACITY - 13]
    one, beside = Request(tokens, SamplingParams(), 13), asked(1)
    serve(batch, [one, beside])
    assert one.answer == alone(model, one)
    assert beside.answer == alone(model, beside)
    assert batch._state.cache.lengths[0] == CAPACITY - 1  # the last token is never fed


@pytest.mark.parametrize(
    ("rows", "speculation", "error", "sentence"),
    [
        (5, "lookup", ValueError, "1 to 4 sequences at a time"),
        (3, Lookup(tokens=3), ValueError, "Ask for up to 2"),
        (1, "guess", ValueError, "got 'guess'"),
        (1, 3, TypeError, "got 3"),
    ],
)
def test_what_cannot_speculate_is_refused(model, rows, speculation, error, sentence):
    with pytest.raises(error, match=sentence):
        LiveBatch(model, rows, CAPACITY, speculation=speculation, ahead=False)
