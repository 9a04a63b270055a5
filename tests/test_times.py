"""The times of a generation are what their words say, on a device of known speed."""

import json
import math
import types

import numpy as np
import pytest
from flax import nnx
from generate_cases import TINY

import checkpoints
from ffjax.cli import main
from ffjax.generation import generate
from ffjax.loop import BLOCK, Loop, Made
from ffjax.model import Transformer
from ffjax.streaming import stream

pytestmark = [
    pytest.mark.once(
        "Times are taken of a device that is made up.",
        sample=[
            "test_the_prefill_of_a_generation_contains_no_step",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# Seconds whose sums are exact.
PREFILL = 64.0
STEP = 0.5
TOKEN = 65


class Device:
    """A GPU as a generation sees it: it works in order, and its clock is the host's."""

    def __init__(self):
        self.now = 1000.0
        self.busy_until = self.now
        self.idle = 0.0

    def work(self, seconds: float) -> None:
        """Orders work; the host goes on."""
        self.idle += max(self.now - self.busy_until, 0)
        self.busy_until = max(self.now, self.busy_until) + seconds

    def wait(self, until: float) -> None:
        """Has the host wait."""
        self.now = max(self.now, until)

    def prefill(self, loop: Loop):
        """In place of `Loop.prefill`."""
        self.work(PREFILL)
        return Made(Later(np.full(loop._request.batch, TOKEN), self), None)

    def decode(self, loop: Loop):
        """In place of `Loop.decode`."""
        self.work(BLOCK * STEP)
        return Made(Later(np.full((BLOCK, loop._request.batch), TOKEN), self), None)


class Later:
    """What the device will have made when its work so far is done."""

    def __init__(self, value, device: Device):
        self._value, self._device, self._ready = value, device, device.busy_until

    def _read(self):
        self._device.wait(self._ready)
        return self._value

    def __array__(self, *_, **__):
        return np.asarray(self._read())

    def __int__(self):
        return int(self._read())

    def block_until_ready(self):
        self._read()
        return self


@pytest.fixture
def device(monkeypatch):
    device = Device()
    clock = types.SimpleNamespace(perf_counter=lambda: device.now)
    for name in ("ffjax.generation", "ffjax.streaming"):
        monkeypatch.setattr(f"{name}.time", clock)
    monkeypatch.setattr(Loop, "prefill", lambda loop: device.prefill(loop))
    monkeypatch.setattr(Loop, "decode", lambda loop: device.decode(loop))
    return device


@pytest.fixture(scope="module")
def model():
    return Transformer(TINY, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("count", [2, BLOCK + 1, 3 * BLOCK])
def test_the_prefill_of_a_generation_contains_no_step(model, device, count):
    out = generate(model, [[1, 2], [3]], count)
    steps = -(-(count - 1) // BLOCK) * BLOCK
    assert out.steps == steps
    assert out.prefill_seconds == PREFILL
    assert out.decode_seconds == steps * STEP
    assert out.tokens_per_second == 2 * (count - 1) / (steps * STEP)
    assert device.now == 1000 + PREFILL + steps * STEP


@pytest.mark.parametrize("run", [generate, stream])
def test_a_single_token_has_a_prefill_and_no_rate(model, device, run):
    out = run(model, [1, 2], 1)
    if run is stream:
        list(out)
        out = out.output
    assert (out.prefill_seconds, out.decode_seconds, out.steps) == (PREFILL, 0.0, 0)
    assert math.isnan(out.tokens_per_second)


def test_a_streams_times_are_those_of_what_its_reader_has(model, device):
    steps = stream(model, [1, 2], 3 * BLOCK + 1)
    next(steps)
    assert steps.output.prefill_seconds == PREFILL == device.now - 1000
    assert math.isnan(steps.output.tokens_per_second)
    for given in range(1, 3 * BLOCK + 1):
        next(steps)
        blocks = -(-given // BLOCK)
        assert steps.output.decode_seconds == blocks * BLOCK * STEP == device.now - 1000 - PREFILL
        assert steps.output.tokens_per_second == given / steps.output.decode_seconds
    assert device.idle == 0  # every block was ordered before the one before was read
    assert steps.output.tokens_per_second == 1 / STEP


def test_a_slow_reader_is_part_of_a_streams_time(model, device):
    steps = stream(model, [1, 2], BLOCK + 1)
    for _ in range(BLOCK + 1):
        device.now += 16.0
        next(steps)
    # The first of these seconds passed before the stream began.
    assert steps.output.prefill_seconds == PREFILL
    assert steps.output.decode_seconds == device.now - 1000 - 16 - PREFILL
    assert steps.output.tokens_per_second == BLOCK / steps.output.decode_seconds


def test_a_stop_token_is_made_by_a_step_too(model, device):
    """And none comes of the steps after it."""
    out = generate(model, [1, 2], 3 * BLOCK, stop_token=TOKEN)
    assert (out.tokens, out.finish_reasons) == ([[]], ["stop"])
    assert (out.steps, out.decode_seconds) == (0, 0.0)
    steps = device.decode

    def stops_at_3(loop):
        made = steps(loop)
        made.tokens._value[2] = 7
        return made

    device.decode = stops_at_3
    out = generate(model, [1, 2], 3 * BLOCK, stop_token=7)
    assert (out.tokens, out.finish_reasons) == ([[TOKEN] * 3], ["stop"])
    assert out.decode_seconds == BLOCK * STEP  # not of the block that was ordered ahead
    assert out.tokens_per_second == 3 / out.decode_seconds


def test_the_command_prints_the_same_figures(model, device, capsys, tmp_path):
    checkpoints.save(model, tmp_path / "tiny")
    asked = ["generate", "--model", str(tmp_path / "tiny"), "--prompt", "x"]
    asked += ["--max-new-tokens", str(2 * BLOCK + 1)]
    assert main([*asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prefill_seconds"] == PREFILL
    assert report["decode_seconds"] == 2 * BLOCK * STEP
    assert report["seconds"] == PREFILL + 2 * BLOCK * STEP
    assert report["tokens_per_second"] == 1 / STEP
    assert main(asked) == 0
    assert f"{2 * BLOCK + 1} tokens, prefill 64.000 s, 2.0 tokens/s with " in (
        capsys.readouterr().err
    )
