"""Drafts of a second model: the tokens that come without, and a cache that is always right."""

import dataclasses
import json
import random
import types
from typing import Any

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

import checkpoints
from ffjax import Draft, Generator, SamplingParams, generate, quantize, stream
from ffjax.broken import NotFiniteError
from ffjax.cache import KVCache
from ffjax.cli import main
from ffjax.decode import fused_step
from ffjax.generation import Replies, blocks_for
from ffjax.loop import BLOCK
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.requests import Request
from ffjax.speculation import drafting
from ffjax.speculation.draft_loop import DraftLoop
from ffjax.speculation.drafting import FIRST_TOKENS, ModelSource
from ffjax.speculation.source import Choosing

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_greedy_tokens_are_those_without_a_draft[itself-1-generate]",
            "test_what_cannot_draft_is_refused",
            "test_a_draft_refuses_what_it_cannot_be",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

LIMITS = [SamplingParams(max_tokens=n) for n in (3, 17, NEW, 1)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return float32_model()


@pytest.fixture(scope="module")
def drafts(model) -> dict[str, Transformer]:
    return {
        "itself": model,
        "quantized": quantize(model, "int8"),
        "another": float32_model(3, name="another", num_layers=2),
    }


# Tokens are those that come without


@pytest.mark.drawn("Each draft, and each batch.")
@pytest.mark.parametrize(("batch", "run"), [(1, generate), (2, streamed), (4, generate)])
@pytest.mark.parametrize("name", ["itself", "quantized", "another"])
def test_greedy_tokens_are_those_without_a_draft(model, drafts, name, batch, run):
    speculation = Draft(drafts[name])
    _, drafted, accepted = both(model, PROMPTS[batch], NEW, run, speculation=speculation)
    made = NEW - 1
    if name == "itself":
        steps = -(-made // min(4, 8 // batch))
        assert accepted == [made - steps] * batch
        assert drafted.tokens_per_step == pytest.approx(made / steps)
    if name == "quantized":
        assert sum(accepted) > batch * made / 4
    if name == "another":
        assert sum(accepted) < batch * made / 4


@pytest.mark.drawn("Each draft, and each batch.")
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", ["itself", "another"])
def test_drawn_tokens_are_those_without_a_draft(model, drafts, name, batch):
    how: dict[str, Any] = {
        "temperature": 1.0,
        "seed": list(range(batch)),
        "speculation": Draft(drafts[name]),
    }
    accepted = both(model, PROMPTS[batch], NEW, **how)[2]
    # By the same noise, so that a model agrees with itself, and others often.
    made = NEW - 1
    steps = -(-made // min(4, 8 // batch))
    assert accepted == [made - steps] * batch if name == "itself" else sum(accepted) > made / 8


@pytest.mark.parametrize("tokens", range(2, 9))
def test_a_model_that_drafts_for_itself_is_always_right(model, tokens):
    count = 1 + 4 * tokens
    _, drafted, accepted = both(model, CIRCLE, count, speculation=Draft(model, tokens))
    assert drafted.tokens_per_step == tokens
    assert accepted == [4 * (tokens - 1)]


@pytest.mark.drawn(
    "What has all stages has each.",
    sample=[
        "test_drafts_are_chosen_as_tokens_are[all]",
        "test_drafts_are_chosen_as_tokens_are[log-probabilities]",
    ],
)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_drafts_are_chosen_as_tokens_are(model, name):
    how: dict[str, Any] = {"sampling": SAMPLINGS[name], "speculation": Draft(model)}
    if name == "penalties":
        how["sampling"] = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2)
    accepted = both(model, PROMPTS[2], FEW, **how)[2]
    assert accepted == [FEW - 1 - 4] * 2


def test_a_processor_is_given_the_rows_of_the_batch(model):
    own = np.linspace(0, 3, 2 * 23, dtype=np.float32).reshape(2, 23)

    def processor(logits, before):
        assert logits.shape == before.prompt.shape == before.counts.shape == (2, 23)
        return logits + own + 0.1 * before.prompt - 0.01 * before.lengths[:, None] * before.counts

    how = {"logits_processors": processor, "speculation": Draft(model)}
    assert both(model, PROMPTS[2], FEW, **how)[2] == [FEW - 1 - 4] * 2


@pytest.mark.parametrize("name", ["itself", "another"])
def test_a_text_ends_at_the_same_token(model, drafts, name):
    speculation = Draft(drafts[name], 2)
    plain = generate(model, PROMPTS[4], NEW).tokens
    both(model, PROMPTS[4], NEW, stop_token=plain[1][9], speculation=speculation)
    both(model, PROMPTS[4], NEW, sampling=LIMITS, speculation=speculation)
    how = {"capacity": 80, "speculation": Draft(drafts[name])}
    for count in (1, 2, 4, 5, 6):
        both(model, CIRCLE, count, **how)
    for token in dict.fromkeys(generate(model, CIRCLE, NEW).tokens[0]):
        both(model, CIRCLE, NEW, stop_token=token, **how)


@pytest.mark.parametrize("tokens", [4, 8])
def test_a_text_may_fill_its_cache(model, tokens):
    slots, speculation = 256, Draft(model, tokens)
    capacity = slots - BLOCK
    how = {"capacity": capacity, "speculation": speculation}
    both(model, CIRCLE, capacity - len(CIRCLE), streamed, **how)
    whole = CONFIG.max_context - len(CIRCLE)
    assert both(model, CIRCLE, whole, speculation=speculation)[1].finish_reasons == ["length"]


def test_a_draft_model_may_have_a_shorter_context(model):
    short = float32_model(max_context=64, name="short")
    both(model, CIRCLE, 64 - len(CIRCLE), speculation=Draft(short))
    says = "need 65 positions; the draft model short was made for 64. Ask for fewer"
    with pytest.raises(ValueError, match=says):
        generate(model, [CIRCLE, [2]], 65 - len(CIRCLE), speculation=Draft(short))


def test_a_draft_model_without_numbers_is_wrong_and_no_more(model):
    broken = float32_model(4)
    broken.final_norm[...] = jnp.full_like(broken.final_norm[...], jnp.nan)
    each: tuple[dict[str, Any], ...] = {}, {"temperature": 0.7, "seed": 2}
    for how in each:
        accepted = both(model, PROMPTS[2], FEW, speculation=Draft(broken), **how)[2]
        assert sum(accepted) < 8


def test_numbers_of_the_model_that_are_not_finite_end_with_what_came_before(model):
    def broken(logits, before):
        return jnp.where(before.lengths[:, None] == 13, jnp.nan, logits)

    errors = []
    for speculation in (None, Draft(model)):
        with pytest.raises(NotFiniteError) as caught:
            how: dict[str, Any] = {"logits_processors": broken, "speculation": speculation}
            generate(model, PROMPTS[2], FEW, **how)
        errors.append(caught.value)
    assert str(errors[1]) == str(errors[0])
    assert errors[1].output.tokens == errors[0].output.tokens


def test_a_reader_of_a_stream_may_end_one_text(model):
    rows = stream(model, PROMPTS[4], NEW, speculation=Draft(model))
    plain = generate(model, PROMPTS[4], NEW).tokens
    for i, _ in enumerate(rows):
        if i == 4:
            rows.stop(2, "enough")
    assert rows.output.tokens == [*plain[:2], plain[2][:5], plain[3]]


# The draft model's cache


def greedy(memory, fed, logits, greedy, number):
    return greedy, memory


@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
def test_drafts_are_those_of_the_draft_model_from_scratch(drafts, tokens):
    """Whatever was kept before: of texts that any number of drafts is right in."""
    model, rng = drafts["another"], random.Random(tokens)
    batch, capacity = 3, 200
    taken = Parts.of(model)
    source = ModelSource(graphdef=taken.graphdef, tokens=tokens, implementation="xla")
    choosing = Choosing(None, greedy)
    find = jax.jit(lambda known, *args: source.drafts(known, *args, choosing=choosing))
    texts = [[rng.randrange(23) for _ in range(n)] for n in (2, 9, 30)]
    cache = KVCache.create(model.config, batch, 256, jnp.float32, tokens=FIRST_TOKENS)
    fed = np.zeros((batch, 30), np.int32)
    for row, text in zip(fed, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    counts = jnp.array([len(text) - 1 for text in texts])
    cache = model(jnp.asarray(fed), cache, num_tokens=counts)[1]
    seen = set()
    for _ in range(12):
        known = np.full((batch, 256), 22, np.int32)
        for row, text in zip(known, texts, strict=True):
            row[: len(text)] = text
        lengths = jnp.array([len(text) for text in texts], jnp.int32)
        found, many, cache = find(jnp.asarray(known), lengths, taken.state, cache)
        want = generate(model, texts, tokens - 1, capacity=capacity).tokens
        assert found.tolist() == want
        assert many.tolist() == [tokens - 1] * batch
        for text, draft in zip(texts, want, strict=True):
            right = rng.randrange(tokens)
            seen.add(right)
            other = (draft[right] + rng.randrange(1, 23)) if right < len(draft) else 5
            text += [*draft[:right], other % 23]
    assert seen == set(range(tokens))


def test_a_step_that_gave_up_drafts_some_token(model):
    """It has chosen none, -1, which is no place in a history."""

    def none(memory, fed, logits, greedy, number):
        return jnp.full_like(greedy, -1), memory

    parts = Parts.of(model)
    source = ModelSource(graphdef=parts.graphdef, tokens=4, implementation="xla")
    cache = KVCache.create(CONFIG, 1, 16, jnp.float32, tokens=FIRST_TOKENS)
    lengths = jnp.array([5], jnp.int32)
    known = jnp.ones((1, 16), jnp.int32)
    drafts, *_ = source.drafts(known, lengths, parts.state, cache, Choosing(None, none))
    assert drafts.tolist() == [[0, 0, 0]]


class Doubted(ModelSource):
    """A draft model whose tokens are changed, from a place on that hangs on the text's length.

    It goes on from what it was made to say: the wrong tokens are in its cache.
    """

    right = np.random.default_rng(1).integers(0, 8, 400)

    def drafts(self, known, lengths, weights, state, choosing):
        assert choosing is not None

        def changed(memory, fed, logits, greedy, number):
            token, memory = choosing.next(memory, fed, logits, greedy, number)
            right = jnp.asarray(self.right % self.tokens)[lengths]
            return jnp.where(number >= right, (token + 1) % 23, token), memory

        how = Choosing(choosing.memory, changed)
        return super().drafts(known, lengths, weights, state, how)


@pytest.mark.parametrize(("batch", "temperature"), [(1, 0.0), (2, 0.8), (4, 0.0)])
def test_the_cache_is_right_behind_any_number_of_right_drafts(model, batch, temperature):
    prompts, tokens, count = PROMPTS[batch], 8 // batch, 150
    want = generate(model, prompts, count, temperature=temperature).tokens
    request = Request.checked(CONFIG, prompts, count, temperature, 0, None, None)

    steps = DraftLoop(model, request, Draft(model, tokens), make=Doubted)
    replies = Replies(request)
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
            right = int(Doubted.right[length] % tokens)
            kept = min(right + 1, last - length)
            seen.add(right)
            expected += [False] + [True] * (kept - 1)
            length += kept
        assert [step[b] for step in drafted] == expected
    assert seen == set(range(tokens))


# Programs


def test_weights_and_prompts_are_no_part_of_a_program(model, drafts):
    how: dict[str, Any] = {"capacity": 600}
    speculation = Draft(drafts["another"])
    generate(model, CIRCLE, NEW, speculation=speculation, **how)
    other = float32_model(5, name="another", num_layers=2)
    with compilations() as seen:
        out = generate(model, STRAIGHT, NEW - 1, speculation=Draft(other), **how)
        assert seen == []
    assert out.tokens == generate(model, STRAIGHT, NEW - 1, **how).tokens
    # There is always a draft: of blocks of plain steps there is no program.
    request = Request.checked(CONFIG, CIRCLE, NEW, 0.0, 0, None, 600)
    assert len(DraftLoop(model, request, dataclasses.replace(speculation, tokens=4))._block) == 1


@pytest.mark.by_numpy
def test_fused_steps_draft(monkeypatch):
    """Interpreted: of two tokens, and of one."""
    config = dataclasses.replace(CONFIG, head_dim=32)
    model = random_model(config)
    shapes = []

    def fused(model, cache, tokens, implementation):
        shapes.append(tokens.shape)
        return fused_step(model, cache, tokens, interpret=True)

    monkeypatch.setattr(drafting, "decode_step", fused)
    accepted = both(model, CIRCLE, BLOCK + 1, speculation=Draft(model, 3))[2]
    assert accepted[0] > 2
    assert set(shapes) == {(1, 2), (1,)}


# What is refused


def test_what_cannot_draft_is_refused(model):
    large = float32_model(vocab_size=24, name="large")
    fits = "vocabulary of the model: large has 24 tokens, tiny has 23. Take another"
    for fails in (
        lambda: generate(model, CIRCLE, 3, speculation=Draft(large)),
        lambda: Generator(model, types.SimpleNamespace(), speculation=Draft(large)),  # pyright: ignore
    ):
        with pytest.raises(ValueError, match=fits):
            fails()
    with pytest.raises(ValueError, match=r"5 of each of 2\. Ask for up to 4"):
        generate(model, PROMPTS[2], 3, speculation=Draft(model, 5))
    with pytest.raises(ValueError, match="1 to 4 sequences"):
        generate(model, [CIRCLE] * 5, 3, speculation=Draft(model))
    with pytest.raises(NotImplementedError, match="Of the draft model tiny: The fused"):
        generate(model, CIRCLE, 3, implementation="pallas", speculation=Draft(model))


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        (("SmolLM2-135M",), TypeError, r"takes a ffjax\.Transformer, as ffjax\.load returns"),
        ((1,), ValueError, "2 tokens of a sequence or more; got tokens=1"),
        ((2.5,), TypeError, r"tokens of a Draft is an integer, got 2\.5"),
        ((True,), TypeError, "got True"),
    ],
)
def test_a_draft_refuses_what_it_cannot_be(model, args, error, says):
    with pytest.raises(error, match=says):
        Draft(*args) if isinstance(args[0], str) else Draft(model, *args)


# Texts


def test_texts_are_those_without_a_draft():
    plain = Generator.load(dtype=jnp.float32)
    drafted = Generator(
        plain.model, plain.tokenizer, speculation=Draft(quantize(plain.model, "int4"))
    )
    how: dict[str, Any] = {"max_tokens": 30, "temperature": 0.4, "seed": 3}
    prompts = ["def add(a, b):", "class Stack:\n"]
    rows = [g.generate(prompts, **how) for g in (plain, drafted)]
    assert [one.text for one in rows[1]] == [one.text for one in rows[0]]
    assert all(one.accepted for one in rows[1])
    with drafted.stream(prompts[0], **how) as pieces:
        assert "".join(pieces) == plain.generate(prompts[0], **how).text


def test_the_command_takes_a_draft_model(tmp_path, capsys):
    def run(*how, code=0):
        asked = [
            "generate",
            "--model",
            tiny,
            "--prompt",
            "def add(",
            "--max-new-tokens",
            "17",
            *how,
        ]
        assert main(asked) == code
        out, err = capsys.readouterr()
        return json.loads(out) if "--json" in how else err

    tiny, path = str(tmp_path / "tiny"), str(tmp_path / "int8")
    checkpoints.save(float32_model(vocab_size=257), tiny)
    checkpoints.save(quantize(checkpoints.load(tiny), "int8"), path)
    plain = run("--json")
    assert "tokens_per_step" not in plain
    for how in (["--draft", path], ["--draft-weights", "int8", "--speculation-tokens", "3"]):
        report = run("--json", *how)
        assert len(report["tokens"]) == 17
        assert report["tokens_per_step"] == pytest.approx(16 / (16 - report["accepted"]))
        assert 1 < report["tokens_per_step"] <= (4 if how[0] == "--draft" else 3)
    assert "tokens a step" in run("--draft", path)
    assert "tokens a step" in run("--draft", path, "-n", "2", "--temperature", "0.5")
    lookup = run("--json", "--speculation", "lookup", "--speculation-tokens", "2")
    assert lookup["tokens_per_step"] <= 2
    assert "are two. Leave one out" in run("--speculation", "lookup", "--draft", path, code=2)
    assert "and there is none" in run("--speculation-tokens", "3", code=2)
    twice = run("--draft", path, "--draft-weights", "int8", code=2)
    assert "quantized already" in twice
    assert "Leave it out, or give a model" in twice
    checkpoints.save(float32_model(vocab_size=257, model_dim=64), tiny, overwrite=True)
    groups = run("--draft-weights", "int4", code=2)
    assert "multiple of 128; they are 64. Give --draft-weights int8" in groups
