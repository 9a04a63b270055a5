"""`ffjax serve` as a process: signals, a kill in the middle, and what its options refuse."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_folder import chat_folder
from serve_cases import until

import ffjax
from ffjax.cli import main
from ffjax.commands.serve import default_capacity
from ffjax.loop import slots_for
from ffjax.rope import inverse_frequencies
from ffjax.serve.server import bound, is_local
from ffjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.once(
    "Signals, sockets and processes are the system's.",
    sample=[
        "test_what_options_refuse",
    ],
)

PROMPT = "def add(a, b):\n"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "talker")


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait(self, words: str) -> str:
        until(lambda: self.process.poll() is not None or self._has(words), 90)
        assert self._has(words), "".join(self.lines)
        return next(line for line in self.lines if words in line)

    def _has(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def ended(self) -> int:
        code = self.process.wait(30)
        self._reader.join(10)
        return code

    @property
    def url(self) -> str:
        found = re.search(r"http://[\d.:]+", self.wait("Ready: "))
        assert found is not None
        return found[0]

    def stream(self, tokens: int, n: int = 1) -> Any:
        """A stream of `n` texts, one after the other: the server has one row."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        return client.completions.create(
            model=client.models.list().data[0].id,
            prompt=PROMPT,
            max_tokens=tokens,
            n=n,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@contextlib.contextmanager
def served(*more: str) -> Iterator[Process]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ffjax", "serve", "--port", "0", "--batch", "1"),
            *("--capacity", "1000", "--max-logprobs", "0", *more),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait(10)


def test_sigterm_lets_the_shipped_models_answer_end_which_is_that_of_generate():
    with served("--grace", "50") as server:
        chunks = server.stream(200)
        said = [next(chunks).choices[0]]
        server.process.send_signal(signal.SIGTERM)
        said += [chunk.choices[0] for chunk in chunks]
        assert said[-1].finish_reason == "length"
        assert server.ended() == 0
        assert "200 new" in server.wait("/v1/completions: ")
        assert "a chat page needs a model with a chat template" in server.wait("Ready: ")
        assert server.lines[-1] == "ffjax serve: Ended.\n"
        assert not any("Traceback" in line for line in server.lines)
    tokens = ByteTokenizer().encode(PROMPT)
    out = ffjax.generate(ffjax.load(ffjax.SHIPPED_MODEL), [tokens], 200, capacity=1000)
    assert "".join(choice.text for choice in said) == ByteTokenizer().decode(out.tokens[0])


def test_ctrl_c_ends_within_its_grace_and_says_so_to_the_client():
    with served("--grace", "0", "--quiet") as server:
        chunks = server.stream(900, n=20)
        next(chunks)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        assert server.ended() == 0
        assert server.lines[-1] == "ffjax serve: Ended.\n"
        assert not any("Traceback" in line or " new" in line for line in server.lines)


def test_a_kill_in_the_middle_is_an_error_to_the_client_and_leaves_the_port_free():
    with served() as server:
        port = int(server.url.rpartition(":")[2])
        chunks = server.stream(900, n=20)
        next(chunks)
        server.process.kill()
        with pytest.raises(Exception, match=r"(?i)connection|peer closed|disconnected"):
            list(chunks)  # and no answer that looks complete
        assert server.ended() == -signal.SIGKILL
        bound("127.0.0.1", port).close()


# Options


def run(capsys, *more: str) -> tuple[int, str]:
    code = main(["serve", *more])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_a_port_that_is_taken(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, err = run(capsys, "--model", str(folder), "--port", port)
    assert code == 2 and f"bound to 127.0.0.1, port {port}: address already in use" in err
    assert "another --port" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--host", "no such host"], "--host is a name or an address of this machine"),
        (["--host", "192.0.2.1"], "no address of this machine. Give --host one of its own"),
        (["--port", "65536"], "--port: a whole number from 0 to 65535"),
        (["--batch", "9"], "--batch: a whole number from 1 to 8"),
        (["--batch", "0"], "--batch: a whole number from 1 to 8"),
        (["--max-queue", "-1"], "--max-queue: a whole number from 0"),
        (["--max-logprobs", "21"], "--max-logprobs: a whole number from 0 to 20"),
        (["--capacity", "4000"], "--capacity is at most what the model was made for, 2048"),
        (["--api-key", ""], "--api-key goes into a header"),
        (["--api-key", "two words"], "--api-key goes into a header"),
        (["--grace", "-1"], "--grace: a number from 0"),
        (["--speculation", "lookup", "--batch", "5"], "--speculation takes --batch 1 to 4"),
        (
            ["--speculation", "lookup", "--speculation-tokens", "3"],
            "--batch is 4. Give --speculation-tokens 2, or --batch 2.",
        ),
        (["--speculation-tokens", "3"], "is none. Give --speculation or --draft, too."),
        (["--draft-weights", "int8", "--batch", "5"], "--draft-weights takes --batch 1 to 4"),
        (["--draft", "x", "--speculation-tokens", "3"], "is 4. Give --speculation-tokens 2, or"),
        (["--draft", "x", "--speculation", "lookup"], "are two. Leave one out"),
        (["--draft", "/nowhere"], "/nowhere"),
        (["--draft", str(ffjax.SHIPPED_MODEL)], "A draft model has the vocabulary of the model"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_options_refuse(capsys, folder, more, words):
    model = [] if "--model" in more else ["--model", str(folder)]
    code, err = run(capsys, *model, "--port", "0", *more)
    assert code == 2 and words in err and err.count("\n") <= 2


@pytest.mark.parametrize(
    ("name", "most", "capacity"),
    [
        ("llama3.2-1b", 131_072, 4096),
        ("llama3.2-1b", 700, 700),
        ("phi4-mini", 131_072, 4088),  # of LongRoPE's two sets of factors, that of short texts
        ("phi4-mini", 2000, 2000),
    ],
)
def test_the_usual_capacity_is_one_of_the_original_context(name, most, capacity):
    config = ffjax.preset(name)
    assert default_capacity(config, most) == capacity
    if capacity == 4088:
        short, long = (inverse_frequencies(config, slots_for(n)) for n in (capacity, 4096))
        assert (short != long).any()


def test_a_draft_model_is_loaded_for_the_batch(capsys, folder, tmp_path, monkeypatch):
    short = chat_folder(tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    options = ["--model", str(folder), "--port", "0", "--draft", str(short)]
    made: list[dict[str, Any]] = []

    def run_once(server: Any, sock: socket.socket) -> bool:
        server.scheduler._make()
        return True

    monkeypatch.setattr("ffjax.live.LiveBatch", lambda model, **how: made.append(how))
    monkeypatch.setattr("ffjax.serve.server.Server.run", run_once)
    code, err = run(capsys, *options, "--draft-weights", "int8")
    assert code == 0, err
    [how] = made
    draft = how["speculation"]
    assert isinstance(draft, ffjax.Draft) and str(draft.model.config.weights).startswith("int8")
    assert (how["rows"], how["capacity"], draft.tokens) == (4, 700, None)
    assert " in int8 writes drafts: a step of" in err and "takes 2 tokens of each text" in err
    code, err = run(capsys, *options, "--capacity", "701")
    assert code == 2
    assert "--capacity is at most what the draft model" in err
    assert "was made for, 700; got 701" in err


def test_a_missing_extra_is_named(capsys, folder, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "uvicorn":
            raise ImportError(name, name=name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("ffjax.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    code, err = run(capsys, "--model", str(folder))
    assert code == 2
    assert "A server needs the package uvicorn. Install it with: pip install 'ffjax[serve]'." in err


def test_a_key_of_the_environment_is_checked_too(capsys, folder, monkeypatch):
    monkeypatch.setenv("FFJAX_API_KEY", "é")
    code, err = run(capsys, "--model", str(folder), "--port", "0")
    assert code == 2 and "FFJAX_API_KEY goes into a header" in err


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_which_addresses_are_this_machines_alone(host, local):
    assert is_local(host) == local
