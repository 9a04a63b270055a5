"""`ffjax bench`: a fair baseline, honest figures, and a check that finds a wrong step."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_cases import CONFIG, FAMILY, PNG
from decode_cases import filled_cache, random_tokens
from numerics import TOLERANCES, assert_close, assert_same_choice, relative_error

from ffjax import decode
from ffjax.benchmark import contenders, suite
from ffjax.benchmark.bandwidth import Bandwidth, default_bytes, read_bandwidth
from ffjax.benchmark.baseline import LayerCaches, baseline_step, split_cache
from ffjax.benchmark.check import Check, Difference, compare, follow, observe
from ffjax.benchmark.contenders import Contender, baseline, implementation
from ffjax.benchmark.inputs import capacity_for, first_tokens, random_model, started_cache
from ffjax.benchmark.machine import Machine
from ffjax.benchmark.plot import draw
from ffjax.benchmark.report import as_data, as_text
from ffjax.benchmark.suite import Point, Report, Sweep, Traffic
from ffjax.benchmark.timing import DecodeLoop, Timing, time_loops
from ffjax.cli import main
from ffjax.commands import bench
from ffjax.config import PRESETS
from ffjax.decode import DecodeOutput, reference_step
from ffjax.model import Transformer
from pallas_kernels.compile import why_no_compiler

pytestmark = [
    pytest.mark.once(
        "What is timed and how it is printed is arithmetic; a sample runs the programs.",
        sample=[
            "test_the_kernel_is_timed_where_it_can_run_and_checked_against_the_reference",
            "test_a_plot_draws_lines_of_the_times_the_floor_and_the_baseline",
            "test_bad_input_is_a_sentence_and_code_2",
            "test_a_loop_updates_the_baselines_cache_in_place",
            "test_a_random_model_has_weights_of_unit_gain_and_norms_around_1",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CAPACITY = 24
EQUAL = Difference(0.0, 0.0, 1.0, 1, 0.0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return _model(CONFIG)


_model = functools.cache(random_model)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """A preset of these sizes, a small array to read, and programs compiled without care."""
    careful = jax.config.values["jax_disable_most_optimizations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, CONFIG.name, CONFIG)
        patch.setattr(suite, "default_bytes", lambda device: 1 << 20)
        patch.setattr(suite, "random_model", _model)
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
    path = tmp_path_factory.mktemp("plots") / "sweep.png"
    options = ["--batch", "1,2", "--position", "9", "--steps", "3", "--compare", "xla"]
    code, out, err = _bench(*options, "--json", "--plot", str(path))
    assert (code, err) == (0, "")
    return json.loads(out), path


def test_a_sweep_is_one_object(swept):
    data, _ = swept
    assert [(point["batch"], point["position"]) for point in data["points"]] == [(1, 9), (2, 9)]
    assert [point["capacity"] for point in data["points"]] == [256, 256]
    assert (data["config"], data["steps"], data["repetitions"]) == ("tiny", 3, 7)
    assert data["device"] == jax.devices()[0].device_kind
    assert data["versions"]["jax"] == jax.__version__
    assert {"ffjax", "jaxlib", "runtime"} < set(data["versions"])
    assert data["read_bandwidth"]["tb_per_second"] > 0


def test_a_sweep_measures_every_batch_at_every_position_once(monkeypatch):
    measured = []
    monkeypatch.setattr(
        suite, "_measure", lambda _, __, ___, *at: measured.append(at[:2]) or [_point()]
    )
    suite.run(Sweep(config=CONFIG, batches=(4, 1, 4), positions=(9, 3), steps=1))
    assert measured == [(4, 9), (4, 3), (1, 9), (1, 3)]


def test_several_tokens_a_step_are_checked_against_the_reference_one_by_one():
    options = ["--tokens", "1,3", "--position", "9", "--steps", "3", "--batch", "2", "--json"]
    code, out, err = _bench(*options)
    assert (code, err) == (0, "")
    one, three = json.loads(out)["points"]
    assert (one["tokens"], three["tokens"]) == (1, 3)
    assert (one["capacity"], three["capacity"]) == (256, 256)
    assert three["tokens_per_second"] == pytest.approx(6e6 / three["us_per_step"])
    slot = 2 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
    # Of several tokens a step keeps one, so that both go through the same positions.
    assert three["cache_bytes"] == one["cache_bytes"] == slot * 2 * (9 + 1)
    assert three["weight_bytes"] - one["weight_bytes"] == 2 * 4 * CONFIG.model_dim
    assert three["correctness"]["against"] == "one by one"
    assert three["correctness"]["tokens"] == 18
    assert three["correctness"]["difference"]["relative_error"] < 0.05
    code, out, _ = _bench(*options[:-1])
    assert code == 0 and "| tokens |" in out and "one by one" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tokens", "2", "--compare", "xla"], "one token of each sequence a step, got 2."),
        (["--tokens", "2", "--loop"], "--tokens times decode steps; leave it out"),
        (["--tokens", "1,2", "--plot", "a.png"], "--plot draws steps of one token"),
        (["--tokens", "0"], "--tokens: whole numbers from 1 are needed"),
    ],
)
def test_several_tokens_go_with_some_options_alone(arguments, sentence):
    code, out, err = _bench(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err


def test_figures_of_a_point_follow_from_its_repetitions_and_bytes(swept):
    data, _ = swept
    for point in data["points"]:
        for timed in (point, point["baseline"]):
            repetitions = timed["repetitions_us"]
            assert len(repetitions) == 7
            assert timed["us_per_step"] == pytest.approx(sorted(repetitions)[3])
            assert timed["fastest_us"] == pytest.approx(min(repetitions))
            width = max(repetitions) - min(repetitions)
            assert timed["spread"] == pytest.approx(width / timed["us_per_step"])
            assert timed["compile_seconds"] > 0
        # K and V of L layers, bfloat16, on average at the second of three steps.
        slot = 2 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim
        assert point["cache_bytes"] == slot * point["batch"] * (point["position"] + 1)
        # Every weight once, of the embedding a row a sequence.
        table = CONFIG.vocab_size * CONFIG.model_dim
        weights = CONFIG.num_params - table + point["batch"] * CONFIG.model_dim
        assert point["weight_bytes"] == 2 * weights
        read = point["weight_bytes"] + point["cache_bytes"]
        assert point["bytes_per_step"] == read
        assert point["tb_per_second"] == pytest.approx(read / point["us_per_step"] / 1e6)
        share = point["tb_per_second"] / data["read_bandwidth"]["tb_per_second"]
        assert point["percent_of_read_bandwidth"] == pytest.approx(100 * share)
        assert point["floor_us"] == pytest.approx(share * point["us_per_step"])
        tokens = 1e6 * point["batch"] / point["us_per_step"]
        assert point["tokens_per_second"] == pytest.approx(tokens)
        speedup = point["baseline"]["us_per_step"] / point["us_per_step"]
        assert point["speedup"] == pytest.approx(speedup)


def test_the_timed_step_is_checked(swept):
    data, _ = swept
    for point in data["points"]:
        assert point["implementation"] in ("xla", "pallas")
        check = point["correctness"]
        assert (check["steps"], check["tokens"]) == (3, 3 * point["batch"])
        assert check["finite"]
        assert check["repeats"]
        difference = check["difference"]
        limit = TOLERANCES["cached_vs_whole_bfloat16"].relative
        assert 0 <= difference["relative_error"] <= limit
        assert 0 <= difference["largest_difference"] < difference["logit_rms"]
        assert 0 <= difference["same_tokens"] <= check["tokens"]


def test_a_plot_is_a_png(swept):
    _, path = swept
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 10_000


def test_the_text_is_a_table_after_what_was_timed_and_why(monkeypatch):
    reason = "It is made of wood."
    report = _report(_point(implementation="xla", reason=reason), _point())
    monkeypatch.setattr(suite, "run", lambda sweep, say: say("measuring") or report)
    code, out, err = _bench()
    assert (code, err) == (0, "ffjax bench: measuring\n")
    assert out == as_text(report) + "\n"
    title, _, table = out.partition("\n\n")
    assert title.startswith("tiny, bfloat16, on Abacus (wood); ffjax 2, JAX 1. Median of 7 loops")
    assert "Read bandwidth 0.004 TB/s" in title
    assert f"The reference, 'xla', is timed, because: {reason}" in title
    assert "Logits are compared with the reference's" in title
    lines = table.splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the fused kernel may run here")
def test_without_the_kernel_the_reference_is_timed_and_the_reason_given(swept):
    data, _ = swept
    for point in data["points"]:
        assert point["implementation"] == "xla"
        assert point["correctness"]["against"] == "baseline"
        assert "The fused kernel runs on NVIDIA GPUs" in point["reason"]


def test_the_kernel_is_timed_where_it_can_run_and_checked_against_the_reference(monkeypatch):
    """With a stand-in: the reference's numbers under the kernel's name."""
    named = []

    def decode_step(model, cache, tokens, *, implementation) -> DecodeOutput:
        named.append(implementation)
        return reference_step(model, cache, tokens)

    monkeypatch.setattr(decode, "why_not_fused_config", lambda *_: None)
    monkeypatch.setattr(contenders, "decode_step", decode_step)
    sweep = Sweep(config=CONFIG, batches=(1,), positions=(4,), steps=1)
    said: list[str] = []
    [point] = suite.run(sweep, said.append).points
    assert said[-1] == "batch 1, position 4: compiling, checking and timing 'pallas'"
    assert (point.implementation, point.reason) == ("pallas", None)
    assert point.check.against == "xla"
    assert point.check.difference is not None
    assert point.check.difference.relative_error == 0
    assert set(named) == {"pallas", "xla"}


def test_a_step_that_is_wrong_ends_with_code_1(monkeypatch):
    def decode_step(model, cache, tokens, *, implementation) -> DecodeOutput:
        out = reference_step(model, cache, tokens)
        return out._replace(logits=out.logits.at[0, 7].set(jnp.nan))

    monkeypatch.setattr(contenders, "decode_step", decode_step)
    code, out, err = _bench("--implementation", "xla", "--position", "4", "--steps", "1", "--json")
    assert code == 1
    [point] = json.loads(out)["points"]
    assert point["correctness"]["finite"] is False
    assert point["correctness"]["difference"]["relative_error"] is None
    assert "batch 1, position 4: 'xla' had logits not finite." in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "llama9"], "No preset is called 'llama9'; there are llama3.2-1b"),
        (["--steps", "0"], "--steps: a whole number from 1 is needed, got '0'."),
        (["--batch", "2,0"], "--batch: whole numbers from 1 are needed"),
        (["--position=3,-1"], "--position: whole numbers from 0 are needed"),
        (["--repetitions", "6"], "--repetitions: a whole number from 7 is needed, got '6'."),
        (
            ["--position", "9,237", "--steps", "64"],
            "64 steps from position 237 on need 301 positions; tiny was made for 300.",
        ),
        (
            ["--batch", "1,9", "--implementation", "pallas"],
            "The fused kernel takes 1 to 8 sequences; there are 9.",
        ),
        (["--plot", "times.pdf"], "its name ends in .png, got times.pdf."),
        (["--plot", "no/such/place.png"], "a directory that exists; no/such does not."),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(arguments, sentence):
    code, out, err = _bench(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ffjax bench: ")
    assert sentence in err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the fused kernel may run here")
def test_a_named_kernel_that_cannot_run_is_a_sentence_before_weights_are_made(monkeypatch):
    def never(*_):
        raise AssertionError("weights were made")

    monkeypatch.setattr(suite, "random_model", never)
    code, out, err = _bench("--implementation", "pallas")
    assert (code, out) == (2, "")
    assert "ffjax bench: The fused kernel runs on NVIDIA GPUs" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--batch", "1,two"],
            "whole numbers from 1 are needed, with commas between them, as 1,2,4",
        ),
        (["--compare", "torch"], "--compare: one of xla is needed, got 'torch'."),
    ],
)
def test_arguments_that_do_not_parse_end_with_code_2(capsys, arguments, words):
    assert main(["bench", "--config", CONFIG.name, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    code, out, err = _bench("--plot", str(tmp_path / "times.png"))
    assert (code, out) == (2, "")
    assert "matplotlib, which is not installed" in err
    assert "pip install 'ffjax[plot]'" in err


def test_another_family_is_timed_beside_its_baseline_and_checked_against_it(monkeypatch):
    monkeypatch.setitem(PRESETS, FAMILY.name, FAMILY)
    numbers = ["--batch", "2", "--position", "400", "--steps", "3", "--json"]
    what = ["--implementation", "xla", "--compare", "xla"]
    code, out, err = _bench("--config", FAMILY.name, *numbers, *what)
    assert (code, err) == (0, "")
    [point] = json.loads(out)["points"]
    assert point["baseline"]["us_per_step"] > 0
    check = point["correctness"]
    assert check["against"] == "baseline"
    limit = TOLERANCES["cached_vs_whole_bfloat16"].relative
    assert 0 <= check["difference"]["relative_error"] <= limit


def test_a_device_that_is_too_small_is_a_sentence(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 40_000_000_000})
    monkeypatch.setattr(suite, "default_device", lambda: device)
    grid = {"batches": (1, 8), "positions": (96, 16_000), "implementation": "pallas"}
    sweep = Sweep(config=PRESETS["llama3.1-8b"], baseline=True, **grid)
    # Twice 8.03e9 bfloat16 weights, and 8 * 16128 slots of 131,072 bytes.
    with pytest.raises(ValueError, match=r"take 65\.9 GB at the largest point; this device has 40"):
        suite.run(sweep)


# The baseline.


def _poisoned(cache: LayerCaches, lengths: list[int]) -> LayerCaches:
    """NaN keys, and values that would show, in every slot that is not live."""
    live = (jnp.arange(CAPACITY) < jnp.array(lengths)[:, None])[:, None, :, None]
    keys = tuple(jnp.where(live, k, jnp.nan) for k in cache.k)
    values = tuple(jnp.where(live, v, 1e4) for v in cache.v)
    return LayerCaches(keys, values, cache.lengths, cache.capacity)


@pytest.mark.parametrize("lengths", [[0], [7], [CAPACITY - 4, 3, 0]])
def test_the_baseline_says_what_the_reference_says(model, lengths):
    cache = filled_cache(CONFIG, lengths, CAPACITY)
    ours = baseline(model)
    own = _poisoned(ours.adopt(cache), lengths)
    reference = jax.jit(functools.partial(reference_step, model))
    step = jax.jit(ours.step)
    tokens = random_tokens(CONFIG, len(lengths))
    for taken in range(4):
        want = reference(cache, tokens)
        out = step(ours.weights, own, tokens)
        assert_close(out.logits, want.logits, "cached_vs_whole_bfloat16")
        assert_same_choice(out.logits, want.logits, "cached_vs_whole_bfloat16")
        assert out.token.tolist() == out.logits.argmax(-1).tolist()
        assert out.cache.lengths.tolist() == [n + taken + 1 for n in lengths]
        cache, own, tokens = want.cache, out.cache, want.token
    for row, length in enumerate(lengths):
        new = slice(length, length + 4)
        for stacked, parts in ((cache.k, own.k), (cache.v, own.v)):
            written = np.stack([np.asarray(part[row, :, new], np.float32) for part in parts])
            assert_close(written, stacked[:, row, :, new], "cached_vs_whole_bfloat16")


def test_a_split_cache_is_the_live_part_and_zeros():
    lengths = [3, CAPACITY]
    cache = filled_cache(CONFIG, lengths, CAPACITY)
    parts = split_cache(CONFIG, cache, 4)
    for stacked, split in ((cache.k, parts.k), (cache.v, parts.v)):
        got = np.stack([np.asarray(part, np.float32) for part in split])
        want = np.array(stacked, np.float32)
        want[:, 0, :, 3:] = 0
        np.testing.assert_array_equal(got, want)


def test_the_baseline_holds_one_array_per_layer_and_copies_no_other(model):
    ours = baseline(model)
    assert ours.weights.embed is model.embed[...]
    assert ours.weights.head is model.head_weight
    cache = ours.adopt(started_cache(CONFIG, 2, 7, CAPACITY))
    lowered = jax.jit(ours.step, donate_argnums=1).lower(
        ours.weights, cache, first_tokens(CONFIG, 2)
    )
    text = lowered.as_text()
    assert f"tensor<{CONFIG.ffw_dim * 2}x{CONFIG.model_dim}xbf16>" in text
    assert f"tensor<{CONFIG.num_layers}x" not in text


def test_a_loop_updates_the_baselines_cache_in_place(model):
    ours = baseline(model)
    cache = ours.adopt(started_cache(CONFIG, 2, 7, CAPACITY))
    size = sum(array.nbytes for array in (*cache.k, *cache.v))
    loop = DecodeLoop(ours.step, ours.weights, cache, 7, first_tokens(CONFIG, 2), 2)
    assert loop.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
@pytest.mark.skipif(
    os.environ.get("JAX_PLATFORMS") != "cpu",
    reason="XLA's CUDA plugin compiles without a GPU where JAX_PLATFORMS=cpu keeps it from one",
)
@pytest.mark.parametrize(
    ("name", "batch"), [("llama3.1-8b", 1), ("mistral-7b-v0.1", 1), ("mistral-7b-v0.1", 4)]
)
def test_on_a_gpu_the_baseline_copies_no_cache(name, batch):
    """A capacity that XLA would pad, such as 16064, costs a copy of a layer's values."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.targets import target

    config = dataclasses.replace(PRESETS[name], num_layers=1, vocab_size=64)
    capacity = capacity_for(16_000, 64)
    devices = topologies.get_topology_desc(
        "", "cuda", target_config=target("h200").config, topology="1x1x1"
    ).devices
    sharding = SingleDeviceSharding(devices[0])

    def abstract() -> Any:
        cache = split_cache(config, started_cache(config, batch, 16_000, capacity), 64)
        return baseline(random_model(config)).weights, cache, first_tokens(config, batch)

    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(abstract),
    )
    step = jax.jit(functools.partial(baseline_step, config), donate_argnums=1)
    memory = step.trace(*arguments).lower().compile().memory_analysis()
    assert memory is not None
    # Keys: of the whole capacity, or of Mistral's window of 4096 and of 64 steps.
    slots = capacity if config.window is None else 4352
    layer = 2 * batch * config.num_kv_heads * slots * config.head_dim
    assert memory.alias_size_in_bytes >= 2 * layer
    assert memory.temp_size_in_bytes < layer / 4


# Timing.


class _Fake(DecodeLoop):
    """A loop whose runs take as long as they are told to."""

    def __init__(self, name: str, log: list[str], seconds: list[float]):
        self.steps, self.compile_seconds = 2, 0.5
        self._name, self._log, self._seconds = name, log, iter(seconds)

    def run(self) -> float:
        self._log.append(self._name)
        return next(self._seconds)


def test_loops_take_turns_after_a_run_that_does_not_count():
    log: list[str] = []
    ours, theirs = _Fake("a", log, [99, 1, 2, 6]), _Fake("b", log, [99, 4, 4, 4])
    timings = time_loops([ours, theirs], 3)
    assert "".join(log) == "abababab"
    assert [timing.loop_seconds for timing in timings] == [(1, 2, 6), (4, 4, 4)]
    first = timings[0]
    assert (first.step_seconds, first.fastest_step_seconds, first.spread) == (1, 0.5, 2.5)
    assert first.compile_seconds == 0.5


def test_a_loop_feeds_tokens_back_and_starts_every_run_at_the_same_position(model):
    batch, position, steps = 2, 5, 6
    reference = jax.jit(functools.partial(reference_step, model))
    cache = started_cache(CONFIG, batch, position, CAPACITY)
    token, want = first_tokens(CONFIG, batch), []
    for _ in range(steps):
        cache, _, token, _ = reference(cache, token)
        want.append(token.tolist())
    assert len(np.unique(want)) > 2  # a loop that fed the same token again would be found out
    ours = implementation(model, "xla")
    cache = started_cache(CONFIG, batch, position, CAPACITY)
    loop = DecodeLoop(ours.step, ours.weights, cache, position, first_tokens(CONFIG, batch), steps)
    for _ in range(CAPACITY // steps + 1):  # more than the cache would hold one after another
        assert loop.run() > 0
        assert loop.tokens is not None
        assert loop.tokens.tolist() == want
        assert loop.repeats
    loop.close()


# The check.


def _altered(model: Transformer, alter) -> Contender:
    """The reference, its logits altered by a function of them and of the cache before."""
    plain = implementation(model, "xla")

    def step(params: Any, cache: Any, tokens: jax.Array) -> DecodeOutput:
        out = plain.step(params, cache, tokens)
        logits = alter(out.logits, cache)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return DecodeOutput(out.cache, logits, token)

    return Contender(step, plain.weights, plain.adopt)


def _observed(contender: Contender, steps: int = 3):
    cache = started_cache(CONFIG, 2, 5, CAPACITY)
    return observe(contender, cache, first_tokens(CONFIG, 2), steps)


def test_a_check_of_equals_finds_nothing(model):
    seen = _observed(implementation(model, "xla"))
    assert seen.repeats
    assert seen.cache.lengths.tolist() == [8, 8]
    assert seen.fed[0].tolist() == first_tokens(CONFIG, 2).tolist()
    assert seen.fed[1:].tolist() == seen.chosen[:-1].tolist()
    logits, _ = follow(
        implementation(model, "xla"), started_cache(CONFIG, 2, 5, CAPACITY), seen.fed
    )
    found = compare(seen.logits, logits)
    assert (found.relative_error, found.largest_difference, found.largest_gap) == (0, 0, 0)
    assert found.same_tokens == 6


def test_a_check_measures_a_difference(model):
    logits = np.array(_observed(implementation(model, "xla")).logits)
    changed = logits.copy()
    best = int(changed[1, 0].argmax())
    changed[1, 0, best] -= 3.0
    found = compare(jnp.asarray(changed), jnp.asarray(logits))
    gap = logits[1, 0, best] - logits[1, 0, changed[1, 0].argmax()]
    assert 0 < gap < 3
    assert found.largest_gap == pytest.approx(gap)
    assert found.same_tokens == 5
    assert found.largest_difference == pytest.approx(3)
    assert found.relative_error == pytest.approx(relative_error(changed, logits), rel=1e-5)
    assert found.logit_rms == pytest.approx(np.sqrt(np.mean(logits**2)), rel=1e-5)


def test_a_step_that_reads_beyond_the_live_positions_is_found_out(model):
    """Its first run finds NaN there, the second what the first has left."""

    def read_beyond(logits, cache):
        beyond = cache.k[0, 0, 0, cache.lengths[0] + 1, 0].astype(jnp.float32)
        return logits + 0 * beyond

    assert not jnp.isfinite(_observed(_altered(model, read_beyond)).logits).all()

    def hide_nan(logits, cache):
        return logits + jnp.nan_to_num(read_beyond(logits, cache) + cache.k[0, 0, 0, 6, 0])

    assert not _observed(_altered(model, hide_nan)).repeats


@pytest.mark.parametrize(("token", "sound"), [(0, True), (1, False)])
def test_timed_tokens_that_are_not_those_checked_are_found_out(monkeypatch, token, sound):
    """A step that always chooses 0 is timed; `token` is what was checked."""

    def zeros(model, cache, tokens, *, implementation) -> DecodeOutput:
        logits = jnp.zeros((1, CONFIG.vocab_size))
        return DecodeOutput(
            dataclasses.replace(cache, lengths=cache.lengths + 1), logits, 0 * tokens
        )

    def check(sweep, contenders, name, cache, first):
        return Check(1, 1, True, True, "baseline", EQUAL), np.array([[token]]), cache

    monkeypatch.setattr(contenders, "decode_step", zeros)
    monkeypatch.setattr(suite, "_check", check)
    sweep = Sweep(config=CONFIG, batches=(1,), positions=(4,), steps=1, implementation="xla")
    [point] = suite.run(sweep).points
    assert point.check.sound == sound


def test_kernels_are_timed_in_turn_and_each_is_checked(monkeypatch):
    """What would be compiled by two backends is the reference here, and one is wrong."""
    real, ran = contenders.decode_step, []

    def step(model, cache, tokens, *, implementation) -> DecodeOutput:
        ran.append(implementation)
        out = real(model, cache, tokens, implementation="xla")
        wrong = 1.5 if implementation == "pallas_mosaic_gpu" else 1.0
        return out._replace(logits=wrong * out.logits)

    monkeypatch.setattr(contenders, "decode_step", step)
    monkeypatch.setattr(
        suite, "choose", lambda config, batch, capacity, named, tokens: (named, None)
    )
    grid = {"batches": (1,), "positions": (4,), "steps": 2}
    sweep = Sweep(
        config=CONFIG, implementation="pallas", others=("pallas_mosaic_gpu",), baseline=True, **grid
    )
    right, wrong = suite.run(sweep).points
    assert [right.implementation, wrong.implementation] == ["pallas", "pallas_mosaic_gpu"]
    assert right.check.difference.relative_error < 1e-6
    assert wrong.check.difference.relative_error == pytest.approx(0.5, rel=1e-3)
    assert right.check.sound and wrong.check.sound
    assert right.timing != wrong.timing
    assert right.baseline == wrong.baseline is not None
    assert {"pallas", "pallas_mosaic_gpu", "xla"} == set(ran)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--backend", "triton,triton"], "triton, mosaic_gpu or both, with a comma between"),
        (["--backend", "cuda"], "with a comma between, is needed, got 'cuda'"),
        (["--backend", "triton", "--implementation", "xla"], "so does --implementation. Give one."),
        (["--backend", "triton", "--prompt", "16"], "--backend times decode steps; leave it out"),
        (["--backend", "triton", "--loop"], "--loop times whole generations; leave --backend out."),
        (["--backend", "mosaic_gpu"], "runs on NVIDIA GPUs of compute capability 8.0"),
    ],
)
def test_backends_that_cannot_be_timed_are_a_sentence(capsys, more, sentence):
    with contextlib.suppress(SystemExit):
        assert main(["bench", "--config", "python-bytes-3m", *more])
    assert sentence in capsys.readouterr().err


def test_triton_is_not_timed_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(bench, "why_not_backend", lambda name: f"{name} is not there.")
    assert main(["bench", "--config", "python-bytes-3m", "--backend", "triton,mosaic_gpu"]) == 2
    assert "--backend triton: triton is not there." in capsys.readouterr().err


def test_a_loop_whose_runs_differ_is_found_out():
    """Its step chooses how many positions are not live yet but hold something."""

    def step(weights, cache, tokens) -> DecodeOutput:
        found = jnp.sum(jnp.isfinite(cache.k[0, 0, 0, :, 0])) - cache.lengths
        k = cache.k.at[0, 0, 0, cache.lengths[0], 0].set(1)
        cache = dataclasses.replace(cache, k=k, lengths=cache.lengths + 1)
        return DecodeOutput(cache, jnp.zeros((1, 7)), found)

    cache = started_cache(CONFIG, 1, 5, CAPACITY)
    loop = DecodeLoop(step, (), cache, 5, jnp.zeros((1,), jnp.int32), 2)
    loop.run()
    assert loop.repeats
    loop.run()
    assert not loop.repeats


# Inputs, bandwidth, figures.


def test_a_random_model_has_weights_of_unit_gain_and_norms_around_1(model):
    for param in (model.embed, model.layers.qkv, model.layers.gate_up, model.layers.down):
        weight = np.asarray(param[...], np.float32)
        assert weight.std() == pytest.approx(1 / math.sqrt(weight.shape[-1]), rel=0.05)
        assert abs(weight.mean()) < 0.1 * weight.std()
    for param in (model.layers.attn_norm, model.layers.mlp_norm, model.final_norm):
        norm = np.asarray(param[...], np.float32)
        assert 0.5 <= norm.min() < 0.8
        assert 1.2 < norm.max() <= 1.5
    assert model.dtype == jnp.bfloat16


def test_a_started_cache_is_random_up_to_the_position_and_nan_beyond():
    cache = started_cache(CONFIG, 2, 9, CAPACITY)
    assert cache.lengths.tolist() == [9, 9]
    assert not cache.counters.any()
    for array in (cache.k, cache.v):
        values = np.asarray(array, np.float32)
        assert values[..., :9, :].std() == pytest.approx(1, rel=0.1)
        assert np.isnan(values[..., 9:, :]).all()
    assert not np.array_equal(cache.k[..., :9, :], cache.v[..., :9, :])
    again = started_cache(CONFIG, 2, 9, CAPACITY)
    assert np.asarray(again.k).tobytes() == np.asarray(cache.k).tobytes()


@pytest.mark.parametrize(
    ("position", "steps", "capacity"), [(0, 1, 256), (192, 64, 256), (192, 65, 512)]
)
def test_a_capacity_is_just_above_what_is_needed(position, steps, capacity):
    assert capacity_for(position, steps) == capacity


def test_bandwidth_is_bytes_over_the_median_second():
    measured = Bandwidth(1000, (1.0, 4.0, 2.0))
    assert measured.bytes_per_second == 500
    assert measured.spread == 1.5


def test_the_read_bandwidth_is_measured_over_the_whole_array():
    measured = read_bandwidth(5 << 20, repetitions=3)
    assert measured.array_bytes == 5 << 20
    assert len(measured.pass_seconds) == 3
    assert min(measured.pass_seconds) > 0


@pytest.mark.parametrize(
    ("stats", "size"),
    [(None, 512_000_000), ({"bytes_limit": 16 << 30}, 4 << 30), ({"bytes_limit": 1 << 40}, 8e9)],
)
def test_the_array_is_sized_to_the_device(stats, size):
    assert default_bytes(types.SimpleNamespace(memory_stats=lambda: stats)) == size


def _point(**changes: Any) -> Point:
    """5 ms a step for 4 sequences and 10 MB."""
    fields: dict[str, Any] = {
        "batch": 4,
        "position": 96,
        "capacity": 256,
        "implementation": "pallas",
        "reason": None,
        "tokens": 1,
        "traffic": Traffic(8_000_000, 2_000_000.0),
        "timing": Timing(2, (0.01,) * 7, 1.5),
        "baseline": Timing(2, (0.025,) * 7, 2.5),
        "check": Check(2, 8, True, True, "xla", Difference(0.01, 0.2, 1.0, 7, 0.125)),
    }
    return Point(**(fields | changes))


def _report(*points: Point) -> Report:
    sweep = Sweep(config=CONFIG, batches=(4,), positions=(96,), steps=2, baseline=True)
    return Report(
        sweep=sweep,
        machine=Machine("Abacus", "wood", {"jax": "1", "ffjax": "2"}),
        bandwidth=Bandwidth(8_000_000, (0.002,) * 7),
        points=points,
    )


def test_figures_by_hand():
    point = _point()
    report = _report(point)
    assert point.tokens_per_second == pytest.approx(800)
    assert point.bytes_per_second == pytest.approx(2e9)
    assert point.speedup == pytest.approx(2.5)
    assert report.fraction_of_bandwidth(point) == pytest.approx(0.5)
    assert report.floor_seconds(point) == pytest.approx(0.0025)
    [data] = as_data(report)["points"]
    assert data["tb_per_second"] == pytest.approx(0.002)
    assert data["percent_of_read_bandwidth"] == pytest.approx(50)
    assert _point(baseline=None).speedup is None


def test_the_table_by_hand():
    text = as_text(_report(_point(), _point(check=Check(2, 8, True, False, "xla", EQUAL))))
    header, rule, row, unsound = text.splitlines()[-4:]
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row))
    assert set(rule) <= set("|-:")
    assert dict(zip(names, cells, strict=True)) == {
        "batch": "4",
        "position": "96",
        "timed": "pallas",
        "µs/step": "5000.0",
        "spread": "0.0%",
        "tokens/s": "800.0",
        "MB/step": "10.0",
        "TB/s": "0.002",
        "% of read": "50.0",
        "compile s": "1.5",
        "XLA µs/step": "12500.0",
        "XLA spread": "0.0%",
        "speedup": "2.50x",
        "rel. error": "1.0e-02",
        "largest diff.": "2.0e-01",
        "same tokens": "7/8",
        "largest gap": "1.2e-01",
        "bit-equal": "yes",
    }
    assert unsound.endswith("|     0.0e+00 |        NO |")


def test_a_plot_draws_lines_of_the_times_the_floor_and_the_baseline(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *rest, **kw: drawn.append((x, y)) or plot(self, x, y, *rest, **kw),
    )
    points = [_point(position=position) for position in (1024, 96)]
    draw(_report(*points), tmp_path / "times.png")
    against_position, against_batch = drawn[:3], drawn[3:]
    assert [x for x, _ in against_position] == [[96, 1024]] * 3
    for (_, y), want in zip(against_position, (5000, 2500, 12_500), strict=True):
        assert y == pytest.approx([want, want])
    assert [x for x, _ in against_batch] == [[4]] * 6
    assert (tmp_path / "times.png").read_bytes().startswith(PNG)
