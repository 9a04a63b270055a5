"""The search for wrong steps: what it draws, finds, makes smaller, and survives."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import jax.numpy as jnp
import pytest
from search import command, plans
from search.cases import FOUND
from search.compare import Refused, check_case, kernel_step
from search.draw import Case, draw_case
from search.pool import check_all
from search.report import Report
from search.shrink import shrunk, smaller
from search.worker import Verdict, Worker
from stream_cases import FAMILIES

from ffjax.decode import reference_step
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = [
    pytest.mark.once(
        "What is drawn and searched is plain Python; other tests take the steps.",
        sample=[
            "test_a_seed_says_all",
            "test_the_command_checks_plans",
        ],
    ),
    pytest.mark.by_numpy,
]

# Of one program; what a step of it costs is mostly to compile it.
SMALL = Case(
    model_dim=128, ffw_dim=208, heads=2, vocab=33, lengths=(5, 30), capacity=34, step=2**31 - 3
)


SEVERAL = dataclasses.replace(SMALL, lengths=(5, 20), capacity=39, tokens=3)

# Drawing


def test_a_seed_says_all():
    assert [draw_case(seed) for seed in range(50)] == [draw_case(seed) for seed in range(50)]


def test_everything_is_drawn():
    cases = [draw_case(seed) for seed in range(600)]
    assert {case.family for case in cases} == {"llama", *FAMILIES}
    assert {len(case.lengths) for case in cases} == set(range(1, 9))
    assert {case.tokens for case in cases} == set(range(1, 9))
    assert max(len(case.lengths) * case.tokens for case in cases) == 8
    assert {case.head_dim for case in cases} == {32, 64, 128, 256}
    assert {1, 16} <= {case.heads // case.kv_heads for case in cases}
    assert {bits for case in cases for bits in case.bits} == {4, 8, 16}
    pairs = {(b, g) for case in cases for b, g in zip(case.bits, case.groups, strict=True)}
    kinds = {g.partition(" ")[2] for b, g in pairs if b == 4 and g}
    assert kinds == {f"{x}{y}" for x in ("float16", "bfloat16") for y in ("", " zero", " minimum")}
    assert {g.split()[0] for b, g in pairs if b == 4 and g} == {"32", "64", "128"}
    assert any(b == 8 and g for b, g in pairs) and (4, "") in pairs and (8, "") in pairs
    assert {1, 40} <= {case.layers for case in cases}
    assert any(len(case.lengths) > 1 and case.model_dim > 4096 for case in cases)
    assert any(case.tuning for case in cases)
    assert any(case.vocab % 2 for case in cases)
    assert any(length == case.capacity for case in cases for length in case.lengths)
    assert {0, 84, 2**29} <= {case.step for case in cases}
    assert max(case.step for case in cases) == 2**31 - 1
    assert min(case.model_dim for case in cases) == 128
    assert max(case.model_dim for case in cases) > 4096


def test_a_case_is_what_it_prints_as():
    for seed in range(50):
        case = draw_case(seed)
        assert eval(repr(case), {"Case": Case}) == case
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case


# Comparing


@pytest.mark.parametrize("case", [SMALL, SEVERAL], ids=["one token", "several"])
def test_a_right_step_is_found_right(case):
    assert check_case(case, kernel_step(case, interpret=True), INTERPRETER) is None


def step_with(change, case=SMALL):
    """The reference's step, which counts as the kernel does, its output changed."""
    steps = layout_of(make_stream_plan(case.dims, INTERPRETER)).steps
    exchange = "counters" if case.tokens == 1 else "wide_counters"

    def step(model, cache, *fed):
        out = reference_step(model, cache, *fed)
        words = getattr(out.cache, exchange).at[steps].add(1)
        return change(of_cache(out, **{exchange: words}))

    return step


def of_cache(out, **fields):
    return out._replace(cache=dataclasses.replace(out.cache, **fields))


def test_a_step_of_the_reference_is_found_right():
    assert check_case(SMALL, step_with(lambda out: out), INTERPRETER) is None


WRONG = {
    "logits": (
        lambda out: out._replace(logits=out.logits * jnp.array([[1.0], [1.3]])),
        "from float32's",
    ),
    "no number": (lambda out: out._replace(logits=out.logits.at[0].set(jnp.nan)), "inf"),
    "token": (lambda out: out._replace(token=out.token ^ 1), "token"),
    "lengths": (lambda out: of_cache(out, lengths=out.cache.lengths.at[0].add(1)), "Lengths"),
    "an old position": (lambda out: of_cache(out, v=out.cache.v.at[0, 0, 0, 0].set(7)), "changed"),
    "a word that says nothing": (
        lambda out: out._replace(logits=out.logits * (2 + out.cache.counters.sum() % 1009)),
        "Two runs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_found(name):
    change, said = WRONG[name]
    wrong = check_case(SMALL, step_with(change), INTERPRETER)
    assert wrong is not None
    assert said in wrong


WRONG_OF_SEVERAL = {
    "logits of the last token": (
        lambda out: out._replace(logits=out.logits.at[:, 2].multiply(1.3)),
        "from float32's",
    ),
    "all tokens count": (
        lambda out: of_cache(out, lengths=(out.cache.lengths + 2) // 3 * 3),
        "Lengths",
    ),
    "a position before the first token": (
        lambda out: of_cache(out, k=out.cache.k.at[0, 1, 0, 19].set(7)),
        "changed",
    ),
    "a word that says nothing": (
        lambda out: out._replace(logits=out.logits * (2 + out.cache.wide_counters.sum() % 1009)),
        "Two runs",
    ),
}


@pytest.mark.parametrize("name", WRONG_OF_SEVERAL)
def test_a_wrong_step_of_several_tokens_is_found(name):
    change, said = WRONG_OF_SEVERAL[name]
    wrong = check_case(SEVERAL, step_with(change, SEVERAL), INTERPRETER)
    assert wrong is not None
    assert said in wrong


def test_what_the_kernel_refuses_is_no_failure():
    with pytest.raises(Refused, match="multiple of 16"):
        check_case(dataclasses.replace(SMALL, model_dim=136), gpu=INTERPRETER)


# Shrinking


def test_a_failure_becomes_as_small_as_it_can_be():
    def fails(case: Case) -> bool:
        many = len(case.lengths) >= 2 and case.tokens >= 3
        return case.layers >= 5 and 8 in case.bits and many

    case = Case(
        family="gemma2",
        layers=30,
        model_dim=1024,
        ffw_dim=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        vocab=5000,
        window=40,
        bits=(8, 4, 4, 8, 4),
        lengths=(100, 3, 300, 0, 5),
        tokens=8,
        capacity=600,
        step=84,
        tuning=(("slots", 2),),
        seed=7,
    )
    small = shrunk(case, fails, time.monotonic() + 600)
    assert (small.layers, small.lengths, small.tokens) == (5, (0, 0), 3)
    assert sorted(small.bits)[:2] == [8, 16]
    assert (small.family, small.model_dim, small.heads, small.tuning) == ("llama", 128, 1, ())


def test_shrinking_ends_in_time():
    ticks = iter(range(1000))
    case = Case(layers=40, vocab=5000)
    assert shrunk(case, lambda one: True, 3, lambda: next(ticks)) != case
    assert shrunk(case, lambda one: True, 0, lambda: 1) == case


def test_smaller_cases_are_models():
    for seed in range(20):
        assert all(case.config for case in smaller(draw_case(seed)))


# Workers


ECHO = """
import json, os, signal, sys
sys.path[:0] = ["tests"]
from search.draw import Case
from search.worker import serve

class No(Exception):
    pass

def check(case):
    print("this is no answer")
    if case.layers == 2:
        os.kill(os.getpid(), signal.SIGABRT)
    if case.layers == 3:
        import time
        time.sleep(600)
    if case.layers == 4:
        raise RuntimeError("out of order")
    if case.layers == 5:
        raise No("not I")
    return "wrong" if case.layers == 6 else None

serve(check, No)
"""


def echo(limit_s: float = 600) -> Worker:
    return Worker(limit_s, [sys.executable, "-c", ECHO])


def test_a_worker_that_dies_fails_its_case_alone():
    report = Report()
    numbers = [1, 2, 1, 4, 5, 6, 1, 2, 1]
    workers = [echo(), echo()]
    check_all(
        range(len(numbers)),
        lambda seed: Case(layers=numbers[seed]),
        workers,
        report,
        time.monotonic() + 600,
    )
    for worker in workers:
        worker.close()
    assert report.kinds == {"right": 4, "died": 3, "refused": 1, "wrong": 1}
    assert sorted(seed for seed, _, _ in report.failures) == [1, 3, 5, 7]
    assert (report.run, report.failed) == (8, 4)


def test_a_worker_that_hangs_is_given_up():
    worker = echo()
    assert worker.check(Case(layers=1)) == Verdict("right", "")
    worker.limit_s = 1  # it has started
    assert worker.check(Case(layers=3)).kind == "hung"
    worker.limit_s = 600
    assert worker.check(Case(layers=1)).kind == "right"
    worker.close()


# The command


def test_the_command_checks_plans(capsys, tmp_path):
    file = tmp_path / "found.json"
    arguments = ["--plans", "--seeds", "4:6", "--json", str(file)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("seeds 4:6\n")
    assert "0 failed." in said
    assert json.loads(file.read_text())["failures"] == []


def test_the_command_says_what_failed(capsys, monkeypatch):
    case = FOUND["narrow, 8 layers, int8, 2"]
    monkeypatch.setattr(
        plans, "check_plan", lambda seed: ("wrong", "Why.", case, plans.gpu_of(seed))
    )
    assert command.main(["--plans", "--only", "3"]) == 1
    said = capsys.readouterr().out
    assert "seed 3: wrong: " in said
    assert repr(case) in said


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_right(name):
    assert check_case(FOUND[name]) is None


def test_the_command_tells_that_nothing_was_checked(capsys):
    assert command.main(["--plans", "--count", "0"]) == 2
    assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["x", "5", "5:2", "3:3", ":"])
def test_seeds_that_are_none_are_refused(seeds, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--plans", "--seeds", seeds])
    assert "is FROM:TO, the first less than the last, got" in capsys.readouterr().err
