"""The inline PTX by which the programs that draw meet, run on a CPU: several programs of a row."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import Edit, Inline, inlines, shape
from ptx_machine import Machine, PtxError

from pallas_kernels.draw import ptx
from pallas_kernels.draw.border import out_of_reach
from pallas_kernels.draw.noise import noisy
from pallas_kernels.draw.penalties import by_ptx, penalized
from pallas_kernels.draw.ptx import SLOTS
from pallas_kernels.draw.threefry import gumbel, random_bits

pytestmark = [
    pytest.mark.once(
        "The machine and the texts are ours; a sample shows that they are traced.",
        sample=[
            "test_programs_are_told_what_all_have_found[False-16-4]",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

WARPS, TOGETHER = 8, 2
THREADS = 32 * WARPS
WIDTH = THREADS * TOGETHER
TAG = 2


@functools.cache
def texts(places: int, best: bool, winners: int, warps: int, parts: int) -> list[Inline]:
    """Of look, tell and told."""
    width = 32 * warps * TOGETHER

    def body(board):
        row = jnp.zeros((1, width))
        ints = jnp.zeros((1, width), jnp.int32)
        shared, zero = jnp.zeros((1,), jnp.int32), jnp.int32(0)
        pair = (row, ints) if best else None
        ptx.look(row, ints, [jnp.float32(0)] * places, pair, winners, shared, TOGETHER)
        slots = max(int(best), winners)
        ptx.tell(board, shared, zero, zero, warps, slots)
        ptx.told(board, shared, zero, zero, warps, parts, slots, 50)

    return inlines(body, shape(1024))


def meet(
    parts: int,
    places: np.ndarray,
    best: bool,
    warps: int,
    edits: tuple = (),
    seed: int = 0,
    missing: bool = False,
    winners: int = 0,
) -> None:
    """Has the programs of a row meet, and compares what each is told with what there is.

    `missing`: one word of the last program has not come.
    """
    rng = np.random.default_rng(seed)
    look, tell, told = texts(len(places), best, winners, warps, parts)
    for old, new, *only in edits:
        both = {"look": look, "tell": tell, "told": told}
        whole = [x for x in only or both if both[x].has((old, new))]
        if not whole:
            raise LookupError(f"{old} does not occur.")
        look, tell, told = (
            one.edited((old, new)) if name in whole else one for name, one in both.items()
        )
    threads = 32 * warps
    width = threads * TOGETHER
    vocab = parts * width
    logits = rng.normal(size=vocab).astype(np.float32)
    logits[rng.permutation(vocab)[: vocab // 5]] = -np.inf
    noisy = np.where(rng.random(vocab) < 0.5, -np.inf, np.round(rng.normal(size=vocab), 1) - 3)
    noisy = noisy.astype(np.float32)
    # Some warps have nothing above the lowest place.
    logits[: vocab // 4] -= 10
    noisy[logits <= min(places, default=-np.inf)] = -np.inf
    mass = rng.integers(0, 1 << 28, vocab).astype(np.int32)
    mass[: vocab // 2] = (1 << 28) - 1
    board = np.zeros(32 + parts * SLOTS * 8, np.uint8)
    board[32:] = rng.integers(0, 256, len(board) - 32)
    board.view(np.uint64)[4:] &= np.uint64(2**64 - 4)
    board.view(np.uint64)[4:] |= np.uint64(1)  # of another meeting
    machines = [Machine(threads, 2 * warps * SLOTS * 8, board, order=rng) for _ in range(parts)]
    base = Machine.shared_base

    def elements(x: np.ndarray, part: int) -> list[np.ndarray]:
        """Of each thread, those that it has: side by side in pairs, then the others."""
        return list(x[part * width :][:width].reshape(threads, TOGETHER).T)

    memory = Machine.memory_base
    for part, machine in enumerate(machines):
        operands = [*elements(logits, part), *elements(mass, part)]
        operands += [place for place in places for _ in range(TOGETHER)]
        if best:
            ids = np.arange(vocab, dtype=np.int32)
            operands += [*elements(noisy, part), *elements(ids, part)]
        look.run(machine, *operands, *[base] * TOGETHER)
        tell.run(machine, base, memory, 32 + part * SLOTS * 8, TAG)
    if missing:
        board.view(np.uint64)[-1] ^= np.uint64(3)  # of another meeting
    above = logits > places[:, None]
    counts = above.sum(axis=1)
    sums = np.where(above, mass.astype(np.int64), 0).sum(axis=1)
    token = int(np.argmax(noisy))
    slots = np.arange(threads) % SLOTS
    for machine in machines:
        count, total, ahead = told.run(machine, slots, base, memory, 32, TAG)
        for slot in range(len(places)):
            assert set(count[slots == slot].view(np.int32)) == {counts[slot]}
            assert set(total[slots == slot].view(np.float32)) == {np.float32(sums[slot])}
        if best and not winners:
            assert set(ahead[slots == SLOTS - 1].view(np.int32)) == {token}
        for slot, place in zip(range(SLOTS - winners, SLOTS), range(-winners, 0), strict=True):
            among = np.where(above[place], noisy, -np.inf)
            assert set(ahead[slots == slot].view(np.int32)) == {np.argmax(among)}


def noise_texts(together: int) -> Inline:
    shape_ = (1, 64 * together)

    def body(_):
        row, word = jnp.zeros(shape_), jnp.uint32(0)
        index = jnp.zeros(shape_, jnp.int32)
        noisy(row, (word, word), index, jnp.float32(0), jnp.float32(0), together)

    return inlines(body, shape(1))[0]


def make_noise(logits, key, index, temperature, least, edit=None) -> tuple[np.ndarray, int]:
    """Of arrays `[elements, threads]`: what comes out, and how many instructions it took."""
    together, threads = logits.shape
    machine = Machine(threads, 0, 16)
    operands = [*logits, *index]
    operands += [x for x in (*map(np.asarray, key), temperature, least) for _ in range(together)]
    out = noise_texts(together).edited(edit).run(machine, *operands)
    return np.stack(out).view(np.float32), machine.clock


# Of this key, indices of the least and of the greatest noise.
KEY, EXTREMES = (jnp.uint32(3), jnp.uint32(5)), (9564963, 18245552)


def check_noise(together: int, temperature: float, edit: Edit = None) -> None:
    """Compares noise, that of the least and of the greatest random number too, with JAX's."""
    rng = np.random.default_rng(0)
    size = together, 64
    logits = rng.normal(size=size).astype(np.float32)
    index = rng.integers(0, 1 << 18, size).astype(np.int32)
    index[-1, :2] = EXTREMES
    words = jnp.asarray(index, jnp.uint32)
    assert (random_bits(KEY, words) >> 9)[-1, :2].tolist() == [0, 2**23 - 1]
    # Of the second warp, in every other pair of elements, one token alone.
    logits[::2, 32:] = logits[1::2, 33:] = -10
    scale, least = np.float32(temperature), np.float32(-5)
    made, _ = make_noise(logits, KEY, index, scale, least, edit)
    want = np.where(logits < least, -np.inf, logits + scale * np.asarray(gumbel(KEY, words)))
    np.testing.assert_allclose(made, want, rtol=3e-7, atol=6e-7)


@pytest.mark.parametrize("together", [1, 4])
def test_noise_is_jaxs(together):
    check_noise(together, 0.7)


def test_no_noise_brings_back_what_is_out_of_reach():
    least, greatest = np.asarray(gumbel(KEY, jnp.array(EXTREMES, jnp.uint32)))
    behind = out_of_reach(jnp.float32(3), jnp.float32(0.5))
    assert behind + 0.5 * greatest < 3 + 0.5 * least


def test_no_noise_is_made_in_warps_that_have_no_token_to_draw():
    logits = np.full((4, 64), -5, np.float32)
    index = np.arange(4 * 64, dtype=np.int32).reshape(4, 64)
    how = KEY, index, np.float32(1), np.float32(-4.5)
    made, nothing = make_noise(logits, *how)
    assert (made == -np.inf).all()
    logits[1, 40] = -4.5
    made, one = make_noise(logits, *how)
    assert (np.argwhere(made > -np.inf) == [[1, 40]]).all()
    logits[:, 40] = 0
    made, two = make_noise(logits, *how)
    assert np.argwhere(made > -np.inf).tolist() == [[i, 40] for i in range(4)]
    # Two of a thread's elements are skipped together.
    assert nothing < one - 200 < two - 400


PLACES = np.array([2.0, 1.5, 1.0, 0.3, 0.0, -0.4, -2.5, -np.inf], np.float32)


@pytest.mark.drawn(
    "Launches of one, some and many programs, of either question.",
    sample=[
        "test_programs_are_told_what_all_have_found[False-1-8]",
        "test_programs_are_told_what_all_have_found[True-2-8]",
        "test_programs_are_told_what_all_have_found[True-4-16]",
        "test_programs_are_told_what_all_have_found[False-16-4]",
    ],
)
@pytest.mark.parametrize(("parts", "warps"), [(1, 8), (2, 8), (16, 4), (4, 16), (32, 8)])
@pytest.mark.parametrize("best", [False, True])
def test_programs_are_told_what_all_have_found(parts, warps, best):
    meet(parts, PLACES[best:], best, warps)
    meet(parts, PLACES[:4], best, warps)


@pytest.mark.parametrize(("parts", "warps"), [(2, 8), (16, 4)])
def test_programs_are_told_which_token_is_ahead_above_each_of_some_places(parts, warps):
    for places in ([1.0, -2.5, 0.3, 0.0, -0.4], [0.3, 2.0, 0.0, -0.4, -2.5]):
        meet(parts, np.array(places, np.float32), True, warps, winners=3)


def test_a_program_waits_for_the_words_of_this_meeting():
    with pytest.raises(PtxError, match="trap"):
        meet(2, PLACES, False, 8, missing=True)


# What is changed, and whether the last slot holds a token then.
FAULTS = {
    "warps that have tokens are skipped": ("@!above bra over_2", "@above bra over_2", True),
    "a place's count is not added": ("@above add.u32 count_3, count_3, 1", "", False),
    "the first of equals is not the greatest": (
        "sub.u32 token, 0x3fffffff",
        "add.u32 token, 0",
        True,
    ),
    "a mass's upper half is lost": (
        "mul.wide.u32 other, high, 65536",
        "mov.b64 other, 0",
        False,
    ),
    "sums are read before all have written": ("bar.sync 0", "", "told", False),
    "tokens are added up": ("@last mov.b64 joined, larger", "", True),
}


# The same of tokens that are ahead above some places.
WINNER_FAULTS = [
    ("setp.gt.and.s32 is_ahead, ordered, top_4, above", "setp.gt.s32 is_ahead, ordered, top_4"),
    ("@is_ahead mov.b32 top_token_5", "@!is_ahead mov.b32 top_token_5"),
    ("setp.ge.u32 last, word, 5", "setp.ge.u32 last, word, 6"),
]


@pytest.mark.parametrize("edit", WINNER_FAULTS)
def test_a_fault_in_what_is_ahead_is_seen(edit):
    places = np.array([1.0, -2.5, 0.3, 0.0, -0.4], np.float32)
    with pytest.raises((AssertionError, PtxError)):
        for seed in range(3):
            meet(2, places, True, 8, (edit,), seed, winners=3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault):
    *edit, best = FAULTS[fault]
    with pytest.raises((AssertionError, PtxError)):
        for seed in range(3):
            meet(2, PLACES[best:], best, 8, (edit,), seed)


@pytest.mark.parametrize(
    "edit",
    [
        ("shf.l.wrap.b32 other, other, other, 29", "shf.l.wrap.b32 other, other, other, 28"),
        ("max.f32 number_2, number_2, 0f00800000", ""),
        ("vote.sync.any.pred", "vote.sync.all.pred"),
        ("or.pred anyone, anyone, may_be_2", ""),
        ("neg.f32 number_2, number_2", ""),
        ("@!anyone bra over_2", "@anyone bra over_2"),
    ],
)
def test_a_fault_in_noise_is_seen(edit):
    with pytest.raises((AssertionError, PtxError)):
        for temperature in (0.7, 1.0):
            check_noise(4, temperature, edit)


def penalties_text() -> Inline:
    def body(out):
        row, ints = jnp.zeros((1, 64)), jnp.zeros((1, 64), jnp.int32)
        edited = by_ptx(row, ints, ints > 0, *[jnp.float32(1)] * 3)
        out[0] = jnp.max(edited).astype(jnp.int32)

    return inlines(body, shape(1))[0]


def put_penalties(edit: Edit = None) -> None:
    """Compares logits of every kind, with the penalties that its formula puts on them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=64).astype(np.float32) * 3
    logits[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30]
    counts = rng.integers(0, 4, 64).astype(np.int32)
    counts[:6] = 2
    prompt = rng.random(64) < 0.3
    for kinds in ((1.3, 0.5, 0.25), (0.7, -1.5, 0.0), (1.0, 0.0, 0.0)):
        each = [np.float32(x) for x in kinds]
        with np.errstate(invalid="ignore"):
            want = penalized(*map(jnp.asarray, (logits, counts, prompt)), *each)
        operands = logits, counts, prompt.astype(np.int32), *each
        [got] = penalties_text().edited(edit).run(Machine(64, 0, 16), *operands)
        np.testing.assert_allclose(got.view(np.float32), want, rtol=1e-6, atol=1e-6)


def test_penalties_are_those_of_the_formula():
    put_penalties()


@pytest.mark.parametrize(
    "edit",
    [
        ("or.pred held, held, said", ""),
        ("selp.f32 other, other, some, positive", "selp.f32 other, some, other, positive"),
        ("selp.f32 number, other, number, said", "selp.f32 number, other, number, held"),
        ("mov.b32 some, $6", "mov.b32 some, $5"),
    ],
)
def test_a_fault_in_penalties_is_seen(edit):
    with pytest.raises(AssertionError):
        put_penalties(edit)
