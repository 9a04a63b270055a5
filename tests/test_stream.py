"""The streamed kernel: its plan, its mail, and its own body, interpreted, against the model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import (
    QUICK_COMPILE,
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
    small_config,
)
from jax.experimental import pallas as pl
from numerics import TOLERANCES, assert_close, worst_error
from test_kernel import CASES, bits, newest, reference, untouched

from ffjax.cache import KVCache
from ffjax.config import PRESETS, preset
from pallas_kernels.dims import Dims, Features
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.launch import StepState, named_weights
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.launch import layout_of, run_stream, stream_step
from pallas_kernels.stream.layout import SharedLayout
from pallas_kernels.stream.mail import Mail, mail_words
from pallas_kernels.stream.plan import (
    LAYER_SEGMENTS,
    PIECE,
    RESERVED_TILE,
    Segment,
    StreamPlan,
)
from pallas_kernels.stream.planner import (
    COMPILER_BYTES,
    make_stream_plan,
    why_not,
    why_not_on,
)
from pallas_kernels.stream.route import make_route, route_shape
from pallas_kernels.stream.stages import run_stage, stages_of, state_shapes
from pallas_kernels.stream.tiles import first_place, next_place, next_segment
from pallas_kernels.stream.tuning import Tuning

pytestmark = pytest.mark.filterwarnings("error")

H200 = Gpu.named("H200", "9.0", 132)


def machine(programs: int) -> Gpu:
    return Gpu.named("made up", "9.0", programs)


def preset_dims(name: str, batch: int) -> Dims:
    return dims_of(preset(name), batch, 1024)


# The plan: who computes what


def env_of(plan: StreamPlan, program: int) -> StreamEnv:
    """Enough of an environment to ask where tiles stand."""
    nothing: Any = None
    return StreamEnv(
        plan=plan,
        refs={},
        program=jnp.int32(program),
        lengths=(),
        interpret=True,
        step=jnp.int32(0),
        mail=nothing,
        shared=nothing,
    )


def route_of(plan: StreamPlan) -> np.ndarray:
    """The route of every program, of weights that need not exist: `[P, rows, words]`."""
    specs = named_weights(plan.dims.abstract_weights())

    def kernel(ref):
        refs = {**specs, "route": ref}
        env = dataclasses.replace(env_of(plan, 0), program=pl.program_id(0), refs=refs)
        make_route(env, jnp.int32(0))

    shape = jax.ShapeDtypeStruct(route_shape(plan), jnp.int32)
    grid = (plan.programs,)
    return np.asarray(pl.pallas_call(kernel, grid=grid, out_shape=shape, interpret=True)())


PLANS = {
    "1B on an H200": lambda: make_stream_plan(preset_dims("llama3.2-1b", 1), H200),
    "8B on an H200": lambda: make_stream_plan(preset_dims("llama3.1-8b", 1), H200),
    "8B on an H200, 2 sequences": lambda: make_stream_plan(preset_dims("llama3.1-8b", 2), H200),
    "3B, tiles of 8 KiB": lambda: make_stream_plan(
        preset_dims("llama3.2-3b", 1), H200, Tuning(tile_bytes=8192)
    ),
    "attention wider than the model": lambda: make_stream_plan(
        preset_dims("qwen3-0.6b", 1), H200, Tuning(tile_bytes=16384)
    ),
    "odd sizes, 7 programs": lambda: make_stream_plan(
        dims_of(small_config(ffw_dim=2320), 3, 64), machine(7)
    ),
    "a group of the down projection in 4 tiles": lambda: make_stream_plan(
        dims_of(small_config(ffw_dim=2064), 1, 64), machine(4)
    ),
    "odd sizes, 1 program": lambda: make_stream_plan(dims_of(small_config(), 1, 64), INTERPRETER),
    "the shipped model": lambda: make_stream_plan(preset_dims("python-bytes-3m", 1), H200),
}


def rows_of(plan: StreamPlan, segment: Segment, program: int, tile: int) -> np.ndarray:
    """The matrix's rows whose products are taken to be those of a tile's rows."""
    d, part = plan.dims, plan.segments[segment]
    row = np.arange(part.rows)
    team = program // part.splits
    half, turn = part.rows // 2, tile * part.teams + team
    if segment == Segment.QKV:
        head, pair = divmod(turn * half + row % half, d.head_dim // 2)
        return head * d.head_dim + pair + row // half * (d.head_dim // 2)
    if segment == Segment.GATE_UP:
        return turn * half + row % half + row // half * d.ffw_dim
    if segment == Segment.DOWN and part.splits == 1:
        # A group of the residual has the rows of some tiles.
        group = tile // part.run * plan.programs + program
        return group * plan.rows + tile % part.run * part.rows + row
    return turn * part.rows + row


@pytest.mark.parametrize("name", PLANS)
def test_every_weight_is_read_once(name):
    plan = PLANS[name]()
    route = route_of(plan)
    assert not route[:, 0, 5].any()
    first = 1
    for segment, part in plan.segments.items():
        matrix_rows = 2 * part.out if segment == Segment.GATE_UP else part.out
        seen = []  # where copies begin and end in the matrix, in elements
        for program, tile in itertools.product(range(plan.programs), range(part.tiles)):
            low, which, layer_stride, stride, size, count, pitch, _ = route[
                program, first + tile
            ].tolist()
            if not count:
                continue
            copies = np.arange(count)
            start = (low + copies * stride) * PIECE
            length = size // 2
            layers = segment != Segment.HEAD
            assert (which, layer_stride) == (segment, layers * matrix_rows * part.inner // PIECE)
            # Bulk copies are of 16 bytes, and lie in the slot.
            assert size % 16 == pitch % 16 == 0
            assert (count - 1) * pitch + size <= plan.slot_bytes
            # They lie where the tile's rows are looked for.
            width = min(part.width, part.inner - program % part.splits * part.width)
            slot_row, there = pitch * copies // (2 * part.width), length // width
            assert (slot_row * 2 * part.width == pitch * copies).all()
            wanted = rows_of(plan, segment, program, tile)[slot_row[:, None] + np.arange(there)]
            row, column = np.divmod(start, part.inner)
            assert (wanted == row[:, None] + np.arange(there)).all()
            assert (column == program % part.splits * part.width).all()
            seen += zip(start.tolist(), (start + length).tolist(), strict=True)
        first += part.tiles
        starts, ends = np.sort(np.array(seen), axis=0).T
        assert starts[0] == 0
        assert (starts[1:] == ends[:-1]).all(), segment
        assert ends[-1] == matrix_rows * part.inner
        assert part.splits * part.width >= part.inner > (part.splits - 1) * part.width
        assert part.width <= plan.span(segment)
    assert first == route.shape[1]


@pytest.mark.parametrize("name", ["1B on an H200", "odd sizes, 7 programs"])
def test_the_stream_passes_every_tile_in_order(name):
    plan = PLANS[name]()
    order = [(Segment.EMBED, 0, 0)]
    for layer in range(plan.dims.num_layers):
        for segment in LAYER_SEGMENTS:
            order += [(segment, layer, j) for j in range(plan.segments[segment].tiles)]
    order += [
        (Segment.HEAD, plan.dims.num_layers, j) for j in range(plan.segments[Segment.HEAD].tiles)
    ]
    env = env_of(plan, plan.programs - 1)
    place, got, last = first_place(env, Segment.EMBED, 0), [], []
    ahead = jax.jit(next_place)
    over = jax.jit(lambda place: next_segment(env, place))
    for _ in order:
        got.append(tuple(int(x) for x in place[:3]))
        last.append(bool(place.last))
        place = over(place) if last[-1] else ahead(place)
    assert got == order
    changes = [a[:2] != b[:2] for a, b in itertools.pairwise(order)] + [True]
    assert last == changes
    starts = [plan.first_tile(segment, layer) for segment, layer, number in order if number == 0]
    assert starts == [i for i, (_, _, number) in enumerate(order) if number == 0]


def test_a_ring_that_does_not_fit_is_refused():
    """99 KiB of shared memory hold two tiles of 8 KiB beside the rest, not two of 32."""
    small, dims = Gpu.named("RTX PRO 6000", "12.0", 188), preset_dims("llama3.2-1b", 1)
    reason = why_not_on(small, dims)
    assert reason is not None
    assert "two tiles of 32768 bytes do not fit" in reason
    assert "Take a tuning with smaller tiles" in reason
    plan = make_stream_plan(dims, small)
    nothing: Any = jax.ShapeDtypeStruct((), jnp.int32)  # it is refused before it is looked at
    state = StepState(nothing, nothing, nothing, nothing)
    with pytest.raises(ValueError, match=re.escape(reason)):
        run_stream(lambda env: None, plan, dims.abstract_weights(), state, nothing)
    assert why_not_on(small, dims, Tuning(tile_bytes=8192)) is None
    assert why_not_on(H200, dims) is None


def test_all_programs_end_a_segment_at_about_the_same_time():
    for name in ("llama3.2-1b", "llama3.2-3b", "llama3.1-8b"):
        plan = make_stream_plan(preset_dims(name, 1), H200)
        dealt = plan.total_tiles - 1
        needed = sum(p.groups / p.teams * plan.dims.num_layers for p in plan.segments.values())
        needed -= (plan.dims.num_layers - 1) * (
            plan.segments[Segment.HEAD].groups / plan.segments[Segment.HEAD].teams
        )
        assert dealt < 1.04 * needed, name


@pytest.mark.parametrize("tile_bytes", [8192, 16384, 32768, 65536])
@pytest.mark.parametrize("name", PRESETS)
def test_the_ring_fits_shared_memory(name, tile_bytes):
    for batch, warps in itertools.product((1, 2, 8), (None, 8)):
        tuning = Tuning(tile_bytes=tile_bytes, num_warps=warps)
        plan = make_stream_plan(preset_dims(name, batch), H200, tuning)
        assert plan.slots >= 2
        assert plan.slot_bytes % 16 == 0
        # The compiler takes the ring's stand-in, and uses the beginning of it for other things.
        taken = (plan.num_stages - 1) * RESERVED_TILE
        assert taken <= H200.shared_memory
        size = SharedLayout.of(plan).size
        assert plan.slots * plan.slot_bytes + plan.tail_bytes < size
        fits = size + COMPILER_BYTES <= taken
        assert fits or (tile_bytes == 65536 and plan.why_no_room), (plan.slots, plan.slot_bytes)
        for segment, part in plan.segments.items():
            # All threads read a whole span of every row.
            read = 2 * ((part.rows - 1) * part.width + plan.span(segment))
            assert read <= plan.slot_bytes + plan.tail_bytes
            assert part.rows == 2 or 2 * part.rows * plan.span(segment) <= tile_bytes


def test_tiles_in_flight_fill_the_shared_memory():
    for batch in (1, 2, 8):
        for name in ("llama3.2-1b", "llama3.1-8b"):
            plan = make_stream_plan(preset_dims(name, batch), H200)
            # By Little's law 4.4 TB/s at a latency of 1.5 µs are 50 KB on each of 132 cores.
            assert plan.slots * plan.slot_bytes > 90_000
            assert plan.in_flight * plan.slot_bytes > 30_000
            fewer = make_stream_plan(preset_dims(name, batch), H200, Tuning(slots=2))
            assert fewer.slots == 2
            more = make_stream_plan(preset_dims(name, batch), H200, Tuning(slots=99))
            assert more.slots == plan.slots


def test_a_single_sequence_is_cut_into_chunks():
    for batch, padded, chunked in ((1, 1, True), (2, 8, False), (8, 8, False)):
        plan = make_stream_plan(preset_dims("llama3.2-1b", batch), H200)
        assert (plan.padded_batch, plan.chunked) == (padded, chunked)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile_bytes": 4096}, "tile_bytes is one of 8192, 16384, 32768, 65536; got 4096"),
        ({"num_warps": 5}, "num_warps is one of None, 4, 8; got 5"),
        ({"in_flight": 0}, "in_flight is one of 1, 2, .*, 16; got 0"),
        ({"l2_tiles": 17}, "l2_tiles is one of 0, 1, .*; got 17"),
        ({"slots": 1}, "slots is at least 2, got 1"),
    ],
)
def test_a_tunable_out_of_range_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Tuning(**options)


@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_gpus_without_bulk_copies_are_refused(capability):
    gpu = Gpu.named("older", capability, 108)
    with pytest.raises(ValueError, match=f"capability 9.0 and newer; this GPU has {capability}"):
        make_stream_plan(preset_dims("llama3.2-1b", 1), gpu)


def test_a_model_too_wide_for_its_batch_is_refused():
    dims = dataclasses.replace(preset_dims("llama3.1-8b", 8), model_dim=8208)
    assert why_not(dataclasses.replace(dims, batch=1), 132) is None
    assert why_not(dataclasses.replace(dims, model_dim=8192), 132) is None
    reason = why_not(dims, 132)
    assert reason is not None
    assert "at most 8192 activations of each of 8 sequences in place; this model has 8208" in reason
    with pytest.raises(ValueError, match="at most 8192 activations"):
        make_stream_plan(dims, H200)


def test_inputs_in_more_parts_than_programs_are_refused():
    dims = preset_dims("llama3.1-8b", 1)
    assert why_not(dims, 2) is None
    with pytest.raises(ValueError, match=r"14336 hidden activations among 2 programs; .* has 1"):
        make_stream_plan(dims, machine(1))


def test_rows_that_bulk_copies_cannot_begin_at_are_refused():
    dims = dataclasses.replace(preset_dims("llama3.2-1b", 1), ffw_dim=8188)
    with pytest.raises(ValueError, match=r"rows of weights of whole 8 elements; .* rows of 8188"):
        make_stream_plan(dims, H200)


def test_a_cache_made_for_a_smaller_batch_is_refused():
    config = small_config()
    model, cache = random_model(config), filled_cache(config, [1, 2], 16)
    small = KVCache.create(config, 1, 16).counters
    weights, state = kernel_inputs(model, dataclasses.replace(cache, counters=small))
    plan = make_stream_plan(dims_of(config, 2, 16), INTERPRETER)
    with pytest.raises(ValueError, match=r"hands over activations in .* words; the cache has"):
        stream_step(plan, weights, state, random_tokens(config, 2), interpret=True)


def test_a_grid_that_does_not_fit_the_device_is_refused():
    config = small_config()
    weights, state = kernel_inputs(random_model(config), filled_cache(config, [1], 16))
    plan = make_stream_plan(dims_of(config, 1, 16), machine(7))
    with pytest.raises(ValueError, match="this plan has 7, the device holds 6"):
        stream_step(dataclasses.replace(plan, resident=6), weights, state, jnp.zeros(1, jnp.int32))


# The mail


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_mail_has_room_for_every_plan(name, batch):
    """It is made with the cache, before anybody knows the device or the tuning."""
    dims = preset_dims(name, batch)
    planned = 0
    for cores in (1, 78, 108, 132, 160, 320):
        for tuning in (Tuning(), Tuning(tile_bytes=8192), Tuning(num_warps=8)):
            if why_not(dims, cores, tuning) is None:
                layout = layout_of(make_stream_plan(dims, machine(cores), tuning))
                assert layout.words <= mail_words(dims) - 2
                planned += 1
    assert planned


def test_more_programs_than_the_mail_has_places_are_refused():
    with pytest.raises(ValueError, match="at most 320 places; this GPU has 321 multiprocessors"):
        make_stream_plan(preset_dims("llama3.2-1b", 1), machine(321))


def test_buffers_of_the_mail_do_not_overlap():
    dims = preset_dims("llama3.1-8b", 8)
    plan = make_stream_plan(dims, H200)
    layout = dataclasses.astuple(layout_of(plan))
    assert sorted(layout) == list(layout)
    assert layout[-1] <= mail_words(dims) - 2
    at = layout_of(plan)
    assert at.x_mid - at.x_in >= 8 * 4096
    assert at.attn - at.qkv >= 8 * 6144
    assert at.parts - at.partial >= 2 * 8 * 4096 * plan.segments[Segment.DOWN].splits


def interpreted(body, *results: jax.ShapeDtypeStruct) -> list[np.ndarray]:
    """Runs `body(mail, *results)` as an interpreted kernel; the mail's words, and the results."""
    layout = layout_of(PLANS["odd sizes, 1 program"]())

    def kernel(words, *out):
        words[...] = jnp.zeros((64,), jnp.int32)
        body(Mail(words, layout, True, 128), *out)

    shapes = [jax.ShapeDtypeStruct((64,), jnp.int32), *results]
    return [np.asarray(x) for x in pl.pallas_call(kernel, out_shape=shapes, interpret=True)()]


def test_a_word_holds_24_bits_of_a_number_and_a_tag():
    values = np.array([0, -0.0, 1, -1.5, np.pi, 1e-30, 3e38, np.inf, -np.inf, np.nan], np.float32)
    # The NaN of all ones, which rounding up would carry into another number.
    values = np.append(values, np.array([0x7FFFFFFF], np.int32).view(np.float32))
    for tag in (1, 255, 256, 300):

        def body(mail, tag=tag):
            for i, value in enumerate(values):
                at = jnp.full((1,), i)
                number = jnp.full((1,), int(value.view(np.int32)), jnp.int32)
                number = jax.lax.bitcast_convert_type(number, jnp.float32)
                mail.publish(at, number, jnp.int32(tag), jnp.ones((1,), bool))

        [words] = interpreted(body)
        words = words[: len(values)]
        assert (words & 255 == tag & 255).all()
        got = (words & ~255).view(np.float32)
        np.testing.assert_allclose(got, values, rtol=2**-16)
        assert np.isnan(got).tolist() == np.isnan(values).tolist()


def test_interpreted_what_has_not_come_is_nan():
    def body(mail, words, pairs):
        offsets = jax.lax.iota(jnp.int32, 8)
        ones, half = jnp.ones((8,), jnp.float32), offsets < 4
        mail.publish(offsets, ones, jnp.int32(3), half)
        words[...] = mail.collect(offsets, jnp.int32(3), offsets != 7)
        mail.publish_pair(16 + 2 * offsets, ones, jnp.int32(3 + 256), half)
        [got] = mail.collect_pairs([(16 + 2 * offsets, offsets != 7)], jnp.int32(3))
        pairs[...] = jax.lax.bitcast_convert_type(got, jnp.float32)

    result = jax.ShapeDtypeStruct((8,), jnp.float32)
    _, words, pairs = interpreted(body, result, result)
    np.testing.assert_array_equal(words, [1, 1, 1, 1, np.nan, np.nan, np.nan, 0])
    # The tag of a pair has 32 bits: 259 is not 3.
    np.testing.assert_array_equal(pairs, [np.nan] * 7 + [0])


# The whole kernel, one program


@functools.lru_cache
def stream(plan: StreamPlan):
    run = functools.partial(stream_step, plan, interpret=True)
    return jax.jit(run, compiler_options=QUICK_COMPILE)


def streamed(model, cache: KVCache, tokens, tuning: Tuning | None = None):
    dims = dims_of(model.config, cache.batch, cache.capacity)
    plan = make_stream_plan(dims, INTERPRETER, tuning or Tuning())
    weights, state = kernel_inputs(model, cache)
    logits, token, state = stream(plan)(weights, state, tokens)
    return logits, token, KVCache(*state)


def check(config, got, want, lengths):
    logits, token, cache = got
    assert_close(logits, want.logits, "fused_vs_model")
    assert_close(newest(cache), newest(want.cache), "fused_vs_model")
    assert bits(untouched(cache)) == bits(untouched(want.cache))
    assert token.tolist() == np.argmax(logits, axis=-1).tolist()
    assert cache.lengths.tolist() == [n + 1 for n in lengths]


# One program has room for all inputs of the down projection in its registers.
ONE_PROGRAM = [name for name in CASES if name != "inputs wider than a tile"]


@pytest.mark.parametrize("name", ONE_PROGRAM)
def test_a_step_matches_the_model(name):
    config, capacity, all_lengths = CASES[name]
    model = random_model(config)
    lengths = all_lengths[0]
    cache = filled_cache(config, lengths, capacity)  # NaN where nobody may read
    tokens = random_tokens(config, len(lengths))
    got = streamed(model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)
    assert bits(streamed(model, cache, tokens)) == bits(got)


# A window of 40 positions; lengths at its edge, and where the query of a local layer sees
# less than the cache holds.
_WINDOW = [39, 40, 100]
FAMILIES = {
    "mistral": {"window": 40},
    "qwen2": {"qkv_bias": True, "num_heads": 4, "num_kv_heads": 2},
    "qwen3": {"qk_norm": "head", "num_heads": 4, "num_kv_heads": 2},
    "olmo2": {
        "qk_norm": "full",
        "pre_norm": False,
        "post_norm": True,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "granite": {
        "embed_scale": 3.0,
        "residual_scale": 0.6,
        "attn_scale": 0.6,
        "logit_scale": 0.125,
    },
    "gemma2": {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": "gelu_tanh",
        "attn_softcap": 2.0,
        "logit_softcap": 3.0,
        "window": 40,
        "window_pattern": (True, False),
        "embed_scale": 2.02,  # rounded to bfloat16
        "attn_scale": 0.6,
    },
    "gemma3": {
        "norm_offset": 1.0,
        "post_norm": True,
        "activation": "gelu_tanh",
        "qk_norm": "head",
        "window": 40,
        "window_pattern": (True, True, False),
        "num_layers": 3,
        "rope_theta_local": 100.0,
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_every_family_matches_the_model(name):
    config = small_config(**FAMILIES[name])
    model = random_model(config)
    cache, tokens = filled_cache(config, _WINDOW, 110), random_tokens(config, 3)
    got, want = streamed(model, cache, tokens), reference(model, cache, tokens)
    check(config, got, want, _WINDOW)
    # Another step reads what this one has stored.
    again, wanted = streamed(model, got[2], want.token), reference(model, want.cache, want.token)
    assert_close(again[0], wanted.logits, "fused_vs_model")
    assert_close(newest(again[2]), newest(wanted.cache), "fused_vs_model")


# Each field in one family: a field costs a compilation.
FIELDS = {
    "mistral": ("window",),
    "granite": ("embed_scale", "residual_scale", "attn_scale", "logit_scale"),
    "gemma2": ("norm_offset", "activation", "attn_softcap", "logit_softcap"),
    "gemma3": ("local_rope",),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_beyond_llama_matters(name):
    """Left at its default, a family's field moves the logits beyond the tolerance.

    Of the other fields the arrays depend: without them there is no step.
    """
    config = small_config(**FAMILIES[name])
    model = random_model(config)
    cache, tokens = filled_cache(config, _WINDOW, 110), random_tokens(config, 3)
    dims = dims_of(config, 3, 110)
    weights, state = kernel_inputs(model, cache)
    want, _, _ = streamed(model, cache, tokens)
    for field in FIELDS[name]:
        changes = {field: getattr(Features(), field)}
        if field == "window":
            changes["local_layers"] = ()
        features = dataclasses.replace(dims.features, **changes)
        plan = make_stream_plan(dataclasses.replace(dims, features=features), INTERPRETER)
        logits, _, _ = stream(plan)(weights, state, tokens)
        assert worst_error(logits, want) > TOLERANCES["fused_vs_model"].worst, field


def test_every_field_of_the_features_is_tried():
    names = {field.name for field in dataclasses.fields(Features)}
    arrays = {"pre_norm", "post_norm", "qk_norm", "qkv_bias", "local_layers"}
    assert {field for fields in FIELDS.values() for field in fields} | arrays == names


def test_layers_beyond_the_31st_know_whether_they_are_local():
    local = tuple(i % 3 == 0 or i > 60 for i in range(70))
    plan = PLANS["odd sizes, 1 program"]()
    features = Features(window=4, local_layers=local)
    plan = dataclasses.replace(plan, dims=dataclasses.replace(plan.dims, features=features))
    ask = jax.vmap(env_of(plan, 0).is_local)
    assert np.asarray(ask(jnp.arange(70))).tolist() == list(local)


def test_steps_in_a_row_match_the_model():
    """Each step's tags differ from those that the step before has left in the mail."""
    config = small_config(num_kv_heads=2)
    model = random_model(config)
    cache = filled_cache(config, [126, 0, 60], 135)
    want_cache, tokens = cache, random_tokens(config, 3)
    for step in range(4):
        logits, _, cache = streamed(model, cache, tokens)
        want = reference(model, want_cache, tokens)
        assert_close(logits, want.logits, "fused_vs_model")
        want_cache, tokens = want.cache, want.token
        check_tags(model, cache, step + 1)


def check_tags(model, cache: KVCache, steps: int) -> None:
    """After so many steps every word has the tag of its last hand-over: none is a step old."""
    dims = dims_of(model.config, cache.batch, cache.capacity)
    at, words = layout_of(make_stream_plan(dims, INTERPRETER)), np.asarray(cache.counters)
    assert words[at.steps] == steps
    tag_of_head = steps * (dims.num_layers + 1)
    for start, width, tag in (
        (at.x_in, dims.model_dim, tag_of_head),
        (at.x_mid, dims.model_dim, tag_of_head - 1),
        (at.qkv, dims.qkv_dim, tag_of_head - 1),
        (at.attn, dims.attn_dim, tag_of_head - 1),
        (at.ffw, dims.ffw_dim, tag_of_head - 1),
    ):
        assert (words[start : start + dims.batch * width] & 255 == tag & 255).all()


def layout_start(model, cache: KVCache) -> int:
    dims = dims_of(model.config, cache.batch, cache.capacity)
    return layout_of(make_stream_plan(dims, INTERPRETER)).steps


def test_tags_go_round():
    """After 2^31 and more hand-overs the count wraps, and the words' 8 bits long before."""
    config = small_config()
    model = random_model(config)
    fresh = filled_cache(config, [5], 16)
    tokens = random_tokens(config, 1)
    want = streamed(model, fresh, tokens)
    at = layout_start(model, fresh)
    for steps in (84, 85, 2**31 // 3, 2**31 - 1):
        cache = dataclasses.replace(fresh, counters=fresh.counters.at[at].set(steps))
        got = streamed(model, cache, tokens)
        assert bits(got[0]) == bits(want[0]), steps
        assert int(got[2].counters[at]) == np.int64(steps + 1).astype(np.int32)


# Interpreted, there is no ring: what is left of a tuning is how tiles are cut.
TUNINGS = {
    "small, warps that only feed": (Tuning(tile_bytes=8192, num_warps=8), [65]),
    "small, batch of 3": (Tuning(tile_bytes=8192, num_warps=8), [65, 3, 70]),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tile_shape_gives_the_same(name):
    tuning, lengths = TUNINGS[name]
    config = small_config(num_heads=4, num_kv_heads=2)
    model = random_model(config)
    cache, tokens = filled_cache(config, lengths, 80), random_tokens(config, len(lengths))
    want = streamed(model, cache, tokens)
    got = streamed(model, cache, tokens, tuning)
    assert_close(got[0], want[0], "fused_vs_fused")
    assert_close(newest(got[2]), newest(want[2]), "fused_vs_fused")


def test_a_full_cache_gives_nan_and_keeps_what_it_holds():
    config = small_config()
    model = random_model(config)
    cache, tokens = filled_cache(config, [66, 70, 70], 70), random_tokens(config, 3)
    before = [np.asarray(cache.k), np.asarray(cache.v)]
    lengths = cache.lengths.at[2].set(71)
    logits, token, after = streamed(model, dataclasses.replace(cache, lengths=lengths), tokens)
    want = reference(model, dataclasses.replace(cache, lengths=lengths), tokens)
    assert np.isnan(logits).all(axis=1).tolist() == [False, True, True]
    assert token.tolist()[1:] == want.token.tolist()[1:]
    assert after.lengths.tolist() == [67, 71, 72]
    for new, old in zip((after.k, after.v), before, strict=True):
        assert bits(new[:, 1:]) == bits(old[:, 1:])


def test_sequences_of_a_batch_do_not_see_each_other():
    config = small_config()
    model = random_model(config)
    cache, tokens = filled_cache(config, [127, 0, 66], 130), random_tokens(config, 3)
    logits, _, after = streamed(model, cache, tokens)
    order = np.array([2, 0, 1])
    shuffled = KVCache(cache.k[:, order], cache.v[:, order], cache.lengths[order], cache.counters)
    got, _, got_after = streamed(model, shuffled, tokens[order])
    assert bits(got) == bits(logits[order])
    assert bits([got_after.k, got_after.v]) == bits([after.k[:, order], after.v[:, order]])


def test_tokens_outside_the_vocabulary_are_clamped():
    config = small_config()
    model, cache = random_model(config), filled_cache(config, [5, 5, 5], 16)
    last = config.vocab_size - 1
    wild, tame = jnp.array([-1, last + 1, 2**31 - 1]), jnp.array([0, last, last])
    assert bits(streamed(model, cache, wild.astype(jnp.int32))[0]) == bits(
        streamed(model, cache, tame.astype(jnp.int32))[0]
    )


def test_of_equal_logits_the_lowest_token_wins():
    config = small_config()
    model, cache = random_model(config), filled_cache(config, [5, 3], 16)
    tokens = random_tokens(config, 2)
    _, best, _ = streamed(model, cache, tokens)
    head = model.head_weight.at[jnp.array([2, 99])].set(model.head_weight[best])
    # Each best row once more, before and behind it.
    weights, state = kernel_inputs(model, cache)
    head = head.at[jnp.array([100, 1])].set(model.head_weight[best])
    plan = make_stream_plan(dims_of(config, 2, 16), INTERPRETER)
    for rows, want in ((head, [2, 1]), (jnp.ones_like(head), [0, 0])):
        logits, token, _ = stream(plan)(weights._replace(head=rows), state, tokens)
        assert token.tolist() == np.argmax(logits, axis=-1).tolist() == want


# Several programs, stage by stage


def run_stages(plan: StreamPlan, model, cache: KVCache, tokens):
    """A step of several programs: one launch a stage, so that nobody has to wait."""
    weights, state = kernel_inputs(model, cache)
    carried = {name: jnp.zeros(x.shape, x.dtype) for name, x in state_shapes(plan).items()}
    for name in ("residual_first", "residual_second"):
        carried[name] = jnp.full_like(carried[name], jnp.nan)
    carried["best_logit"] = jnp.full_like(carried["best_logit"], -jnp.inf)
    carried["best_token"] = jnp.full(carried["best_logit"].shape, 2**31 - 1, jnp.int32)
    carried["logits"] = jnp.full((cache.batch, model.config.vocab_size), jnp.nan, jnp.float32)
    carried["token"] = jnp.full((cache.batch,), -1, jnp.int32)
    for stage in stages_of(plan):
        body = functools.partial(run_stage, stage)
        run = functools.partial(run_stream, body, plan, interpret=True)
        out = jax.jit(run, compiler_options=QUICK_COMPILE)(weights, state, tokens, updated=carried)
        state = StepState(*(out[name] for name in StepState._fields))
        carried = {name: out[name] for name in carried}
    return carried["logits"], carried["token"], KVCache(*state)


def test_inputs_wider_than_a_program_are_split():
    config, capacity, [lengths] = CASES["inputs wider than a tile"]
    model = random_model(config)
    cache, tokens = filled_cache(config, lengths, capacity), random_tokens(config, 2)
    plan = make_stream_plan(dims_of(config, 2, capacity), machine(2))
    assert plan.product_warps == 8
    assert plan.segments[Segment.DOWN].splits == 2
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)


# Of each batch size: how wide the hidden activations are, so that they come in two parts; the
# down projection's tiles of a group of the residual.
SPLIT = {1: (8208, 8), 2: (656, 1)}


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("gemma3", 2)])
def test_programs_hand_over_all_that_others_need(family, batch):
    """Inputs of the down projection in parts, heads in parts, more programs than some groups.

    A word that is read and was not written would be NaN, in this step or, if it was written
    in the first alone, in the next.
    """
    fields = FAMILIES.get(family, {})
    if "window" in fields:
        fields = fields | {"window": 150, "window_pattern": (True,)}
    ffw_dim, tiles = SPLIT[batch]
    config = small_config(**fields | {"num_layers": 1, "ffw_dim": ffw_dim})
    model = random_model(config)
    lengths = [300, 2][:batch]
    cache, tokens = filled_cache(config, lengths, 310), random_tokens(config, batch)
    plan = make_stream_plan(dims_of(config, batch, 310), machine(19))
    short = dataclasses.replace(plan.attention, min_span=64, max_splits=4)
    plan = dataclasses.replace(plan, attention=short)
    down, attn_out = plan.segments[Segment.DOWN], plan.segments[Segment.ATTN_OUT]
    assert down.splits == 2
    assert down.teams == 9  # the 19th program has no team
    assert down.rows * tiles == plan.rows
    assert attn_out.groups * plan.rows == 144
    assert attn_out.groups < 19
    got = run_stages(plan, model, cache, tokens)
    check(config, got, reference(model, cache, tokens), lengths)


@pytest.mark.parametrize("programs", [1, 4])
def test_a_group_of_the_residual_has_several_tiles_of_the_down_projection(programs):
    """All of a group's tiles are one program's, and summed up at once."""
    config = small_config(num_layers=1, ffw_dim=2064)
    model = random_model(config)
    cache, tokens = filled_cache(config, [9], 16), random_tokens(config, 1)
    plan = make_stream_plan(dims_of(config, 1, 16), machine(programs))
    down = plan.segments[Segment.DOWN]
    assert (down.splits, down.run, plan.rows) == (1, 4, 16)
    got = (streamed if programs == 1 else functools.partial(run_stages, plan))(model, cache, tokens)
    check(config, got, reference(model, cache, tokens), [9])
