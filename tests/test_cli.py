"""The command line: text, JSON, sentences, exit codes."""

import dataclasses
import io
import json
import logging
import os
import signal
import subprocess
import sys

import pytest
from flax import nnx

import checkpoints
from ffjax.cli import commands as all_commands
from ffjax.cli import main
from ffjax.config import ModelConfig
from ffjax.generation import generate
from ffjax.model import Transformer
from ffjax.streaming import Stream
from ffjax.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.once(
        "What a command says is the same with any JAX; a sample is of what JAX has a part in.",
        sample=[
            "test_text_goes_to_stdout_and_figures_to_stderr",
            "test_json_is_one_object_and_nothing_else",
            "test_bad_input_is_a_sentence_on_stderr_and_code_2",
            "test_arguments_that_do_not_parse_end_with_code_2",
            "test_version",
            "test_where_jax_starts_no_device_every_command_says_so",
            "test_a_plugin_that_does_not_start_is_a_line_without_a_traceback",
            "test_ctrl_c_ends_with_130_and_no_traceback",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = ModelConfig(
    name="tiny-bytes",
    vocab_size=257,
    num_layers=1,
    model_dim=32,
    ffw_dim=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_context=40_000,
)
PROMPT = "x = 1\n"
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(2))


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(model, path)
    return str(path)


def _expected(model, **options) -> list[int]:
    prompt = TOKENIZER.encode(PROMPT)
    return generate(model, [prompt], 40, stop_token=TOKENIZER.eot_id, **options).tokens[0]


def _arguments(path, *more) -> list[str]:
    prompt = [] if "--prompt" in more else ["--prompt", PROMPT]
    return ["generate", "--model", path, *prompt, "--max-new-tokens", "40", *more]


def test_text_goes_to_stdout_and_figures_to_stderr(model, path, capsys):
    assert main(_arguments(path)) == 0
    out, err = capsys.readouterr()
    assert out == PROMPT + TOKENIZER.decode(_expected(model)) + "\n"
    assert "tiny-bytes: 40 tokens, " in err
    assert "tokens/s with 'xla' on " in err


def test_json_is_one_object_and_nothing_else(model, path, capsys):
    assert main(_arguments(path, "--json", "--implementation", "xla")) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    expected = _expected(model)
    assert err == ""
    assert report["tokens"] == expected
    assert report["text"] == TOKENIZER.decode(expected)
    assert (report["implementation"], report["model"]) == ("xla", "tiny-bytes")
    assert (report["prompt_tokens"], report["finish_reason"]) == (len(PROMPT), "length")
    assert report["device"]
    assert report["seconds"] == report["prefill_seconds"] + report["decode_seconds"] > 0
    assert report["tokens_per_second"] == pytest.approx(39 / report["decode_seconds"])
    start_up = report["start_up_seconds"]
    assert list(start_up) == ["imports", "model", "programs", "first_token"]
    assert start_up["programs"] >= report["compile_seconds"]
    assert start_up["first_token"] >= report["prefill_seconds"]
    assert min(start_up.values()) > 0


def test_temperature_and_seed_reach_the_draws(model, path, capsys):
    for seed in (3, 4):
        assert main(_arguments(path, "--json", "--temperature", "1.5", "--seed", str(seed))) == 0
        tokens = json.loads(capsys.readouterr().out)["tokens"]
        assert tokens == _expected(model, temperature=1.5, seed=seed)


def test_the_shipped_model_is_the_default(capsys):
    assert main(["generate", "--prompt", "import ", "--max-new-tokens", "3", "--json"]) == 0
    shipped = checkpoints.load(checkpoints.SHIPPED_MODEL)
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == shipped.config.name
    assert report["tokens"] == generate(shipped, TOKENIZER.encode("import "), 3).tokens[0]


def test_a_character_of_several_bytes_is_shown_whole(path, capsys, monkeypatch):
    tokens = [[byte] for byte in "né".encode()]
    monkeypatch.setattr(Stream, "__next__", lambda self: tokens.pop(0) if tokens else _stop())
    assert main(_arguments(path)) == 0
    assert capsys.readouterr().out == PROMPT + "né\n"


def _stop():
    raise StopIteration


def test_a_terminal_that_lacks_a_character_shows_another(path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["generate", "--model", path, "--prompt", "né", "--max-new-tokens", "1"]) == 0
    assert terminal.buffer.getvalue().startswith(b"n?")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--prompt", ""],
            "--prompt is empty, and this model's tokenizer puts nothing before a text.",
        ),
        (["--max-new-tokens", "0"], "--max-new-tokens: a whole number from 1 is needed, got '0'."),
        (["--max-new-tokens", "40000"], "need 40006 positions; tiny-bytes was made for 40000."),
        (["--temperature", "-1"], "--temperature: a number from 0 is needed, got '-1'."),
        (["--seed", "-1"], "--seed: a whole number from 0 to 2^64 - 1 is needed, got '-1'."),
        (["--model", "no/such/checkpoint"], "no/such/checkpoint"),
    ],
)
def test_bad_input_is_a_sentence_on_stderr_and_code_2(path, capsys, more, sentence):
    assert main(_arguments(path, *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ffjax generate: ")
    assert sentence in err
    assert "Traceback" not in err


def test_a_former_name_of_the_kernel_is_taken_with_a_sentence(capsys):
    arguments = ["bench", "--config", "llama3.2-1b", "--batch", "9"]
    assert main([*arguments, "--implementation", "pallas_stream"]) == 2
    said, reason = capsys.readouterr().err.splitlines()
    assert said.startswith("--implementation pallas_stream is called pallas now;")
    assert "takes 1 to 8 sequences" in reason


def test_a_model_of_another_vocabulary_is_refused(capsys, tmp_path):
    config = dataclasses.replace(CONFIG, name="words", vocab_size=100)
    checkpoints.save(Transformer(config, rngs=nnx.Rngs(0)), tmp_path / "words")
    assert main(_arguments(str(tmp_path / "words"))) == 2
    assert "needs a vocabulary of 257; words has 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["generate"], "--prompt"),
        (
            ["generate", "--prompt", "x", "--implementation", "cuda"],
            "--implementation: one of pallas, pallas_mosaic_gpu, xla is needed, got 'cuda'.",
        ),
        (
            ["generate", "--prompt", "x", "--max-new-tokens", "many"],
            "a whole number from 1 is needed, got 'many'.",
        ),
    ],
)
def test_arguments_that_do_not_parse_end_with_code_2(capsys, arguments, words):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("ffjax ")


def _broken(*_, **__):
    raise KeyError("ours\nand more")


def test_a_defect_is_a_sentence_that_says_what_to_report(path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "load", _broken)
    assert main(_arguments(path)) == 2
    assert capsys.readouterr().err == (
        "ffjax generate: This is an error inside ffjax: KeyError, 'ours\\nand more'. Please report "
        "it, with what the same command prints under --traceback.\n"
    )
    assert main(_arguments(path, "--traceback")) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in _broken" in err
    assert err.endswith("prints under --traceback.\n")


# Each command, in a process where JAX starts no device: exit code and last line of stderr.
_WITHOUT_DEVICE = """
import contextlib, io, json, sys
from ffjax.cli import main
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    print(json.dumps([code, err.getvalue()]))
"""


def _without_device(variables, *commands: list[str]) -> list[tuple[int, str]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_PLATF")}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DEVICE, json.dumps(commands)],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_where_jax_starts_no_device_every_command_says_so(path, tmp_path):
    checkpoints.export_hf(path, tmp_path / "hf")
    (tmp_path / "text").write_text("import os\n")
    small = ["--config", "python-bytes-3m"]
    commands = {
        "generate": _arguments(path, "--json"),
        "chat": ["chat", "--model", path],
        "serve": ["serve", "--model", path, "--port", "0"],
        "convert": ["convert", str(tmp_path / "hf"), str(tmp_path / "converted")],
        "quantize": ["quantize", path, str(tmp_path / "quantized"), "--weights", "int8"],
        "inspect": ["inspect", path],
        "bench": ["bench", *small],
        "tune": ["tune", *small],
        "eval": ["eval", path, "--text", str(tmp_path / "text")],
        "fidelity": ["fidelity", *small],
    }
    # `doctor` reports it, and `export` needs no device.
    assert {*commands, "doctor", "export"} == set(all_commands())
    ended = _without_device({"JAX_PLATFORMS": "nonsense"}, *commands.values())
    for name, (code, err) in zip(commands, ended, strict=True):
        assert code == 2
        assert err.startswith(f"ffjax {name}: JAX starts no device: Unable to initialize backend")
        assert err.endswith("JAX_PLATFORMS is 'nonsense': unset it, or set JAX_PLATFORMS=cpu.\n")
        assert err.count("\n") == 1
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "variables",
    # Asked again, JAX is content with the first of two platforms.
    [
        {"JAX_PLATFORMS": "cpu,nonsense"},
        {"JAX_PLATFORMS": "cpu", "JAX_PLATFORM_NAME": "nonsense"},
        {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_DEVICE": "tpu"},
    ],
)
def test_whatever_leaves_jax_without_a_device_is_no_defect(path, variables):
    [(code, err)] = _without_device(variables, _arguments(path))
    assert code == 2
    assert err.startswith("ffjax generate: JAX starts no device: Un")
    assert err.count("\n") == 1


def test_a_platform_without_devices_is_named(path, capsys, monkeypatch):
    """JAX says nothing then: it asserts that it has started something."""

    def none(*_, **__):
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.local_devices", none)
    monkeypatch.setattr(checkpoints, "load", none)
    assert main(_arguments(path)) == 2
    assert capsys.readouterr().err == (
        "ffjax generate: JAX starts no device: it finds none of the platform that it is to use. "
        "JAX_PLATFORMS is 'cuda': unset it, or set JAX_PLATFORMS=cpu.\n"
    )


def test_a_plugin_that_does_not_start_is_a_line_without_a_traceback(path, monkeypatch, caplog):
    def load(*_, **__):
        try:
            raise RuntimeError("Unable to load 100% of it.")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Calling %s", "it")
        raise ValueError("enough")

    monkeypatch.setattr(checkpoints, "load", load)
    assert main(_arguments(path)) == 2
    [record] = caplog.records
    assert record.getMessage() == "Calling it: Unable to load 100% of it."
    assert record.exc_info is None


# `python -m ffjax`, also where this process ignores Ctrl-C, as a shell's background jobs do:
# ignored signals are inherited.
_MODULE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("ffjax", run_name="__main__", alter_sys=True)
"""


def _start(path, count: int) -> subprocess.Popen:
    arguments = ["generate", "--model", path, "--prompt", PROMPT, "--max-new-tokens", str(count)]
    return subprocess.Popen(
        [sys.executable, "-c", _MODULE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_with_130_and_no_traceback(path):
    with _start(path, 39_000) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"  # the prompt is out: the stream runs
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Interrupted." in err
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise elsewhere")
def test_a_reader_that_leaves_early_is_no_error(path):
    with _start(path, 39_000) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
