"""`ffjax chat` with a small model: what it is told, what it says, at a terminal and in a pipe."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_folder import chat_folder
from pseudo_terminal import CTRL_C, CTRL_D, terminal

import ffjax
from ffjax.cli import main

pytestmark = pytest.mark.once(
    "What a chat says is the same with any JAX; a sample runs a model.",
    sample=[
        "test_answers_are_those_of_the_library_and_the_cache_is_kept",
        "test_what_options_refuse",
    ],
)

TESTS = Path(__file__).parent
TRAINED = os.environ.get("FFJAX_TEST_CHAT_MODEL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture
def chat(folder, monkeypatch, capsysbinary) -> Any:
    """Runs the command in a pipe; returns its exit code, its answers and its notes."""

    def run(text: str, *options: str, model: Path | None = folder) -> tuple[int, str, str]:
        data = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", data)
        paths = [] if model is None else ["--model", str(model)]
        code = main(["chat", *paths, "--max-new-tokens", "12", *options])
        out, err = capsysbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


def said(folder: Path, *messages: tuple[str, str]) -> str:
    """What the model answers, alone."""
    generator = ffjax.Generator.load(folder)
    asked = [{"role": role, "content": content} for role, content in messages]
    return generator.chat(asked, max_tokens=12).text


def test_answers_are_those_of_the_library_and_the_cache_is_kept(chat, folder, tmp_path):
    kept = tmp_path / "kept.json"
    code, out, err = chat(f"hello\nworld\n/save {kept}\n", "--system", "be kind")
    assert code == 0
    messages = json.loads(kept.read_text(encoding="utf-8"))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [one["role"] for one in messages] == roles
    first = said(folder, ("system", "be kind"), ("user", "hello"))
    assert messages[2]["content"] == first
    assert out == "".join(f"{messages[i]['content'].rstrip(chr(10))}\n" for i in (2, 4))
    figures = [line for line in err.splitlines() if "tokens/s" in line]
    assert "0 of" in figures[0]
    assert len(figures) == 2
    assert "0 of" not in figures[1]
    code, out, _ = chat("/retry\n", "--load", str(kept))
    assert (code, out) == (0, f"{messages[4]['content'].rstrip(chr(10))}\n")


def test_a_draft_model_writes_ahead(chat, folder):
    code, out, err = chat("hello\nworld\n", "--draft", str(folder), "--draft-weights", "int8")
    assert code == 0
    assert len(out.splitlines()) >= 2
    first, second = (line for line in err.splitlines() if "tokens/s" in line)
    assert "tokens a step" in first and "tokens a step" in second
    assert "0 of" in first and "0 of" not in second
    code, _, err = chat("hello\n", "--draft", str(ffjax.SHIPPED_MODEL))
    assert code == 2
    assert "A draft model has the vocabulary of the model" in err


def test_a_model_without_a_template_is_refused(chat):
    code, out, err = chat("hello\n", model=None)
    assert (code, out) == (2, "")
    assert "and the shipped model has none" in err
    assert "Give --model the folder of one that was" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chat-template", "x"], "there is no 'x'"),
        (["--template-var", "x"], "--template-var takes NAME=VALUE"),
        (["--load", "/nowhere/a.json"], "/nowhere/a.json: no such file"),
        (["--speculation", "lookup", "--draft", "x"], "are two. Leave one out"),
        (["--speculation-tokens", "3"], "is none. Give --speculation or --draft, too."),
        (["--temperature", "-1"], "--temperature: a number from 0 is needed"),
        (["--top-p", "2"], "--top-p"),
        (["--system"], "--system: expected one argument"),
    ],
)
def test_what_options_refuse(chat, options, words):
    code, out, err = chat("hello\n", *options)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [("temperature -1", "temperature"), ('logit_bias {"x": 1}', "maps token ids to numbers")],
)
def test_settings_of_the_sampling_are_refused_in_a_sentence(chat, setting, words):
    code, out, err = chat(f"/set {setting}\nhello\n")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_variables_reach_the_template(chat, folder):
    _, plain, _ = chat("hello\n")
    _, moody, err = chat("hello\n", "--template-var", "mood=merry", "--no-figures")
    assert plain != moody
    assert "reads no variable" not in err
    _, _, err = chat("hello\n", "--template-var", "moods=merry", "--no-figures")
    assert "The chat template reads no variable moods" in err


def test_the_contexts_end(folder, tmp_path):
    """A conversation that has grown beyond the model's context: a sentence, /reset helps."""
    kept = tmp_path / "long.json"
    long = [{"role": "user", "content": "hello " * 2100}, {"role": "assistant", "content": "x"}]
    kept.write_text(json.dumps(long))
    env = {"PYTHONPATH": str(TESTS.parent), "XDG_STATE_HOME": str(tmp_path)}
    options = ["--model", folder, "--load", kept, "--max-new-tokens", "5"]
    command = [sys.executable, "-m", "ffjax", "chat", *options]
    with terminal(command, env={**env, "JAX_PLATFORMS": "cpu"}) as shell:
        shell.line("hello")
        shell.expect("there is no room for a reply")
        shell.line("/reset")
        shell.expect("All that was said is forgotten")
        shell.line("hello")
        shell.expect("0 of .* context tokens cached")
        shell.line(CTRL_D, end="")
        assert shell.end() == 0
    assert "Traceback" not in shell.text


@pytest.mark.skipif(TRAINED is None, reason="needs FFJAX_TEST_CHAT_MODEL, a trained model's folder")
def test_a_trained_model_is_talked_with_at_a_terminal(tmp_path):
    env = {"PYTHONPATH": str(TESTS.parent), "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ffjax", "chat", "--model", str(TRAINED), "--greedy"]
    with terminal(command, env=env) as shell:
        shell.line("What is the capital of France?")
        shell.expect("Paris")
        shell.expect("0 of .* context tokens cached")
        shell.line("And what is the capital of Italy?")
        shell.expect("Rome")
        found = shell.expect(r"\d+ of \d+ context tokens cached")
        cached, context = (int(word) for word in found.split() if word.isdigit())
        assert 0 < context - cached < 30
        shell.line("Tell me a long story about Paris.")
        shell.expect("Reading")
        shell.expect(r"\w+ \w+ \w+")
        shell.keys(CTRL_C)
        shell.expect("Stopped")
        shell.line(CTRL_D, end="")
        assert shell.end() == 0
