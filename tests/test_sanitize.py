"""`python -m tests.sanitize`: what it runs, what it reads, and that what is planted is there."""

import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of
from ptx_inline import lower_for_gpu
from sanitize import command, findings, sanitizer
from sanitize.apart import plan_apart, put_apart
from sanitize.cases import CASES, Case
from sanitize.findings import Explanation, Finding, findings_in
from sanitize.planted import PLANTED, plant
from stream_cases import H200

from ffjax.cache import KVCache
from pallas_kernels.launch import StepState
from pallas_kernels.stream import launch, product
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.plan import Segment
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

pytestmark = pytest.mark.once(
    "It runs and reads another program; a sample shows that its cases are lowered.",
    sample=[
        "test_a_kernel_put_apart_is_lowered[mixed, 3]",
        "test_a_planted_error_is_planted[load]",
        "test_bad_input_is_refused",
    ],
)

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at ffjax_decode_step+0x160
=========     by thread (0,0,0) in block (3,0,0)
=========     Access to 0x7f6510c00001 is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at ffjax_decode_step+0x160
=========     by thread (1,0,0) in block (7,0,0)
========= Invalid __shared__ read of size 16 bytes
=========     at ffjax_decode_step+0x200
========= Target application returned an error
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at ffjax_decode_step+0x90
=========     and Read access at ffjax_decode_step+0x100 [508 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
# Of one write, with two reads.
SEVERAL = RACECHECK.replace(
    "[508 hazards]\n",
    "[508 hazards]\n=========     and Read access at ffjax_decode_step+0x2f0 [4 hazards]\n",
)
CLEAN = "========= COMPUTE-SANITIZER\nsteps taken\n========= ERROR SUMMARY: 0 errors\n"

# Takes the place of NVIDIA's program: it writes down how it was called, and says what the folder
# beside it holds for the tool and the planted error.
FAKE = """\
#!{python}
import json, os, pathlib, sys
if sys.argv[1] == "--help":
    print("Version 2099.1 --tool arg --port arg --padding arg --print-limit arg")
    sys.exit()
folder = pathlib.Path(__file__).parent
words = [word for word in sys.argv[1:] if word != "apart"]
with open(folder / "calls", "a") as calls:
    allocator = os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"]
    apart = "apart" in sys.argv
    print(json.dumps({{"words": words, "allocator": allocator, "apart": apart}}), file=calls)
said = folder / f"{{words[1]}} {{words[-1]}}"
print(said.read_text() if said.exists() else (folder / "else").read_text())
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A program that finds nothing, until its folder says otherwise."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    (tmp_path / "else").write_text(CLEAN)
    plain = [sys.executable, "-c", "print('steps taken')"]
    monkeypatch.setattr(command, "plain_command", lambda *_: plain)
    return path


def calls(fake) -> list[dict]:
    return [json.loads(line) for line in (fake.parent / "calls").read_text().splitlines()]


def run(fake, *more: str) -> int:
    return command.main(["--sanitizer", str(fake), "--jobs", "3", *more])


def test_every_tool_watches_every_case(fake, capsys):
    assert run(fake) == 0
    asked = calls(fake)
    assert {(call["words"][1], call["words"][-1]) for call in asked} == {
        (tool, case) for tool in sanitizer.TOOLS for case in CASES
    }
    assert len(asked) == len(sanitizer.TOOLS) * len(CASES)
    assert {call["allocator"] for call in asked} == {"platform"}
    assert {call["words"][1] for call in asked if call["apart"]} == {"racecheck"}
    assert {"--padding" in call["words"] for call in asked} == {True, False}
    # What this version has not is not asked for.
    assert not any("--num-cuda-barriers" in call["words"] for call in asked)
    assert len({call["words"][call["words"].index("--port") + 1] for call in asked}) <= 3
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("bfloat16, 1")]
    assert rows == [["bfloat16,", "1", *["clean"] * 5]]
    assert f"0 of {5 * len(CASES)} runs found something" in out
    assert "compute-sanitizer 2099.1" in out


def test_a_finding_is_printed_and_fails(fake, capsys):
    (fake.parent / "racecheck int8, 3").write_text(RACECHECK)
    assert run(fake, "--only", "^int8", "--tool", "racecheck") == 1
    out = capsys.readouterr().out
    assert "int8, 3, racecheck\n  1 times: Error: Race reported between Write access" in out
    assert "1 FOUND" in out
    assert "1 of 4 runs found something, or broke." in out


def test_an_explained_finding_does_not(fake, capsys, monkeypatch):
    (fake.parent / "racecheck int8, 3").write_text(RACECHECK)
    why = Explanation("racecheck", "int8, .", r"\+0x90.*\+0x100", "They are not the same words.")
    monkeypatch.setattr(findings, "EXPLAINED", (why,))
    assert run(fake, "--only", "^int8", "--tool", "racecheck") == 1  # no "steps taken"
    (fake.parent / "racecheck int8, 3").write_text(f"{RACECHECK}steps taken\n")
    assert run(fake, "--only", "^int8", "--tool", "racecheck") == 0
    out = capsys.readouterr().out
    assert "explained. They are not the same words." in out
    assert "1 explained" in out


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("steps taken\n", "no summary of the tool's"),
        ("========= ERROR SUMMARY: 0 errors\n", "before its steps were taken"),
        ("========= Error: Device not supported\nsteps taken\n", "no summary of the tool's"),
    ],
)
def test_a_run_that_says_nothing_is_no_clean_one(fake, capsys, said, reason):
    (fake.parent / "memcheck olmo2, 1").write_text(said)
    assert run(fake, "--only", "olmo2", "--tool", "memcheck") == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out
    assert reason in out


def test_a_run_that_does_not_end_is_ended(capsys, tmp_path):
    path = tmp_path / "slow"
    path.write_text(
        FAKE.format(python=sys.executable).replace(
            "words = ", "__import__('time').sleep(600); words = "
        )
    )
    path.chmod(0o755)
    ran = sanitizer.run([str(path), "--tool"], dict(os.environ), 2)
    assert ran.code is None
    assert command.read("memcheck", "olmo2, 1", ran, 2.0).cell == "BROKEN"


def test_planted_errors_must_be_found_by_their_tools(fake, capsys):
    texts = {"memcheck": MEMCHECK, "racecheck": RACECHECK}
    for name, one in PLANTED.items():
        text = texts.get(one.tool, MEMCHECK)
        if name not in ("bulk-copy", "divergent"):
            (fake.parent / f"{one.tool} {name}").write_text(text)
    assert run(fake, "--planted") == 0
    out = capsys.readouterr().out
    assert "memcheck does not see a bulk copy from beyond the cache, in this kernel." in out
    assert "synccheck does not see a barrier at which half of a warp stands" in out
    assert len(calls(fake)) == len(PLANTED) + len(sanitizer.TOOLS)
    # What is said without the error, too, is not said because of it.
    (fake.parent / "initcheck bfloat16, 1").write_text(MEMCHECK)
    assert run(fake, "--planted") == 1
    assert "initcheck found none of its planted errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (
            MEMCHECK,
            [
                Finding("Invalid __global__ read of size 4 bytes", "ffjax_decode_step+0x160", 2),
                Finding("Invalid __shared__ read of size 16 bytes", "ffjax_decode_step+0x200", 1),
            ],
        ),
        (
            RACECHECK,
            [
                Finding(
                    "Error: Race reported between Write access at ffjax_decode_step+0x90 "
                    "and Read access at ffjax_decode_step+0x100",
                    "",
                    1,
                )
            ],
        ),
        (
            SEVERAL,
            [
                Finding(
                    "Error: Race reported between Write access at ffjax_decode_step+0x90 "
                    f"and Read access at ffjax_decode_step+{read}",
                    "",
                    1,
                )
                for read in ("0x100", "0x2f0")
            ],
        ),
        (CLEAN, []),
        ("no word of the tool's", []),
    ],
)
def test_reports_are_counted_by_what_they_say(output, found):
    assert findings_in(output) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sanitizer", "no-such-program"], "no program that can be run"),
        (["--sanitizer", sys.executable, "--only", "nothing like it"], "fits no case"),
    ],
)
def test_bad_input_is_refused(capsys, arguments, message):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_where_there_is_no_sanitizer_a_sentence_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "_FOLDERS", (str(tmp_path / "cuda*"),))
    monkeypatch.setattr(sanitizer.importlib.util, "find_spec", lambda _: None)
    assert command.main([]) == 2
    assert "--sanitizer PATH" in capsys.readouterr().err
    (tmp_path / "cuda-99").mkdir()
    (tmp_path / "cuda-99" / "compute-sanitizer").write_text("#!/bin/sh\n")
    (tmp_path / "cuda-99" / "compute-sanitizer").chmod(0o755)
    assert sanitizer.find() == str(tmp_path / "cuda-99" / "compute-sanitizer")


def dims(case: Case):
    return dims_of(case.config, len(case.lengths), case.capacity, case.tokens)


def gpu_of(case: Case):
    return H200 if case.gpu is None else target(case.gpu).gpu


def plan_of(case: Case):
    return make_stream_plan(dims(case), gpu_of(case))


def test_the_cases_are_of_every_kind():
    plans = {name: plan_of(case) for name, case in CASES.items()}
    split = {name for name, plan in plans.items() if plan.segments[Segment.DOWN].splits > 1}
    assert split == {name for name in CASES if name.startswith("split")}
    boxed = {name for name, plan in plans.items() if plan.box is not None}
    assert boxed == {name for name in CASES if "boxes" in name}
    # Somewhere the ring comes round.
    assert any(plan.total_tiles > plan.slots for plan in plans.values())
    for name, case in CASES.items():
        assert (max(case.lengths) >= 512) == ("several KV splits" in name)
        assert max(case.lengths) + 3 * case.tokens <= case.capacity
    assert {len(case.lengths) for case in CASES.values()} == {1, 2, 3}
    assert {case.tokens for case in CASES.values()} == {1, 3, 4, 8}
    assert {(plan.bulk, plan.dims.tokens > 1) for plan in plans.values()} == {
        (bulk, several) for bulk in (True, False) for several in (True, False)
    }
    assert max(plan.attention.abreast for plan in plans.values()) > 1
    bits = {plan.dims.weight_bits.qkv for plan in plans.values()}
    assert bits == {16, 8, 4}


def lower(case: Case) -> None:
    plan = plan_of(case)
    sizes = plan.dims.batch, plan.dims.capacity
    cache = jax.eval_shape(lambda: KVCache.create(case.config, *sizes, tokens=case.tokens))
    exchange = cache.counters if case.tokens == 1 else cache.wide_counters
    state = StepState(cache.k, cache.v, cache.lengths, exchange)
    tokens = jax.ShapeDtypeStruct((plan.dims.columns,), jnp.int32)
    step = functools.partial(launch.stream_step, plan)
    lower_for_gpu(step, plan.dims.abstract_weights(), state, tokens)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_planted(name):
    """It changes the kernel, and the kernel is lowered all the same."""
    with plant(name):
        lower(CASES["bfloat16, 1"])


def test_an_error_that_changes_nothing_is_none():
    with pytest.raises(RuntimeError, match="changed no text"), plant("load"):
        pass


def test_what_was_said_and_run_is_kept_where_asked(fake, tmp_path):
    kept = tmp_path / "a" / "kept"
    asked = ["--only", "olmo2", "--tool", "racecheck", "--keep", str(kept)]
    assert run(fake, *asked, "--as-it-is") == 0
    assert (kept / "olmo2, 1, racecheck.txt").read_text().startswith(CLEAN)
    assert [call["apart"] for call in calls(fake)] == [False]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_beyond_a_slot_that_is_put_apart(name):
    case = CASES[name]
    with put_apart():
        plan = plan_apart(dims(case), gpu_of(case))
        at = SharedLayout.of(plan)
    usual = SharedLayout.of(plan_of(case))
    assert plan.slots >= 2
    for segment, part in plan.segments.items():
        span = plan.span(segment) * part.bits // 8
        assert (part.rows - 1) * part.row_bytes + span <= plan.slot_bytes
    assert at.sums - at.spare == 32 * (usual.sums - usual.spare)


@pytest.mark.drawn(
    "Each mechanism once.",
    sample=[
        "test_a_kernel_put_apart_is_lowered[bfloat16, 3]",
        "test_a_kernel_put_apart_is_lowered[mixed, 3]",
        "test_a_kernel_put_apart_is_lowered[gemma2, 3]",
        "test_a_kernel_put_apart_is_lowered[olmo2, 1]",
        "test_a_kernel_put_apart_is_lowered[several KV splits, 3]",
        "test_a_kernel_put_apart_is_lowered[split down projection, boxes, 3]",
        "test_a_kernel_put_apart_is_lowered[8 tokens, several KV splits, 1]",
        "test_a_kernel_put_apart_is_lowered[3 tokens, int4, 2]",
        "test_a_kernel_put_apart_is_lowered[8 tokens, qwen3, 1]",
        "test_a_kernel_put_apart_is_lowered[as an A100, int4, 3]",
        "test_a_kernel_put_apart_is_lowered[as an A100, several KV splits, 3]",
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_put_apart_is_lowered(name):
    with put_apart():
        lower(CASES[name])


def test_spare_places_apart_are_each_threads_own():
    case = CASES["bfloat16, 1"]
    plan = plan_of(case)
    part = plan.segments[Segment.QKV]
    usual = np.asarray(product.place_aside(plan, part, 0, 1 << 20))
    with put_apart():
        apart = np.asarray(product.place_aside(plan, part, 0, 1 << 20))
    spare = usual >= 1 << 20
    assert (apart[~spare] == usual[~spare]).all()
    assert len(set(apart[spare])) == spare.sum()
    assert (np.diff(np.sort(apart[spare])) >= 4 * part.rows).all()
    assert len(set(usual[spare])) == plan.num_warps
