"""`ffjax bench --loop`: a token's time in whole generations, by two clocks, beside bare steps."""

import contextlib
import functools
import io
import json
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from bench_cases import CONFIG

from ffjax.benchmark import loops
from ffjax.benchmark.inputs import random_model, random_prompts
from ffjax.benchmark.loop_report import as_data, as_text
from ffjax.benchmark.loops import LoopPoint, LoopReport, LoopSweep, Way
from ffjax.benchmark.machine import Machine
from ffjax.benchmark.timing import Samples, Timing
from ffjax.broken import NotFiniteError
from ffjax.cli import main
from ffjax.config import PRESETS
from ffjax.generation import generate

pytestmark = [
    pytest.mark.once(
        "What is timed and how it is printed is arithmetic; a sample runs the programs.",
        sample=[
            "test_bad_input_is_a_sentence_and_code_2",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

WAYS = [
    "generate, greedy",
    "stream, greedy",
    "stream, greedy, slow reader",
    "stream, greedy, busy reader",
    "generate, temperature 0.8",
    "stream, temperature 0.8",
    "generate, top-k 50, top-p 0.9",
    "stream, top-k 50, top-p 0.9",
]
_model = functools.cache(random_model)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """A preset of these sizes, and programs compiled without care."""
    careful = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, CONFIG.name, CONFIG)
        patch.setattr(loops, "random_model", _model)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", careful)


def _bench(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["bench", "--config", CONFIG.name, "--loop", *arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def timed() -> dict[str, Any]:
    """The object that is printed."""
    code, out, err = _bench("--batch", "2", "--position", "9", "--steps", "16", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_every_way_is_timed_beside_the_bare_steps(timed):
    assert (timed["config"], timed["steps"], timed["repetitions"]) == ("tiny", 16, 7)
    [point] = timed["loops"]
    assert (point["batch"], point["position"]) == (2, 9)
    assert point["step"]["us_per_step"] > 0
    assert [way["name"] for way in point["ways"]] == WAYS
    # The same program of steps from the same cache chooses the same tokens.
    assert point["same_tokens_as_bare_steps"] == 16


def test_figures_of_a_way_follow_from_its_repetitions(timed):
    [point] = timed["loops"]
    step = point["step"]["us_per_step"]
    for way in point["ways"]:
        assert way["sound"]
        assert len(way["repetitions_us"]) == len(way["reported_repetitions_us"]) == 7
        assert way["us_per_token"] == pytest.approx(sorted(way["repetitions_us"])[3])
        assert way["over_step"] == pytest.approx(way["us_per_token"] / step)
        assert way["reported_over_step"] == pytest.approx(way["reported_us"] / step)
        assert (way["reader_us"] > 0) == ("reader" in way["name"])
        longer = max(step, way["reader_us"])
        assert way["over_longer"] == pytest.approx(way["us_per_token"] / longer)


def test_a_clock_outside_finds_what_a_generation_does_not_report(monkeypatch):
    """A second a token that nobody reports, on a clock that advances for nothing else."""
    clock = types.SimpleNamespace(now=0.0)

    def slower(model, prompts, new_tokens, **options):
        clock.now += 5 + new_tokens
        return generate(model, prompts, new_tokens, **options)

    monkeypatch.setattr(loops, "generate", slower)
    monkeypatch.setattr(
        loops, "time", types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=None)
    )
    sweep = LoopSweep(config=CONFIG, batches=(1,), positions=(4,), steps=8)
    asked = loops._Asked(sweep, _model(CONFIG), random_prompts(CONFIG, [4]), "greedy")
    spent = asked.generate()
    assert spent.clock == 8.0
    assert 0 < spent.reported < 8
    assert spent.tokens.shape == (9, 1)


def test_a_stream_is_timed_from_its_first_token_to_its_last_sleep_and_all(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, slept=[])

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds + 0.5

    class Rows:
        output = types.SimpleNamespace(decode_seconds=3.0)

        def __next__(self) -> list[int]:
            clock.now += 2
            return [7]

    monkeypatch.setattr(loops, "stream", lambda *_, **__: Rows())
    monkeypatch.setattr(
        loops, "time", types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep)
    )
    sweep = LoopSweep(config=CONFIG, batches=(1,), positions=(4,), steps=8)
    asked = loops._Asked(sweep, _model(CONFIG), random_prompts(CONFIG, [4]), "greedy", 1.0)
    spent = asked.stream()
    assert clock.slept == [1.0] * 8
    assert (spent.clock, spent.reported, spent.reader) == (8 * 3.5, 3.0, 8 * 1.5)
    assert spent.tokens.tolist() == [[7]] * 9


def test_a_busy_reader_looks_at_the_clock_until_its_time_is_up(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)

    def look() -> float:
        clock.now += 0.25
        return clock.now

    monkeypatch.setattr(loops, "time", types.SimpleNamespace(perf_counter=look, sleep=None))
    sweep = LoopSweep(config=CONFIG, batches=(1,), positions=(4,), steps=8)
    model = _model(CONFIG)
    asked = loops._Asked(sweep, model, random_prompts(CONFIG, [4]), "greedy", 1.0, busy=True)
    spent = asked.stream()
    assert spent.reader == 8 * 1.25
    assert spent.tokens.shape == (9, 1)


def test_a_generation_that_does_not_repeat_ends_with_code_1(monkeypatch):
    runs = iter(range(999))

    def changes(model, prompts, new_tokens, **options):
        out = generate(model, prompts, new_tokens, **options)
        if new_tokens > 1 and next(runs) == 7:  # the second time of one way
            out.tokens[0][3] += 1
        return out

    monkeypatch.setattr(loops, "generate", changes)
    code, out, err = _bench("--position", "4", "--steps", "8", "--json")
    assert code == 1
    [point] = json.loads(out)["loops"]
    assert [way["sound"] for way in point["ways"]].count(False) == 1
    assert "batch 1, position 4: generate, " in err
    assert "gave other tokens than before, or not as many as asked for." in err


def test_logits_that_are_not_finite_end_with_code_1(monkeypatch):
    def broken(*_, **__):
        raise NotFiniteError(0, 3)

    monkeypatch.setattr(loops, "generate", broken)
    code, out, err = _bench("--position", "4", "--steps", "8", "--json")
    assert (code, out) == (1, "")
    assert "those of sequence 0 were NaN or infinite after 3 new tokens" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--position", "0"], "A generation begins after 1 token or more, got 0."),
        (["--steps", "12"], "ask for a multiple of 8 steps, got 12."),
        (
            ["--position", "9,292", "--steps", "8"],
            "8 steps after 292 tokens and the first new one need 301 positions; tiny was made "
            "for 300.",
        ),
        (["--compare", "xla"], "--loop times whole generations; leave --compare out."),
        (["--plot", "times.png"], "--loop times whole generations; leave --plot out."),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(arguments, sentence):
    code, out, err = _bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ffjax bench: ")
    assert sentence in err


def test_steps_agree_up_to_the_first_that_differs():
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    assert loops._agreeing(tokens, tokens) == 3
    assert loops._agreeing(tokens, tokens + np.array([[0, 0], [0, 1], [0, 0]])) == 1
    assert loops._agreeing(tokens, None) == 0


def _report() -> LoopReport:
    """Ten steps of 1 ms; a reader who sleeps 2 ms at each."""

    def way(name: str, clock: float, reader: float, *, sound: bool) -> Way:
        return Way(
            name=name,
            steps=10,
            reported=Samples((0.011,) * 7),
            clock=Samples((clock,) * 7),
            reader=Samples((reader,) * 7),
            sound=sound,
        )

    point = LoopPoint(
        batch=4,
        position=96,
        implementation="pallas",
        reason=None,
        step=Timing(10, (0.01,) * 7, 1.5),
        same_tokens=7,
        ways=(way("generate", 0.012, 0.0, sound=True), way("stream", 0.025, 0.02, sound=False)),
    )
    return LoopReport(
        sweep=LoopSweep(config=CONFIG, batches=(4,), positions=(96,), steps=8),
        machine=Machine("Abacus", "wood", {"jax": "1", "ffjax": "2"}),
        points=(point,),
    )


def test_the_table_by_hand():
    text = as_text(_report())
    assert text.startswith("tiny, bfloat16, on Abacus (wood); ffjax 2, JAX 1. Median of 7 ")
    assert "Batch 4, position 96: greedy tokens are those of the bare steps for 7 of 8" in text
    header, rule, *rows = text.splitlines()[-5:]
    assert set(rule) <= set("|-:")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    names, bare, first, second = cells
    assert names[2:] == [
        "what",
        "µs/token",
        "spread",
        "over step",
        "reported µs/token",
        "reader µs/token",
        "same tokens",
    ]
    assert bare[2:] == ["bare steps (pallas)", "1000.0", "0.0%", "", "", "", ""]
    assert first[2:] == ["generate", "1200.0", "0.0%", "1.200x", "1100.0", "", "yes"]
    assert second[2:] == ["stream", "2500.0", "0.0%", "1.250x", "1100.0", "2000.0", "NO"]
    [data] = as_data(_report())["loops"]
    assert [way["over_step"] for way in data["ways"]] == pytest.approx([1.2, 2.5])
    assert [way["over_longer"] for way in data["ways"]] == pytest.approx([1.2, 1.25])
