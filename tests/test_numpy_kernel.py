"""Kernels that numpy runs: as Pallas's interpreter has them, and within their arrays."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from numpy_kernel import by_numpy

from pallas_kernels.stream import access, launch

ROWS = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
SUMS = jax.ShapeDtypeStruct((4,), jnp.float32)


def each_adds_its_row(rows, before, sums, last):
    """A program adds its row to `sums`, which is updated in place, and says which one it was."""
    program = pl.program_id(0)

    def add(at, _):
        row = access.load(rows.at[program, at])
        is_new = program == 0
        at_all = lax.iota(jnp.int32, 4)
        old = access.load(sums.at[at_all], mask=at_all == at, other=0.0)
        added = jnp.where(is_new, jnp.round(row + 0.6), row) + old
        access.store(sums.at[at_all], added, mask=at_all == at)
        return 0

    lax.fori_loop(0, 4 + 0 * program, add, 0)  # as in a step, a loop whose end is not constant
    last[program] = program + 1


def ran(kernel, programs, arrays, shapes, aliases):
    run = functools.partial(launch._interpret, kernel, programs, shapes=shapes, aliases=aliases)
    return [np.asarray(x) for x in jax.jit(lambda *arrays: run(arrays))(*arrays)]


def test_programs_run_in_turn_and_update_what_they_are_given():
    shapes = [SUMS, jax.ShapeDtypeStruct((4,), jnp.int32)]
    given = each_adds_its_row, 3, (ROWS, jnp.full(4, 0.5, jnp.float32)), shapes, {1: 0}
    wanted = ran(*given)
    with by_numpy():
        got = ran(*given)
    assert got[0].tolist() == wanted[0].tolist() == [13.5, 16.5, 19.5, 22.5]
    unwritten = np.iinfo(np.int32).min  # by the interpreter too
    assert got[1].tolist() == wanted[1].tolist() == [1, 2, 3, unwritten]


def test_what_nobody_writes_is_no_number():
    with by_numpy():
        [got] = ran(lambda rows, sums: None, 1, (ROWS,), [SUMS], {})
    assert np.isnan(got).all()


@pytest.mark.parametrize(("shift", "message"), [(-1, "negative index"), (1, "out of bounds")])
def test_an_address_outside_an_array_is_an_error(shift, message):
    def kernel(rows, sums, masked: bool):
        at = lax.iota(jnp.int32, 4) + shift
        mask = (at >= 0) & (at < 4) if masked else None
        access.store(sums.at[lax.iota(jnp.int32, 4)], access.load(rows.at[0, at], mask=mask))

    with by_numpy():
        ran(functools.partial(kernel, masked=True), 1, (ROWS,), [SUMS], {})
        with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
            ran(functools.partial(kernel, masked=False), 1, (ROWS,), [SUMS], {})
