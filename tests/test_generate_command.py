"""`ffjax generate`: how tokens are chosen, where prompts come from, many at a time."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from flax import nnx
from generate_cases import TINY
from talkers import write_talker
from test_cli import _MODULE

import checkpoints
from ffjax.cli import main
from ffjax.model import Transformer
from ffjax.sampling.params import SamplingParams
from ffjax.text.batches import TextBatch
from ffjax.text.generator import Generator

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_every_option_is_a_field_of_the_parameters",
            "test_options_that_cannot_be_are_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

SETTINGS = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(Transformer(TINY, rngs=nnx.Rngs(2)), path)
    return str(path)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "talker"
    return str(write_talker(folder, generation_config__json=SETTINGS))


def _run(capsys, *arguments: str, code: int = 0) -> tuple[str, str]:
    assert main(["generate", *arguments]) == code
    return capsys.readouterr()


def _reports(capsys, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in _run(capsys, *arguments)[0].splitlines()]


# How tokens are chosen


def test_every_option_is_a_field_of_the_parameters(path, capsys, monkeypatch):
    seen: list[SamplingParams] = []
    made = TextBatch.__init__

    def watched(self, model, tokenizer, asked, **options):
        seen.extend(one.params for one in asked)
        made(self, model, tokenizer, asked, **options)

    monkeypatch.setattr(TextBatch, "__init__", watched)
    options = {
        "max_tokens": ("--max-new-tokens", "7"),
        "min_tokens": ("--min-new-tokens", "3"),
        "temperature": ("--temperature", "0.5"),
        "top_k": ("--top-k", "9"),
        "top_p": ("--top-p", "0.8"),
        "min_p": ("--min-p", "0.1"),
        "repetition_penalty": ("--repetition-penalty", "1.2"),
        "presence_penalty": ("--presence-penalty", "-0.5"),
        "frequency_penalty": ("--frequency-penalty", "0.25"),
        "seed": ("--seed", "5"),
        "logprobs": ("--logprobs", "2"),
    }
    words = [word for pair in options.values() for word in pair]
    words += ["--logit-bias", "13=-2.5", "--logit-bias", "7=1", "--stop", "\\n\\tx", "--stop", "é"]
    [report] = _reports(capsys, "--model", path, "--prompt", "a", "--json", *words)
    expected = SamplingParams(
        **{name: json.loads(value) for name, (_, value) in options.items()},
        logit_bias={13: -2.5, 7: 1},
        stop=("\n\tx", "é"),
    )
    assert seen == [expected]
    assert len(report["tokens"]) == len(report["logprobs"]) == 7
    assert [len(one["top"]) for one in report["logprobs"]] == [2] * 7
    out = Generator.load(path).generate("a", expected)
    assert (report["tokens"], report["seed"]) == (out.tokens, 5)


def test_the_models_file_gives_the_defaults_and_it_is_said(talker, capsys):
    out, err = _run(capsys, "--model", talker, "--prompt", "hello", "--json")
    report = json.loads(out)
    expected = SamplingParams.from_generation_config(SETTINGS)
    tokens = Generator.load(talker).generate("hello", expected, seed=0).tokens
    assert report["tokens"] == tokens
    assert len(tokens) <= 9
    said = "--max-new-tokens 9 --temperature 0.6 --top-k 20 --top-p 0.9"
    assert err == f"ffjax generate: As the model's generation_config.json says, {said}.\n"
    _, err = _run(capsys, "--model", talker, "--prompt", "a", "--json", "--temperature", "0.1")
    assert "--max-new-tokens 9 --top-k 20 --top-p 0.9." in err
    greedy, err = _run(
        capsys,
        "--model",
        talker,
        "--prompt",
        "hello",
        "--json",
        "--greedy",
        "--max-new-tokens",
        "9",
    )
    assert err == ""
    assert json.loads(greedy)["tokens"] == (
        Generator.load(talker, sampling=SamplingParams()).generate("hello", max_tokens=9).tokens
    )


def test_a_stop_string_ends_the_text(path, capsys):
    arguments = ["--model", path, "--prompt", "a", "--max-new-tokens", "30", "--temperature", "1"]
    [free] = _reports(capsys, *arguments, "--json")
    text = free["text"]
    stop = next(text[i : i + 2] for i in range(4, len(text)) if text[i : i + 2].isprintable())
    [report] = _reports(capsys, *arguments, "--json", "--stop", stop)
    assert (report["finish_reason"], report["stop_reason"]) == ("stop", stop)
    assert report["text"] == text[: text.index(stop)]
    assert _run(capsys, *arguments, "--stop", stop)[0] == "a" + report["text"] + "\n"


def test_what_draws_nothing_is_said(path, capsys):
    _, err = _run(
        capsys,
        "--model",
        path,
        "--prompt",
        "a",
        "--top-p",
        "0.5",
        "--max-new-tokens",
        "2",
        "--json",
    )
    assert err == (
        "ffjax generate: --top-p changes nothing where no token is drawn: give --temperature, "
        "too.\n"
    )


# Where prompts come from


def test_a_prompt_is_read_from_a_file_and_from_standard_input(path, capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes("\ufeffclass é:\n".encode())
    arguments = ["--model", path, "--max-new-tokens", "3"]
    expected, _ = _run(capsys, *arguments, "--prompt", "class é:\n")
    assert expected.startswith("class é:\n")
    assert _run(capsys, *arguments, "--prompt-file", str(tmp_path / "p.txt"))[0] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("class é:\n".encode())))
    assert _run(capsys, *arguments, "--prompt-file", "-")[0] == expected


def test_many_prompts_get_what_each_gets_alone_in_their_order(path, capsys, tmp_path):
    texts = ["a", "class Stack:" * 3, "é", *(f"x = {i}" for i in range(8))]
    (tmp_path / "p.txt").write_text("\n\r\n".join(texts) + "\n", encoding="utf-8")
    draws = ["--temperature", "1", "--seed", "4", "--max-new-tokens", "6"]
    many = ["--model", path, "--prompts", str(tmp_path / "p.txt"), *draws]
    out, err = _run(capsys, *many)
    reports = [json.loads(line) for line in out.splitlines()]
    assert [one["line"] for one in reports] == list(range(1, 23, 2))
    assert err.startswith("tiny: 11 texts, ")
    generator = Generator.load(path)
    for text, report in zip(texts, reports, strict=True):
        alone = generator.generate(text, temperature=1.0, seed=4, max_tokens=6)
        assert (report["tokens"], report["text"]) == (alone.tokens, alone.text)
    assert _run(capsys, *many, "--json")[1] == ""


def test_lines_of_json_have_options_of_their_own(talker, capsys, tmp_path):
    lines = [
        {"prompt": "hello", "id": "first", "temperature": 0.9, "seed": 3, "max_tokens": 4},
        {"messages": [{"role": "user", "content": "hello"}], "logit_bias": {"7": 50}},
        {"prompt": "world", "stop": ["\n"], "logprobs": 1},
        {"prompt": "world", "max_tokens": None, "logit_bias": None},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    reports = _reports(
        capsys, "--model", talker, "--prompts", str(tmp_path / "p.jsonl"), "--greedy"
    )
    assert [one.get("id") for one in reports] == ["first", None, None, None]
    assert ["logprobs" in one for one in reports] == [False, False, True, False]
    generator = Generator.load(talker, sampling=SamplingParams(seed=0, max_tokens=9))
    first = generator.generate("hello", temperature=0.9, seed=3, max_tokens=4)
    assert reports[0]["tokens"] == first.tokens
    assert reports[1]["tokens"] == [7] * 9
    assert reports[3]["tokens"] == generator.generate("world").tokens


def test_several_texts_of_a_prompt(path, capsys, tmp_path):
    arguments = ["--model", path, "--prompt", "ab", "-n", "3", "--temperature", "1"]
    arguments += ["--max-new-tokens", "5", "--seed", "8"]
    reports = _reports(capsys, *arguments, "--json")
    assert [(one["sample"], one["seed"]) for one in reports] == [(0, 8), (1, 9), (2, 10)]
    generator = Generator.load(path)
    for report in reports:
        alone = generator.generate("ab", temperature=1.0, seed=report["seed"], max_tokens=5)
        assert report["tokens"] == alone.tokens
    out, _ = _run(capsys, *arguments)
    assert out == "".join(
        f"=== {i + 1} of 3, seed {8 + i} ===\nab{one['text']}\n" for i, one in enumerate(reports)
    )
    (tmp_path / "p.txt").write_text("ab\ncd\n")
    many = _reports(capsys, "--prompts", str(tmp_path / "p.txt"), *arguments[:2], *arguments[4:])
    assert [(one["line"], one["sample"]) for one in many] == [
        (line, sample) for line in (1, 2) for sample in range(3)
    ]
    assert [one["tokens"] for one in many[:3]] == [one["tokens"] for one in reports]


def test_a_folder_of_messages_only_needs_no_chat_option(talker, capsys, tmp_path):
    (tmp_path / "p").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    file = str(tmp_path / "p")
    [one] = _reports(capsys, "--model", talker, "--prompts", file, "--greedy")
    [other] = _reports(
        capsys, "--model", talker, "--prompt", "hello", "--chat", "--greedy", "--json"
    )
    assert one["tokens"] == other["tokens"]


# Bad input


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "A file of prompts has one a line; FILE has none."),
        (b"\n \n", "A file of prompts has one a line; FILE has none."),
        (b'[{"prompt": "a"},\n {"prompt": "b"}]', "FILE is one list in JSON. Write each"),
        (b"ab\n\xff\n", "the byte at 3 of FILE is none. Convert it"),
        (b'{"prompt": "a"}\nb\n', "line 2 of FILE is not JSON"),
        (b'{"prompt": "a"}\n3\n', "line 2 of FILE is none"),
        (b'{"prompt": "a", "messages": []}', "Line 1 of FILE has to have prompt or messages"),
        (b"{}", "Line 1 of FILE has to have prompt or messages"),
        (b'{"prompt": 3}', "Line 1 of FILE has a prompt that is no text."),
        (b'{"messages": 3}', "Line 1 of FILE has messages that are no list."),
        (b'{"prompt": "a", "temp": 3}', "Line 1 of FILE has a field 'temp'; there are prompt"),
        (b'{"prompt": "a", "top_p": 3}', "Line 1 of FILE: top_p must be above 0"),
        (b'{"prompt": "a", "seed": "x"}', "Line 1 of FILE: A seed is an integer"),
        (b'{"prompt": "a"}\n{"prompt": ""}', "Line 2 of FILE is empty, and this model's"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "Line 1 of FILE: logit_bias maps token"),
        (b'{"prompt": "a", "stop_token_ids": [257]}', "Line 1 of FILE: stop_token_ids"),
        (b'{"prompt": "a", "max_tokens": 400}', "Line 1 of FILE: A prompt of 1 token and 400"),
        (b"ab\n" + b"a" * 400, "Line 2 of FILE: A prompt of 400 tokens and 1 new ones need 401"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "Line 1 of FILE has messages: that"),
    ],
)
def test_a_line_that_is_wrong_is_named_before_anything_runs(
    path, capsys, tmp_path, monkeypatch, content, sentence
):
    monkeypatch.setattr(TextBatch, "__init__", None)
    file = tmp_path / "p"
    file.write_bytes(content)
    out, err = _run(capsys, "--model", path, "--prompts", str(file), code=2)
    assert out == ""
    assert sentence.replace("FILE", str(file)) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompt", "a", "--prompts", "x"], "--prompts: not allowed with argument --prompt."),
        (
            ["--prompt", "a", "--prompt", "b"],
            "--prompt is given once. Many prompts stand in",
        ),
        (["--prompt-file", "no/such"], "no/such: no such file or directory."),
        (["--prompts", "."], ".: is a directory."),
        (["--prompt", "a", "--top-p", "0"], "--top-p: a number above 0, at most 1, is needed"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p: a number above 0, at most 1, is needed"),
        (["--prompt", "a", "--min-p", "nan"], "--min-p: a number from 0 to 1 is needed"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k: a whole number from 0 is needed"),
        (["--prompt", "a", "--stop", ""], "--stop: a text of at least one character is needed"),
        (["--prompt", "a", "--logit-bias", "x"], "--logit-bias: a token id and a number are"),
        (["--prompt", "a", "--logit-bias", "x=1"], "--logit-bias: a token id and a number are"),
        (["--prompt", "a", "--logit-bias", "300=1"], "A token id of --logit-bias must be in the"),
        (["--prompt", "a", "--presence-penalty", "x"], "a number is needed, got 'x'"),
        (["--prompt", "a", "--repetition-penalty", "0"], "a number above 0 is needed, got '0'"),
        (["--prompt", "a", "--logprobs", "21"], "a whole number from 0 to 20 is needed"),
        (["--prompt", "a", "--logprobs", "1"], "--logprobs is for JSON, which has room for them."),
        (["--prompt", "a", "--greedy", "--temperature", "1"], "Give one of them."),
        (["--prompt", "a", "-n", "2"], "-n asks for 2 texts of a prompt, and the likeliest tokens"),
        (["--prompt", "a", "-n", "0"], "-n: a whole number from 1 is needed"),
        (
            ["--prompt", "a", "--min-new-tokens", "9", "--max-new-tokens", "3"],
            "--min-new-tokens is at most --max-new-tokens, 3; got 9.",
        ),
    ],
)
def test_options_that_cannot_be_are_a_sentence(path, capsys, more, sentence):
    out, err = _run(capsys, "--model", path, *more, code=2)
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_written(path, tmp_path):
    """Short texts are there when long ones are broken off, which are shown as far as they came."""
    short = [{"prompt": "a", "max_tokens": 2, "ignore_eos": True}] * 8
    long = [{"prompt": "a", "max_tokens": 390, "ignore_eos": True}] * 4000
    (tmp_path / "p").write_text("".join(json.dumps(one) + "\n" for one in [*short, *long]))
    arguments = ["generate", "--model", path, "--prompts", str(tmp_path / "p")]
    with subprocess.Popen(
        [sys.executable, "-c", _MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    reports = [json.loads(line) for line in (first + out).splitlines()]
    assert [one["line"] for one in reports] == list(range(1, len(reports) + 1))
    assert len(reports) < 4008
    assert {one["finish_reason"] for one in reports} <= {"length", "interrupted"}
    assert reports[0]["finish_reason"] == "length"
    assert err.endswith(b"\nInterrupted.\n")
    assert b"Traceback" not in err


def test_nan_keeps_what_came_before(tmp_path, capsys):
    model = Transformer(TINY, rngs=nnx.Rngs(2))
    model.embed[...] = model.embed[...].at[ord("!")].set(float("nan"))
    checkpoints.save(model, tmp_path / "broken")
    lines = [{"prompt": "a", "max_tokens": 2}] * 8 + [{"prompt": "b!"}] * 8
    (tmp_path / "p").write_text("".join(json.dumps(one) + "\n" for one in lines))
    arguments = ["--model", str(tmp_path / "broken"), "--prompts", str(tmp_path / "p")]
    out, err = _run(capsys, *arguments, code=1)
    reasons = [json.loads(line)["finish_reason"] for line in out.splitlines()]
    assert reasons[:8] == ["length"] * 8
    assert reasons[8] == "not_finite"
    assert "Logits must be finite" in err


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_waits_for_what_the_device_still_computes():
    """Else Python 3.12 aborts, as it ends while a thread of XLA's gives something back to it."""
    arguments = ["generate", "--prompt", "def f", "--max-new-tokens", "2000"]
    with subprocess.Popen(
        [sys.executable, "-c", _MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(12).startswith(b"def f")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.endswith(b"\nInterrupted.\n")
