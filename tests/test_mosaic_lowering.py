"""The kernel's body as Mosaic GPU is given it, run on a CPU against JAX's own evaluation."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mosaic_programs as programs
import numpy as np
import pytest
from jax import Array, lax
from jax._src.lib.mlir.dialects import llvm
from jax.experimental import pallas as pl
from jaxpr_numpy import evaluate
from mosaic_machine import MosaicError, MosaicMachine, lowered_kernel, run, traced
from mosaic_programs import put

from pallas_kernels.mosaic_gpu.launch import SCRATCH_BYTES
from pallas_kernels.stream import access, ptx

THREADS = [32, 128, 256]
every_count = pytest.mark.parametrize("threads", THREADS)
# More are drawn by hand: `check_random(seed)`.
SEEDS = range(60)


def interpreted(
    kernel: Callable[..., None], arrays: Sequence[Any], specs: Sequence[Any]
) -> list[np.ndarray]:
    call = pl.pallas_call(kernel, grid=(1,), out_shape=list(specs), interpret=True)
    return [np.asarray(x) for x in jax.jit(call)(*arrays)]


def evaluated(
    kernel: Callable[..., None], arrays: Sequence[Any], specs: Sequence[Any]
) -> list[np.ndarray]:
    """By numpy, what is not stored 0."""
    results = [np.zeros(x.shape, x.dtype) for x in specs]
    evaluate(traced(kernel, arrays, specs), [*(np.array(x) for x in arrays), *results])
    return results


def check(
    kernel: Callable[..., None],
    arrays: Sequence[Any],
    specs: Sequence[Any],
    threads: int,
    *,
    reference: Callable[..., list[np.ndarray]] = evaluated,
    rtol: float = 0,
    scratch_bytes: int = SCRATCH_BYTES,
) -> MosaicMachine:
    """Whether a kernel's stores are what they should be, all of them and no more."""
    got, machine = run(
        kernel, threads=threads, arrays=arrays, out_shapes=specs, scratch_bytes=scratch_bytes
    )
    wanted = reference(kernel, arrays, specs)
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        stored = machine.is_stored(len(arrays) + number, a)
        assert stored.any()
        a, b = (np.where(stored, x, 0).astype(np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=0)
    return machine


def check_random(seed: int, reference: Any = evaluated) -> MosaicMachine:
    threads = THREADS[seed % 3]
    kernel = programs.kernel_of(seed, threads)
    arrays = programs.numbers_of(seed)
    # Arrays of any layout, of which those of the kernel that are large have one alone.
    options: Any = {"reference": reference, "scratch_bytes": 8192}
    return check(kernel, arrays, programs.RESULTS, threads, **options)


@pytest.mark.once(
    "They have the operations that the other tests have, in other orders.",
    sample=[f"test_a_random_kernel[{seed}]" for seed in range(20)],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_kernel(seed):
    check_random(seed)


@pytest.mark.parametrize("seed", [1, 13, 24])
def test_jax_evaluates_a_random_kernel_likewise(seed):
    check_random(seed, interpreted)


# Operation by operation


def spec(count: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), dtype)


def loaded(ref: Any, shape: tuple[int, ...]) -> Array:
    """An array's first elements, in order: in registers, in the plain layout."""
    count = math.prod(shape)
    return access.load(ref.at[lax.iota(jnp.int32, count)]).reshape(shape)


def whole_numbers(count: int, dtype: Any = jnp.float32, most: int = 99) -> np.ndarray:
    return np.random.default_rng(count).integers(-most, most + 1, count).astype(dtype)


SHAPES = [(), (1,), (32,), (128,), (256,), (8, 8, 4), (256, 8), (1, 8), (2, 1, 16), (128, 4)]


@every_count
@pytest.mark.parametrize("shape", [x for x in SHAPES if x])
def test_iota_counts_along_each_axis(shape, threads):
    def kernel(out: Any) -> None:
        for axis in range(len(shape)):
            number = lax.broadcasted_iota(jnp.int32, shape, axis)
            put(out, number, room=axis * math.prod(shape))

    check(kernel, [], [spec(len(shape) * math.prod(shape))], threads)


REDUCED = [
    (shape, axes)
    for shape in [(1,), (32,), (8, 8, 4), (256, 8), (1, 8), (2, 1, 16)]
    for count in range(1, len(shape) + 1)
    for axes in itertools.combinations(range(len(shape)), count)
]


@every_count
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_arrays_are_reduced_along_any_axes(dtype, threads):
    wanted = []

    def kernel(x: Any, out: Any) -> None:
        room = 0
        for shape, axes in REDUCED:
            for way in (lax.reduce_sum, lax.reduce_max, lax.reduce_min):
                found = way(loaded(x, shape), axes)
                put(out, found, room=room)
                room += found.size
        wanted.append(room)

    count = 3 * sum(
        math.prod(n for i, n in enumerate(shape) if i not in axes) for shape, axes in REDUCED
    )
    machine = check(kernel, [whole_numbers(2048, dtype)], [spec(count, dtype)], threads)
    assert wanted[0] == count
    assert (machine.barriers > 0) == (threads > 32)


BROADCASTS = [
    ((8,), (4, 8), (1,)),
    ((8,), (8, 4), (0,)),
    ((8, 4), (8, 2, 4), (0, 2)),
    ((8, 4), (2, 8, 4, 2), (1, 2)),
    ((1, 8), (16, 8), (0, 1)),
    ((8, 1, 4), (8, 8, 4), (0, 1, 2)),
    ((32, 1), (32, 32), (0, 1)),
    ((1,), (8, 4), (1,)),
    ((), (256, 4), ()),
    ((256,), (256, 8), (0,)),
    ((128, 4), (2, 128, 4), (1, 2)),
]


@every_count
@pytest.mark.parametrize(("shape", "to", "axes"), BROADCASTS)
def test_arrays_are_broadcast_in_each_direction(shape, to, axes, threads):
    def kernel(x: Any, y: Any, out: Any) -> None:
        one, other = loaded(x, shape), loaded(y, to)
        put(out, other + lax.broadcast_in_dim(one, to, axes))

    # As a sum and alone, where nothing says which layout is wanted.
    def alone(x: Any, out: Any) -> None:
        put(out, lax.broadcast_in_dim(loaded(x, shape), to, axes))

    arrays = [whole_numbers(math.prod(shape)), whole_numbers(math.prod(to))]
    check(kernel, arrays, [spec(math.prod(to), jnp.float32)], threads)
    check(alone, arrays[:1], [spec(math.prod(to), jnp.float32)], threads)


@every_count
def test_arrays_of_different_layouts_are_chosen_between(threads):
    def kernel(x: Any, out: Any) -> None:
        a = loaded(x, (8, 8, 4))
        rows, columns, middle = (jnp.sum(a, axis=i) for i in (2, 0, 1))
        which = columns > middle
        put(out, jnp.where(which, columns, middle))
        put(out, jnp.where(rows > 0, rows, jnp.float32(5)), room=32)
        put(out, jnp.where(which, jnp.sum(rows.reshape(2, 8, 4), axis=0), 7.0), room=96)

    check(kernel, [whole_numbers(256)], [spec(128, jnp.float32)], threads)


# Numbers


DTYPES = [jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.bfloat16, jnp.float16, jnp.float32]


def numbers_of(dtype: Any) -> np.ndarray:
    """64 numbers of a dtype, halves and others that must be rounded among them."""
    rng = np.random.default_rng(0)
    if dtype == jnp.bool_:
        return rng.integers(0, 2, 64).astype(bool)
    if jnp.issubdtype(dtype, jnp.integer):
        return rng.integers(-120, 120, 64).astype(dtype)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0.5, -0.5, 0, -1.9])
    return np.concatenate([ties, rng.standard_normal(56) * 20]).astype(dtype)


@pytest.mark.parametrize("source", DTYPES, ids=lambda x: np.dtype(x).name)
def test_numbers_are_converted_and_rounded_to_nearest(source):
    def kernel(x: Any, *outs: Any) -> None:
        values = loaded(x, (64,))
        for out, dtype in zip(outs, DTYPES, strict=True):
            put(out, values.astype(dtype))

    check(kernel, [numbers_of(source)], [spec(64, dtype) for dtype in DTYPES], 32)


UNSIGNED = [jnp.uint8, jnp.uint16, jnp.uint32]


@pytest.mark.parametrize("dtype", UNSIGNED, ids=lambda x: np.dtype(x).name)
def test_large_unsigned_numbers_are_not_negative_ones(dtype):
    def kernel(x: Any, y: Any, out: Any, signed: Any, floats: Any, chosen: Any) -> None:
        a, b = loaded(x, (64,)), loaded(y, (64,))
        made = [lax.max(a, b), lax.min(a, b), lax.div(a, b), lax.rem(a, b)]
        for i, value in enumerate(made):
            put(out, value, room=64 * i)
        put(out, jnp.full((1,), lax.reduce_max(a, (0,))), room=256)
        for i, value in enumerate([a < b, a <= b, a > b, a >= b]):
            put(chosen, value, room=64 * i)
        put(signed, a.astype(jnp.int32))
        put(floats, a.astype(jnp.float32))

    most, rng = np.iinfo(dtype).max, np.random.default_rng(0)
    x = rng.integers(most // 2, most, 64).astype(dtype)
    y = rng.integers(1, most, 64).astype(dtype)
    specs = [spec(257, dtype), spec(64), spec(64, jnp.float32), spec(256, jnp.bool_)]
    check(kernel, [x, y], specs, 32)


def test_large_floats_become_unsigned_numbers():
    def kernel(x: Any, out: Any) -> None:
        put(out, loaded(x, (4,)).astype(jnp.uint32))

    x = np.array([0, 1.9, 2.0**31, 4e9], np.float32)
    check(kernel, [x], [spec(4, jnp.uint32)], 32)


def test_bits_are_compared_and_reduced_as_0_and_1():
    def kernel(x: Any, y: Any, out: Any) -> None:
        a, b = loaded(x, (64,)), loaded(y, (64,))
        made = [a < b, a <= b, a > b, a >= b, a == b, a != b, a & b, a | b, a ^ b, ~a]
        made += [lax.max(a, b), lax.min(a, b)]
        for i, value in enumerate(made):
            put(out, value, room=64 * i)
        rows = a.reshape(8, 8)
        put(out, jnp.any(rows, axis=1), room=768)
        put(out, jnp.all(rows | b.reshape(8, 8), axis=0), room=776)

    bits = [np.random.default_rng(i).integers(0, 2, 64).astype(bool) for i in range(2)]
    check(kernel, bits, [spec(784, jnp.bool_)], 32)


# Each with numbers that it takes, and how far off its approximation is.
FUNCTIONS = {
    "exp": (jnp.exp, -20, 20, 4e-6),
    "exp2": (jnp.exp2, -20, 20, 2e-7),
    "rsqrt": (lax.rsqrt, 0.01, 99, 4e-7),
    "sqrt": (jnp.sqrt, 0.01, 99, 4e-7),
    "cos": (jnp.cos, -9, 9, 1e-6),
    "sin": (jnp.sin, -9, 9, 1e-6),
    "tanh": (jnp.tanh, -5, 5, 1e-6),
    "logistic": (jax.nn.sigmoid, -9, 9, 2e-6),
    "divided": (lambda x: 3 / x, 0.1, 9, 4e-7),
    "rest": (lambda x: lax.rem(x, jnp.full_like(x, 1.5)), -9, 9, 0),
    "cube": (lambda x: x**3, -9, 9, 4e-7),
    "clamped": (lambda x: jnp.clip(x, -1, 2), -9, 9, 0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_floats(name, dtype):
    function, low, high, rtol = FUNCTIONS[name]

    def kernel(x: Any, out: Any) -> None:
        put(out, function(loaded(x, (64,))))

    x = np.random.default_rng(0).uniform(low, high, 64).astype(dtype)
    if dtype == jnp.bfloat16:
        rtol = 2**-7
    check(kernel, [x], [spec(64, dtype)], 32, rtol=rtol)


def test_not_numbers_win_a_maximum():
    def kernel(x: Any, out: Any) -> None:
        values = loaded(x, (64,))
        put(out, jnp.full((1,), jnp.max(values)))
        put(out, jnp.maximum(values, 0.0), room=1)
        put(out, jnp.where(values == values, 1.0, 0.0), room=65)
        put(out, jnp.where(values != values, 1.0, 0.0), room=129)

    x = np.ones(64, np.float32)
    x[17] = np.nan
    check(kernel, [x], [spec(193, jnp.float32)], 32)


def test_bits_of_floats_are_integers():
    def kernel(x: Any, out: Any, back: Any) -> None:
        bits = lax.bitcast_convert_type(loaded(x, (64,)), jnp.int32)
        put(out, bits)
        put(back, lax.bitcast_convert_type(bits ^ 1, jnp.float32))

    check(kernel, [numbers_of(jnp.float32)], [spec(64), spec(64, jnp.float32)], 32)


# Memory


@every_count
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: np.dtype(x).name)
def test_what_a_mask_hides_is_neither_loaded_nor_stored(dtype, threads):
    def kernel(x: Any, out: Any) -> None:
        index = lax.iota(jnp.int32, 256)
        there = (index & 3) != 1
        far = jnp.where(there, index, 1 << 20)
        some = access.load(x.at[far], mask=there, other=1)
        access.store(out.at[far], some, mask=there)
        put(out, some, room=256)
        none = access.load(x.at[far], mask=there)
        put(out, jnp.where(there, none, some), room=512)

    numbers = np.resize(numbers_of(dtype), 256)
    machine = check(kernel, [numbers], [spec(768, dtype)], threads)
    assert machine.is_stored(1, np.zeros(768, dtype)).sum() == 192 + 512


@every_count
def test_what_many_threads_hold_one_stores(threads):
    def kernel(x: Any, out: Any) -> None:
        put(out, loaded(x, (4,)))
        out[4] = jnp.sum(loaded(x, (64,)))
        put(out, jnp.sum(loaded(x, (8, 4)), axis=1), room=8)
        put(out, lax.iota(jnp.int32, 8).astype(jnp.float32), mask=jnp.arange(8) < 3, room=16)

    machine = check(kernel, [whole_numbers(64)], [spec(32, jnp.float32)], threads)
    assert machine.stored.max() == 1


@every_count
def test_arrays_of_several_axes_are_indexed(threads):
    def kernel(x: Any, out: Any) -> None:
        row = lax.broadcasted_iota(jnp.int32, (8, 4), 0)
        column = lax.iota(jnp.int32, 4)
        layer = x[0, 0, 1]
        found = access.load(x.at[layer, (row * 3) & 7, column[None, :]])
        access.store(out.at[layer, row, column[None, :]], found + 1)
        out[1 - layer, 7, 3] = x[layer, 7, 0]

    x = np.arange(64, dtype=np.int32).reshape(2, 8, 4)
    check(kernel, [x], [jax.ShapeDtypeStruct((2, 8, 4), jnp.int32)], threads)


def test_a_load_beyond_an_array_is_noticed():
    def kernel(x: Any, out: Any) -> None:
        put(out, access.load(x.at[lax.iota(jnp.int32, 32) + 1]))

    with pytest.raises(MosaicError, match="outside of the arrays"):
        check(kernel, [whole_numbers(32)], [spec(32, jnp.float32)], 32)


def test_elements_of_arrays_beyond_2_to_the_31_are_found():
    """Of such an array, of which only the first bytes are there, the last are asked for."""

    def kernel(x: Any, out: Any) -> None:
        row = lax.iota(jnp.int32, 32) * 0 + 70_000
        put(out, access.load(x.at[row, lax.iota(jnp.int32, 32)], mask=row < 0, other=3))

    shape = jax.ShapeDtypeStruct((1 << 17, 1 << 15), jnp.int8)
    specs = [spec(32, jnp.int8)]
    jaxpr = traced(kernel, [shape], specs)
    with lowered_kernel(jaxpr, [shape, *specs], 32) as function:
        text = str(function)
    assert "arith.muli" in text and "70000 : i64" not in text
    assert text.count("arith.extsi") >= 2


# Control flow


@every_count
@pytest.mark.parametrize("number", [-3, 0, 1, 2, 7])
def test_the_nearest_of_three_branches_is_taken(number, threads):
    def kernel(x: Any, which: Any, out: Any) -> None:
        values, count = loaded(x, (8, 32)), lax.broadcasted_iota(jnp.int32, (8, 32), 0)

        def sums(axis: int) -> Array:
            total = jnp.sum(values, axis=axis, keepdims=True)
            return jnp.broadcast_to(total, (8, 32)) + count

        ways = [lambda: sums(0), lambda: sums(1), lambda: values]
        put(out, lax.switch(which[0], ways) + count)

    arrays = [whole_numbers(256, jnp.int32), np.array([number], np.int32)]
    check(kernel, arrays, [spec(256)], threads)


@every_count
@pytest.mark.parametrize("number", [0, 5])
def test_one_of_two_branches_is_taken(number, threads):
    def kernel(x: Any, which: Any, out: Any) -> None:
        values = loaded(x, (256,))
        total, values = lax.cond(
            which[0] > 3,
            lambda: (jnp.sum(values), values * 2),
            lambda: (jnp.max(values), jnp.zeros_like(values)),
        )
        put(out, values + total)

    arrays = [whole_numbers(256, jnp.int32), np.array([number], np.int32)]
    check(kernel, arrays, [spec(256)], threads)


@every_count
def test_loops_within_loops_reduce(threads):
    def kernel(x: Any, out: Any) -> None:
        values = loaded(x, (8, 32))

        def inner(j: Array, total: Array) -> Array:
            return total + jnp.sum(values, axis=0) * j + jnp.max(total)

        def outer(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, rows = carry
            total = lax.fori_loop(jnp.int32(0), i + 1, inner, total)
            # Through shared memory as the inner loop's sums are, which others may still read.
            return total, rows + jnp.sum(values * total[None, :], axis=1) + jnp.sum(rows)

        start = jnp.zeros((32,), jnp.int32), jnp.zeros((8,), jnp.int32)
        count = jnp.minimum(x[0] & 3, 3) + 2
        total, rows = lax.fori_loop(jnp.int32(0), count, outer, start)
        put(out, total)
        put(out, rows, room=32)

    check(kernel, [whole_numbers(256, jnp.int32, 3)], [spec(40)], threads)


@every_count
def test_shared_memory_that_is_free_before_a_loop_may_be_used_within_and_behind(threads):
    def kernel(x: Any, out: Any) -> None:
        values = loaded(x, (8, 32))
        access.meet()  # nobody reads shared memory any more

        def body(i: Array, total: Array) -> Array:
            return total + jnp.sum(values * (total + i)[None, :], axis=0)

        total = lax.fori_loop(jnp.int32(0), (x[0] & 1) + 2, body, jnp.zeros((32,), jnp.int32))
        put(out, total)
        access.meet()
        rows = lax.cond(x[1] > 0, lambda: jnp.sum(values, axis=0), lambda: total)
        put(out, rows + jnp.sum(values + rows[None, :], axis=0), room=32)

    x = whole_numbers(256, jnp.int32, 3)
    x[1] = 1
    check(kernel, [x], [spec(64)], threads)


@every_count
@pytest.mark.parametrize("number", [0, 1])
def test_what_follows_from_indices_is_made_where_it_is_wanted(number, threads):
    """Within a branch first, then in another one, then outside: none knows what another made."""

    def kernel(which: Any, out: Any) -> None:
        lazy = lax.broadcasted_iota(jnp.int32, (8, 32), 1) * 5 + which[0]
        more = lazy[:, :, None] + lax.broadcasted_iota(jnp.int32, (8, 32, 2), 2) * 1000

        def reduced() -> Array:
            return jnp.sum(lazy, axis=1) + jnp.max(more, axis=(1, 2))

        made = lax.cond(which[0] > 0, reduced, lambda: reduced() * 3)
        made += lax.cond(which[0] > 0, lambda: reduced() * 7, reduced)
        put(out, made)
        put(out, lazy, room=8)
        put(out, jnp.min(more, axis=2), room=264)

    check(kernel, [np.array([number], np.int32)], [spec(520)], threads)


def test_calls_are_lowered_where_they_stand():
    @jax.jit
    def twice(x: Array) -> Array:
        return x + x

    def kernel(x: Any, out: Any) -> None:
        put(out, twice(loaded(x, (64,))) + pl.program_id(0))

    check(kernel, [whole_numbers(64, jnp.int32)], [spec(64)], 32)


def test_what_is_not_lowered_has_a_sentence():
    def kernel(x: Any, out: Any) -> None:
        put(out, jnp.cumsum(loaded(x, (32,))))

    with pytest.raises(NotImplementedError, match="cumsum is not lowered for Mosaic GPU"):
        run(kernel, threads=32, arrays=[whole_numbers(32)], out_shapes=[spec(32, jnp.float32)])


def test_what_does_not_fit_into_the_scratch_has_a_sentence():
    def kernel(x: Any, out: Any) -> None:
        values = loaded(x, (256, 8))
        put(out, values.reshape(8, 256) + jnp.sum(values, axis=0)[:, None])
        a = jnp.sum(loaded(x, (2048,)).reshape(2, 4, 256), axis=0)
        b = jnp.sum(loaded(x, (2048,)).reshape(4, 256, 2), axis=2)
        put(out, a + b)

    arrays, specs = [whole_numbers(2048)], [spec(2048, jnp.float32)]
    with pytest.raises(NotImplementedError, match="exchange at most 512 bytes at once, got"):
        run(kernel, threads=128, arrays=arrays, out_shapes=specs, once=False, scratch_bytes=512)


def test_inline_assembly_with_effects_is_neither_moved_nor_doubled():
    """JAX from 0.11 on can say so."""

    def kernel(x: Any, out: Any) -> None:
        put(out, jnp.sum(loaded(x, (8, 32)), axis=0))

    arrays = [jax.ShapeDtypeStruct((256,), jnp.int32), spec(32)]
    with lowered_kernel(traced(kernel, arrays[:1], arrays[1:]), arrays, 128) as function:
        lines = [line for line in str(function).splitlines() if "llvm.inline_asm" in line]
    known = "convergent" in inspect.signature(llvm.inline_asm).parameters
    assert sum("st.shared" in line for line in lines) > 0
    for line in lines:
        computes = "%tid.x" in line or "mad.wide" in line
        assert ("has_side_effects" in line) != computes
        assert ("convergent" in line) == (known and not computes)


def kernel_of_indices(anew: Callable[[Array], Array], x: Any, out: Any) -> None:
    """Indices in a loop, in branches, along either axis, summed up, and as places of elements."""
    row, column = (lax.broadcasted_iota(jnp.int32, (8, 32), axis) for axis in (0, 1))
    again = anew(anew(lax.iota(jnp.int32, 256)))

    def step(i: Array, total: Array) -> Array:
        mine = anew(column) * (i + 1) + anew(row)
        more = lax.cond(i > 1, lambda: jnp.sum(mine, axis=1), lambda: jnp.max(anew(row), axis=1))
        return total + more

    total = lax.fori_loop(jnp.int32(0), jnp.int32(4), step, jnp.zeros((8,), jnp.int32))
    put(out, total)
    put(out, access.load(x.at[255 - again]), room=8)
    put(out, anew(access.load(x.at[again])), room=264)  # of what no index is known


@every_count
def test_indices_that_are_made_anew_are_the_same(threads):
    def plain(x: Array) -> Array:
        return x

    check(
        functools.partial(kernel_of_indices, ptx.anew),
        [whole_numbers(256, jnp.int32)],
        [spec(520)],
        threads,
        reference=lambda _, *rest: evaluated(functools.partial(kernel_of_indices, plain), *rest),
    )


def test_of_what_is_made_anew_no_number_is_known_before():
    """A thread's number is read where it is wanted: LLVM would compute elements before the loop."""

    def kernel(out: Any) -> None:
        def step(i: Array, total: Array) -> Array:
            return total + jnp.sum(ptx.anew(lax.iota(jnp.int32, 1024)) * i)

        put(out, jnp.full((1,), lax.fori_loop(jnp.int32(0), jnp.int32(9), step, jnp.int32(0))))

    with lowered_kernel(traced(kernel, [], [spec(1)]), [spec(1)], 128) as function:
        text = str(function)
    before, _, loop = text.partition("scf.while")
    of_loop = [line for line in loop.splitlines() if "%tid.x" in line]
    # 8 elements a thread follow from one number.
    assert len(of_loop) == 1
    assert "has_side_effects" in of_loop[0]
    assert before.count("%tid.x") == 1
