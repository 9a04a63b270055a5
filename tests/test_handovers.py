"""The model of the hand-overs: it finds what was wrong, and what is made wrong, and no more."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, filled_cache, random_model, random_tokens, small_config
from quantize_cases import FOR_KERNELS, kernel_config
from search.aged import aged_counters, poison_of
from search.cases import FOUND
from search.draw import Case, draw_case
from search.handovers import F297B28, HEAD_APART, Event, Model
from search.orders import faults_of
from search.plans import check_plan, gpu_of
from search.schedules import wrong_in
from search.shares import Shares, misowned
from stream_cases import FAMILIES, H200, env_of, machine, streamed
from tag_cases import same_tags

from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.stream.descriptors import busy_tiles
from pallas_kernels.stream.kv_splits import part_of, share_of
from pallas_kernels.stream.launch import layout_of
from pallas_kernels.stream.plan import LOT, Segment
from pallas_kernels.stream.planner import make_stream_plan, why_not_on
from pallas_kernels.stream.segments.attention import _rows_of
from pallas_kernels.stream.tuning import Tuning

pytestmark = [
    pytest.mark.once(
        "The model of the hand-overs is plain Python; a sample compares it with a step.",
        sample=[
            "test_tiles_are_those_of_the_kernel",
            "test_a_schedule_shows_what_was_wrong",
        ],
    ),
    pytest.mark.by_numpy,
]

COUNTERS = (0, 84, 2**29, 2**31 - 3, 2**32 // 9)
NARROW = FOUND["narrow, 8 layers, int8, 2"]


def plan_of(case: Case, gpu=H200):
    return make_stream_plan(case.dims, gpu, case.tuned or Tuning())


# What the tags of f297b28 let pass: programs with empty tiles alone, and tags that come round.
WRONG_THEN = [
    name
    for name in FOUND
    if ("narrow" in name or "512" in name) and not name.endswith((" 1", "bfloat16, 2"))
]


@pytest.mark.parametrize("name", WRONG_THEN)
def test_it_finds_what_was_wrong(name):
    case = FOUND[name]
    model = Model(plan_of(case), F297B28)
    faults = faults_of(model, 84, case.lengths)
    assert {(fault.kind, fault.buffer) for fault in faults} == {("stale", "x_in")}


@pytest.mark.parametrize("step", COUNTERS)
def test_a_schedule_shows_what_was_wrong(step):
    model = Model(plan_of(NARROW), F297B28)
    wrong = [wrong_in(model, step, NARROW.lengths, 0, fast) for fast in (100, 110)]
    assert all(one is not None and "takes x_in of another tag" in one for one in wrong)


@pytest.mark.parametrize("name", FOUND)
def test_with_a_buffer_for_the_head_nothing_is_wrong(name):
    case = FOUND[name]
    plan = plan_of(case)
    assert not misowned(Shares(plan, case.lengths))
    assert faults_of(Model(plan, HEAD_APART), case.step, case.lengths) == []


@pytest.mark.parametrize("step", COUNTERS)
def test_counters_may_be_anywhere(step):
    model = Model(plan_of(NARROW), HEAD_APART)
    assert faults_of(model, step, NARROW.lengths) == []
    assert wrong_in(model, step, NARROW.lengths, 1, fast=100, slow=3, steps=2) is None


def test_what_was_right_then_is_found_right():
    for name in set(FOUND) - set(WRONG_THEN):
        case = FOUND[name]
        assert faults_of(Model(plan_of(case), F297B28), 84, case.lengths) == []


def test_pairs_that_nobody_wrote_would_pass_where_a_tag_of_32_bits_is_0():
    """After 2^32 hand-overs; whoever then first needs several KV splits finds zeros."""
    case = Case(layers=2, heads=2, kv_heads=2, lengths=(600,), capacity=700)
    step = (2**32 - 1) // 3
    plan = plan_of(case, machine(7))
    even = Model(plan, dataclasses.replace(HEAD_APART, odd_pairs=False))
    assert faults_of(even, step, case.lengths)[0].buffer == "parts"
    assert wrong_in(even, step, case.lengths, 0) is not None
    assert faults_of(Model(plan, HEAD_APART), step, case.lengths) == []


# Hand-overs that are made wrong


SPLIT = Case(
    family="gemma2",
    layers=3,
    model_dim=256,
    ffw_dim=8192,
    heads=4,
    kv_heads=2,
    vocab=300,
    window=300,
    bits=(8, 8, 8, 8, 8),
    lengths=(600, 3),
    capacity=700,
)


@pytest.mark.parametrize(("tokens", "lengths"), [(4, (600, 3)), (8, (600,)), (3, (299, 511))])
def test_steps_of_several_tokens_are_right(tokens, lengths):
    for case in (SPLIT, NARROW):
        case = dataclasses.replace(case, tokens=tokens, lengths=lengths, capacity=700)
        plan = plan_of(case, machine(16))
        assert not misowned(Shares(plan, lengths))
        model = Model(plan, HEAD_APART)
        assert faults_of(model, 84, lengths) == []
        assert wrong_in(model, 84, lengths, 2, fast=3, slow=15, steps=2) is None


class Changed(Model):
    """One program leaves out all its waits for a buffer, or its writes of it, in one layer."""

    def __init__(self, plan, buffer: str, writes: bool, program: int):
        super().__init__(plan, HEAD_APART)
        self.left_out = buffer, writes, program

    def step(self, number, lengths):
        step = super().step(number, lengths)
        buffer, writes, program = self.left_out

        def stays(event: Event) -> bool:
            return (event.items.buffer, event.writes) != (buffer, writes)

        step.events[program] = [event for event in step.events[program] if stays(event)]
        return step


WIDE = dataclasses.replace(SPLIT, tokens=4)
BUFFERS = ("x_in", "x_head", "x_mid", "qkv", "attn", "ffw", "attn_block", "ffw_block")


def first_with(model: Model, buffer: str, writes: bool) -> int:
    events = model.step(5, SPLIT.lengths).events
    return next(
        program
        for program, some in enumerate(events)
        if any((event.items.buffer, event.writes) == (buffer, writes) for event in some)
    )


LEFT_OUT = [(SPLIT, buffer) for buffer in (*BUFFERS, "parts", "partial", "best")]
LEFT_OUT += [(WIDE, buffer) for buffer in ("qkv", "attn", "parts")]


@pytest.mark.parametrize(("case", "buffer"), LEFT_OUT, ids=lambda x: getattr(x, "tokens", x))
def test_a_hand_over_that_is_left_out_is_found(case, buffer):
    plan = plan_of(case, machine(16))
    program = first_with(Model(plan, HEAD_APART), buffer, True)
    model = Changed(plan, buffer, True, program)
    assert "never written" in {fault.kind for fault in faults_of(model, 5, case.lengths)}
    wrong = wrong_in(model, 5, case.lengths, 0)
    assert wrong is not None
    assert "Nobody can go on" in wrong


@pytest.mark.parametrize("buffer", ["x_mid", "attn", "ffw", "qkv"])
def test_a_program_that_reads_what_it_waits_for_too_late_is_found(buffer):
    """It publishes before it has read: what it then reads may be overwritten."""

    class Late(Model):
        def step(self, number, lengths):
            step = super().step(number, lengths)
            for events in step.events:
                waits = [e for e in events if e.items.buffer == buffer and not e.writes]
                for event in waits:  # after everything that this program writes in the layer
                    events.remove(event)
                    later = [i for i, e in enumerate(events) if e.tag <= event.tag]
                    events.insert(later[-1] + 1, event)
            return step

    plan = plan_of(dataclasses.replace(SPLIT, family="llama", window=None), machine(16))
    faults = faults_of(Late(plan, HEAD_APART), 5, SPLIT.lengths)
    assert ("overwritten", buffer) in {(fault.kind, fault.buffer) for fault in faults}


# Against the kernel's own


@pytest.mark.parametrize("name", ["narrow, 8 layers, int8, 2", "960 wide, int8, 2"])
def test_tiles_are_those_of_the_kernel(name):
    plan = plan_of(FOUND[name], machine(7))
    shares = Shares(plan, (0,) * plan.dims.batch)
    for segment in Segment:
        if segment == Segment.EMBED:
            continue
        theirs = [int(busy_tiles(env_of(plan, p), plan.segments[segment])) for p in range(7)]
        assert shares.busy[segment] == theirs


@pytest.mark.drawn("Any two of them together.", pairs=True)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("lengths", [(0, 255, 256), (600, 3, 300), (299, 699, 700)])
def test_parts_of_attention_are_those_of_the_kernel(lengths, local, tokens):
    case = dataclasses.replace(SPLIT, lengths=lengths, heads=80, layers=2, tokens=tokens)
    plan = plan_of(case, machine(7))
    layer = jnp.int32(0 if local else 1)
    shares = Shares(plan, lengths)
    parts, most = shares.parts(local), LOT * plan.attention.abreast
    assert plan.attention.lots > 1
    for program in range(7):
        env = dataclasses.replace(
            env_of(plan, program), lengths=tuple(jnp.int32(n) for n in lengths)
        )
        share = share_of(env, layer, None)
        theirs = [part_of(env, layer, share, jnp.int32(j)) for j in range(int(share.parts))]
        found = [
            (int(p.sequence), int(p.head), int(p.first_query), int(p.split), int(p.num_splits))
            for p in theirs
        ]
        mine = parts[program]
        assert [(p.sequence, p.kv_head, most * p.lot, p.split, p.num_splits) for p in mine] == found
        for part, one in zip(mine, theirs, strict=True):
            column, query, there = (np.asarray(x) for x in _rows_of(env, one, jnp.arange(most)))
            of_them = np.broadcast_arrays(column, query)
            assert shares.queries(part) == list(zip(*(x[there] for x in of_them), strict=True))


AGED = {
    "several, windows": (small_config(**FAMILIES["gemma2"]), [300, 2], 400),
    "two, integers": (kernel_config(FOR_KERNELS["mixed"], num_layers=1), [3, 5], 100),
    "one": (small_config(num_layers=1), [3], 100),
    "two of 3 tokens": (small_config(num_layers=1), [3, 60], 100, 3),
}


@pytest.mark.drawn("A step is the same wherever it begins.")
@pytest.mark.parametrize("start", [0, 2**31 - 2])
@pytest.mark.parametrize("name", AGED)
def test_a_cache_has_the_tags_that_steps_leave(name, start):
    config, lengths, capacity, *each = AGED[name]
    exchange = "wide_counters" if each else "counters"
    model, cache = random_model(config), filled_cache(config, lengths, capacity, math.nan, *each)
    plan = make_stream_plan(dims_of(config, len(lengths), capacity, *each), INTERPRETER)
    layout, words = layout_of(plan), getattr(cache, exchange).shape[0]
    begun = aged_counters(plan, layout, start, words)
    cache = dataclasses.replace(cache, **{exchange: jnp.asarray(begun)})
    tokens = random_tokens(config, plan.dims.columns).reshape(len(lengths), *each)
    _, _, cache = streamed(model, cache, tokens)
    before = cache.lengths.tolist()
    logits, _, cache = streamed(model, cache, tokens)
    assert np.isfinite(logits).all()
    want = aged_counters(plan, layout, start + 2, words, before)
    same_tags(np.asarray(getattr(cache, exchange)), want, poison_of(plan, layout, words))


# Of several programs: `test_stream_stages`.


# Drawn plans


def test_drawn_plans_are_right():
    """Small ones; `python -m tests.search --plans` does any number of all."""
    checked = 0
    for seed in range(400):
        if not is_small(seed):
            continue
        kind, why, case, gpu = check_plan(seed)
        assert kind == "right", f"seed {seed}, {gpu.cores} multiprocessors: {why} {case!r}"
        checked += 1
        if checked == 40:
            return
    raise AssertionError(f"{checked} plans are too few.")


def is_small(seed: int) -> bool:
    """Whether the seed's plan is there, and takes no time to check."""
    gpu = gpu_of(seed)
    case = draw_case(seed, gpu.cores)
    small = case.layers * gpu.cores < 700 and len(case.lengths) * case.heads < 200
    return small and why_not_on(gpu, case.dims, case.tuned or Tuning()) is None
