"""`ffjax bench --prompt`: honest figures, and a check that finds a wrong prefill."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_cases import CONFIG, FAMILY, PNG

from ffjax.benchmark import prompts
from ffjax.benchmark.dense_rate import DenseRate
from ffjax.benchmark.flops import prompt_flops
from ffjax.benchmark.inputs import random_model, random_prompts
from ffjax.benchmark.machine import Machine
from ffjax.benchmark.prompt_check import PromptCheck, ReferencePrefill, same_cache
from ffjax.benchmark.prompt_plot import draw_prompts
from ffjax.benchmark.prompt_report import as_data, as_text
from ffjax.benchmark.prompts import Peak, PromptPoint, PromptReport, PromptSweep
from ffjax.benchmark.span import Span
from ffjax.benchmark.timing import Samples, Timing
from ffjax.cache import KVCache
from ffjax.cli import main
from ffjax.config import PRESETS
from ffjax.loop import NOT_FINITE, Loop, Made

pytestmark = [
    pytest.mark.once(
        "What is timed and how it is printed is arithmetic; a sample runs the programs.",
        sample=[
            "test_bad_input_is_a_sentence_and_code_2",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

_model = functools.cache(random_model)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Presets of these sizes, small matrices to multiply, and programs compiled without care."""
    careful = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, CONFIG.name, CONFIG)
        patch.setitem(PRESETS, FAMILY.name, FAMILY)
        patch.setattr(prompts, "default_size", lambda device: 64)
        patch.setattr(prompts, "random_model", _model)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", careful)


def _bench(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["bench", "--config", CONFIG.name, *arguments])
    return code, out.getvalue(), err.getvalue()


# The command.


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The object printed by a sweep, and the plot."""
    path = tmp_path_factory.mktemp("plots") / "prompts.png"
    options = ["--prompt", "5,40,3-70", "--batch", "2", "--steps", "3", "--compare", "xla"]
    code, out, err = _bench(*options, "--json", "--plot", str(path))
    assert (code, err) == (0, "")
    return json.loads(out), path


def test_a_sweep_is_one_object(swept):
    data, path = swept
    assert [(point["batch"], point["prompt"]) for point in data["prompts"]] == [
        (2, "5"),
        (2, "40"),
        (2, "3-70"),
    ]
    assert [point["lengths"] for point in data["prompts"]] == [[5, 5], [40, 40], [3, 70]]
    assert (data["config"], data["steps"], data["repetitions"]) == ("tiny", 3, 7)
    assert data["device"] == jax.devices()[0].device_kind
    assert data["dense_rate"]["size"] == 64
    assert data["dense_rate"]["tflops_per_second"] > 0
    assert path.read_bytes().startswith(PNG)


def test_figures_of_a_point_follow_from_its_repetitions_and_operations(swept):
    data, _ = swept
    for point in data["prompts"]:
        for timed in (point["first_token"], point["request"], point["reference"]):
            repetitions = timed["repetitions_ms"]
            assert len(repetitions) == 7
            assert timed["ms"] == pytest.approx(sorted(repetitions)[3])
            assert timed["fastest_ms"] == pytest.approx(min(repetitions))
        pairs = zip(
            point["first_token"]["repetitions_ms"], point["request"]["repetitions_ms"], strict=True
        )
        assert all(0 < first < request for first, request in pairs)
        total = prompt_flops(CONFIG, point["lengths"]).total
        assert point["flops"]["total"] == total
        floor = total / data["dense_rate"]["tflops_per_second"] / 1e9
        assert point["floor_ms"] == pytest.approx(floor)
        share = 100 * floor / point["first_token"]["ms"]
        assert point["percent_of_dense_rate"] == pytest.approx(share)
        assert point["step"]["position"] == max(point["lengths"])
        steps = 1e3 * point["first_token"]["ms"] / point["step"]["us_per_step"]
        assert point["steps_to_first_token"] == pytest.approx(steps)


def test_the_timed_prefill_is_checked(swept):
    data, _ = swept
    for point in data["prompts"]:
        check = point["correctness"]
        assert check["sound"]
        assert (check["tokens"], check["positions"]) == (2, sum(point["lengths"]))
        assert check["finite"]
        assert check["repeats"]
        assert 0 <= check["cache_error"] <= check["position_error"] < 0.1
        assert 0 <= check["same_tokens"] <= 2


def test_another_family_in_several_chunks_is_right(monkeypatch):
    monkeypatch.setattr("ffjax.benchmark.prompt_check._CHUNK", 16)
    code, out, err = _bench("--config", FAMILY.name, "--prompt", "9-50", "--batch", "3", "--json")
    assert (code, err) == (0, "")
    [point] = json.loads(out)["prompts"]
    assert point["correctness"]["sound"]
    assert point["reference"] is None


def test_quantized_weights_are_named_and_right():
    formats = ["--weights", "int8", "--head", "int8"]
    code, out, err = _bench("--prompt", "20", "--steps", "1", *formats, "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["quantized"] == "int8: qkv, attn_out, gate_up, down, head"
    [point] = data["prompts"]
    assert point["correctness"]["sound"]
    assert point["flops"]["total"] == prompt_flops(CONFIG, [20]).total


def test_the_text_is_a_table_after_what_was_timed():
    code, out, err = _bench("--prompt", "4", "--steps", "2")
    assert code == 0
    doing, done = err.splitlines()[-2:]
    assert doing == "ffjax bench: batch 1, prompts of 4: checking and timing"
    assert re.fullmatch(r"ffjax bench: first token \S+ ms, a step \S+ us", done)
    title, _, table = out.rstrip("\n").partition("\n\n")
    assert title.startswith("tiny, bfloat16, on ")
    assert "Dense rate " in title
    assert len({len(line) for line in table.splitlines()}) == 1


# What is planted is found.


def _altered(monkeypatch, alter: Callable[[Loop, Made], Made]) -> None:
    prefill = Loop.prefill
    monkeypatch.setattr(Loop, "prefill", lambda loop: alter(loop, prefill(loop)))


def _with(made: Made, tokens: jax.Array) -> Made:
    return made._replace(tokens=tokens)


def _set(loop: Loop, **arrays: Any) -> None:
    loop._cache = dataclasses.replace(loop.cache, **arrays)


def _one_position(loop: Loop, made: Made) -> Made:
    k = loop.cache.k
    _set(loop, k=k.at[2, 1, :, 33].set(-k[2, 1, :, 33]))
    return made


def _one_layer_by_a_little(loop: Loop, made: Made) -> Made:
    v = loop.cache.v
    _set(loop, v=v.at[1, 0].multiply(1.2))
    return made


def _lengths(loop: Loop, made: Made) -> Made:
    _set(loop, lengths=loop.cache.lengths - 1)
    return made


def _not_finite(loop: Loop, made: Made) -> Made:
    _set(loop, v=loop.cache.v.at[0, 0, 0, 2, 1].set(jnp.nan))
    return made


def _beyond(loop: Loop, made: Made) -> Made:
    _set(loop, v=loop.cache.v.at[:, :, :, 40:].set(jnp.nan))
    return made


ANOTHER_CACHE = "made another cache than the reference"


@pytest.mark.parametrize(
    ("alter", "complaint"),
    [
        (_one_position, ANOTHER_CACHE),
        (_one_layer_by_a_little, ANOTHER_CACHE),
        (_lengths, ANOTHER_CACHE),
        (_not_finite, "made a cache or logits not finite"),
        (
            lambda _, made: _with(made, made.tokens.at[1].set(NOT_FINITE)),
            "made a cache or logits not finite",
        ),
        (
            lambda _, made: _with(made, (made.tokens + 50) % CONFIG.vocab_size),
            "chose other first tokens than the reference",
        ),
        (_beyond, None),  # nobody reads what is not live
    ],
)
def test_a_wrong_prefill_is_found(monkeypatch, alter, complaint):
    _altered(monkeypatch, alter)
    code, out, err = _bench("--prompt", "40", "--batch", "2", "--steps", "1", "--json")
    [point] = json.loads(out)["prompts"]
    assert point["correctness"]["sound"] == (complaint is None)
    if complaint is None:
        assert (code, err) == (0, "")
    else:
        assert code == 1
        assert err == f"ffjax bench: batch 2, prompts of 40: the prefill {complaint}.\n"


@pytest.mark.parametrize("run", [2, 5])
def test_a_prefill_that_does_not_repeat_is_found(monkeypatch, run):
    """The first run is the compiling one; 1 is checked, 2 compared with it, others are timed."""
    runs = iter(range(99))

    def alter(loop: Loop, made: Made) -> Made:
        if next(runs) != run:
            return made
        k = loop.cache.k
        _set(loop, k=k.at[0, 0, 0, 0, 0].add(0.125))
        return _with(made, made.tokens + (run > 2))

    _altered(monkeypatch, alter)
    code, _, err = _bench("--prompt", "7", "--steps", "1", "--json")
    assert code == 1
    assert "the prefill gave other bits when repeated." in err


def test_the_reference_is_the_model_whatever_the_chunks(monkeypatch):
    model, lengths = _model(FAMILY), (3, 21, 16)
    rows = random_prompts(FAMILY, lengths)
    monkeypatch.setattr("ffjax.benchmark.prompt_check._CHUNK", 8)
    logits, cache = ReferencePrefill(model, rows, 32).run()
    assert cache.lengths.tolist() == list(lengths)
    for row, prompt in enumerate(rows):
        alone = KVCache.create(FAMILY, 1, 32, model.dtype)
        want, alone = model(jnp.asarray(prompt[None]), alone, last_only=True)
        error = np.linalg.norm(logits[row] - want[0]) / np.linalg.norm(want)
        assert error < 0.02
        live = slice(len(prompt))
        got, kept = (
            np.asarray(x, np.float32)[:, :, live] for x in (cache.k[:, row], alone.k[:, 0])
        )
        assert np.linalg.norm(got - kept) / np.linalg.norm(kept) < 0.02


def test_caches_are_the_same_by_bits_where_they_are_live():
    cache = KVCache.create(CONFIG, 2, 8)
    cache = dataclasses.replace(cache, lengths=jnp.array([3, 8], jnp.int32))
    for slot, same in ((2, False), (3, True)):
        other = dataclasses.replace(cache, v=cache.v.at[1, 0, 0, slot, 0].set(-0.0))
        assert bool(same_cache(cache, other)) == same
    assert not same_cache(cache, dataclasses.replace(cache, lengths=cache.lengths - 1))


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "0"], "--prompt: lengths from 1 are needed, with commas between them"),
        (["--prompt", "9-3"], "got '9-3'."),
        (["--prompt", "16,many"], "as 16,128 or 10-1500; got '16,many'."),
        (["--prompt", "3-9"], "Prompts of 3-9 tokens are several"),
        (
            ["--prompt", "16,300"],
            "A prompt of 300 tokens and a new one need 301 positions; tiny was made for 300.",
        ),
        (["--prompt", "16", "--steps", "301"], "301 steps need as many positions"),
        (["--prompt", "16", "--position", "3"], "leave --position out, or --prompt."),
        (["--prompt", "16", "--loop"], "--loop times whole generations; leave --prompt out."),
        (["--prompt", "16", "--plot", "times.pdf"], "its name ends in .png"),
        (["--prompt", "16", "--repetitions", "6"], "--repetitions: a whole number from 7"),
        (
            ["--prompt", "16", "--batch", "9", "--implementation", "pallas"],
            "The fused kernel takes 1 to 8 sequences; there are 9.",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(arguments, sentence):
    code, out, err = _bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ffjax bench: ")
    assert sentence in err


def test_a_device_that_is_too_small_is_a_sentence(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 20_000_000_000})
    monkeypatch.setattr(prompts, "default_device", lambda: device)
    spans = (Span(16, 16), Span(8000, 16_000))
    sweep = PromptSweep(config=PRESETS["llama3.1-8b"], batches=(2,), spans=spans)
    # 8.03e9 bfloat16 weights, and twice 2 * 16128 slots of 131,072 bytes.
    with pytest.raises(ValueError, match=r"take 24\.5 GB at the largest point; this device has 20"):
        prompts.run(sweep)


def test_steps_behind_the_longest_prompt_fit_the_model():
    sweep = PromptSweep(config=CONFIG, batches=(1,), spans=(Span(290, 290),), steps=64)
    assert sweep.step_position(Span(290, 290)) == 236
    assert sweep.step_position(Span(100, 100)) == 100


def test_the_peak_of_a_device_is_the_prefills_only_where_it_raised_it(monkeypatch):
    told = iter([10, 10, 10, 30])
    monkeypatch.setattr(prompts, "_peak_bytes", lambda device: next(told))
    code, out, _ = _bench("--prompt", "9,4", "--steps", "1", "--json")
    assert code == 0
    peaks = [(p["peak_bytes"], p["peak_is_the_prefills"]) for p in json.loads(out)["prompts"]]
    assert peaks == [(30, True), (10, False)]  # that of 4 tokens ran first


# Figures.


def _point(**changes: Any) -> PromptPoint:
    """2 ms for 4 prompts of 96 tokens, of which their operations take 1 ms; 0.5 ms a step."""
    fields: dict[str, Any] = {
        "span": Span(96, 96),
        "lengths": (96,) * 4,
        "implementation": "pallas",
        "prefill": "packed",
        "reason": None,
        "flops": dataclasses.replace(prompt_flops(CONFIG, [1]), products=0, attention=0, head=1000),
        "first_token": Samples((0.002,) * 6 + (0.003,)),
        "request": Samples((0.004,) * 7),
        "compile_seconds": 1.5,
        "reference": Samples((0.01,) * 7),
        "step": Timing(2, (0.001,) * 7, 2.5),
        "temp_bytes": 3_000_000,
        "peak": Peak(4_000_000_000, False),
        "check": PromptCheck(4, 384, True, True, 0.01, 0.02, 3, 0.125),
    }
    return PromptPoint(**(fields | changes))


def _report(*points: PromptPoint) -> PromptReport:
    return PromptReport(
        sweep=PromptSweep(config=CONFIG, batches=(4,), spans=(Span(96, 96),), reference=True),
        machine=Machine("Abacus", "wood", {"jax": "1", "ffjax": "2"}),
        rate=DenseRate(100, Samples((2.0,) * 7)),
        points=points,
    )


def test_figures_by_hand():
    report = _report(_point())
    [point] = report.points
    assert report.floor_seconds(point) == pytest.approx(0.001)
    assert report.fraction_of_rate(point) == pytest.approx(0.5)
    assert point.steps == pytest.approx(4)
    [data] = as_data(report)["prompts"]
    assert data["percent_of_dense_rate"] == pytest.approx(50)
    assert data["first_token"]["spread"] == pytest.approx(0.5)
    assert (data["peak_bytes"], data["peak_is_the_prefills"]) == (4_000_000_000, False)


def test_the_table_by_hand():
    wrong = PromptCheck(4, 384, True, False, float("inf"), 2.0, 0, 3.0)
    text = as_text(_report(_point(), _point(check=wrong)))
    header, rule, row, unsound = text.splitlines()[-4:]
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row))
    assert set(rule) <= set("|-:")
    assert dict(zip(names, cells, strict=True)) == {
        "batch": "4",
        "prompt": "96",
        "steps by": "pallas",
        "prefill by": "packed",
        "first token ms": "2.00",
        "spread": "50.0%",
        "request ms": "4.00",
        "floor ms": "1",
        "% of rate": "50.0",
        "step µs": "500.0",
        "in steps": "4.00",
        "compile s": "1.5",
        "reference ms": "10.00",
        "temp. MB": "3",
        "peak GB": "<=4.00",
        "cache error": "1.0e-02",
        "worst position": "2.0e-02",
        "same tokens": "3/4",
        "gap": "1.2e-01",
        "bit-equal": "yes",
        "right": "yes",
    }
    assert unsound.endswith("|        NO |    NO |")
    assert as_data(_report(_point(check=wrong)))["prompts"][0]["correctness"]["cache_error"] is None


def test_a_plot_draws_the_times_their_floor_the_step_and_the_reference(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *rest, **kw: drawn.append((x, y)) or plot(self, x, y, *rest, **kw),
    )
    spans = [Span(1024, 1024), Span(96, 96), Span(10, 30)]
    points = [_point(span=span, lengths=span.lengths(4)) for span in spans]
    draw_prompts(_report(*points), tmp_path / "prompts.png")
    *lines, ragged = drawn
    assert [x for x, _ in lines] == [[96, 1024]] * 4
    for (_, y), want in zip(lines, (2, 1, 0.5, 10), strict=True):
        assert y == pytest.approx([want, want])
    assert ragged == ([20], [pytest.approx(2)])
    assert (tmp_path / "prompts.png").read_bytes().startswith(PNG)
