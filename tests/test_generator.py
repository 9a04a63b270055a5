"""`ffjax.Generator`: text in, text out, and the tokens those of `ffjax.generate`."""

import dataclasses
import gc
import json
import math
import random
import weakref
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx
from generate_cases import TINY
from talkers import write_talker
from test_hf_tokenizer import KINDS, TEXTS, write

import checkpoints
import ffjax
from ffjax.cli import main
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.model import Transformer
from ffjax.sampling.params import SamplingParams
from ffjax.text.asked import MAX_TOKENS
from ffjax.text.batches import TextBatch
from ffjax.text.generator import Generator
from ffjax.text.writer import Writer
from ffjax.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_the_tokens_are_those_of_generate",
            "test_a_stream_gives_what_generate_gives_piece_by_piece",
            "test_bad_input_is_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

TOKENIZER = ByteTokenizer()
# Drawn, so that the text of a model that knows nothing does not repeat.
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=30)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(TINY, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model, TOKENIZER)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Generator:
    folder = write_talker(tmp_path_factory.mktemp("hf") / "talker")
    return Generator.load(folder, dtype=jnp.float32)


# Tokens to text


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_random_tokens_become_the_text_that_decoding_them_all_gives(kind, tmp_path):
    tokenizer = TOKENIZER if kind == "bytes" else HFTokenizer.read(write(tmp_path, kind))
    draw = random.Random(3)
    for _ in range(150):
        text = "".join(draw.choices([*"he lo wrd\n", "日", "🐍", "é", *TEXTS[1:4]], k=9))
        prompt, new = TOKENIZER.encode(text), []
        tokens = tokenizer.encode(text)
        cut = draw.randrange(1, len(tokens))
        prompt, new = tokens[:cut], tokens[cut:]
        writer = Writer(tokenizer, prompt, SamplingParams())
        pieces = [writer.push(token) for token in new]
        said = "".join([*pieces, writer.finish()])
        assert "\ufffd" not in "".join(pieces)
        before = tokenizer.stream()
        assert "".join(map(before.push, prompt)) + said == text
        assert writer.text == said


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_a_stop_string_is_found_in_any_tokens(kind, tmp_path):
    tokenizer = TOKENIZER if kind == "bytes" else HFTokenizer.read(write(tmp_path, kind))
    draw = random.Random(4)
    for _ in range(150):
        text = "".join(draw.choices([*"helo wrd", "日本", "é"], k=20))
        start = draw.randrange(18)
        stop = text[start : start + draw.randrange(1, 5)]
        prompt, *tokens = (
            tokenizer.encode("x" + text) if kind == "bytes" else tokenizer.encode(text)
        )
        shown = Writer(tokenizer, [prompt], SamplingParams(stop=stop))
        said = "".join([*map(shown.push, tokens), shown.finish()])
        assert said == text[: text.index(stop)]
        assert shown.stopped == stop
        kept = Writer(
            tokenizer, [prompt], SamplingParams(stop=stop, include_stop_str_in_output=True)
        )
        assert "".join([*map(kept.push, tokens), kept.finish()]) == said + stop


# generate


def test_the_tokens_are_those_of_generate(model, generator):
    out = generator.generate("class A:\n", DRAWN)
    expected = ffjax.generate(model, TOKENIZER.encode("class A:\n"), 30, temperature=1.0, seed=[7])
    assert out.tokens == expected.tokens[0]
    assert out.text == TOKENIZER.decode(out.tokens)
    assert (out.prompt_tokens, out.cached_tokens, out.seed) == (9, 0, 7)
    assert (out.finish_reason, out.stop_reason, out.logprobs) == ("length", None, None)
    assert (out.implementation, out.prefill) == ("xla", "xla")
    assert out.tokens_per_second == pytest.approx(29 / out.decode_seconds)


def test_unequal_prompts_get_what_each_gets_alone(generator):
    prompts = ["a", "class Stack:\n" * 9, "é", "x = 1\n" * 3, *map(str, range(6))]
    params = [
        dataclasses.replace(DRAWN, seed=i, max_tokens=5 + i, stop=["e"] if i % 2 else [])
        for i in range(len(prompts))
    ]
    together = generator.generate(prompts, params)
    assert len(together) == 10  # more than run side by side
    for prompt, one, out in zip(prompts, params, together, strict=True):
        alone = generator.generate(prompt, one)
        assert (out.text, out.tokens) == (alone.text, alone.tokens)
        assert (out.finish_reason, out.stop_reason) == (alone.finish_reason, alone.stop_reason)


def test_several_texts_of_a_prompt_have_seeds_that_follow_each_other(generator):
    two = generator.generate(["a", "b", "c", "d", "e"], DRAWN, n=2)
    assert [[one.seed for one in row] for row in two] == [[7, 8]] * 5
    out = generator.generate("a", DRAWN, n=2)
    assert [one.seed for one in out] == [7, 8]
    assert [one.text for one in out] == [one.text for one in two[0]]
    assert [one.text for one in out] == [
        generator.generate("a", DRAWN, seed=seed).text for seed in (7, 8)
    ]
    assert len({one.text for one in out}) == 2
    last = generator.generate("a", DRAWN, n=2, seed=2**64 - 1)
    assert [one.seed for one in last] == [2**64 - 1, 0]


def test_without_a_seed_each_text_has_one_of_its_own_that_draws_it_again(generator):
    first, second = (generator.generate("a", temperature=1.0, max_tokens=20) for _ in range(2))
    assert first.text != second.text
    assert generator.generate("a", temperature=1.0, max_tokens=20, seed=first.seed) == (
        dataclasses.replace(
            first,
            compile_seconds=pytest.approx(0, abs=60),
            prefill_seconds=pytest.approx(0, abs=60),
            decode_seconds=pytest.approx(0, abs=60),
        )
    )


def test_a_stop_string_ends_a_text_and_is_said(generator):
    free = generator.generate("a", DRAWN).text
    at = next(i for i in range(5, len(free) - 2) if free[i : i + 2].isascii())
    stop = free[at : at + 2]
    at = free.index(stop)
    out = generator.generate("a", DRAWN, stop=stop)
    assert (out.text, out.finish_reason, out.stop_reason) == (free[:at], "stop", stop)
    # The tokens that say it are there.
    assert TOKENIZER.decode(out.tokens) == free[: at + 2]
    kept = generator.generate("a", DRAWN, stop=["never", stop], include_stop_str_in_output=True)
    assert kept.text == free[: at + 2]
    assert "".join(generator.stream("a", DRAWN, stop=stop)) == free[:at]


def test_a_stop_string_that_comes_with_the_last_token_has_ended_the_text(generator):
    free = generator.generate("a", DRAWN)
    token = next(token for token in free.tokens[5:] if token < 128)
    most = free.tokens.index(token) + 1
    out = generator.generate("a", DRAWN, max_tokens=most, stop=chr(token))
    assert (out.finish_reason, out.stop_reason) == ("stop", chr(token))
    assert len(out.tokens) == most


def test_a_stop_token_is_said_and_not_shown(generator):
    free = generator.generate("a", DRAWN)
    token = free.tokens[9]
    out = generator.generate("a", DRAWN, stop_token_ids=[token])
    assert out.tokens == free.tokens[: free.tokens.index(token)]
    assert (out.finish_reason, out.stop_reason) == ("stop", token)
    assert out.tokens_per_second == pytest.approx(len(out.tokens) / out.decode_seconds)


def test_log_probabilities_come_with_their_tokens(generator):
    plain, told = generator.generate(["a", "b"], [DRAWN, dataclasses.replace(DRAWN, logprobs=2)])
    assert plain.logprobs is None
    assert len(told.logprobs) == len(told.tokens)
    assert all(len(one.top) == 2 and one.logprob <= 0 for one in told.logprobs)


def test_without_a_number_there_are_as_many_tokens_as_there_is_room_for(generator):
    out = generator.generate("a" * 390)
    assert out.prompt_tokens + len(out.tokens) == TINY.max_context
    # A longer prompt beside it does not change that.
    both = generator.generate(["a" * 390, "b" * 370])
    assert [len(one.tokens) for one in both] == [10, 30]
    assert MAX_TOKENS == 1024


# stream


def test_a_stream_gives_what_generate_gives_piece_by_piece(talker):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    whole = talker.generate("hello", params)
    stream = talker.stream("hello", params)
    seen = ""
    for piece in stream:
        assert piece
        seen += piece
        assert stream.completion.text.startswith(seen)
    assert seen == whole.text == stream.completion.text
    assert stream.completion.tokens == whole.tokens
    assert list(stream) == []


def test_a_stream_that_is_left_keeps_what_came_and_frees_its_cache(generator, monkeypatch):
    batches = []
    made = TextBatch.__init__

    def watched(self, *args, **options):
        batches.append(weakref.ref(self))
        made(self, *args, **options)

    monkeypatch.setattr(TextBatch, "__init__", watched)
    with generator.stream("a", DRAWN) as stream:
        first = next(stream)
    out = stream.completion
    assert (out.text, out.finish_reason) == (first, None)
    assert 1 <= len(out.tokens) < 30
    assert list(stream) == []
    stream.close()
    gc.disable()  # no circle keeps it
    try:
        del stream
        assert [batch() for batch in batches] == [None]
    finally:
        gc.enable()


# What is no number


def test_what_came_before_nan_is_kept():
    untied = dataclasses.replace(TINY, tied_embeddings=False)
    broken = Transformer(untied, rngs=nnx.Rngs(1), dtype=jnp.float32)
    free = Generator(broken, TOKENIZER).generate(["ab", "cd"], DRAWN)
    # The first that comes to this token has no next one.
    token = free[0].tokens[9]
    broken.embed[...] = broken.embed[...].at[token].set(math.nan)
    with pytest.raises(ffjax.NotFiniteError) as raised:
        Generator(broken, TOKENIZER).generate(["ab", "cd"], DRAWN)
    [one, other] = raised.value.completions or []
    assert one.tokens == free[0].tokens[: free[0].tokens.index(token) + 1]
    assert other.tokens == free[1].tokens[: len(other.tokens)] != []
    assert (one.finish_reason, other.finish_reason) == (None, None)
    short = [dataclasses.replace(DRAWN, max_tokens=1)] * 5 + [DRAWN] * 5
    with pytest.raises(ffjax.NotFiniteError) as raised:
        Generator(broken, TOKENIZER).generate(["ab"] * 10, short)
    first, *_, last = raised.value.completions or []
    assert (first.tokens, last.tokens) == (one.tokens[:1], one.tokens)
    stream = Generator(broken, TOKENIZER).stream("ab", DRAWN)
    with pytest.raises(ffjax.NotFiniteError):
        list(stream)
    assert stream.completion.text == one.text


# Loading


def test_the_files_of_a_checkpoint_say_how_tokens_are_chosen(tmp_path):
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    folder = write_talker(tmp_path / "hf", generation_config__json=config)
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert (
        main(["quantize", str(tmp_path / "ours"), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    )
    for place in (folder, tmp_path / "ours", tmp_path / "int8"):
        generator = Generator.load(place)
        assert generator.sampling == SamplingParams.from_generation_config(config)
        assert generator.sampling.temperature == 0.6
        assert generator.tokenizer.eot_ids == (1, 2)
    assert Generator.load(folder, sampling=DRAWN).sampling == DRAWN
    assert Generator.load(folder, weights="int8").model.config.weights.quantized
    assert Generator.load().sampling == SamplingParams()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"generation_config.json is damaged: it is not JSON"),
        ('{"do_sample": true, "top_p": 3}', r"generation_config.json .* top_p must be above 0"),
        ('{"max_new_tokens": "many"}', r"cannot be followed: max_tokens is an integer"),
    ],
)
def test_a_file_that_cannot_be_followed_is_named(content, sentence, tmp_path):
    folder = write_talker(tmp_path / "hf")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Generator.load(folder)


def test_the_readme_chats_with_a_folder(tmp_path, capsys):
    folder = write_talker(tmp_path / "hf")
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    [lines] = [block for block in readme.split("```") if ".stream_chat(" in block]
    code = lines.removeprefix("python\n").replace('"Llama-3.2-1B-Instruct"', repr(str(folder)))
    assert code.count(str(folder)) == 1
    names = {"ffjax": ffjax}
    exec(code, names)
    talker: Any = names["generator"]
    again = talker.session().reply(names["messages"], max_tokens=50)
    assert capsys.readouterr().out == "".join(again)


# Bad input


@pytest.mark.parametrize(
    ("prompts", "options", "error", "sentence"),
    [
        ("", {}, ValueError, "The prompt is empty"),
        (["a", ""], {}, ValueError, "The prompt is empty"),
        (["a", 3], {}, TypeError, "A prompt is a text, got int"),
        ("a", {"max_token": 3}, TypeError, "max_token is none. Is max_tokens meant"),
        ("a", {"temprature": 3}, TypeError, "Is temperature meant"),
        ("a", {"zzz": 3}, TypeError, "There are max_tokens, min_tokens"),
        ("a", {"temperature": -1}, ValueError, "temperature must be 0"),
        ("a", {"n": 0}, ValueError, "at least 1; got 0"),
        ("a", {"n": 2.0}, ValueError, "at least 1; got 2.0"),
        ("a", {"sampling": 0.8}, TypeError, "one for each prompt; got 0.8"),
        ("a", {"sampling": [DRAWN, DRAWN]}, ValueError, "there are 2 for 1 prompt"),
        ("a", {"sampling": ["x"]}, TypeError, "sampling is a SamplingParams, got 'x'"),
        ("a", {"max_tokens": 400}, ValueError, "need 401 positions; tiny was made for 400"),
        ("a" * 400, {}, ValueError, "tiny was made for 400"),
        ("a", {"stop_token_ids": [257]}, ValueError, "vocabulary of tiny"),
        ("a", {"stop": ""}, ValueError, "at least one character"),
        ("a\ud800", {}, ValueError, "no lone surrogates"),
    ],
)
def test_bad_input_is_a_sentence(generator, prompts, options, error, sentence):
    with pytest.raises(error, match=sentence):
        generator.generate(prompts, **options)


def test_no_prompts_are_no_texts(generator):
    assert generator.generate([]) == []


def test_the_completion_has_no_surprises_for_json(generator):
    out = generator.generate("a", DRAWN, logprobs=1)
    assert json.loads(json.dumps(dataclasses.asdict(out)))["tokens"] == out.tokens
    assert checkpoints.SHIPPED_MODEL.exists()


def test_a_text_that_ends_early_has_times_of_its_own(generator):
    short, long = generator.generate(
        ["import ", "class "],
        [SamplingParams(max_tokens=3), SamplingParams(max_tokens=200)],
    )
    assert (len(short.tokens), len(long.tokens)) == (3, 200)
    assert 0 < short.decode_seconds < long.decode_seconds
