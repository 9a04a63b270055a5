"""Tuning: what is tried, what counts, and the table that the fused kernel reads."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decode_cases import dims_of, random_model, small_config

from ffjax import cli
from ffjax.benchmark import tune as tune_module
from ffjax.benchmark.contenders import Contender, implementation
from ffjax.benchmark.tune import Trial, candidates, refinements, tune
from ffjax.commands.tune import _line
from ffjax.config import preset
from ffjax.formats import WeightFormats, int4
from ffjax.quantization import quantized_config
from pallas_kernels.dims import Grouping, WeightBits, WeightGroups
from pallas_kernels.gpu import Gpu
from pallas_kernels.stream import tuning as tuning_module
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import fitting, make_stream_plan
from pallas_kernels.stream.tuning import Tuning, row_key, tuning_for

pytestmark = [
    pytest.mark.once(
        "What is tried is planned in plain Python.",
        sample=[
            "test_bad_input_gets_a_sentence",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

H200 = Gpu.named("NVIDIA H200", "9.0", 132)


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.2-3b", "llama3.1-8b"])
@pytest.mark.parametrize("batch", [1, 8])
def test_candidates_differ_and_can_be_planned(name, batch):
    dims = dims_of(preset(name), batch, 1024)
    tried = candidates(dims, H200)
    assert tried[0] == Tuning()
    plans = [make_stream_plan(dims, H200, tuning) for tuning in tried]
    downs = [p.segments[Segment.DOWN] for p in plans]
    pairs = zip(plans, downs, strict=True)
    sizes = {(p.rows, down.rows, down.splits, p.num_warps) for p, down in pairs}
    assert len(sizes) == len(plans) > 1
    finer = refinements(dims, H200, Tuning())
    assert Tuning() not in finer
    planned = [make_stream_plan(dims, H200, tuning) for tuning in finer]
    rings = set()
    for p, t in zip(planned, finer, strict=True):
        ahead = min(p.in_flight, p.slots), t.l2_tiles, t.l2_bytes, p.next_tiles
        others = t.collect_tiles, t.hidden_copies, p.attention.tiles, p.attention.block
        rings.add((p.slots, *ahead, *others))
    assert len(rings) == len(planned)
    slots = [t.slots for t in finer if t.slots is not None]
    assert slots == list(range(plans[0].slots - 1, 1, -1))
    usual = Tuning().in_flight
    flying = [t.in_flight for t in finer if t.in_flight != usual]
    assert flying == [n for n in range(1, min(4, plans[0].slots) + 1) if n != usual]
    assert [t.l2_tiles for t in finer if t.l2_tiles != Tuning().l2_tiles] == [0, 2, 4, 16]
    assert [t.l2_bytes for t in finer if t.l2_bytes != Tuning().l2_bytes] == [4096, 32_768]
    assert [t.next_tiles for t in finer if t.next_tiles is not None] == [2, 16]
    assert [t.collect_tiles for t in finer if t.collect_tiles] == [1, 2]
    assert [t.hidden_copies for t in finer if t.hidden_copies != 1] == [2]
    assert [t.cache_tiles for t in finer if t.cache_tiles != Tuning().cache_tiles] == [3]
    usual = Tuning().cache_tile_bytes
    smaller = [t.cache_tile_bytes for t in finer if t.cache_tile_bytes != usual]
    assert smaller == [8192, 16_384]


def test_candidates_begin_with_what_fits():
    dims, small = dims_of(preset("llama3.2-1b"), 1, 1024), Gpu.named("L4", "8.9", 58)
    tried = candidates(dims, small)
    assert tried[0] == fitting(dims, small) != Tuning()
    assert len(tried) > 1
    for tuning in tried:
        assert make_stream_plan(dims, small, tuning).why_no_room is None


def test_a_gpu_that_streams_nothing_has_no_candidates():
    dims = dims_of(preset("llama3.2-1b"), 1, 1024)
    assert candidates(dims, Gpu.named("many", "9.0", 321)) == []


def test_a_line_says_how_a_plan_keeps_its_tiles():
    options: dict[str, Any] = {
        "in_flight": 3,
        "l2_tiles": 4,
        "collect_tiles": 1,
        "hidden_copies": 2,
    }
    tuning = Tuning(tile_bytes=16384, slots=5, **options)
    plan = make_stream_plan(dims_of(preset("llama3.2-1b"), 1, 1024), H200, tuning)
    trial = Trial(tuning, plan, tune_module.Timing(1, (1e-3,), 0.0), 0.004, True, None)
    line = _line(trial)
    assert f"tiles of {plan.rows} rows, 5 slots of {plan.slot_bytes} bytes, 3 in flight" in line
    assert "4 ahead by 8192 bytes, 1 of the next segment, 1 with activations, 2 copies" in line
    assert "4 warps, error 4.0e-03" in line
    assert "WRONG" not in line
    assert "WRONG" in _line(dataclasses.replace(trial, repeats=False))
    failed = dataclasses.replace(trial, timing=None, failure="too much")
    assert _line(failed).startswith("  does not compile")
    assert _line(failed).endswith("4 warps: too much")


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_fastest_sound_candidate_comes_first(monkeypatch, tokens):
    """The reference plays the kernel: wrong under one tuning, failing under another."""
    config = small_config(vocab_size=32, num_layers=1)
    model, dims = random_model(config), dims_of(config, 1, 256, tokens)
    right, wrong, broken = (Tuning(tile_bytes=size) for size in (8192, 16384, 65536))
    monkeypatch.setattr(tune_module, "candidates", lambda *_: [wrong, broken, right])
    monkeypatch.setattr(tune_module, "refinements", lambda *_: [Tuning(slots=2)])

    def make(model, tuning) -> Contender:
        plain = implementation(model, "xla")

        def step(weights, cache, tokens):
            if tuning == broken:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory\nand more")
            out = plain.step(weights, cache, tokens)
            off = 0.5 * jnp.max(jnp.abs(out.logits)) if tuning == wrong else 0.0
            return out._replace(logits=out.logits + off)  # pyright: ignore[reportAttributeAccessIssue]

        return dataclasses.replace(plain, step=step)

    said = []
    trials = tune(model, dims, H200, 3, 6, 7, make, said.append)
    assert [trial.sound for trial in trials] == [True, True, False, False]
    assert {trials[0].tuning, trials[1].tuning} == {right, Tuning(slots=2)}
    times = [trial.timing.step_seconds for trial in trials[:2] if trial.timing is not None]
    assert times == sorted(times)
    assert trials[2].tuning == wrong
    assert trials[2].relative_error > tune_module.WRONG > trials[0].relative_error
    assert trials[3].tuning == broken
    assert trials[3].failure == "RESOURCE_EXHAUSTED: shared memory"
    assert len(said) == 4


def test_bits_that_change_are_not_sound():
    plan = make_stream_plan(dims_of(small_config(), 1, 16), H200)
    timing = tune_module.Timing(1, (1.0,), 0.0)
    trial = Trial(Tuning(), plan, timing, 0.0, True, None)
    assert trial.sound
    assert not dataclasses.replace(trial, repeats=False).sound
    assert not dataclasses.replace(trial, relative_error=float("nan")).sound


def test_without_a_gpu_tuning_is_refused_before_weights_are_made(capsys, monkeypatch):
    def never(*_):
        raise AssertionError("weights were made")

    monkeypatch.setattr("ffjax.benchmark.inputs.random_model", never)
    if jax.default_backend() != "cpu":
        pytest.skip("says what a CPU cannot do")
    assert cli.main(["tune", "--config", "python-bytes-3m"]) == 2
    assert "runs on NVIDIA GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llama9"], "No preset is called 'llama9'"),
        (["--config", "llama3.2-1b", "--batch", "9"], "takes 1 to 8 sequences; there are 9"),
        (
            ["--config", "llama3.2-1b", "--steps", "0"],
            "--steps: a whole number from 1 is needed, got '0'.",
        ),
        (
            ["--config", "llama3.2-1b", "--repetitions", "3"],
            "--repetitions: a whole number from 7 is needed, got '3'.",
        ),
    ],
)
def test_bad_input_gets_a_sentence(capsys, arguments, message):
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


# The table


def test_every_row_of_the_table_can_be_planned():
    for row in tuning_module._table():
        assert {"device", "batch", "tuning", "us_per_step", "config"} <= row.keys()
        dims = dims_of(preset(row["config"]), row["batch"], 1024, row.get("tokens", 1))
        names = (field.name for field in dataclasses.fields(WeightBits))
        bits = WeightBits(**dict(zip(names, row["weight_bits"], strict=True)))
        dims = dataclasses.replace(dims, weight_bits=bits)
        if (groups := row.get("groups")) is not None:
            kinds = [group and Grouping(size=int(group.split()[0])) for group in groups]
            names = (field.name for field in dataclasses.fields(WeightGroups))
            of_row = WeightGroups(**dict(zip(names, kinds, strict=True)))
            dims = dataclasses.replace(dims, weight_groups=of_row)
        assert row_key(row["device"], dims).items() <= row.items()
        make_stream_plan(dims, H200, Tuning(**row["tuning"]))


def test_a_step_takes_its_own_row_or_the_defaults(monkeypatch):
    dims = dims_of(preset("llama3.2-1b"), 3, 1024)
    chosen = Tuning(tile_bytes=16384, num_warps=8, l2_tiles=2)
    row = {**row_key("NVIDIA H200", dims), "tuning": dataclasses.asdict(chosen)}
    monkeypatch.setattr(tuning_module, "_table", lambda: [json.loads(json.dumps(row))])
    assert row["batch"] == 4
    assert tuning_for("NVIDIA H200", dims) == chosen
    assert tuning_for("NVIDIA H200", dataclasses.replace(dims, batch=4, capacity=7)) == chosen
    assert tuning_for("NVIDIA H200", dataclasses.replace(dims, batch=2)) is None
    assert tuning_for("NVIDIA H200", dataclasses.replace(dims, ffw_dim=64)) is None
    assert tuning_for("NVIDIA H100", dims) is None


def test_weights_in_other_groups_take_their_own_row_or_that_of_their_bits(monkeypatch):
    dims = dims_of(quantized_config(preset("llama3.2-1b"), WeightFormats.of_layers(int4(32))), 1, 9)
    usual = dims_of(quantized_config(preset("llama3.2-1b"), WeightFormats.of_layers(int4())), 1, 9)
    own, other = row_key("NVIDIA H200", dims), row_key("NVIDIA H200", usual)
    assert own["groups"] == ["32"] * 4 + [None] and "groups" not in other
    own, other = {**own, "tuning": {"slots": 3}}, {**other, "tuning": {"slots": 4}}
    monkeypatch.setattr(tuning_module, "_table", lambda: [own, other])
    assert tuning_for("NVIDIA H200", dims) == Tuning(slots=3)
    assert tuning_for("NVIDIA H200", usual) == Tuning(slots=4)
    # With zero points they are others.
    formats = WeightFormats.of_layers(int4(32, offset="zero"))
    zeros = dims_of(quantized_config(preset("llama3.2-1b"), formats), 1, 9)
    assert tuning_for("NVIDIA H200", zeros) == Tuning(slots=4)
    monkeypatch.setattr(tuning_module, "_table", lambda: [own])
    assert tuning_for("NVIDIA H200", usual) is None


def test_several_tokens_take_their_own_row_or_that_of_as_many_sequences(monkeypatch):
    dims = dims_of(preset("llama3.2-1b"), 2, 1024)
    several = dataclasses.replace(dims, tokens=3)
    of_eight = {**row_key("NVIDIA H200", dataclasses.replace(dims, batch=8)), "tuning": {}}
    of_four = {**row_key("NVIDIA H200", several), "tuning": {"slots": 4}}
    monkeypatch.setattr(tuning_module, "_table", lambda: [of_four, of_eight])
    assert (of_four["batch"], of_four["tokens"]) == (2, 4)
    assert tuning_for("NVIDIA H200", several) == Tuning(slots=4)
    assert tuning_for("NVIDIA H200", dims) is None  # one token takes no row of several
    by_columns = dataclasses.replace(dims, batch=1, tokens=8)
    assert tuning_for("NVIDIA H200", by_columns) == Tuning()
    assert tuning_for("NVIDIA H200", dataclasses.replace(by_columns, tokens=4)) is None
