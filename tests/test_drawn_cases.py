"""Which cases of a test are drawn."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
from conftest import _drawn, _leave_the_drawn
from drawn_cases import covering, numbered


def brought(cases, together: int) -> set:
    """What occurs in cases, by plain loops."""
    return {
        tuple((axis, case[axis]) for axis in axes)
        for case in cases
        for axes in itertools.combinations(range(len(case)), together)
    }


@pytest.mark.parametrize("together", [1, 2])
def test_every_value_or_pair_of_all_cases_is_in_those_drawn(together):
    draw = random.Random(together)
    for start in range(20):
        sizes = [draw.randrange(1, 6) for _ in range(draw.randrange(2, 5))]
        whole = list(itertools.product(*map(range, sizes)))
        cases = draw.sample(whole, draw.randrange(1, len(whole) + 1))
        taken = covering(cases, together, start)
        assert brought([cases[at] for at in taken], together) == brought(cases, together)


def test_few_are_drawn_and_others_where_it_begins_elsewhere():
    cases = list(itertools.product(range(4), range(4), range(4)))
    assert len(covering(cases, 1)) == 4
    assert len(covering(cases, 2)) <= 20  # of 64; 16 at the least
    assert covering(cases, 1, 5) != covering(cases, 1, 0) == covering(cases, 1)
    # Both values of the second are drawn alike, not one of them once.
    both = list(itertools.product(range(10), range(2)))
    assert sum(both[at][1] for at in covering(both, 1)) == 5


def test_values_are_told_apart_also_those_without_a_hash():
    one, other = [1], [1]
    rows = [{"a": one, "b": 1}, {"a": other, "b": 1.0}, {"a": one, "b": True}]
    assert numbered(rows) == [(0, 0), (1, 1), (0, 2)]


# Marks


def case(name: str, *marks: pytest.MarkDecorator, **params) -> SimpleNamespace:
    """As much of a test's case as is asked for."""
    found = [mark.mark for mark in marks]

    def of(kind):
        return [mark for mark in found if mark.name == kind]

    return SimpleNamespace(
        name=name,
        nodeid=f"tests/test_a.py::{name}",
        callspec=SimpleNamespace(params=params),
        iter_markers=of,
        get_closest_marker=lambda kind: next(iter(of(kind)), None),
    )


def names(cases) -> list[str]:
    return [one.name for one in cases]


def product(*marks: pytest.MarkDecorator) -> list[SimpleNamespace]:
    both = itertools.product("xyz", range(3))
    return [case(f"test_it[{a}-{b}]", *marks, a=a, b=b) for a, b in both]


def test_a_sample_is_what_runs_and_what_other_pythons_run_runs_here_too():
    once = pytest.mark.once("why", sample=["test_it[z-0]", "test_other"])
    sample = pytest.mark.drawn("why", sample=["test_it[x-1]"])
    assert names(_drawn(product(sample))) == ["test_it[x-1]"]  # type: ignore[arg-type]
    assert names(_drawn(product(sample, once))) == ["test_it[x-1]", "test_it[z-0]"]  # type: ignore[arg-type]
    every = names(_drawn(product(pytest.mark.drawn("why"), once)))  # type: ignore[arg-type]
    assert "test_it[z-0]" in every and len(every) in (3, 4)
    pairs = pytest.mark.drawn("why", pairs=True)
    assert len(_drawn(product(pairs))) == 9  # type: ignore[arg-type]


def test_tests_without_the_mark_stay_and_the_others_are_told_of():
    told = []
    config = SimpleNamespace(
        hook=SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    )
    items = [*product(pytest.mark.drawn("why")), case("test_other[1]"), case("test_other[2]")]
    before = list(items)
    _leave_the_drawn(config, items)  # type: ignore[arg-type]
    assert len(items) == 3 + 2 and items[-2:] == before[-2:]
    assert {one.nodeid for one in told} | {one.nodeid for one in items} == {
        one.nodeid for one in before
    }
