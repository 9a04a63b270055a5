"""Where threads hold the elements of arrays, and how these come to other threads."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from jax._src.lib.mlir.dialects import arith
from mosaic_machine import MosaicMachine, lowered_function, run_lowered

from pallas_kernels.mosaic_gpu import arithmetic
from pallas_kernels.mosaic_gpu.ir import constant, i32, integer
from pallas_kernels.mosaic_gpu.layout import Layout, bits_of_axes, log2
from pallas_kernels.mosaic_gpu.memory import _store
from pallas_kernels.mosaic_gpu.threads import Threads
from pallas_kernels.mosaic_gpu.values import Registers

THREADS = [32, 128, 256]
SEEDS = range(40)


def some_layout(draw: random.Random, bits: int, threads: int) -> Layout:
    """Any layout of 2 ** bits elements on so many threads."""
    most = log2(threads)
    of_threads = draw.randint(max(0, bits - 4), min(bits, most))
    registers = bits - of_threads
    places = [*draw.sample(range(most), of_threads), *(-1 - i for i in range(registers))]
    draw.shuffle(places)
    return Layout(tuple(places), registers)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (32,), (8, 8, 4), (256, 8), (1, 8), (128, 4)])
def test_neighbouring_elements_are_a_threads_own(shape, threads):
    count, held = math.prod(shape), Layout.plain(shape, threads).elements(threads)
    each = max(1, count // threads)
    wanted = np.arange(threads)[:, None] * each + np.arange(each)
    np.testing.assert_array_equal(held, wanted % count)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_layout_says_which_element_lies_where(seed):
    draw = random.Random(seed)
    threads, bits = draw.choice(THREADS), draw.randint(0, 8)
    layout = some_layout(draw, bits, threads)
    held = layout.elements(threads)
    for thread, register in itertools.product(range(threads), range(layout.registers)):
        wanted = 0
        for bit, place in enumerate(layout.places):
            number, at = (thread, place) if place >= 0 else (register, -1 - place)
            wanted += (number >> at & 1) << bit
        assert held[thread, register] == wanted
    # All are there, and the threads that differ in free bits alone hold the same.
    assert set(held.ravel()) == set(range(1 << bits))
    free = layout.free(threads)
    np.testing.assert_array_equal(held, held[np.arange(threads) & ~free])
    assert len(np.unique(held[:, 0])) == threads >> free.bit_count()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_restricted_layout_holds_parts_of_elements(seed):
    draw = random.Random(seed)
    threads, bits = draw.choice(THREADS), draw.randint(1, 8)
    layout = some_layout(draw, bits, threads)
    some = draw.sample(range(bits), draw.randint(0, bits))
    part, which = layout.restricted(some)
    whole, held = layout.elements(threads), part.elements(threads)
    wanted = sum(((whole >> bit & 1) << i for i, bit in enumerate(some)), np.zeros_like(whole))
    assert len(which) == layout.registers and sorted(set(which)) == [*range(part.registers)]
    np.testing.assert_array_equal(held[:, which], wanted)


def test_the_last_axis_has_the_lowest_bits():
    assert bits_of_axes((4, 1, 8)) == [[3, 4], [], [0, 1, 2]]


@pytest.mark.parametrize("size", [0, 3, 12])
def test_sizes_are_powers_of_two(size):
    with pytest.raises(ValueError, match=f"powers of two of elements, got {size}"):
        Layout.plain((size, 1), 32)


# From layout to layout


def _numbers(own: Threads, layout: Layout) -> list[Any]:
    """Of each element a number of its own."""
    return [arith.muli(own.element(layout, k), constant(i32(), 3)) for k in range(layout.registers)]


def _results(write: Any, threads: int, registers: int) -> np.ndarray:
    """Each thread's registers `[threads, registers]` that `write` makes of the threads."""

    def stored(own: Threads, _ring: Any, bases: list[Any]) -> None:
        regs = write(own)
        assert len(regs) == registers
        for k, value in enumerate(regs):
            at = arith.muli(own.number, constant(i32(), 4 * registers))
            at = arith.extsi(integer(64), arith.addi(at, constant(i32(), 4 * k)))
            _store(arith.addi(bases[0], at), value, None)

    out = np.zeros((threads, registers), np.int32)
    machine = MosaicMachine(threads, [out])
    with lowered_function(stored, 1, threads) as function:
        run_lowered(function, machine)
    return machine.array(0, out)


def check_moved(seed: int) -> None:
    draw = random.Random(seed)
    threads, bits = draw.choice(THREADS), draw.randint(1, 8)
    source, target = (some_layout(draw, bits, threads) for _ in range(2))
    if draw.random() < 0.5:  # within warps
        places = [*target.places]
        for bit, place in enumerate(source.places):
            if place >= 5 and place not in places and places[bit] >= 0:
                places[bit] = place
        target = Layout(tuple(places), target.register_bits)

    def write(own: Threads) -> list[Any]:
        there = own.at(Registers((1 << bits,), source, _numbers(own, source)), target)
        return [*there, *own.at(Registers((1 << bits,), target, there), source)]

    got = _results(write, threads, target.registers + source.registers)
    wanted = [3 * layout.elements(threads) for layout in (target, source)]
    np.testing.assert_array_equal(got, np.concatenate(wanted, axis=1))


@pytest.mark.parametrize("seed", range(120))
def test_elements_move_from_any_layout_to_any_other_and_back(seed):
    check_moved(seed)


def check_summed(seed: int) -> None:
    draw = random.Random(seed)
    threads = draw.choice(THREADS)
    shape = tuple(1 << draw.randint(0, 3) for _ in range(draw.randint(1, 3)))
    axes = sorted(draw.sample(range(len(shape)), draw.randint(1, len(shape))))
    source = some_layout(draw, log2(math.prod(shape)), threads)
    kept: list[Layout] = []

    def write(own: Threads) -> list[Any]:
        numbers = Registers(shape, source, _numbers(own, source))
        sums = own.reduced(numbers, axes, arithmetic.BINARY["add"])
        kept.append(sums.layout)
        assert sums.shape == tuple(n for i, n in enumerate(shape) if i not in axes)
        return sums.regs

    bits = [b for a in reversed(range(len(shape))) if a not in axes for b in bits_of_axes(shape)[a]]
    got = _results(write, threads, source.restricted(bits)[0].registers)
    numbers = 3 * np.arange(math.prod(shape)).reshape(shape)
    wanted = numbers.sum(axis=tuple(axes)).ravel()
    np.testing.assert_array_equal(got, wanted[kept[0].elements(threads)])


@pytest.mark.parametrize("seed", SEEDS)
def test_elements_of_any_layout_are_summed(seed):
    check_summed(seed)
