"""What is bound to the kernel's own inline PTX by way of Mosaic GPU: what Triton binds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mosaic_machine import (
    MosaicMachine,
    Text,
    lowered_kernel,
    run,
    run_lowered,
    traced,
)
from mosaic_programs import put
from ptx_inline import bound, shape
from test_ptx import ONE

from pallas_kernels.mosaic_gpu.layout import Layout
from pallas_kernels.stream import access, ptx

pytestmark = pytest.mark.once(
    "The rules and the machine are ours; a sample shows that they are lowered.",
    sample=[
        "test_triton_and_mosaic_bind_the_same[words]",
        "test_rows_go_through_shared_memory[32]",
    ],
)

THREADS = 64
FEED = ONE.feed


def count(size: int, step: int = 1, first: int = 0) -> jax.Array:
    return lax.iota(jnp.int32, size) * step + first


def words(exchange: Any, weights: Any) -> None:
    there, ring = count(THREADS) & 1, jnp.int32(0x1800)
    how = 8, 0xFF, 64, weights, ring, FEED
    ptx.collect_words(exchange, count(THREADS, 4), [0, 256], count(THREADS, 0, 55), there, *how)


def each(together: int, pairs: bool) -> Callable[..., None]:
    def body(exchange: Any, weights: Any) -> None:
        offsets = [count(THREADS * together, 2, first) for first in (100, 700, 1400)]
        how = pairs, together, 64, weights, jnp.int32(0x1800), FEED
        ptx.collect_each(exchange, offsets, jnp.int32(77), *how)

    return body


def word(size: int) -> Callable[..., None]:
    def body(exchange: Any, _weights: Any) -> None:
        mask = (count(size) & 3) < 2
        ptx.store_word(exchange, count(size, 3, -6), count(size, 5, -9), mask, interpret=False)

    return body


def pair(exchange: Any, _weights: Any) -> None:
    numbers = count(THREADS, 5, -9), count(THREADS, 7)
    ptx.store_pair(exchange, count(THREADS, 2), *numbers, count(THREADS) > 3, interpret=False)


def row(_exchange: Any, _weights: Any) -> None:
    numbers = [count(THREADS, 3, i) for i in range(8)]
    ptx.write_row(count(THREADS, 32, 0x1400), numbers, (count(THREADS) & 1) < 1)


def read(_exchange: Any, _weights: Any) -> None:
    ptx.read_row(jnp.int32(0x1420))


BODIES: dict[str, tuple[Callable[..., None], int]] = {
    "words": (words, 1),
    "words anywhere": (each(1, False), 1),
    "words anywhere, two a thread": (each(2, False), 2),
    "pairs anywhere, four a thread": (each(4, True), 4),
    "a word": (word(THREADS), 1),
    "a word of some": (word(THREADS // 4), 1),
    "words, one after the other": (word(THREADS * 2), 1),
    "a pair": (pair, 1),
    "a row": (row, 1),
    "a row that is read": (read, 1),
}


# Texts that are none of the kernel's: a thread's number, elements' addresses, and a store.
_OF_THE_LOWERING = [
    ["mov.u32", "$0,", "%tid.x;", "}"],
    *(["mad.wide.s32", "$0,", "$2,", f"{item},", "$1;", "}"] for item in (2, 4)),
    ["st.global.b32", "[$1],", "$2;", "mov.b32", "$0,", "0;", "}"],
]


class Listening(MosaicMachine):
    """Runs what the lowering writes; of the kernel's texts it keeps what is bound.

    Their n-th result is twice their n-th operand, and 1 more.
    """

    def run(self, text: str, constraints: str, operands: Any, limit: int = 9) -> list[np.ndarray]:
        if text.split()[1:] in _OF_THE_LOWERING:
            return super().run(text, constraints, operands)
        self.texts.append(Text(text, constraints, tuple(operands)))
        results = [2 * x.astype(np.uint32) + 1 for x in operands[: constraints.count("=")]]
        more = constraints.count("=") - len(results)
        return [*results, *[np.zeros(self.threads, np.uint32)] * more]


def bound_by_mosaic(
    body: Callable[..., None], together: int, arrays: list[np.ndarray]
) -> tuple[list[np.ndarray], list[int]]:
    """Elements of each operand, in order, and where the arrays lie."""

    def kernel(exchange: Any, weights: Any, _out: Any) -> None:
        body(exchange, weights)

    jaxpr = traced(kernel, arrays, [shape(1)])
    memory = [*arrays, np.zeros(1, np.int32)]
    machine = Listening(THREADS, memory)
    with lowered_kernel(jaxpr, memory, THREADS) as function:
        run_lowered(function, machine)
    text = machine.texts[0].text
    texts = [x for x in machine.texts if x.text == text]
    out = []
    for number in range(len(texts[0].operands) // together):
        own = slice(number * together, (number + 1) * together)
        held = np.stack([x for each in texts for x in each.operands[own]], axis=1)  # [T, registers]
        # Whoever holds an element: all hold the same.
        out.append(held.astype(np.int64))
    return out, machine.arrays[:2]


@pytest.mark.parametrize("name", BODIES)
def test_triton_and_mosaic_bind_the_same(name):
    body, together = BODIES[name]
    arrays = [np.zeros(4096, np.int32), np.zeros(64, jnp.bfloat16)]
    got, pointers = bound_by_mosaic(body, together, arrays)
    wanted = bound(body, pointers, shape(4096), shape(64, jnp.bfloat16))
    assert len(got) == len(wanted) > 0
    for held, elements in zip(got, wanted, strict=True):
        # A splat is one number there, and has each element's register here.
        numbers = Layout.plain((elements.size,), THREADS).elements(THREADS)
        each = elements.ravel()[numbers]
        np.testing.assert_array_equal(held, np.broadcast_to(each, held.shape))


@pytest.mark.parametrize("together", [1, 2, 4])
def test_results_are_those_of_the_elements_that_were_bound(together):
    arrays = [np.zeros(4096, np.int32), np.zeros(64, jnp.bfloat16)]
    size = THREADS * together

    def kernel(exchange: Any, weights: Any, out: Any) -> None:
        offsets = [count(size, 3, first) for first in (100, 700)]
        how = False, together, 64, weights, jnp.int32(0x1800), FEED
        for i, found in enumerate(ptx.collect_each(exchange, offsets, jnp.int32(77), *how)):
            put(out, found, room=i * size)

    spec = shape(2 * size)
    memory = [*arrays, np.zeros(spec.shape, spec.dtype)]
    machine = Listening(THREADS, memory)
    with lowered_kernel(traced(kernel, arrays, [spec]), memory, THREADS) as function:
        run_lowered(function, machine)
    offsets = np.concatenate([np.arange(size) * 3 + first for first in (100, 700)])
    np.testing.assert_array_equal(machine.array(2, spec), 2 * offsets + 1)


@pytest.mark.parametrize("size", [4, 32])
def test_rows_go_through_shared_memory(size):
    def kernel(x: Any, out: Any) -> None:
        base = ptx.ring_base(2048, 128)
        index = count(size)
        numbers = [access.load(x.at[index * 8 + i]) for i in range(8)]
        ptx.write_row(base + 32 * index, numbers, index != 1)
        access.meet()
        for place, number in enumerate([0, 2, size - 1]):
            for i, found in enumerate(ptx.read_row(base + 32 * number)):
                out[8 * place + i] = found
        out[24] = base

    x = np.arange(8 * size, dtype=np.int32) * 3
    [got], machine = run(
        kernel, threads=THREADS, arrays=[x], out_shapes=[shape(25)], ring_bytes=2048 + 128
    )
    rows = x.reshape(size, 8)[[0, 2, size - 1]]
    first = -(-machine.ring // 128) * 128
    np.testing.assert_array_equal(got, [*rows.ravel(), first])
    # What is not written is not there: row 1.
    assert (machine.view(first + 32, 8, np.int32) == -1).all()


@pytest.mark.parametrize("size", [8, THREADS, 2 * THREADS])
def test_words_are_stored_where_the_mask_says(size):
    def kernel(x: Any, out: Any) -> None:
        index = count(size)
        mask = access.load(x.at[index]) > 2
        ptx.store_word(out, index * 2, index + 7, mask, interpret=False)

    x = np.arange(size, dtype=np.int32) % 5
    [got], _ = run(kernel, threads=THREADS, arrays=[x], out_shapes=[shape(2 * size)], once=False)
    wanted = np.full(2 * size, -1, np.int32)
    wanted[::2] = np.where(x > 2, np.arange(size) + 7, -1)
    np.testing.assert_array_equal(got, wanted)


def test_words_of_other_layouts_are_stored():
    """A thread has sums of neighbouring columns; a text wants them in the plain layout."""

    def kernel(x: Any, out: Any) -> None:
        rows = access.load(x.at[count(256)]).reshape(4, 64)
        sums = jnp.sum(rows, axis=0)
        ptx.store_word(out, count(64), sums, sums > 0, interpret=False)

    x = np.random.default_rng(0).integers(-9, 10, 256).astype(np.int32)
    [got], _ = run(kernel, threads=THREADS, arrays=[x], out_shapes=[shape(64)], once=False)
    sums = x.reshape(4, 64).sum(axis=0)
    np.testing.assert_array_equal(got, np.where(sums > 0, sums, -1))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("taken", [0, 1])
def test_branches_leave_an_array_where_the_first_one_has_it(taken, first):
    """Sums of pairs lie with every second thread; the other branch has the plain layout."""

    def kernel(x: Any, which: Any, out: Any) -> None:
        sums = jnp.sum(access.load(x.at[count(THREADS)]).reshape(THREADS // 2, 2), axis=1)
        plain = access.load(x.at[count(THREADS // 2)])
        ways = [lambda: sums, lambda: plain] if first else [lambda: plain, lambda: sums]
        made = lax.switch(access.load(which.at[count(1)])[0], ways)
        index = count(THREADS // 2)
        access.store(out.at[index], made * 2 + index)

    x = np.random.default_rng(1).integers(-9, 10, THREADS).astype(np.int32)
    arrays = [x, np.array([taken], np.int32)]
    [got], _ = run(kernel, threads=THREADS, arrays=arrays, out_shapes=[shape(THREADS // 2)])
    wanted = x.reshape(-1, 2).sum(axis=1) if first == (taken == 0) else x[: THREADS // 2]
    np.testing.assert_array_equal(got, wanted * 2 + np.arange(THREADS // 2))


@pytest.mark.parametrize("threads", [128, 256])
def test_squares_are_summed_over_a_sequence(threads):
    values = np.random.default_rng(0).standard_normal((8, threads)).astype(np.float32)

    def kernel(x: Any, out: Any) -> None:
        base = ptx.ring_base(1024, 128)
        loaded = [access.load(x.at[i, count(threads)]) for i in range(8)]
        sums = ptx.sum_squares(base, loaded, threads // 32)
        # Elements of two layouts meet.
        columns = jnp.sum(loaded[0].reshape(threads // 32, 32), axis=0)
        put(out, sums + jnp.sum(columns))

    [got], _ = run(
        kernel,
        threads=threads,
        arrays=[values],
        out_shapes=[shape(threads, jnp.float32)],
        ring_bytes=2048,
    )
    squares = (values.astype(np.float64) ** 2).reshape(8, threads // 32, 8, 4)
    sums = np.broadcast_to(squares.sum(axis=(0, 1, 3))[:, None], (8, 4)).ravel()
    wanted = np.tile(sums, threads // 32) + values[0].astype(np.float64).sum()
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
