"""A matrix is rounded with the errors that are already made in mind, as GPTQ's paper says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_oracle import damped, oracle_integers
from quantize_cases import by_hand, numbers_of

from ffjax.formats import INT8, WeightFormat, int4
from ffjax.gptq import Order, factor, round_calibrated, shifted
from ffjax.rounding import round_matrix

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the program.",
        sample=["test_integers_are_those_of_the_paper[int4 in groups of 32-largest]"],
    ),
    pytest.mark.filterwarnings("error"),
]

# Two blocks of inputs, of which the second is a quarter full; rows that are a multiple of nothing.
OUT, IN = 7, 160
DAMPENING = 0.01
FORMATS = (
    int4(32),
    int4(32, "float16", "zero"),
    int4(32, "bfloat16", "minimum"),
    WeightFormat(bits=8, group_size=32),
    INT8,
)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
both_orders = pytest.mark.parametrize("order", ["stored", "largest"])


@functools.cache
def program(format: WeightFormat, order: Order):
    """Integers, scales and whether they are sound, of a matrix and its H."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def rounded(weight, hessian, dampening):
        made = factor(hessian, dampening, order)
        return *round_calibrated(weight, made, format), made.sound

    return lambda weight, hessian, dampening=DAMPENING: tuple(
        map(np.asarray, rounded(weight, hessian, np.float32(dampening)))
    )


def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)


def inputs(tokens: int = 400) -> np.ndarray:
    """Inputs `[tokens, in]` that are far from independent, some of them much larger."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((tokens, 40)) @ rng.standard_normal((40, IN))
    x = mixed + 2 * rng.standard_normal((tokens, IN))
    return (x * rng.uniform(0.2, 3, IN)).astype(np.float32)


def stored(integers: np.ndarray, format: WeightFormat) -> np.ndarray:
    return numbers_of(integers) if format.bits == 4 else integers


def plain(weight: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    integers, scale = jax.jit(round_matrix, static_argnums=1)(weight, format)
    return np.asarray(integers), np.asarray(scale)


def loss(weight, integers, scale, format, x) -> float:
    """||(W - Q) X||^2 over ||W X||^2."""
    off = weight - by_hand(integers, scale, format)
    return float(np.square(off @ x.T).sum() / np.square(weight @ x.T).sum())


@pytest.mark.drawn("Each format, in one of the orders.")
@both_orders
@every_format
def test_integers_are_those_of_the_paper(format, order):
    x, weight = inputs(), matrix()
    hessian = x.T @ x
    integers, scale, sound = program(format, order)(weight, hessian)
    assert sound
    exact = scale.astype(np.float64).reshape(OUT, -1, *scale.shape[2:])
    if format.offset is None:
        exact = exact.reshape(OUT, -1)
    want, tie = oracle_integers(weight, damped(hessian, DAMPENING), exact, format, order)
    sure = tie > 1e-4  # float32 tells the two sides of a tie apart
    assert sure.sum() >= OUT - 2
    np.testing.assert_array_equal(stored(integers, format)[sure], want[sure])
    # And they are not those of plain rounding by the same scales.
    alone, _ = oracle_integers(weight, np.eye(IN), exact, format, order)
    assert (alone != want).mean() > 0.1


@both_orders
@every_format
def test_products_are_off_by_less_than_with_plain_rounding(format, order):
    x, weight = inputs(), matrix()
    integers, scale, _ = program(format, order)(weight, x.T @ x)
    got = loss(weight, integers, scale, format, x)
    assert got < 0.7 * loss(weight, *plain(weight, format), format, x)


@both_orders
@every_format
@pytest.mark.parametrize("size", [1, 3e5])
def test_inputs_that_tell_nothing_of_each_other_leave_plain_rounding(format, order, size):
    weight = matrix()
    made = program(format, order)(weight, np.float32(size) * np.eye(IN, dtype=np.float32))
    for got, want in zip(made, plain(weight, format), strict=False):
        assert (got.dtype, got.tobytes()) == (want.dtype, want.tobytes())


@both_orders
def test_an_input_that_was_never_there_keeps_its_weights(order):
    x, weight, format = inputs(), matrix(), int4(32)
    dead = [0, 5, 40, 159]
    x[:, dead] = 0
    integers, scale, sound = program(format, order)(weight, x.T @ x)
    assert sound
    step = np.repeat(scale.astype(np.float32), 32, axis=1)
    want = np.clip(np.round(weight / step), -8, 7) + 8
    np.testing.assert_array_equal(numbers_of(integers)[:, dead], want[:, dead])
    assert (numbers_of(integers) != want).mean() > 0.1
    # Also where none was there.
    integers, scale, sound = program(format, order)(weight, np.zeros((IN, IN), np.float32))
    assert sound
    assert integers.tobytes() == plain(weight, format)[0].tobytes()


@both_orders
def test_an_input_that_was_never_there_has_no_say_in_a_scale(order):
    x, dead = inputs(), [0, 5, 40, 159]
    x[:, dead] = 0
    made = jax.jit(factor, static_argnames="order")(x.T @ x, 0.01, order=order)
    stored = np.empty(IN, np.float32)
    stored[np.arange(IN) if made.order is None else np.asarray(made.order)] = made.matters
    live = np.delete(stored, dead)
    assert live.min() > 0
    assert (stored[dead] < 1e-3 * live.min()).all()
    # Where there are no others, all count alike.
    none = jax.jit(factor, static_argnames="order")(np.zeros((IN, IN), np.float32), 0.01)
    assert (np.asarray(none.matters) == 1).all()


@both_orders
def test_fewer_tokens_than_inputs_do(order):
    x, weight, format = inputs(tokens=30), matrix(), int4(32)
    integers, scale, sound = program(format, order)(weight, x.T @ x)
    assert sound
    got = loss(weight, integers, scale, format, x)
    assert got < 0.2 * loss(weight, *plain(weight, format), format, x)
    # Undamped, 130 of 160 directions have no square at all, and float32 finds that out.
    assert not program(format, order)(weight, x.T @ x, 0)[2]


@both_orders
def test_weights_catch_up_as_least_squares_do(order):
    x, weight = inputs(), matrix()
    before = x + 0.3 * np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)
    hessian, missed = x.T @ x, (before - x).T @ x

    @jax.jit
    def moved(weight, missed, hessian):
        return shifted(weight, missed, factor(hessian, DAMPENING, order))

    inverse = np.linalg.inv(damped(hessian, DAMPENING))
    want = weight + weight.astype(np.float64) @ missed @ inverse
    got = np.asarray(moved(weight, missed, hessian))
    assert np.abs(got - want).max() < 1e-4 * np.abs(want - weight).max()
    assert np.square(got @ x.T - weight @ before.T).sum() < np.square(weight @ (x - before).T).sum()


def test_scales_are_chosen_for_what_cannot_be_made_up_for():
    """An input whose square is 10,000 times that of the others has the scales it likes best."""
    format, weight = int4(32), matrix()
    which = int(np.abs(weight).min(axis=0).argmax())
    hessian = np.eye(IN, dtype=np.float32)
    hessian[which, which] = 1e4

    def off(integers, scale) -> np.ndarray:
        return np.abs(by_hand(integers, scale) - weight)

    got, want = off(*program(format, "largest")(weight, hessian)[:2]), off(*plain(weight, format))
    assert got[:, which].mean() < 0.7 * want[:, which].mean()
    assert got.mean() > want.mean()


def test_the_factor_is_that_of_the_inverse():
    x = inputs()
    for order in ("stored", "largest"):
        made = jax.jit(factor, static_argnums=2)(x.T @ x, DAMPENING, order)
        upper = np.asarray(made.upper, np.float64)
        assert not np.tril(upper, -1).any()
        places = np.arange(IN) if made.order is None else np.asarray(made.order)
        h = damped(x.T @ x, DAMPENING)[places][:, places]
        assert abs(upper.T @ upper @ h / float(made.unit) - np.eye(IN)).max() < 1e-3
    assert (np.diff(h.diagonal()) <= 0).all()
    assert jnp.finfo(made.upper.dtype).bits == 32
