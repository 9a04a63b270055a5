"""What the command line says of errors, arguments and Ctrl-C."""

import errno
import gc
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.cli import main
from ffjax.failures import in_options, sentence, without_advice
from ffjax.interrupts import ctrl_c_is_kept, interrupts_held_back
from ffjax.streaming import Stream


def _caught(call):
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def _raises(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Path("/no/such/file").read_bytes(), "/no/such/file: no such file or directory."),
        (_raises(OSError(errno.ENOSPC, "No space left on device")), "Reading or writing failed: "),
        (_raises(MemoryError()), "The host's memory does not suffice."),
        (
            _raises(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")),
            "The device's memory does not suffice: Out of memory allocating 9 bytes.",
        ),
        (
            _raises(RuntimeError("INTERNAL: Out of memory allocating 9 bytes.\nAnd more")),
            "The device's memory does not suffice: Out of memory allocating 9 bytes.",
        ),
        # Not ours, though of a kind that ours are of.
        (lambda: int("x"), "This is an error inside ffjax: ValueError, invalid literal for"),
        (lambda: jnp.zeros(2) + jnp.zeros(3), "This is an error inside ffjax: TypeError, "),
        (lambda: {}[3], "This is an error inside ffjax: KeyError, 3. Please report it"),
        (lambda: [][0], "This is an error inside ffjax: IndexError, list index out of range."),
        (_raises(Exception()), "This is an error inside ffjax: Exception. Please report it"),
        (lambda: jnp.ones("x" * 9999), "This is an error inside ffjax: "),
    ],
)
def test_every_error_is_a_sentence(call, said):
    text = sentence(_caught(call))
    assert text.startswith(said)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize(
    "line",
    [
        "np.zeros(2) + np.zeros(3)",  # compiled code has no frames
        "jax.lax.scan(lambda c, x: (c, c, c), 0, jnp.zeros(3))",  # JAX leaves its own out
        "jax.jit(lambda x: int(x))(3)",
        "int('x')",
        "json.loads('x')",
    ],
)
def test_an_error_that_a_line_of_ours_has_called_forth_is_none_of_the_input(line):
    ours = {"__name__": "ffjax.made_up", "jax": jax, "jnp": jnp, "np": np, "json": json}
    text = sentence(_caught(lambda: eval(line, ours)))
    assert text.startswith("This is an error inside ffjax: ")
    assert "\n" not in text


def test_an_error_of_ours_speaks_for_itself():
    from ffjax.config import preset

    text = sentence(_caught(lambda: preset("llama9")))
    assert text.startswith("No preset is called 'llama9'")
    assert "inside ffjax" not in text


def test_the_librarys_words_become_options():
    assert in_options("Split it, or use implementation='xla'.") == (
        "Split it, or use --implementation xla."
    )
    assert in_options("Choose group_size=32.") == "Choose --group-size 32."
    assert in_options("or pass overwrite=True, which") == "or pass --overwrite, which"
    assert without_advice("This is cpu. Use implementation='xla' here.") == "This is cpu."
    assert without_advice("Two. Use implementation='xla'.") == "Two."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generate --prompt x --max-tokens 3", "--max-tokens 3. Is --max-new-tokens meant? ffjax"),
        ("generate --prompt x --max_new_tokens 3", "Is --max-new-tokens meant? ffjax generate"),
        ("convert a b --over", "Is --overwrite meant? ffjax convert --help"),
        ("inspec x", "got 'inspec'. Is inspect meant? ffjax --help says more."),
        ("convert a b --dtype fp32", "--dtype: one of bfloat16, float32 is needed, got 'fp32'."),
        ("export a b --shard-gb 5GB", "--shard-gb: a number above 0 is needed, got '5GB'."),
        ("export a b --shard-gb 0", "--shard-gb: a number above 0 is needed, got '0'."),
        ("export a b --shard-gb inf", "a number above 0, at most 3.4e+38, is needed, got 'inf'."),
        (
            "generate --prompt x --temperature 1e39",
            "from 0, at most 3.4e+38, is needed, got '1e39'.",
        ),
        ("doctor --model x", "--model. The model is given by itself, without --model. ffjax"),
        ("eval --model=x --text y", "The model is given by itself, without --model."),
        ("generate --prompt x --temperature nan", "a number from 0 is needed, got 'nan'."),
        ("generate --prompt x --seed 1.5", "from 0 to 2^64 - 1 is needed, got '1.5'."),
        ("generate --prompt x --max-new-tokens 9999999999", "from 1 is needed, got '9999999999'."),
        ("eval --text x --context 7", "--context: an even whole number from 2 is needed, got '7'."),
        ("bench --config llama3.2-1b --batch 9999999999999", "whole numbers from 1 are needed"),
        ("quantize a b --weights int8 --group-size 32", "--group-size is of int4"),
        ("doctor --config python-bytes-3m --text x", "--text is what a model reads"),
        ("eval --text=", "--text is empty. Give a file, or - for standard input."),
        ("generate --chat --prompt x --template-var t=False", "takes JSON, which writes t=false"),
    ],
)
def test_arguments_are_refused_in_the_options_words(capsys, line, said):
    assert main(line.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert "usage:" not in err


def test_a_prompt_that_is_no_text_in_this_locale(capsys):
    assert main(["generate", "--prompt", os.fsdecode(b"na\xffve")]) == 2
    assert "--prompt is text in this terminal's encoding" in capsys.readouterr().err


def test_json_has_what_came_before_ctrl_c(capsys, monkeypatch):
    after, real = iter(range(5)), Stream.__next__

    def interrupted(self):
        if next(after) == 3:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Stream, "__next__", interrupted)
    assert main(["generate", "--prompt", "def f(", "--json"]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["finish_reason"] == "interrupted"
    assert len(report["tokens"]) == 3


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_ctrl_c_waits_until_the_end_of_an_import():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held_back():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class _Cycle:
    """Garbage that only the collector finds."""

    def __init__(self, end=None):
        self.me, self.end = self, end

    def __del__(self):
        if self.end is not None:
            self.end()


def _from_the_collector(stop):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        stop()

    gc.callbacks.append(callback)
    gc.collect()


def _from_a_weak_reference(stop):
    cycle = _Cycle()
    reference = weakref.ref(cycle, lambda _: stop())
    del cycle
    gc.collect()
    assert reference() is None


def _from_a_finalizer(stop):
    _Cycle(stop)
    gc.collect()


@pytest.mark.usefixtures("default_handler")
@pytest.mark.parametrize(
    "callback", [_from_the_collector, _from_a_weak_reference, _from_a_finalizer]
)
def test_ctrl_c_in_a_callback_is_not_lost(callback):
    came = []

    def stop():
        came.append(1)
        signal.raise_signal(signal.SIGINT)

    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), ctrl_c_is_kept():
        callback(stop)
        for _ in range(500):
            time.sleep(0.01)
    assert came == [1]
    assert sys.unraisablehook is before
