"""A live batch with a draft model gives each sequence what it would get without drafts."""

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from generate_cases import TINY
from live_cases import Request, serve
from live_cases import prompt as prompt_of

from ffjax import Draft
from ffjax.cache import KVCache
from ffjax.decode import decode_step
from ffjax.live import LiveBatch
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.sampling.params import SamplingParams
from ffjax.speculation import drafting
from ffjax.speculation.drafting import FIRST_TOKENS, ModelSource
from ffjax.speculation.source import Choosing

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_what_cannot_draft_is_refused",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = dataclasses.replace(TINY, vocab_size=53, num_layers=2, num_heads=4, num_kv_heads=2)
# Of another family and size.
OTHER = dataclasses.replace(
    TINY, name="other", vocab_size=53, qk_norm="head", qkv_bias=True, head_dim=32, ffw_dim=64
)
CAPACITY, CHUNK, TOKENS = 120, 32, 4
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_k": 9},
    "penalties": {"temperature": 0.6, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "stops": {"stop_token_ids": tuple(range(0, 53, 9)), "min_tokens": 6, "temperature": 0.8},
    "told": {"temperature": 0.7, "logprobs": 2},
}
# At the edges of chunks of 32, of which the draft model is fed a token less.
LENGTHS = 70, 1, 33, 32, 5, 65, 2, 31, 97, 34


def made(config=CONFIG, seed: int = 1) -> Transformer:
    # Float32: choices then hang on no rounding that a step of several tokens could change.
    return Transformer(config, rngs=nnx.Rngs(seed), dtype=jnp.float32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return made()


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What a batch says that it compiles."""
    return []


@pytest.fixture(scope="module")
def batch(model, said) -> LiveBatch:
    """One whose model drafts for itself: it is always right, as long as its cache is."""
    return live(model, model, ahead=True, say=said.append)


def live(model: Transformer, draft: Transformer | None, **how: Any) -> Any:
    """Two rows, of one set of programs for all drafts of a structure."""
    speculation = None if draft is None else Draft(draft)
    given: dict[str, Any] = {"max_logprobs": 2, "chunk": CHUNK, "ahead": False} | how
    return LiveBatch(model, 2, CAPACITY, speculation=speculation, **given)


def requests() -> list[Request]:
    """Of every kind."""
    asked = []
    for number, length in enumerate(LENGTHS):
        count = (26, 1, 9, 20, 47, 13, 30, 2, 22, 17)[number]
        kind = KINDS[[*KINDS][number % len(KINDS)]]
        params = SamplingParams(**kind, seed=number, max_tokens=count)
        asked.append(Request(prompt(length, number), params, count, (11,) if number % 2 else ()))
    return asked


def prompt(length: int, seed: int) -> list[int]:
    return prompt_of(length, seed, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def plain(model) -> list[Request]:
    """Those requests, served without speculation."""
    served = requests()
    serve(live(model, None), served)
    return served


def accepted(one: Request) -> int:
    return sum(chosen.drafted for chosen in one.got)


def all_right(one: Request) -> int:
    """How many are accepted where each draft is right: all but the first token of each step."""
    made = len(one.got) - 1
    return made - -(-made // TOKENS)


def follow(batch: Any, one: Request, row: int = 0, keep: int = 0) -> None:
    """Has one request run in a row, beside whatever else runs."""
    batch.place(row, one.tokens, one.params, eos=one.eos, keep=keep)
    while not (fed := batch.feed()).done:
        batch.decode()
    one.take(fed.read())
    while not one.over:
        for step in batch.decode().read():
            if row in step:
                one.take(step[row])
    batch.release(row)


# Tokens are those that come without


@pytest.mark.drawn(
    "One that is always right, and one of another size.",
    sample=[
        "test_every_request_gets_what_it_gets_without_drafts[itself]",
        "test_every_request_gets_what_it_gets_without_drafts[another]",
    ],
)
@pytest.mark.parametrize("name", ["itself", "random", "another"])
def test_every_request_gets_what_it_gets_without_drafts(model, batch, plain, name):
    """Ten of every kind on two rows, some fed in chunks beside those that run."""
    drafts = {
        "random": lambda: made(seed=7),
        "another": lambda: made(OTHER),
    }
    mine = batch if name == "itself" else live(model, drafts[name]())
    served = requests()
    serve(mine, served)
    for number, (one, want) in enumerate(zip(served, plain, strict=True)):
        assert one.answer == want.answer, number
        assert [one.logprobs is None for one in one.got] == [x.logprobs is None for x in want.got]
        assert not one.got[0].drafted
    right, most = sum(map(accepted, served)), sum(map(all_right, served))
    if name == "itself":
        # However a prompt was cut, and whoever ran beside it: the draft's cache was right.
        assert [accepted(one) for one in served] == [all_right(one) for one in served]
    else:
        assert right < most / 2
    assert mine.free == (0, 1)


def test_all_programs_are_compiled_ahead_and_named(batch, said):
    """Of steps, the three kinds alone: there is always a draft. Of sizes of chunks, one here."""
    kinds = ("greedy", "drawn", "with all stages")
    assert said == [
        *(f"compiling a block of steps, {kind}, with drafts of tiny" for kind in kinds),
        "compiling the prefill of 32 tokens",
        "compiling the draft model's prefill of 32 tokens",
        "compiling the choice of the first token",
    ]
    with compilations() as compiled:
        serve(batch, requests())
    assert compiled == []


# The draft model's cache


@nnx.jit
def _filled(model, tokens, cache, count):
    return model(tokens, cache, num_tokens=count)[1]


def caches(model: Transformer, batch: LiveBatch, row: int, tokens: list[int]) -> None:
    """A row's cache of the draft model holds all but the last of these tokens, as from scratch."""
    held = len(tokens) - 1
    cache = KVCache.create(CONFIG, 1, CAPACITY, jnp.float32)
    padded = np.zeros((1, CAPACITY), np.int32)
    padded[0, : len(tokens)] = tokens
    want = _filled(model, jnp.asarray(padded), cache, jnp.array([held]))
    mine = batch._state.draft.cache
    assert mine.lengths[row] == held
    for name in ("k", "v"):
        got, expected = (np.asarray(getattr(one, name)) for one in (mine, want))
        np.testing.assert_allclose(
            got[:, row, :, :held], expected[:, 0, :, :held], rtol=1e-4, atol=1e-5
        )


class Doubted(ModelSource):
    """A draft model whose tokens are changed, from a place on that hangs on the text's length.

    It goes on from what it was made to say: the wrong tokens are in its cache.
    """

    def drafts(self, known, lengths, weights, state, choosing):
        assert choosing is not None

        def changed(memory, fed, logits, greedy, number):
            token, memory = choosing.next(memory, fed, logits, greedy, number)
            wrong = number >= lengths * 7 % 11 % TOKENS
            return jnp.where(wrong, (token + 1) % CONFIG.vocab_size, token), memory

        how = Choosing(choosing.memory, changed)
        return super().drafts(known, lengths, weights, state, how)


def test_a_kept_beginning_is_right_behind_any_draft(model, monkeypatch):
    """Whichever draft of the last step was wrong, while another row runs; fed is what is new."""
    with monkeypatch.context() as patch:
        patch.setattr("ffjax.live.batch.ModelSource", Doubted)
        batch = live(model, model)
    reference = live(model, None)
    beside = Request(prompt(9, 50), SamplingParams(), 90)
    batch.place(1, beside.tokens, beside.params)
    beside.take(batch.feed().read())
    seen, tokens, length = set(), prompt(20, 51), 0
    for count in (2, 3, 4, 5, 6, 7, 9, 12):
        one = Request(tokens, SamplingParams(max_tokens=count), count)
        follow(batch, one, keep=length)
        want = Request(tokens, SamplingParams(max_tokens=count), count)
        follow(reference, want, row=1)
        assert one.answer == want.answer
        seen.add(tuple(chosen.drafted for chosen in one.got[-TOKENS:]))
        held = one.tokens + one.answer[:-1]
        caches(model, batch, 0, held)
        # What another row's steps leave of it, before a request comes and after it.
        batch.decode()
        caches(model, batch, 0, held)
        # As much as there is, or less.
        length = len(held) - (count % 3 == 0) * 4
        tokens = [*held[:length], *prompt(3, count)]
        if count % 2:
            batch.place(0, tokens, keep=length)
            batch.decode()
            caches(model, batch, 0, tokens[:length])
            fed = batch.feed()
            assert (fed.fed, fed.done) == (3, True)
            caches(model, batch, 0, tokens)
            batch.release(0)
            length = len(tokens)
            tokens = [*tokens, 5]
    assert len(seen) > 4


def test_a_full_cache_takes_no_draft(model, batch):
    """The last steps take drafts for which there is no room."""
    one = Request(prompt(CAPACITY - 13, 5), SamplingParams(), 13)
    beside, want = (Request(prompt(20, 6), SamplingParams(max_tokens=70), 70) for _ in range(2))
    serve(batch, [one, beside])
    reference = live(model, None)
    serve(reference, [again := Request(one.tokens, one.params, 13), want])
    assert (one.answer, beside.answer) == (again.answer, want.answer)
    assert (accepted(one), accepted(beside)) == (all_right(one), all_right(beside))
    assert batch._state.cache.lengths[0] == CAPACITY - 1  # the last token is never fed
    assert batch._state.draft.cache.lengths[0] == CAPACITY - 2


def test_a_text_may_end_in_the_midst_of_accepted_drafts(model, batch):
    """At each place of a step; the next request goes on after what is kept."""
    tokens = prompt(12, 8)
    whole = Request(tokens, SamplingParams(temperature=1.0, seed=1), 60)
    follow(live(model, None), whole)
    ends = set()
    for count in range(2, 24):
        stop = whole.answer[count]
        if stop in whole.answer[:count]:
            continue
        params = dataclasses.replace(whole.params, stop_token_ids=[stop])
        one = Request(tokens, params, 60)
        follow(batch, one, row=1)
        assert one.answer == whole.answer[: count + 1]
        assert accepted(one) == all_right(one)
        ends.add(count % TOKENS)
        held = tokens + one.answer[:-1]
        batch.place(1, [*held, 3], keep=len(held))
        assert batch.feed().fed == 1
        caches(model, batch, 1, [*held, 3])
        batch.release(1)
    assert ends == set(range(TOKENS))


def test_a_batch_that_is_reset_begins_anew(model, batch, plain):
    batch.place(0, prompt(40, 1))
    batch.feed()
    batch.reset()
    assert batch.free == (0, 1)
    assert batch._state.draft.cache.lengths.tolist() == [0, 0]
    again = requests()[3]
    serve(batch, [again])
    assert again.answer == plain[3].answer
    assert accepted(again) == all_right(again)


def test_of_a_prompt_of_one_token_the_draft_model_is_fed_none(batch, plain, monkeypatch):
    """The first step feeds it."""
    monkeypatch.setattr(batch._draft, "fed", None)  # would be an error
    one = requests()[1]
    assert len(one.tokens) == 1
    follow(batch, one)
    assert one.answer == plain[1].answer


def test_the_packed_prefill_feeds_both(model, plain, monkeypatch):
    """Interpreted here."""
    with monkeypatch.context() as patch:
        patch.setattr("ffjax.live.batch.resolve_prefill", lambda *_: "pallas")
        batch = live(model, model)
    served = [requests()[i] for i in (2, 5)]
    serve(batch, served)
    assert [one.answer for one in served] == [plain[2].answer, plain[5].answer]
    assert [accepted(one) for one in served] == [all_right(one) for one in served]


def test_a_row_without_a_text_is_fed_at_no_negative_position(model, monkeypatch):
    """A kernel would write before its row's cache: such a row takes part in steps, too."""
    fed = []

    def step(model, cache, tokens, implementation):
        fed.append(cache.lengths.tolist())
        return decode_step(model, cache, tokens, implementation=implementation)

    monkeypatch.setattr(drafting, "decode_step", step)
    parts = Parts.of(model)
    source = ModelSource(graphdef=parts.graphdef, tokens=2, implementation="xla")
    cache = KVCache.create(CONFIG, 3, 16, jnp.float32, tokens=FIRST_TOKENS)
    choosing = Choosing(None, lambda memory, fed, logits, greedy, number: (greedy, memory))
    lengths = jnp.array([1, 2, 9], jnp.int32)
    source.drafts(jnp.ones((3, 16), jnp.int32), lengths, parts.state, cache, choosing)
    assert fed == [[0, 0, 7]]


# Weights


def test_both_models_weights_may_be_replaced(model, plain):
    """A draft model becomes the model, and the model another one; nothing is compiled for it."""
    mine, draft = copy.deepcopy(model), made(seed=7)
    batch = live(mine, draft)

    def served() -> Request:
        one = requests()[8]
        serve(batch, [one])
        return one

    first = served()
    assert first.answer == plain[8].answer
    with compilations() as compiled:
        for name in ("embed", "final_norm", "head"):
            getattr(draft, name)[...] = getattr(model, name)[...]
        draft.layers = model.layers
        second = served()
        assert second.answer == first.answer
        assert accepted(first) < accepted(second) == all_right(second)
        other = made(seed=7)
        mine.layers = other.layers
        third = served()
        assert third.answer != first.answer
        assert accepted(third) < all_right(third)
    assert compiled == []
    batch.place(0, requests()[8].tokens, requests()[8].params)
    draft.final_norm.set_value(draft.final_norm[...].astype(jnp.bfloat16))
    before = batch._state
    with pytest.raises(ValueError, match="another shape, dtype or structure"):
        batch.feed()
    assert batch._state is before  # nothing was ordered
    assert not batch._state.cache.k.is_deleted()


# What is refused


@pytest.mark.parametrize(
    ("draft", "rows", "how", "error", "sentence"),
    [
        ({"vocab_size": 54}, 1, {}, ValueError, "vocabulary of the model: tiny has 54 tokens"),
        ({}, 5, {}, ValueError, "1 to 4 sequences at a time"),
        ({}, 3, {"tokens": 3}, ValueError, "for 3 of each of 3. Ask for up to 2"),
        (
            {"max_context": CAPACITY - 1},
            1,
            {},
            ValueError,
            "tiny was made for 119 tokens, and the capacity is 120. Ask for a capacity of up to",
        ),
    ],
)
def test_what_cannot_draft_is_refused(model, draft, rows, how, error, sentence):
    with pytest.raises(error, match=sentence):
        drawn = Draft(made(dataclasses.replace(CONFIG, **draft)), **how)
        LiveBatch(model, rows, CAPACITY, speculation=drawn, ahead=False)


def test_a_named_implementation_is_that_of_both(model):
    with pytest.raises(NotImplementedError, match="Of the draft model tiny: The fused"):
        how: dict[str, Any] = {"implementation": "pallas", "speculation": Draft(model)}
        LiveBatch(model, 1, CAPACITY, ahead=False, **how)
