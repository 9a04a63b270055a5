"""The fused kernel's plan, and its exchange."""

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
    dims_of,
    filled_cache,
    kernel_inputs,
    random_model,
    random_tokens,
    small_config,
)
from jax.experimental import pallas as pl
from stream_cases import (
    BFLOAT16,
    H200,
    INT4,
    INT8,
    PLANS,
    env_of,
    in_groups,
    machine,
    preset_dims,
)

from ffjax.cache import KVCache
from ffjax.config import PRESETS
from pallas_kernels.dims import Features, WeightBits
from pallas_kernels.gpu import INTERPRETER, Gpu
from pallas_kernels.launch import StepState, named_weights
from pallas_kernels.stream import feeding, ptx
from pallas_kernels.stream.activations import copy_of_hidden
from pallas_kernels.stream.descriptors import descriptors_shape, make_descriptors
from pallas_kernels.stream.exchange import Exchange
from pallas_kernels.stream.exchange_layout import MAP_WORDS, exchange_words
from pallas_kernels.stream.exchange_order import LOAD, word_in_exchange
from pallas_kernels.stream.fragment_layout import column_of, distances, first_input, next_input
from pallas_kernels.stream.kernel import leaves_time, tiles_ahead
from pallas_kernels.stream.kv_splits import part_of, share_of
from pallas_kernels.stream.launch import layout_of, run_stream, stream_step
from pallas_kernels.stream.layout import ALIGNMENT, SharedLayout
from pallas_kernels.stream.plan import (
    BOX_UNIT,
    LAYER_SEGMENTS,
    PIECE,
    RESERVED_TILE,
    Segment,
    StreamPlan,
    is_paired,
)
from pallas_kernels.stream.planner import (
    fitting,
    make_stream_plan,
    why_not,
    why_not_on,
)
from pallas_kernels.stream.product import pieces_of_tile
from pallas_kernels.stream.ring import tensor_map_of
from pallas_kernels.stream.tiles import first_place, next_place, next_segment
from pallas_kernels.stream.tuning import Tuning
from pallas_kernels.targets import target, target_names

pytestmark = [
    pytest.mark.once("Plans are whole numbers, in plain Python."),
    pytest.mark.filterwarnings("error"),
]


# Who holds what


@pytest.mark.parametrize(("bits", "size"), [(16, 0), (8, 0), (8, 32), (4, 0), (4, 32), (4, 64)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-8b", "gemma2-2b", "qwen2.5-1.5b"])
def test_every_input_is_waited_for_where_it_was_put(name, batch, bits, size):
    all_bits = WeightBits(qkv=bits, attn_out=bits, gate_up=bits, down=bits, head=bits)
    sizes = preset_dims(name, batch, all_bits)
    plan = make_stream_plan(in_groups(sizes, size) if size else sizes, H200)
    at, per_word = layout_of(plan), 2 if plan.half2 else 1
    assert plan.half2 == (batch > 1)
    rooms = {
        Segment.QKV: at.x_head - at.x_in,
        Segment.HEAD: at.x_mid - at.x_head,
        Segment.DOWN: at.ffw_copy - at.ffw,
    }
    for segment, room in rooms.items():
        part = plan.segments[segment]
        sequences, inputs = np.arange(batch)[:, None], np.arange(part.inner)
        put = np.asarray(word_in_exchange(plan, part, sequences, inputs)).reshape(batch, -1)
        # A word has neighbours of one sequence, and nothing else.
        words = put[:, ::per_word]
        assert (put[:, per_word - 1 :: per_word] == words).all()
        assert len(set(words.ravel())) == words.size
        assert words.max() < room
        first = np.asarray(first_input(plan, part))
        apart = distances(plan, part)
        # Of one sequence each thread has inputs of its own, of several those of a column.
        seen = first[:, None, None] + np.array(apart)[:, None] + np.arange(PIECE)
        mine = slice(None) if plan.chunked else column_of(plan) == 0
        assert sorted(seen[mine].ravel()) == list(range(plan.span(segment)))
        # Pieces lie where their threads look for them: in loads of 4 words, and those of a warp's
        # threads side by side.
        sequence = np.zeros_like(first) if plan.chunked else np.asarray(column_of(plan))
        word = np.arange(PIECE) // per_word
        within = word // LOAD * 32 * LOAD + word % LOAD
        for before in range(0, part.inner, part.width):
            place = np.asarray(word_in_exchange(plan, part, sequence, before + first))[:, None]
            place = place + [word_in_exchange(plan, part, 0, x) for x in apart]
            there = before + seen[..., -1] < min(before + part.width, part.inner)
            owner = np.broadcast_to(sequence[:, None], there.shape)[there]
            wanted = put[owner[:, None], before + seen[there]]
            assert (wanted == place[there][:, None] + within).all()
            loads = np.sort(place.reshape(-1, 32, len(apart)), axis=1)
            assert (loads - loads[:, :1] == LOAD * np.arange(32)[:, None]).all()
            assert (loads[:, 0] % (32 * LOAD) == 0).all()


@pytest.mark.parametrize(
    ("batch", "bits", "warps", "begins"),
    [
        (1, 16, 4, lambda w, q, t: 512 * w + 256 * q + 8 * t),
        (8, 16, 8, lambda w, q, t: 256 * w + 32 * q + 8 * (t % 4)),
        (1, 4, 4, lambda w, q, t: 512 * w + 128 * (t // 8) + 16 * (t // 4 % 2) + 32 * (t % 4)),
    ],
)
def test_the_examples_of_the_fragment_layout_are_right(batch, bits, warps, begins):
    every = WeightBits(qkv=bits, attn_out=bits, gate_up=bits, down=bits)
    plan = make_stream_plan(preset_dims("llama3.2-1b", batch, every), H200)
    part, threads = plan.segments[Segment.QKV], np.arange(plan.threads)
    assert (plan.num_warps, part.reads * plan.line(part) * part.grain * warps) == (warps, 2048)
    first = np.asarray(first_input(plan, part))
    for q in range(part.reads):
        start = first + distances(plan, part)[q * (part.held // PIECE)]
        assert (start == begins(threads // 32, q, threads % 32)).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_beyond_a_tile_is_multiplied_where_it_may_be_no_number(batch):
    """Of the last part of a split row too, which is shorter than the others."""
    bits = WeightBits(qkv=4, attn_out=4, gate_up=8, down=16, head=4)
    config = small_config(model_dim=1152, ffw_dim=17408, num_heads=12, num_kv_heads=3, head_dim=128)
    plan = make_stream_plan(dataclasses.replace(dims_of(config, batch, 64), weight_bits=bits), H200)
    part = plan.segments[Segment.DOWN]
    assert part.splits > 1
    assert part.inner % part.width
    for split in range(part.splits):
        env = env_of(plan, split)
        place = first_place(env, Segment.DOWN, 0)
        assert int(place.split) == split
        there = np.asarray(pieces_of_tile(env, place, [Segment.DOWN]))
        width = min(part.width, part.inner - split * part.width)
        first, step = np.asarray(first_input(plan, part)), next_input(plan, part)
        within = first[:, None] + step * np.arange(part.reads) < width
        if not plan.chunked:  # every column has the same inputs
            assert (there.reshape(-1, 8, 4) == there.reshape(-1, 8, 4)[:, :1]).all()
        np.testing.assert_array_equal(there, within.sum(axis=1))


# Who computes what


@functools.cache
def descriptors_of(plan: StreamPlan) -> np.ndarray:
    """Copy descriptors of every program, of weights that need not exist: `[P, rows, words]`."""
    specs = named_weights(plan.dims.abstract_weights())

    def kernel(ref):
        refs = {**specs, "descriptors": ref}
        env = dataclasses.replace(env_of(plan, 0), program=pl.program_id(0), refs=refs)
        make_descriptors(env, jnp.int32(0))

    shape = jax.ShapeDtypeStruct(descriptors_shape(plan), jnp.int32)
    grid = (plan.programs,)
    return np.asarray(pl.pallas_call(kernel, grid=grid, out_shape=shape, interpret=True)())


def words_of(plan: StreamPlan, segment: Segment, tile: int) -> np.ndarray:
    """What every program's descriptor of a tile says, `[P, words]`; of the head as if every tile
    had a row of its own."""
    order = sorted(plan.segments)
    first = 1 + sum(plan.segments[s].tiles for s in order[: order.index(segment)])
    descriptors = descriptors_of(plan)
    if segment != Segment.HEAD:
        return descriptors[:, first + tile].astype(np.int64)
    last = plan.segments[segment].tiles - 1
    words = descriptors[:, first + (tile == last)].astype(np.int64)
    for at in range(0, words.shape[1], 8):  # of weights, and of scales
        words[:, at] += (plan.dims.num_layers + tile) * words[:, at + 2]
    return words


def rows_of(plan: StreamPlan, segment: Segment, program: np.ndarray, tile: int) -> np.ndarray:
    """The matrix's rows whose products are taken to be those of a tile's rows, `[programs, R]`."""
    d, part = plan.dims, plan.segments[segment]
    program, row = program[:, None], np.arange(part.rows)
    team = program // part.splits
    half, turn = part.rows // 2, tile * part.teams + team
    if segment == Segment.QKV:
        head, pair = np.divmod(turn * half + row % half, d.head_dim // 2)
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
    descriptors = descriptors_of(plan)
    assert not descriptors[:, 0, 5].any()
    for segment, part in plan.segments.items():
        matrix_rows = 2 * part.out if segment == Segment.GATE_UP else part.out
        apart = part.teams * part.rows if segment == Segment.HEAD else matrix_rows
        seen = []  # where copies begin and end in the matrix, in elements
        for tile in range(part.tiles):
            words = words_of(plan, segment, tile)[:, :8]
            program = np.flatnonzero(words[:, 5])  # of those that have something of it
            low, which, layer_stride, stride, size, count, pitch, box = words[program].T
            copies = np.arange(count.max(initial=0))
            are = copies < count[:, None]  # [programs, copies]
            start = (low[:, None] + copies * stride[:, None]) * part.grain
            length = 8 * size // part.bits
            assert (which == segment).all()
            assert (layer_stride == apart * part.inner // part.grain).all()
            # Bulk copies are of 16 bytes, and lie in the slot.
            assert not (size % 16).any() and not (pitch % 16).any()
            assert ((count - 1) * pitch + size <= plan.slot_bytes).all()
            # They lie where the tile's rows are looked for.
            split = program % part.splits * part.width
            width = np.minimum(part.width, part.inner - split)
            places = (pitch - part.gap)[:, None] * copies
            slot_row, there = places // part.row_bytes, length // width
            assert (slot_row * part.row_bytes == places)[are].all()
            assert part.gap == 0 or (slot_row == copies * (part.rows // 2))[are].all()
            row, column = np.divmod(start, part.inner)
            further = np.arange(there.max(initial=0))
            of_copy = are[:, :, None] & (further < there[:, None, None])
            held = slot_row[:, :, None] + further
            assert (held < part.rows)[of_copy].all()
            rows = rows_of(plan, segment, program, tile)
            wanted = rows[np.arange(len(program))[:, None, None], held.clip(max=part.rows - 1)]
            assert (wanted == row[:, :, None] + further)[of_copy].all()
            assert (column == split[:, None])[are].all()
            seen.append(np.stack([start, start + length[:, None]], axis=-1)[are])
            # The same as a box.
            if segment != Segment.DOWN or plan.box is None:
                assert not box.any()
                continue
            assert (size == pitch).all()
            assert (size == BOX_UNIT * plan.box.units * plan.box.pieces).all()
            assert (count == part.rows).all()
            piece, rest = np.divmod(column[:, 0] * part.bits // 8, BOX_UNIT * plan.box.units)
            assert (box == (-(1 << 31) | piece << 16 | row[:, 0])).all() and not rest.any()
            tensor = tensor_map_of(plan, plan.box)
            assert BOX_UNIT * plan.box.units * tensor.pieces == part.inner * part.bits // 8
            assert feeding.feed_of(plan).matrix_rows == matrix_rows
        starts, ends = np.sort(np.concatenate(seen), axis=0).T
        assert starts[0] == 0
        assert (starts[1:] == ends[:-1]).all(), segment
        assert ends[-1] == matrix_rows * part.inner
        assert part.splits * part.width >= part.inner > (part.splits - 1) * part.width
        assert part.width <= plan.span(segment)
    assert descriptors.shape[1] == 1 + plan.layer_tiles + 2


QUANTIZED = [name for name, plan in PLANS.items() if plan().quantized]


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_scales_of_every_row_come_with_it(name):
    plan = PLANS[name]()
    unit = plan.scale_unit
    for segment, part in plan.segments.items():
        matrix_rows = 2 * part.out if segment == Segment.GATE_UP else part.out
        apart = part.teams * part.rows if segment == Segment.HEAD else matrix_rows
        seen, bytes_of_row = [], part.scale_bytes
        for tile in range(part.tiles):
            words = words_of(plan, segment, tile)
            program = np.flatnonzero(words[:, 5])
            if part.bits == 16 or not program.size:
                assert not words[:, 13].any()
                continue
            assert not np.delete(words, program, axis=0)[:, 13].any()
            low, which, layer_stride, stride, size, count, place, pitch = words[program, 8:].T
            assert (which == segment).all()
            assert (layer_stride == apart * bytes_of_row // unit).all()
            # Copies are of whole units, begin at such, and lie in the slot behind the weights.
            assert not np.any([size % unit, place % unit, pitch % unit])
            assert (place >= part.weight_bytes).all()
            assert (place + (count - 1) * pitch + size <= plan.slot_bytes).all()
            # Which byte of the scales lies in each of the slot that is no weight's.
            held = np.full((len(program), plan.slot_bytes - part.weight_bytes), -1)
            byte = np.arange(size.max())
            for copy in range(count.max()):
                are = copy < count
                start = unit * (low + copy * stride)
                end = unit * -(-matrix_rows * bytes_of_row // unit)
                assert (start + size <= end)[are].all()
                copied = are[:, None] & (byte < size[:, None])
                there = (place - part.weight_bytes + copy * pitch)[:, None] + byte
                held[np.nonzero(copied)[0], there[copied]] = (start[:, None] + byte)[copied]
            # They lie where those of the tile's rows are looked for.
            rows = rows_of(plan, segment, program, tile)
            there = rows < matrix_rows
            before = tile % part.run * part.rows if part.scaled_rows > part.rows else 0
            behind = place - part.weight_bytes + before * bytes_of_row
            size_of_all = part.rows * bytes_of_row + part.scale_gap
            found = np.take_along_axis(held, behind[:, None] + np.arange(size_of_all), axis=1)
            if part.scale_gap:
                half = part.rows // 2 * bytes_of_row
                found = np.delete(found, np.arange(half, half + part.scale_gap), axis=1)
            found = found.reshape(len(program), part.rows, bytes_of_row)
            wanted = rows[..., None] * bytes_of_row + np.arange(bytes_of_row)
            np.testing.assert_array_equal(found[there], wanted[there])
            seen += rows[there].tolist()
        if part.bits != 16:
            # Where inputs are split, each part has the scales of whole rows.
            assert sorted(seen) == np.repeat(np.arange(matrix_rows), part.splits).tolist()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_box_lies_in_its_matrix_and_comes_to_a_whole_line(name):
    plan = PLANS[name]()
    if (box := plan.box) is None:
        return
    part, tensor = plan.segments[Segment.DOWN], tensor_map_of(plan, box)
    units, pieces, rows = tensor.box
    assert units * BOX_UNIT % 16 == 0
    assert max(tensor.box) <= 256
    assert rows == part.rows
    assert units * pieces * BOX_UNIT == part.row_bytes
    # Tiles are whole boxes of it.
    assert units * tensor.pieces * BOX_UNIT == part.inner * part.bits // 8
    assert tensor.pieces == part.splits * pieces
    assert tensor.rows == plan.dims.num_layers * part.out
    assert tensor.thread == plan.threads - 32
    assert plan.slot_bytes % ALIGNMENT == 0
    layout = layout_of(plan)
    assert 4 * layout.maps % ptx.MAP_BYTES == 0
    assert layout.maps + plan.programs * MAP_WORDS <= layout.words
    assert 4 * MAP_WORDS == ptx.MAP_BYTES


def test_a_single_sequence_has_no_boxes():
    plan = make_stream_plan(preset_dims("llama3.1-8b", 1, WeightBits(gate_up=8)), H200)
    assert plan.quantized
    assert plan.segments[Segment.DOWN].splits > 1
    assert plan.box is None


@pytest.mark.parametrize("name", PLANS)
def test_tiles_of_a_kind_are_alike(name):
    plan = PLANS[name]()
    for kind in plan.kinds:
        parts = [plan.segments[segment] for segment in kind]
        alike = {(p.rows, p.bits, p.reads, p.held, p.run, p.scale_bytes) for p in parts}
        assert len(alike) == 1


def test_integers_of_several_sequences_have_tiles_of_more_rows():
    def rows(batch: int, bits: WeightBits) -> list[int]:
        plan = make_stream_plan(preset_dims("llama3.2-1b", batch, bits), H200)
        for segment, part in plan.segments.items():
            outputs = part.rows // 2 if segment == Segment.GATE_UP else part.rows
            assert part.groups == -(-part.out // outputs)
        return [part.rows for _, part in sorted(plan.segments.items())]

    assert rows(8, INT4) == [16, 16, 32, 32, 16]
    # There is no room for more, or a single sequence, or no integers.
    assert rows(8, INT8) == [16] * 5
    assert rows(1, INT4) == [16, 16, 16, 8, 16]
    assert rows(8, BFLOAT16) == [8] * 5


def test_plans_of_quantized_weights_differ_in_what_is_hard():
    plans = [PLANS[name]() for name in QUANTIZED]
    downs = {(p.segments[Segment.DOWN].bits, p.segments[Segment.DOWN].splits > 1) for p in plans}
    assert downs == {(8, False), (8, True), (4, False), (4, True)}
    assert any(p.segments[Segment.DOWN].run > 1 for p in plans)
    assert any(p.padded_columns > 1 for p in plans)
    # Of one piece a row, of more, and where parts are not all whole.
    pieces = {p.box and p.box.pieces for p in plans if p.segments[Segment.DOWN].splits > 1}
    assert pieces == {None, 1, 2}


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
    reason = why_not_on(small, dims, Tuning())
    assert reason is not None
    assert "two tiles of 32768 bytes do not fit" in reason
    assert "Take a tuning with smaller tiles, or implementation='xla'." in reason
    plan = make_stream_plan(dims, small, Tuning())
    nothing: Any = jax.ShapeDtypeStruct((), jnp.int32)  # it is refused before it is looked at
    state = StepState(nothing, nothing, nothing, nothing)
    with pytest.raises(ValueError, match=re.escape(reason)):
        run_stream(lambda env: None, plan, dims.abstract_weights(), state, nothing)
    # Unasked, smaller ones are taken.
    for tuning in (Tuning(tile_bytes=8192, cache_tile_bytes=16_384), None):
        assert why_not_on(small, dims, tuning) is None
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


@pytest.mark.parametrize("bits", [BFLOAT16, INT8, INT4], ids=["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_ring_fits_shared_memory(name, bits):
    planned = 0
    sizes = (8192, 16384, 32768, 65536)
    for batch, warps, tile_bytes in itertools.product((1, 2, 8), (None, 8), sizes):
        tuning, dims = (
            Tuning(tile_bytes=tile_bytes, num_warps=warps),
            preset_dims(name, batch, bits),
        )
        if (reason := why_not(dims, H200.cores, tuning)) is not None:
            assert bits == INT4 and "rows of weights of whole 128 elements" in reason
            continue
        planned += 1
        plan = make_stream_plan(dims, H200, tuning)
        assert plan.slots >= 2
        assert plan.slot_bytes % 16 == 0
        # The compiler takes the ring's stand-in, and uses the beginning of it for other things.
        taken = (plan.num_stages - 1) * RESERVED_TILE
        assert taken <= H200.shared_memory
        size = SharedLayout.of(plan).size
        assert plan.slots * plan.slot_bytes + plan.tail_bytes < size
        fits = size + plan.compiler_bytes <= taken
        # Of int8, eight rows of 8192 inputs are 64 KiB, whatever the tuning.
        wide = name in ("llama3.1-70b", "mistral-small-24b")
        large = tile_bytes == 65536 or (wide and bits == INT8)
        assert fits or (large and plan.why_no_room), (plan.slots, plan.slot_bytes)
        for segment, part in plan.segments.items():
            # All threads read a whole span of every row.
            span_bytes = plan.span(segment) * part.bits // 8
            read = (part.rows - 1) * part.row_bytes + span_bytes
            assert read <= plan.slot_bytes + plan.tail_bytes
            # The least tiles are pairs of rows; of int8, those whose scales are whole 16 bytes.
            least = 2 if part.bits == 16 else 16
            assert part.rows <= least or part.rows * span_bytes <= tile_bytes
            # Scales are copied by 16 bytes.
            copied = part.scaled_rows // 2 if is_paired(segment) else part.scaled_rows
            assert copied * part.scale_bytes % 16 == 0
    assert planned or bits == INT4


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
        assert (plan.padded_columns, plan.chunked) == (padded, chunked)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tile_bytes": 4096}, "tile_bytes is one of 8192, 16384, 32768, 65536; got 4096"),
        ({"num_warps": 5}, "num_warps is one of None, 4, 8; got 5"),
        ({"in_flight": 0}, "in_flight is one of 1, 2, .*, 16; got 0"),
        ({"l2_tiles": 17}, "l2_tiles is one of 0, 1, .*; got 17"),
        ({"l2_bytes": 2048}, "l2_bytes is one of 4096, 8192, .*; got 2048"),
        ({"next_tiles": 0}, "next_tiles is one of None, 1, .*; got 0"),
        ({"collect_tiles": 5}, "collect_tiles is one of 0, 1, .*, 4; got 5"),
        ({"hidden_copies": 3}, "hidden_copies is one of 1, 2; got 3"),
        ({"slots": 1}, "slots is at least 2, got 1"),
    ],
)
def test_a_tunable_out_of_range_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Tuning(**options)


@pytest.mark.parametrize(("length", "num_splits"), [(96, 1), (1000, 4), (16000, 16)])
def test_attention_is_dealt_out_once_to_the_programs_with_the_fewest_tiles(length, num_splits):
    plan = make_stream_plan(dims_of(PRESETS["llama3.2-1b"], 1, 16384), H200)
    seen, busy, tiles = [], [], []
    for program in range(plan.programs):
        env = dataclasses.replace(env_of(plan, program), lengths=(jnp.int32(length),))
        share = share_of(env, jnp.int32(0), None)
        parts = [part_of(env, jnp.int32(0), share, jnp.int32(j)) for j in range(int(share.parts))]
        seen += [(int(part.head), int(part.split), int(part.num_splits)) for part in parts]
        busy.append(len(parts))
        tiles.append(sum(int(first_place(env, s, 0).busy) for s in LAYER_SEGMENTS))
    heads = plan.dims.num_kv_heads
    assert sorted(seen) == [(h, n, num_splits) for h in range(heads) for n in range(num_splits)]
    assert max(busy) == 1
    assert busy == sorted(busy)
    assert tiles == sorted(tiles, reverse=True)
    assert tiles[0] > tiles[-1]


@pytest.mark.parametrize(
    ("bits", "next_tiles", "last"),
    [(16, 1, 1), (16, 3, 3), (16, 16, None), (16, None, 1), (8, None, None), (8, 2, 2)],
)
def test_behind_a_segment_little_is_asked_for(bits, next_tiles, last):
    dims = preset_dims("llama3.2-1b", 1, WeightBits(down=bits))
    plan = make_stream_plan(dims, H200, Tuning(next_tiles=next_tiles))
    env = env_of(plan, program=plan.programs - 1)
    for segment in LAYER_SEGMENTS:
        place = first_place(env, segment, 1)
        for left in reversed(range(plan.segments[segment].tiles)):
            assert int(tiles_ahead(env, place)) == (plan.slots if left or last is None else last)
            place = next_place(place)


def test_more_is_asked_for_with_operands_of_a_layer_but_attentions():
    plan = make_stream_plan(preset_dims("llama3.2-1b", 1), H200, Tuning(collect_tiles=1))
    env = env_of(plan, program=0)
    timely = [s for s in plan.segments if bool(leaves_time(first_place(env, s, 1)))]
    assert timely == [Segment.QKV, Segment.GATE_UP, Segment.DOWN]


@pytest.mark.parametrize("copies", [1, 2])
def test_programs_take_turns_with_the_copies_of_hidden_activations(copies):
    plan = make_stream_plan(preset_dims("llama3.2-1b", 1), H200, Tuning(hidden_copies=copies))
    at = layout_of(plan)
    read = [int(copy_of_hidden(env_of(plan, program))) for program in range(4)]
    assert read == [at.ffw, (at.ffw, at.ffw_copy)[copies - 1]] * 2


def test_a_model_too_wide_for_its_batch_is_refused():
    dims = dataclasses.replace(preset_dims("llama3.1-8b", 8), model_dim=8208)
    assert why_not(dataclasses.replace(dims, batch=1), 132) is None
    assert why_not(dataclasses.replace(dims, model_dim=8192), 132) is None
    reason = why_not(dims, 132)
    assert reason is not None
    said = "at most 8192 activations of each of a step's 8 tokens in place; this model has 8208"
    assert said in reason
    with pytest.raises(ValueError, match="at most 8192 activations"):
        make_stream_plan(dims, H200)


def test_inputs_in_more_parts_than_programs_are_refused():
    dims = preset_dims("llama3.1-8b", 1)
    assert why_not(dims, 2) is None
    with pytest.raises(ValueError, match=r"14336 hidden activations among 2 programs; .* has 1"):
        make_stream_plan(dims, machine(1))


# What is wrong of a model's dims, how its matrices are stored, and what is said.
UNEVEN = {
    "bfloat16": (
        {"ffw_dim": 8188},
        BFLOAT16,
        "of whole 8 elements, of 16 bits each; this model's down has rows of 8188. "
        "Use implementation='xla'.",
    ),
    "int8": (
        {"model_dim": 2056},
        INT8,
        "of whole 16 elements, of 8 bits each; this model's qkv has rows of 2056. "
        "Use implementation='xla'.",
    ),
    "int4": (
        {"ffw_dim": 8208},
        INT4,
        "of whole 128 elements, of 4 bits each; this model's down has rows of 8208. "
        "Use implementation='xla'.",
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_that_bulk_copies_cannot_begin_at_are_refused(name):
    sizes, bits, said = UNEVEN[name]
    dims = dataclasses.replace(preset_dims("llama3.2-1b", 1, bits), **sizes)
    said = f"The fused kernel copies rows of weights {said}"
    assert why_not(dims, H200.cores) == said
    with pytest.raises(ValueError, match=re.escape(said)):
        make_stream_plan(dims, H200)


def test_int4_rows_are_split_at_whole_groups():
    splits = set()
    for groups in range(1, 200):
        for batch in (1, 2, 8):
            dims = dataclasses.replace(
                preset_dims("llama3.2-1b", batch, INT4), ffw_dim=128 * groups
            )
            assert why_not(dims, H200.cores) is None
            down = make_stream_plan(dims, H200).segments[Segment.DOWN]
            assert down.width % 128 == 0
            assert (down.splits - 1) * down.width < down.inner <= down.splits * down.width
            splits.add(down.splits)
    assert len(splits) > 2


def test_scales_that_bulk_copies_cannot_begin_at_are_refused():
    """A group of the residual has 2 rows, which are all that a tile of a split part can have."""
    dims = dataclasses.replace(
        preset_dims("llama3.1-8b", 1, WeightBits(down=8)), model_dim=8192, num_heads=64
    )
    said = (
        "The fused kernel copies scales by whole 16 bytes; those of 2 rows of this model's "
        "down, which it copies at once, are 8. Use implementation='xla'."
    )
    assert why_not(dims, H200.cores) == said
    with pytest.raises(ValueError, match=re.escape(said)):
        make_stream_plan(dims, H200)


def test_where_it_cannot_run_xla_is_named():
    dims = preset_dims("llama3.1-8b", 8, INT8)
    small, many = Gpu.named("RTX PRO 6000", "12.0", 188), machine(321)
    for gpu, tuning in ((many, None), (small, Tuning()), (machine(1), None)):
        reason = why_not_on(gpu, dims, tuning)
        assert reason is not None
        assert reason.endswith("implementation='xla'."), reason


A100, L4, RTX_4090 = (target(name).gpu for name in ("a100", "l4", "rtx4090"))


# Few multiprocessors have many groups of queries each, whose products are kept until all are there.
TOO_LARGE = {
    ("l4", name, 8, bits) for name in ("llama3.1-8b", "mistral-7b-v0.1") for bits in (16, 8)
}
# So have large models on all GPUs with 99 KB of shared memory.
TOO_LARGE |= {
    (gpu, name, batch, bits)
    for name, gpu, cases in (
        ("llama3.1-70b", "l4", [(1, 16), (1, 8), (1, 4), (8, 16), (8, 8), (8, 4)]),
        ("llama3.1-70b", "rtx3090", [(1, 16), (1, 8), (8, 16), (8, 8), (8, 4)]),
        ("llama3.1-70b", "rtx4090", [(1, 16), (1, 8), (8, 16), (8, 8), (8, 4)]),
        ("llama3.1-70b", "rtx5090", [(1, 16), (1, 8), (8, 16), (8, 8)]),
        ("qwen3-4b", "l4", [(8, 16)]),
        ("qwen3-8b", "l4", [(8, 16), (8, 8)]),
        ("qwen3-14b", "l4", [(1, 16), (8, 16), (8, 8)]),
        ("qwen3-14b", "rtx3090", [(8, 16), (8, 8)]),
        ("qwen3-32b", "l4", [(1, 16), (1, 8), (1, 4), (8, 16), (8, 8), (8, 4)]),
        ("qwen3-32b", "rtx3090", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("qwen3-32b", "rtx4090", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("qwen3-32b", "rtx5090", [(1, 16), (8, 16)]),
        ("mistral-nemo-12b", "l4", [(8, 16), (8, 8)]),
        ("mistral-nemo-12b", "rtx3090", [(8, 16), (8, 8)]),
        ("mistral-small-24b", "l4", [(1, 16), (1, 8), (8, 16), (8, 8), (8, 4)]),
        ("mistral-small-24b", "rtx3090", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("olmo3-7b", "l4", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("olmo3-7b", "rtx3090", [(8, 16), (8, 8), (8, 4)]),
        ("phi4-14b", "l4", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("phi4-14b", "rtx3090", [(8, 16), (8, 8)]),
        ("gemma3-12b", "l4", [(1, 16), (8, 16), (8, 8), (8, 4)]),
        ("gemma3-12b", "rtx3090", [(8, 16), (8, 8)]),
    )
    for batch, bits in cases
}
# Its 576 inputs are no whole groups of 128.
NO_GROUPS = {("smollm2-135m", batch, 4) for batch in (1, 8)}


@pytest.mark.parametrize("gpu", target_names())
def test_every_preset_fits_every_gpu(gpu):
    """In every format, with 1 and with 8 sequences, but for what is named."""
    refused = set()
    for name, batch, bits in itertools.product(PRESETS, (1, 8), (16, 8, 4)):
        formats = WeightBits(qkv=bits, attn_out=bits, gate_up=bits, down=bits, head=max(bits, 8))
        if why_not_on(target(gpu).gpu, preset_dims(name, batch, formats)) is not None:
            refused.add((gpu, name, batch, bits))
    no_groups = {(gpu, *case) for case in NO_GROUPS}
    assert refused == {case for case in TOO_LARGE if case[0] == gpu} | no_groups


@pytest.mark.parametrize("gpu", [A100, L4, RTX_4090], ids=lambda gpu: gpu.name)
def test_tiles_shrink_until_some_fit(gpu):
    dims = preset_dims("llama3.2-1b", 1)
    tuning, plan = fitting(dims, gpu), make_stream_plan(dims, gpu)
    assert plan.tuning == tuning
    assert plan.why_no_room is None
    assert SharedLayout.of(plan).size + plan.compiler_bytes <= gpu.shared_memory
    assert not plan.bulk
    assert plan.sharing == 32 * plan.product_warps
    # Where there is room for more, tiles are as they are elsewhere.
    assert tuning.tile_bytes == (32_768 if gpu == A100 else 16_384)
    assert fitting(dims, H200) == Tuning()


def test_tiles_grow_until_two_activations_share_a_word():
    """Of several sequences, where three such tiles fit; their rows have 5120 inputs."""
    for name in ("phi4-14b", "mistral-nemo-12b", "mistral-small-24b"):
        plan = make_stream_plan(preset_dims(name, 8), H200)
        assert plan.half2 and plan.slots == 3 and plan.tuning.tile_bytes == 65_536
        assert fitting(preset_dims(name, 1), H200) == Tuning()
        assert fitting(preset_dims(name, 8), A100).tile_bytes <= 32_768
    # Two would be there, or the usual ones have two hidden activations.
    for name in ("qwen3-14b", "llama3.1-8b"):
        assert fitting(preset_dims(name, 8), H200) == Tuning()


def test_without_bulk_copies_no_tile_is_a_box():
    dims = preset_dims("llama3.1-8b", 8, INT4)
    assert make_stream_plan(dims, H200).box is not None
    assert make_stream_plan(dims, A100).box is None


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


# The exchange


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_exchange_has_room_for_every_plan(name, batch):
    """It is made with the cache, before anybody knows the device or the tuning."""
    dims = preset_dims(name, batch)
    planned = 0
    for cores in (1, 78, 108, 132, 160, 320):
        for tuning in (Tuning(), Tuning(tile_bytes=8192), Tuning(num_warps=8)):
            if why_not(dims, cores, tuning) is None:
                layout = layout_of(make_stream_plan(dims, machine(cores), tuning))
                assert layout.words <= exchange_words(dims) - 2
                planned += 1
    assert planned


def test_more_programs_than_the_exchange_has_places_are_refused():
    with pytest.raises(ValueError, match="at most 320 places; this GPU has 321 multiprocessors"):
        make_stream_plan(preset_dims("llama3.2-1b", 1), machine(321))


@pytest.mark.parametrize(("layers", "globals_at", "gap"), [
    (255, [254], 256),  # from one step's global layer to the next one's
    (300, [20, 275, 299], 255),
    (300, [20, 276, 299], 256),
    (40, [5, 11, 17, 23, 29, 35], 11),
])  # fmt: skip
def test_layers_of_a_kind_that_are_too_far_apart_are_refused(layers, globals_at, gap):
    pattern = tuple(i not in globals_at for i in range(layers))
    config = small_config(num_layers=layers, window=40, window_pattern=pattern)
    reason = why_not(dims_of(config, 2, 64), 132)
    if gap < 256:
        assert reason is None
    else:
        assert reason is not None
        assert "less than 256 apart" in reason
        assert f"this model has up to {gap}." in reason


def test_buffers_of_the_exchange_do_not_overlap():
    dims = preset_dims("llama3.1-8b", 8)
    plan = make_stream_plan(dims, H200)
    layout = dataclasses.astuple(layout_of(plan))
    assert sorted(layout) == list(layout)
    assert layout[-1] <= exchange_words(dims) - 2
    at = layout_of(plan)
    assert at.x_head - at.x_in >= 8 * 4096
    assert at.x_mid - at.x_head >= 8 * 4096
    assert at.parts - at.qkv >= 8 * 6144
    assert at.ffw_block - at.partial >= 2 * 8 * 4096 * plan.segments[Segment.DOWN].splits


def interpreted(body, *results: jax.ShapeDtypeStruct) -> list[np.ndarray]:
    """Runs `body(exchange, *results)` as an interpreted kernel; its words, and the results."""
    layout = layout_of(PLANS["odd sizes, 1 program"]())

    def kernel(words, *out):
        words[...] = jnp.zeros((64,), jnp.int32)
        body(Exchange(words, layout, True, 128), *out)

    shapes = [jax.ShapeDtypeStruct((64,), jnp.int32), *results]
    return [np.asarray(x) for x in pl.pallas_call(kernel, out_shape=shapes, interpret=True)()]


def test_a_word_holds_24_bits_of_a_number_and_a_tag():
    values = np.array([0, -0.0, 1, -1.5, np.pi, 1e-30, 3e38, np.inf, -np.inf, np.nan], np.float32)
    # The NaN of all ones, which rounding up would carry into another number.
    values = np.append(values, np.array([0x7FFFFFFF], np.int32).view(np.float32))
    for tag in (1, 255, 256, 300):

        def body(exchange, tag=tag):
            for i, value in enumerate(values):
                at = jnp.full((1,), i)
                number = jnp.full((1,), int(value.view(np.int32)), jnp.int32)
                number = jax.lax.bitcast_convert_type(number, jnp.float32)
                exchange.publish(at, number, jnp.int32(tag), jnp.ones((1,), bool))

        [words] = interpreted(body)
        words = words[: len(values)]
        assert (words & 255 == tag & 255).all()
        got = (words & ~255).view(np.float32)
        np.testing.assert_allclose(got, values, rtol=2**-16)
        assert np.isnan(got).tolist() == np.isnan(values).tolist()


def test_interpreted_what_has_not_come_is_nan():
    def body(exchange, words, pairs):
        offsets = jax.lax.iota(jnp.int32, 8)
        ones, half = jnp.ones((8,), jnp.float32), offsets < 4
        exchange.publish(offsets, ones, jnp.int32(3), half)
        words[...] = exchange.collect(offsets, jnp.int32(3), offsets != 7)
        exchange.publish_pair(16 + 2 * offsets, ones, jnp.int32(3 + 256), half)
        [got] = exchange.collect_pairs([(16 + 2 * offsets, offsets != 7)], jnp.int32(3))
        pairs[...] = jax.lax.bitcast_convert_type(got, jnp.float32)

    result = jax.ShapeDtypeStruct((8,), jnp.float32)
    _, words, pairs = interpreted(body, result, result)
    np.testing.assert_array_equal(words, [1, 1, 1, 1, np.nan, np.nan, np.nan, 0])
    # The tag of a pair has 32 bits: 259 is not 3.
    np.testing.assert_array_equal(pairs, [np.nan] * 7 + [0])


def test_layers_beyond_the_31st_know_whether_they_are_local():
    local = tuple(i % 3 == 0 or i > 60 for i in range(70))
    plan = PLANS["odd sizes, 1 program"]()
    features = Features(window=4, local_layers=local)
    plan = dataclasses.replace(plan, dims=dataclasses.replace(plan.dims, features=features))
    ask = jax.vmap(env_of(plan, 0).is_local)
    assert np.asarray(ask(jnp.arange(70))).tolist() == list(local)
