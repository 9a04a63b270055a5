"""Generation with drafts: the tokens that come without, in fewer steps."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from decode_cases import random_model
from speculation_cases import (
    CIRCLE,
    CONFIG,
    FEW,
    NEW,
    PROMPTS,
    SAMPLINGS,
    STRAIGHT,
    both,
    float32_model,
    streamed,
)

from ffjax import loop
from ffjax.broken import NotFiniteError
from ffjax.cli import main
from ffjax.decode import fused_step
from ffjax.generation import Replies, blocks_for, generate
from ffjax.loop import BLOCK, NO_TOKEN, Made
from ffjax.model import Transformer
from ffjax.requests import Request
from ffjax.sampling.params import SamplingParams
from ffjax.speculation import block
from ffjax.speculation.lines import Lines
from ffjax.speculation.lookup import Lookup
from ffjax.speculation.loop import SpeculativeLoop
from ffjax.streaming import stream
from ffjax.text.generator import Generator

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_greedy_tokens_are_those_without_speculation[2-streamed]",
            "test_what_cannot_speculate_is_refused",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return float32_model()


@pytest.mark.drawn("Each batch, by either function.")
@pytest.mark.parametrize("run", [generate, streamed])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_greedy_tokens_are_those_without_speculation(model, batch, run):
    plain, drafted, accepted = both(model, PROMPTS[batch], NEW, run)
    assert len(accepted) == batch
    assert sum(accepted) > batch * NEW / 8
    assert drafted.steps < plain.steps
    made = batch * (NEW - 1)
    assert drafted.tokens_per_step == pytest.approx(made / (made - sum(accepted)))
    assert plain.tokens_per_step == 1


@pytest.mark.drawn(
    "One sequence, and several.",
    sample=[
        "test_drawn_tokens_are_those_without_speculation[1]",
        "test_drawn_tokens_are_those_without_speculation[4]",
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_drawn_tokens_are_those_without_speculation(model, batch):
    seeds = list(range(batch))
    greedy = generate(model, PROMPTS[batch], NEW).tokens
    plain, _, accepted = both(model, PROMPTS[batch], NEW, temperature=0.25, seed=seeds)
    assert plain.tokens != greedy
    assert sum(accepted) > 0
    both(model, PROMPTS[batch], NEW, temperature=1.0, seed=5)


def test_a_text_without_repetition_gets_one_token_a_step(model):
    bias = {t: -60.0 for t in range(12)}

    def falling(logits, before):  # never the same token twice in three
        return logits - 40.0 * before.counts

    prompt, how = STRAIGHT[:12], {"sampling": SamplingParams(logit_bias=bias)}
    _, drafted, accepted = both(model, prompt, 11, logits_processors=falling, **how)
    assert accepted == [0]
    assert drafted.tokens_per_step == 1


@pytest.mark.drawn(
    "What has all stages has each.",
    sample=[
        "test_stages_see_what_they_see_without_speculation[all]",
        "test_stages_see_what_they_see_without_speculation[log-probabilities]",
    ],
)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_stages_see_what_they_see_without_speculation(model, name):
    _, _, accepted = both(
        model, PROMPTS[2], NEW if name == "all" else FEW, sampling=SAMPLINGS[name]
    )
    assert sum(accepted) > 0


def test_a_processor_is_given_the_rows_of_the_batch(model):
    own = np.linspace(0, 3, 2 * 23, dtype=np.float32).reshape(2, 23)

    def processor(logits, before):
        assert logits.shape == before.prompt.shape == before.counts.shape == (2, 23)
        return logits + own + 0.1 * before.prompt - 0.01 * before.lengths[:, None] * before.counts

    _, _, accepted = both(model, PROMPTS[2], FEW, logits_processors=processor)
    assert sum(accepted) > 0


def test_a_stop_token_ends_a_text_wherever_in_a_step_it_comes(model):
    plain = generate(model, CIRCLE, NEW).tokens[0]
    how = {"capacity": len(CIRCLE) + NEW, "sampling": SamplingParams(logprobs=1)}
    seen = set()
    for token in dict.fromkeys(plain):
        out, _, accepted = both(model, CIRCLE, NEW, stop_token=token, **how)
        assert out.tokens[0] == plain[: plain.index(token)]
        seen.add(accepted[0])
    assert len(seen) > 1
    rows = both(model, PROMPTS[4], NEW, stop_token=plain[9])[0].finish_reasons
    assert "stop" in rows


def test_no_more_tokens_come_than_were_asked_for(model):
    capacity = len(CIRCLE) + 40
    for count in range(1, 20):
        out = both(model, CIRCLE, count, capacity=capacity)[1]
        assert len(out.tokens[0]) == count
    assert math.isnan(generate(model, CIRCLE, 1, speculation="lookup").tokens_per_step)
    limits = [SamplingParams(max_tokens=n) for n in (3, 17, NEW, 1)]
    both(model, PROMPTS[4], NEW, sampling=limits)


@pytest.mark.parametrize("prompts", [[CIRCLE], [CIRCLE, STRAIGHT]], ids=["1", "2"])
def test_a_text_may_fill_its_cache(model, prompts):
    slots = 256
    capacity = slots - BLOCK
    both(model, prompts, capacity - len(CIRCLE), streamed, capacity=capacity)
    whole = CONFIG.max_context - len(CIRCLE)
    assert both(model, prompts[:1], whole)[1].finish_reasons == ["length"]


class Replay:
    """A source that knows what comes, and is right as often as it is to be."""

    always = False

    def __init__(self, truth: np.ndarray, tokens: int):
        self.truth, self.tokens = truth, tokens
        # By how many tokens a text has.
        self.right = np.random.default_rng(1).integers(0, tokens, truth.shape[1])

    def drafts(self, known, lengths, weights, state, choosing):
        ahead = jnp.arange(self.tokens - 1)
        drafts = jnp.take_along_axis(jnp.asarray(self.truth), lengths[:, None] + ahead, axis=1)
        wrong = ahead >= jnp.asarray(self.right)[lengths][:, None]
        return (drafts + wrong) % 23, jnp.full(lengths.shape, self.tokens - 1), state


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.0), (2, 0.8), (4, 0.0)])
def test_any_number_of_drafts_may_be_right(model, batch, temperature):
    prompts, tokens, count = PROMPTS[batch], 8 // batch, 150
    want = generate(model, prompts, count, temperature=temperature).tokens
    truth = np.zeros((batch, 256), np.int32)
    for row, prompt, answer in zip(truth, prompts, want, strict=True):
        row[: len(prompt) + count] = [*prompt, *answer]
    source = Replay(truth, tokens)
    request = Request.checked(CONFIG, prompts, count, temperature, 0, None, None)
    steps, replies = SpeculativeLoop(model, request, source), Replies(request)
    replies.add(jax.device_get(steps.prefill()).step(), steps.fault)
    drafted = []
    for step in steps.rows(blocks_for(request, steps.block), replies):
        replies.add(step, steps.fault)
        drafted.append(step.drafted)
    assert replies.tokens == want
    seen = set()
    for b, prompt in enumerate(prompts):
        expected, length, last = [], len(prompt) + 1, len(prompt) + count
        while length < last:
            kept = min(source.right[length] + 1, last - length)
            seen.add(source.right[length])
            expected += [False] + [True] * (kept - 1)
            length += kept
        assert [step[b] for step in drafted] == expected
        assert replies.accepted[b] == sum(expected)
    assert seen == set(range(tokens))


class Shy(Lookup):
    """A lookup that has no drafts in the midst of a text."""

    def drafts(self, known, lengths, weights=None, state=None, choosing=None):
        drafts, counts, state = super().drafts(known, lengths, weights, state, choosing)
        return drafts, jnp.where((lengths > 50) & (lengths < 85), 0, counts), state


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.3}, {"sampling": SamplingParams(logprobs=1, frequency_penalty=0.01)}],
    ids=["greedy", "drawn", "penalized"],
)
def test_where_nothing_repeats_steps_are_plain(model, how, monkeypatch):
    shapes = []
    decode = SpeculativeLoop.decode

    def seen(loop):
        made = decode(loop)
        shapes.append(made.tokens.shape[2])
        return made

    monkeypatch.setattr(SpeculativeLoop, "decode", seen)
    request = {"capacity": 200, "speculation": Shy(), **how}
    prompts = [CIRCLE[:20], STRAIGHT]
    _, _, accepted = both(model, prompts, 100, **request)
    assert sum(accepted) > 0
    assert shapes[:2] == [4, 4]
    first = shapes.index(1)
    assert 4 in shapes[first:]
    alone = both(model, STRAIGHT, 100, **request)[2]
    assert alone[0] > 0


def test_plain_blocks_are_ordered_where_no_draft_was_right_and_none_is_there(model, monkeypatch):
    none = np.full((BLOCK, 1, 4), NO_TOKEN)
    none[..., 0] = 1
    right = none.copy()
    right[3, 0, 1] = 2
    made = [(right, False), (none, True), (none, False), (none[..., :1], False), (none, True)]
    request = Request.checked(CONFIG, STRAIGHT, NEW, 0.0, 0, None, None)
    steps, quiet = SpeculativeLoop(model, request, Lookup(tokens=4)), []

    def decode():
        quiet.append(steps._quiet)
        return Made(made[len(quiet) - 1][0], None, np.bool_(made[len(quiet) - 1][1]))

    monkeypatch.setattr(steps, "decode", decode)
    # Each block is ordered when the one before it has been looked at.
    monkeypatch.setattr(loop, "AHEAD", 0)
    assert len(list(steps.rows(len(made), Replies(request)))) == 5 * BLOCK + 1
    assert quiet == [False, False, False, True, True]


def test_a_sequence_that_has_all_its_tokens_stays_where_it_is(model):
    """In plain blocks, too, which run since another one has no drafts for a while."""
    prompts, limits = [CIRCLE[:20], STRAIGHT], [5, 100]
    params = [SamplingParams(max_tokens=limit) for limit in limits]
    request = Request.checked(CONFIG, prompts, 100, 0.0, 0, None, 200, params)
    steps = SpeculativeLoop(model, request, Shy(tokens=4))
    steps.prefill()
    ends = [len(prompt) - 1 + limit for prompt, limit in zip(prompts, limits, strict=True)]
    shapes, lengths = set(), []
    for _ in range(13):
        made = jax.device_get(steps.decode())
        lengths = steps.cache.lengths.tolist()
        assert all(map(int.__le__, lengths, ends)), (lengths, ends)
        shapes.add(made.tokens.shape[2])
        steps._quiet = not (made.drafted or (made.tokens[..., 1:] != NO_TOKEN).any())
    assert lengths == ends
    assert shapes == {1, 4}


def test_one_that_has_all_its_tokens_has_no_drafts():
    known, number = jnp.array([CIRCLE[:16]] * 2), jnp.array([15, 15])
    bounds = block.Bounds(jnp.array([3, 3]), jnp.array([15, 16]))
    found = block._look(Lookup(tokens=4), None, known, number, None, bounds)
    assert found.counts.tolist() == [0, 3]


class Told:
    """A reader that notes what it is asked."""

    def __init__(self):
        self.asked: list[list[list[int]]] = []

    def would_finish(self, columns):
        self.asked.append([[*column] for column in columns])
        return len(self.asked) == 2

    def has_ended(self, row):
        return False


def test_tokens_that_wait_for_another_sequence_are_among_those_that_may_end_it():
    none, reader = NO_TOKEN, Told()
    lines = Lines(2, reader)
    blocks = [
        Made(np.array([[[1, 2, 3], [11, none, none]]]), None),
        Made(np.array([[[4, none, none], [12, 13, none]]]), None),
    ]
    given, ends = [], []
    for made in blocks:
        ends.append(lines.would_finish(made))
        given += [step.tokens for step in lines.taken([made])]
    assert reader.asked == [[[1, 2, 3], [11]], [[2, 3, 4], [12, 13]]]
    assert ends == [False, True]
    assert given == [[1, 11], [2, 12], [3, 13]]


def test_a_reader_of_a_stream_may_end_one_text(model):
    rows = stream(model, PROMPTS[4], NEW, speculation="lookup")
    plain = generate(model, PROMPTS[4], NEW).tokens
    for i, _ in enumerate(rows):
        if i == 4:
            rows.stop(2, "enough")
    out = rows.output
    assert out.tokens == [*plain[:2], plain[2][:5], plain[3]]
    assert (out.finish_reasons[2], out.stop_reasons[2]) == ("stop", "enough")
    rows = stream(model, PROMPTS[2], NEW, speculation="lookup")
    for _ in range(3):
        next(rows)
    rows.close()
    assert rows.output.tokens == [row[:3] for row in generate(model, PROMPTS[2], 3).tokens]


def test_numbers_that_are_not_finite_end_with_what_came_before(model):
    def broken(logits, before):
        return jnp.where(before.lengths[:, None] == 13, jnp.nan, logits)

    errors = []
    for speculation in (None, "lookup"):
        with pytest.raises(NotFiniteError) as caught:
            how = {"logits_processors": broken, "speculation": speculation}
            generate(model, PROMPTS[2], FEW, **how)
        errors.append(caught.value)
    plain, drafted = errors
    assert str(drafted) == str(plain)
    assert drafted.output.tokens == plain.output.tokens
    assert [len(row) for row in drafted.output.tokens] == [13, 13]


def test_without_speculation_programs_are_those_of_before(model):
    with compilations() as seen:
        generate(model, CIRCLE, NEW, capacity=600)
        before = len(seen)
        for none in (None, "none"):
            out = generate(model, CIRCLE, NEW, capacity=600, speculation=none)
            assert out.accepted is None
        assert len(seen) == before
        generate(model, CIRCLE, NEW, capacity=600, speculation="lookup")
        with_drafts = len(seen)
        assert with_drafts > before
        # The settings of the lookup are part of the program, lengths and prompts are not.
        generate(model, STRAIGHT, NEW - 1, capacity=600, speculation=Lookup())
        assert len(seen) == with_drafts


@pytest.mark.parametrize(
    ("batch", "speculation", "error", "says"),
    [
        (5, "lookup", ValueError, "Speculation takes 1 to 4 sequences.*there are 5 prompts"),
        (1, "magic", ValueError, r"'lookup', a ffjax\.Lookup or a ffjax\.Draft; got 'magic'"),
        (1, True, TypeError, "got True"),
        (2, Lookup(tokens=5), ValueError, "5 of each of 2. Ask for up to 4"),
    ],
)
def test_what_cannot_speculate_is_refused(model, batch, speculation, error, says):
    with pytest.raises(error, match=says):
        generate(model, [STRAIGHT] * batch, 3, speculation=speculation)


def test_a_lookup_has_settings(model):
    few, many = (
        both(model, CIRCLE, FEW, speculation=one)[1]
        for one in (Lookup(tokens=2), Lookup(min_match=1, max_match=4))
    )
    assert few.tokens_per_step <= 2 < many.tokens_per_step


@pytest.mark.by_numpy
def test_fused_steps_speculate(monkeypatch):
    """Interpreted: steps of one token, and of two."""
    model = random_model(dataclasses.replace(CONFIG, head_dim=32))

    def fused(model, cache, tokens, implementation):
        return fused_step(model, cache, tokens, interpret=True)

    for module in (loop, block):
        monkeypatch.setattr(module, "decode_step", fused)
    _, drafted, accepted = both(model, CIRCLE, FEW, speculation=Lookup(tokens=2))
    assert accepted[0] > 0
    assert 1 < drafted.tokens_per_step < 2


PROMPT = """def add(a, b):
    return a + b


def sub(a, b):
    return a - b


def mul(a, b):
    return"""


@functools.cache
def generators() -> list[Generator]:
    return [Generator.load(dtype=jnp.float32, speculation=one) for one in (None, "lookup")]


def test_texts_are_those_without_speculation():
    plain, drafted = generators()
    how = {"max_tokens": 60, "stop": ["nothing", "class that"]}
    one, other = (g.generate(PROMPT, **how) for g in (plain, drafted))
    assert other.text == one.text
    assert other.tokens == one.tokens
    assert (other.finish_reason, other.stop_reason) == ("stop", "class that")
    assert other.finish_reason == one.finish_reason
    assert other.accepted
    assert other.tokens_per_step == other.made / (other.made - other.accepted) > 1
    assert (one.accepted, one.tokens_per_step) == (None, 1)
    with drafted.stream(PROMPT, **how) as pieces:
        assert "".join(pieces) == one.text


def test_many_texts_are_written_four_at_a_time():
    plain, drafted = generators()
    prompts = [PROMPT[:n] for n in (40, 8, 70, 17, 30, 31, 50, 66)]
    rows = [g.generate(prompts, max_tokens=16, temperature=0.5, seed=3) for g in (plain, drafted)]
    assert [one.text for one in rows[1]] == [one.text for one in rows[0]]


@pytest.mark.parametrize("tokens", [3, 8])
def test_no_more_texts_are_written_at_a_time_than_a_step_has_room_for(tokens):
    plain, _ = generators()
    lookup = Lookup(tokens=tokens)
    drafted = Generator(plain.model, plain.tokenizer, speculation=lookup)
    prompts = [PROMPT[:n] for n in (40, 8, 70)]
    rows = [g.generate(prompts, max_tokens=8) for g in (plain, drafted)]
    assert [one.text for one in rows[1]] == [one.text for one in rows[0]]


def test_the_command_tells_how_many_tokens_a_step_made(capsys):
    asked = ["generate", "--prompt", PROMPT, "--max-new-tokens", "16", "--speculation", "lookup"]
    assert main([*asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens_per_step"] == pytest.approx(15 / (15 - report["accepted"]))
    assert main(asked) == 0
    assert f"{report['tokens_per_step']:.2f} tokens a step" in capsys.readouterr().err
    assert main([*asked, "-n", "2", "--temperature", "0.5"]) == 0
    assert "tokens a step" in capsys.readouterr().err
