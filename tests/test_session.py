"""Conversations whose cache is kept: every reply is the one that a fresh cache would give."""

import contextlib
import dataclasses
import gc
import os
import random
import signal
import weakref

import jax.numpy as jnp
import pytest
from flax import nnx
from talkers import write_talker

import ffjax
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.live.batch import Block, LiveBatch
from ffjax.live.feeder import Feeder
from ffjax.loop import BLOCK
from ffjax.sampling.params import SamplingParams
from ffjax.text import session as session_module
from ffjax.text.generator import Generator
from ffjax.text.session import ChatSession

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_turns_are_those_of_a_fresh_cache_and_feed_only_what_is_new",
            "test_bad_input_is_a_sentence_and_leaves_the_session",
            "test_a_capacity_is_a_number",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

USER, SYSTEM = "user", "system"
PARAMS = SamplingParams(max_tokens=12, temperature=0.3, seed=3)
# Of caches from scratch: steps take time by their capacity, and two are compiled.
CAPACITIES = 250, 900


@pytest.fixture(scope="module", autouse=True)
def _small_caches():
    """A cache begins with a quarter of its slots: on a CPU most of a step's time goes to them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "_LEAST_CAPACITY", 256 - BLOCK)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("hf") / "talker")


@pytest.fixture(scope="module")
def talker(folder) -> Generator:
    # Float32: what is drawn then hangs on no rounding that the cut of a prompt could change.
    return Generator.load(folder, dtype=jnp.float32)


def _said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that two lists have in common, from the beginning on."""
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1),
        min(len(one), len(other)),
    )


def _prompt(talker: Generator, messages) -> list[int]:
    assert isinstance(talker.tokenizer, HFTokenizer)
    return talker.tokenizer.chat(messages)


def _from_scratch(talker: Generator, messages, params=PARAMS) -> list[int]:
    """By `ffjax.generate`, which knows of no session."""
    prompt, most = _prompt(talker, messages), params.max_tokens or 1
    out = ffjax.generate(
        talker.model,
        prompt,
        most,
        sampling=dataclasses.replace(params, stop=()),
        stop_token=talker.tokenizer.eot_ids,
        capacity=next(n for n in CAPACITIES if n >= len(prompt) + most),
    )
    return out.tokens[0]


def test_drafts_that_are_looked_up_change_no_reply(talker):
    """Over three turns, long and greedy: such a model soon goes round in circles."""
    params = SamplingParams(max_tokens=50)
    drafts = Generator(talker.model, talker.tokenizer, speculation="lookup")
    session, plain = drafts.session(), talker.session()
    messages, accepted = [], 0
    for question in ("who are you", "who are you", "hello"):
        messages.append(_said(USER, question))
        told = _run(session, messages, params)
        want = _run(plain, messages, params)
        assert (told.tokens, told.cached_tokens) == (want.tokens, want.cached_tokens)
        assert told.tokens == _from_scratch(talker, messages, params)
        assert want.accepted is None and told.accepted is not None
        assert told.tokens_per_step >= 1
        accepted += told.accepted
        messages.append(_said("assistant", told.text))
    assert accepted > 0


def test_a_draft_model_changes_no_reply_and_is_fed_what_is_new(talker, monkeypatch):
    """Over three turns: it is the model itself, and always right as long as its cache is."""
    drafts = Generator(talker.model, talker.tokenizer, speculation=ffjax.Draft(talker.model))
    session, messages, held, cached = drafts.session(), [], [], []
    for turn, question in enumerate(("who are you", "hello", "again")):
        messages.append(_said(USER, question))
        params = dataclasses.replace(PARAMS, max_tokens=14, temperature=0.4 * (turn % 2))
        prompt = _prompt(talker, messages)
        with _fed(monkeypatch) as counts, _fed_each(monkeypatch) as each:
            out = _run(session, messages, params)
        assert out.tokens == _from_scratch(talker, messages, params)
        assert out.cached_tokens == _common(held, prompt)
        new = len(prompt) - out.cached_tokens
        assert sum(counts) == new
        # The draft model is a token behind: of the first prompt it is fed a token less.
        assert each == [new, new - (turn == 0)]
        # Of each step of 4 tokens, the first was certain; a stop token came like others.
        made = len(out.tokens) + (out.stop_reason is not None) - 1
        assert out.accepted == made - -(-made // 4) > 0
        held = prompt + out.tokens[: None if out.stop_reason is not None else -1]
        messages.append(_said("assistant", out.text))
        cached.append(out.cached_tokens)
    assert cached[-1] > cached[1] > 20


@contextlib.contextmanager
def _fed_each(monkeypatch):
    """Counts the tokens that the model and its draft model are fed meanwhile."""
    counts: dict[int, int] = {}
    totals: list[int] = []
    fed = Feeder.fed

    def counted(self, weights, state, row, tokens, *more):
        counts[id(self)] = counts.get(id(self), 0) + len(tokens)
        totals[:] = counts.values()
        return fed(self, weights, state, row, tokens, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Feeder, "fed", counted)
        yield totals


def test_a_conversation_goes_as_far_as_its_draft_model(talker):
    config = dataclasses.replace(talker.model.config, name="short", max_context=60)
    short = ffjax.Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    session = ChatSession(talker.model, talker.tokenizer, speculation=ffjax.Draft(short))
    assert session.context == 60
    messages = [_said(USER, "hello")]
    out = _run(session, messages, PARAMS, max_tokens=1000, ignore_eos=True)
    assert (out.finish_reason, out.prompt_tokens + len(out.tokens)) == ("length", 60)
    with pytest.raises(ValueError, match="and the draft model short was made for 60: there is no"):
        session.reply([_said(USER, "hello " * 60)])
    other = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    odd = ffjax.Transformer(other, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocabulary of the model: short has"):
        ChatSession(talker.model, talker.tokenizer, speculation=ffjax.Draft(odd))


def _run(session: ChatSession, messages, params=PARAMS, **options):
    stream = session.reply(messages, params, **options)
    text = "".join(stream)
    assert stream.completion.text == text
    return stream.completion


@contextlib.contextmanager
def _fed(monkeypatch):
    """Counts the tokens that are fed meanwhile."""
    counts: list[int] = []
    feed = LiveBatch.feed

    def counted(self):
        fed = feed(self)
        counts.append(0 if fed is None else fed.fed)
        return fed

    with monkeypatch.context() as patch:
        patch.setattr(LiveBatch, "feed", counted)
        yield counts


def test_turns_are_those_of_a_fresh_cache_and_feed_only_what_is_new(talker, monkeypatch):
    session = talker.session()
    messages = [_said(SYSTEM, "be brief")]
    held: list[int] = []
    common = 0
    for turn in range(4):
        messages.append(_said(USER, f"hello number {turn}"))
        params = PARAMS if turn % 2 else dataclasses.replace(PARAMS, temperature=0.0)
        with _fed(monkeypatch) as counts:
            out = _run(session, messages, params)
        assert out.tokens == _from_scratch(talker, messages, params)
        prompt = _prompt(talker, messages)
        common = _common(held, prompt)
        assert (out.prompt_tokens, out.cached_tokens) == (len(prompt), common)
        assert sum(counts) == len(prompt) - common
        # All that was said before is there, but for what the last token was.
        held = prompt + out.tokens[: None if out.stop_reason is not None else -1]
        messages.append(_said("assistant", out.text))
    assert common > 60


@pytest.mark.drawn(
    "One token, a block, and more.",
    sample=[
        "test_all_but_the_last_token_of_a_reply_is_kept[1]",
        "test_all_but_the_last_token_of_a_reply_is_kept[8]",
        "test_all_but_the_last_token_of_a_reply_is_kept[9]",
    ],
)
@pytest.mark.parametrize("count", [1, 2, 8, 9, 10])
def test_all_but_the_last_token_of_a_reply_is_kept(talker, count):
    """The last one has been chosen; where a block of steps ends with it, nobody has fed it."""
    session = talker.session()
    prompt = _prompt(talker, [_said(USER, "hello")])
    first = session.continued(prompt, dataclasses.replace(PARAMS, max_tokens=count))
    list(first)
    both = [*prompt, *first.completion.tokens, 5]
    second = session.continued(both, PARAMS)
    list(second)
    assert second.completion.cached_tokens == len(prompt) + count - 1
    expected = ffjax.generate(
        talker.model, both, 12, sampling=PARAMS, stop_token=talker.tokenizer.eot_ids, capacity=900
    )
    assert second.completion.tokens == expected.tokens[0]


def test_an_edited_history_keeps_what_stands_before_the_edit(talker):
    session = talker.session()
    messages = [_said(USER, "hello " * 9), _said("assistant", "world"), _said(USER, "again")]
    first = _run(session, messages)
    edited = [messages[0], _said("assistant", "word"), messages[2]]
    out = _run(session, edited)
    both = [_prompt(talker, one) for one in (messages, edited)]
    assert out.cached_tokens == _common(*both) > 10
    assert out.tokens == _from_scratch(talker, edited)
    # The same once more: all but the last token, which is to be fed for its logits.
    again = _run(session, edited)
    assert again.cached_tokens == len(both[1]) - 1
    assert again.tokens == out.tokens
    # Another conversation.
    other = _run(session, [_said(SYSTEM, "x"), _said(USER, "y")])
    assert other.tokens == _from_scratch(talker, [_said(SYSTEM, "x"), _said(USER, "y")])
    assert _run(session, messages).tokens == first.tokens


def test_random_conversations_are_never_wrong(talker, pytestconfig):
    turns = 40 if pytestconfig.getoption("whole") else 20
    draw = random.Random(2)
    session = talker.session()
    messages: list[dict] = []
    cached = 0
    for _ in range(turns):
        del messages[draw.randrange(len(messages) + 1) :]
        messages.append(_said(draw.choice([USER, SYSTEM]), "hello " * draw.randrange(1, 9)))
        stream = session.reply(messages, PARAMS)
        if draw.random() < 0.4:  # left in the middle
            for _ in range(draw.randrange(4)):
                next(stream, None)
            stream.close()
        else:
            expected = _from_scratch(talker, messages)
            assert "".join(stream) == stream.completion.text
            assert stream.completion.tokens == expected
        cached += stream.completion.cached_tokens
        messages.append(_said("assistant", stream.completion.text))
    assert cached > 10 * turns


@pytest.mark.parametrize("how", ["close", "drop", "next reply", "never begun"])
def test_a_reply_that_is_broken_off_leaves_a_usable_session(talker, how):
    session = talker.session()
    messages = [_said(USER, "hello")]
    stream = session.reply(messages, PARAMS, max_tokens=100)
    said = "" if how == "never begun" else next(stream)
    if how == "close":
        stream.close()
        out = stream.completion
        # What the tokens that have come say; a character that was cut in two ends in U+FFFD.
        assert out.text.startswith(said)
        assert out.finish_reason is None
        assert list(stream) == []
    if how == "drop":
        del stream
    messages += [_said("assistant", said), _said(USER, "on")]
    out = _run(session, messages)
    assert out.tokens == _from_scratch(talker, messages)
    if how != "never begun":
        assert out.cached_tokens > 0


def test_ctrl_c_anywhere_leaves_a_usable_session(talker, monkeypatch):
    """In the midst of an order, too, where it waits for the order's end."""
    session = talker.session()
    messages = [_said(USER, "hello")]
    for name in ("place", "feed", "decode"):
        original = getattr(LiveBatch, name)

        def interrupted(self, *args, original=original, **options):
            signal.raise_signal(signal.SIGINT)
            return original(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(LiveBatch, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(session.reply(messages, PARAMS))
        assert session.capacity > 0  # the cache is still there
        assert _run(session, messages).tokens == _from_scratch(talker, messages)


@pytest.mark.parametrize("place", [(LiveBatch, "decode"), (Block, "read")])
def test_an_error_of_the_device_costs_the_cache_and_no_more(talker, monkeypatch, place):
    session = talker.session()
    messages = [_said(USER, "hello")]
    _run(session, messages)

    def broken(self):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(*place, broken)
        with pytest.raises(RuntimeError):
            list(session.reply(messages, PARAMS))
    out = _run(session, messages)
    assert out.cached_tokens == 0
    assert out.tokens == _from_scratch(talker, messages)


def test_the_cache_grows_with_the_conversation(talker):
    session = talker.session(capacity=50)
    messages = [_said(USER, "hello")]
    capacities = []
    for times in (30, 1, 150, 1):
        out = _run(session, messages)
        assert out.tokens == _from_scratch(talker, messages)
        messages += [_said("assistant", out.text), _said(USER, "hello " * times)]
        capacities.append((session.capacity, out.cached_tokens > 0))
    first, second, third, last = capacities
    assert first == (50, False)
    # It has grown twice, each time for more than one reply.
    assert second == (third[0], False)
    assert third[1]
    assert last[0] > third[0]


def test_a_conversation_beyond_the_context_is_refused_and_nothing_lost(talker):
    session = talker.session()
    messages = [_said(USER, "hello")]
    before = _run(session, messages)
    most = talker.model.config.max_context
    long = [*messages, _said("assistant", before.text), _said(USER, "world " * most)]
    with pytest.raises(ValueError, match=rf"made for {most}: there is no room for a reply. Leave"):
        session.reply(long)
    again = _run(session, messages)
    assert again.tokens == before.tokens
    assert again.cached_tokens == again.prompt_tokens - 1


def test_more_tokens_than_there_is_room_for_end_by_length(folder):
    model = ffjax.load(folder, dtype=jnp.float32)
    small = dataclasses.replace(model.config, max_context=60)
    talker = Generator(
        ffjax.Transformer(small, rngs=nnx.Rngs(0), dtype=jnp.float32),
        ffjax.load_tokenizer(folder, small),
    )
    out = talker.chat([_said(USER, "hello")], max_tokens=1000, ignore_eos=True)
    assert out.finish_reason == "length"
    assert out.prompt_tokens + len(out.tokens) == 60
    assert talker.chat([_said(USER, "hello")], ignore_eos=True).tokens == out.tokens


def test_what_ends_a_reply_is_what_ends_a_text(talker):
    session = talker.session()
    messages = [_said(USER, "hello")]
    free = _run(session, messages, max_tokens=30)
    text = free.text
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isascii())
    out = _run(session, messages, max_tokens=30, stop=stop)
    assert (out.text, out.stop_reason) == (text[: text.index(stop)], stop)
    token = free.tokens[7]
    out = _run(session, messages, max_tokens=30, stop_token_ids=[token])
    assert out.tokens == free.tokens[: free.tokens.index(token)]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    one = _run(session, messages, max_tokens=1)
    assert (one.tokens, one.finish_reason) == (free.tokens[:1], "length")


def test_log_probabilities_may_be_asked_for_later(talker):
    session = talker.session()
    messages = [_said(USER, "hello")]
    plain = _run(session, messages)
    told = _run(session, messages, logprobs=3)
    assert told.tokens == plain.tokens
    assert told.logprobs is not None
    assert [len(one.top) for one in told.logprobs] == [3] * len(told.tokens)
    assert _run(session, messages).logprobs is None


def test_chat_keeps_the_cache_of_one_conversation(talker):
    messages = [_said(USER, "hello")]
    first = talker.chat(messages, PARAMS)
    assert first.tokens == _from_scratch(talker, messages)
    messages += [_said("assistant", first.text), _said(USER, "on")]
    with talker.stream_chat(messages, PARAMS) as stream:
        text = "".join(stream)
    assert stream.completion.text == text
    assert stream.completion.tokens == _from_scratch(talker, messages)
    assert stream.completion.cached_tokens > first.prompt_tokens


def test_nan_keeps_what_came_and_the_session(folder):
    model = ffjax.load(folder, dtype=jnp.float32)
    talker = Generator(model, ffjax.load_tokenizer(folder, model.config))
    session = talker.session()
    messages = [_said(USER, "hello")]
    free = _run(session, messages, max_tokens=30)
    token = next(t for t in free.tokens[3:] if t not in _prompt(talker, messages))
    count = free.tokens.index(token) + 1
    kept = model.embed[...]
    model.embed[...] = kept.at[token].set(jnp.nan)
    broken = session.reply(messages, PARAMS, max_tokens=30)
    with pytest.raises(ffjax.NotFiniteError, match=f"after {count} new tokens") as raised:
        list(broken)
    [out] = raised.value.completions or []
    assert out.tokens == free.tokens[:count] == broken.completion.tokens
    assert out.finish_reason is None
    # With the numbers in place again, nothing of the broken cache is left.
    model.embed[...] = kept
    after = _run(session, messages, max_tokens=30)
    assert after.tokens == free.tokens


def test_a_session_that_is_let_go_frees_its_cache(talker):
    session = talker.session()
    list(session.reply([_said(USER, "hello")], PARAMS))
    stream = session.reply([_said(USER, "hello")], PARAMS)
    next(stream)
    batch = weakref.ref(session._batch)
    gc.disable()  # no circle keeps it
    try:
        session.close()
        assert batch() is None
        assert session.capacity == 0
        assert list(stream) == []
    finally:
        gc.enable()
    # It may be used again.
    assert _run(session, [_said(USER, "a")]).tokens == _from_scratch(talker, [_said(USER, "a")])


@pytest.mark.parametrize(
    ("messages", "options", "error", "sentence"),
    [
        ("hello", {}, TypeError, "A conversation is a list of messages"),
        ([], {}, ValueError, r"chat template|at least one"),
        ([3], {}, TypeError, "message"),
        ([_said(USER, "a")], {"template": "x"}, ValueError, "there is no 'x'"),
        ([_said(USER, "a")], {"top_k": "x"}, TypeError, "top_k is an integer"),
        ([_said(USER, "a")], {"topk": 3}, TypeError, "Is top_k meant"),
        ([_said(USER, "a")], {"bad_token_ids": [300]}, ValueError, "must be in the vocabulary"),
        ([_said(USER, "a")], {"sampling": 3}, TypeError, "sampling is a SamplingParams"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_the_session(talker, messages, options, error, sentence):
    session = talker.session()
    good = [_said(USER, "hello")]
    before = _run(session, good)
    with pytest.raises(error, match=sentence):
        session.reply(messages, **options)
    assert _run(session, good).cached_tokens == before.prompt_tokens - 1


@pytest.mark.parametrize("capacity", [0, 1, -3, 2.5, True, "x"])
def test_a_capacity_is_a_number(talker, capacity):
    with pytest.raises(ValueError, match="is a number from 2, got"):
        talker.session(capacity=capacity)


def test_a_model_of_bytes_has_no_conversations():
    with pytest.raises(ValueError, match="needs a chat template, and this model's tokens are byte"):
        Generator.load().chat([_said(USER, "a")])


def test_a_trained_model_keeps_its_cache_over_three_turns():
    """Greedy, as the reference from scratch: the bfloat16 model of a folder, on this machine."""
    folder = os.environ.get("FFJAX_TEST_CHAT_MODEL")
    if not folder:
        pytest.skip("FFJAX_TEST_CHAT_MODEL names no folder of a trained model")
    talker = Generator.load(folder)
    params = SamplingParams(max_tokens=24)
    session = talker.session()
    messages = []
    for question in ("Who are you?", "Name three rivers.", "Which is the longest?"):
        messages.append(_said(USER, question))
        out = _run(session, messages, params)
        assert out.tokens == _from_scratch(talker, messages, params)
        assert len(messages) == 1 or out.cached_tokens > 20
        messages.append(_said("assistant", out.text))
