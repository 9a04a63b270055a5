"""`python -m tests.soak`: the same steps have the same digests, and others are told apart."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from decode_cases import random_model, small_config
from soak import command, together
from soak.walk import NOT_FINITE, Walk, Walker

from ffjax.cache import KVCache

pytestmark = pytest.mark.once(
    "It compares digests of steps that other tests run.",
    sample=[
        "test_what_cannot_run_is_refused",
    ],
)

CONFIG = small_config(num_layers=1, max_context=12)
WALK = Walk(None, "bfloat16", 2, 30, "xla")


@pytest.fixture(scope="module")
def walker() -> Walker:
    return Walker(WALK, random_model(CONFIG))


def test_a_walk_has_a_digest_a_block_and_fresh_caches(walker, monkeypatch):
    made, create = [], KVCache.create
    monkeypatch.setattr(
        KVCache, "create", lambda *args, **more: made.append(args) or create(*args, **more)
    )
    digests = walker.take()
    # 12 positions: blocks of 12 steps, each with a cache of its own.
    assert (walker.block, len(digests)) == (12, 3)
    assert [args[1:3] for args in made] == [(2, 12)] * 3
    assert len(set(digests)) == 3
    assert walker.take() == digests == together.in_threads(walker, 2)[1]


def test_steps_of_several_tokens_are_taken_in_turn_with_those_of_one():
    several = dataclasses.replace(WALK, tokens=12, together=3)
    walker = Walker(several, random_model(CONFIG))
    digests = walker.take()
    # Each turn keeps two tokens, and two that are dropped need a slot.
    assert (walker.block, len(digests)) == (5, 3)
    assert NOT_FINITE not in digests
    assert walker.take() == digests
    other = dataclasses.replace(several, together=2)
    assert not set(Walker(other, random_model(CONFIG)).take()) & set(digests)


def test_other_weights_and_other_bits_have_other_digests(walker):
    other = Walker(WALK, random_model(CONFIG, seed=1))
    assert not set(other.take()) & set(walker.take())


def test_what_is_not_finite_is_said():
    model = random_model(small_config(num_layers=1, max_context=13))
    model.final_norm[...] = model.final_norm[...].at[0].set(jnp.nan)
    assert set(Walker(WALK, model).take()) == {NOT_FINITE}


def test_the_shipped_model_in_every_way(capsys):
    asked = ["--tokens", "6", "--batch", "3", "--implementation", "xla"]
    assert command.main(asked) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert [row[:5] for row in rows[1:6]] == [
        ["3", "first", "1", "18", "none"],
        ["3", "again", "1", "18", "none"],
        ["3", "with XLA's work between", "1", "18", "none"],
        ["3", "2 threads at once", "2", "36", "none"],
        ["3", "2 processes at once", "2", "36", "none"],
    ]
    assert f"the shipped model, bfloat16, 'xla' on {jax.devices()[0].device_kind}" in out


def test_a_difference_is_a_failure(capsys, monkeypatch):
    walks = iter([["a", "b", "c"], ["a", "b", "c"], ["a", "x", "y"]])
    monkeypatch.setattr(Walker, "take", lambda *_: next(walks))
    asked = ["--tokens", "6", "--batch", "1", "--implementation", "xla"]
    assert command.main([*asked, "--threads", "1", "--processes", "1"]) == 1
    out, err = capsys.readouterr()
    assert "with XLA's work between: differs from token 6 on" in err
    assert re.search(r"with XLA's work between +1 +6 +1 ", out)


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(together.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1 before it had taken its steps"):
        together.in_processes(WALK, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "gpt-5"], "No preset is called 'gpt-5'"),
        (["--implementation", "pallas", "--weights", "int8"], "runs on NVIDIA GPUs"),
    ],
)
def test_what_cannot_run_is_refused(capsys, arguments, message):
    assert command.main([*arguments, "--tokens", "2"]) == 2
    assert message in capsys.readouterr().err
