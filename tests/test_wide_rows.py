"""Activations of rows so wide that threads hold them as words, of several sequences.

A kernel collects what each segment is given, and does nothing else. So rows are as wide as large
models' are, and there are no products for a CPU to make.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, small_config
from jax import lax
from mosaic_edits import edited
from mosaic_machine import MosaicError, run
from ptx_machine import PtxError
from stream_cases import machine

from pallas_kernels.backends import Backend
from pallas_kernels.dims import DecodeWeights, Dims, WeightBits
from pallas_kernels.launch import StepState
from pallas_kernels.mosaic_gpu import launch as launching
from pallas_kernels.stream import access, activations, half2, norms
from pallas_kernels.stream import plan as plans
from pallas_kernels.stream.activations import collect_activations
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_layout import exchange_words
from pallas_kernels.stream.exchange_order import word_in_exchange
from pallas_kernels.stream.feeding import with_ring
from pallas_kernels.stream.fragment_layout import column_of, distances, first_input
from pallas_kernels.stream.fragments import Fragments, inputs_of
from pallas_kernels.stream.launch import layout_of, run_stream
from pallas_kernels.stream.plan import PIECE, Segment, StreamPlan
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.ring import start_ring
from pallas_kernels.stream.segments import residual
from pallas_kernels.stream.tiles import first_place
from pallas_kernels.stream.tuning import Tuning

pytestmark = pytest.mark.once(
    "The machine takes long; a sample shows that a JAX lowers what collects activations.",
    sample=["test_fragments_are_the_activations_that_were_handed_over[int8-3]"],
)

# More than 16 pieces a thread in every format, and a last one that some threads lack.
CONFIG = small_config(num_layers=2, model_dim=4352, ffw_dim=4224, vocab_size=64)
FORMATS = {
    "int8": WeightBits(qkv=8, attn_out=8, gate_up=8, down=8, head=8),
    "int4": WeightBits(qkv=4, attn_out=4, gate_up=4, down=4, head=8),
    "bfloat16": WeightBits(qkv=16, attn_out=16, gate_up=8, down=16, head=16),
}
STEP, LAYER = 5, 1
RESIDUALS = (Segment.QKV, Segment.GATE_UP, Segment.HEAD)


def plan_of(
    bits: str, columns: int, backend: Backend = "mosaic_gpu", **features: Any
) -> StreamPlan:
    dims = dims_of(CONFIG, columns, 64)
    changed = dataclasses.replace(dims.features, **features)
    dims = dataclasses.replace(dims, weight_bits=FORMATS[bits], features=changed)
    return make_stream_plan(dims, machine(132), Tuning(backend=backend))


@dataclasses.dataclass(frozen=True)
class Given:
    """What segments are given, and the norms' weights: float32."""

    activations: dict[Segment, np.ndarray]  # [columns, inputs]
    norms: dict[str, np.ndarray]


def given_for(plan: StreamPlan) -> Given:
    """Random numbers; in two columns one channel is thousands of times the others."""
    rng, d = np.random.default_rng(0), plan.dims
    made = {}
    for segment, part in plan.segments.items():
        x = rng.standard_normal((d.columns, part.inner)).astype(np.float32)
        x *= np.exp(rng.uniform(-3, 3, (d.columns, 1)))
        x[0, 77], x[2, part.inner - 1] = 4096 * x[0, 78], -1024 * x[2, 3]
        made[segment] = x
    each = (d.num_layers, d.model_dim)
    shapes = {"attn_norm": each, "mlp_norm": each, "final_norm": each[1:]}
    weights = {name: rng.uniform(-2, 2, x).astype(jnp.bfloat16) for name, x in shapes.items()}
    return Given(made, weights)


def handed_over(plan: StreamPlan, given: Given) -> tuple[np.ndarray, dict[Segment, np.ndarray]]:
    """The exchange, and the numbers in it, which are rounded."""
    at, d = layout_of(plan), plan.dims
    starts = {
        Segment.QKV: at.x_in,
        Segment.ATTN_OUT: at.attn,
        Segment.GATE_UP: at.x_mid,
        Segment.DOWN: at.ffw,
        Segment.HEAD: at.x_head,
    }
    words, numbers = np.zeros(exchange_words(d), np.int32), {}
    words[at.steps] = STEP
    for segment, x in given.activations.items():
        form = half2.RESIDUAL if segment in RESIDUALS else half2.PLAIN
        tag = STEP + 1 if segment == Segment.HEAD else STEP * (d.num_layers + 1) + LAYER + 1
        some = jax.jit(half2.pack_half2, static_argnums=3)(x[:, ::2], x[:, 1::2], tag, form)
        both = jax.jit(half2.unpack_half2, static_argnums=1)(some, form)
        numbers[segment] = np.stack([np.asarray(y) for y in both], axis=2).reshape(x.shape)
        column, element = np.indices(some.shape)
        place = word_in_exchange(plan, plan.segments[segment], column, 2 * element)
        words[starts[segment] + place] = some
    return words, numbers


def wanted_of(plan: StreamPlan, given: Given, numbers: np.ndarray, segment: Segment) -> np.ndarray:
    """What a segment's weights multiply, float64 `[columns, inputs]`."""
    x, features = numbers.astype(np.float64), plan.dims.features
    if segment not in RESIDUALS:
        return x
    x *= half2.RESIDUAL.unit
    if not features.pre_norm and segment != Segment.HEAD:
        return x
    name = {Segment.QKV: "attn_norm", Segment.GATE_UP: "mlp_norm"}.get(segment)
    weights = given.norms["final_norm"] if name is None else given.norms[name][LAYER]
    mean = (x**2).mean(axis=1, keepdims=True)
    by = weights.astype(np.float64) + features.norm_offset
    return x / np.sqrt(mean + plan.dims.norm_eps) * by


def weights_for(dims: Dims, given: Given) -> DecodeWeights:
    """Matrices of zeros, which nobody multiplies; tiles of them are asked for meanwhile."""
    kinds = {16: (jnp.bfloat16, 1), 8: (jnp.int8, 1), 4: (jnp.int32, 8)}
    inner = {"qkv": dims.model_dim, "attn_out": dims.attn_dim, "gate_up": dims.model_dim}
    inner |= {"down": dims.ffw_dim, "head": dims.model_dim}
    out = {"qkv": dims.qkv_dim, "attn_out": dims.model_dim, "gate_up": 2 * dims.ffw_dim}
    out |= {"down": dims.model_dim, "head": dims.vocab_size}
    arrays: dict[str, Any] = dict.fromkeys(DecodeWeights._fields)
    for name, size in inner.items():
        stored = dims.stored(name)
        layers = () if name == "head" else (dims.num_layers,)
        dtype, each = kinds[stored.bits]
        arrays[name] = np.zeros((*layers, out[name], size // each), dtype)
        if stored.bits != 16:
            scales = np.zeros((*layers, out[name], stored.scale_bytes(size)), np.uint8)
            arrays[f"{name}_scale"] = scales.view(np.float32 if stored.bits == 8 else jnp.bfloat16)
    arrays["embed"] = np.zeros((dims.vocab_size, dims.model_dim), jnp.bfloat16)
    arrays["inv_freq"] = np.zeros(dims.head_dim // 2, np.float32)
    arrays |= given.norms
    return DecodeWeights(**arrays)


def collect_all(env: StreamEnv) -> None:
    """Stores every segment's fragments, and their scales; and the mean squares of a block."""
    env = with_ring(env)
    start_ring(env)
    threads = env.iota((env.plan.threads,), 0)

    def collect(segment: Any, nothing: Any) -> Any:
        layer = jnp.where(segment == Segment.HEAD, env.dims.num_layers, LAYER)
        fragments = collect_activations(env, first_place(env, segment, layer))
        for i, word in enumerate(fragments.words):
            access.store(env["words"].at[segment, jnp.full_like(threads, i), threads], word)
        assert fragments.scale is not None
        access.store(env["scales"].at[segment, threads], fragments.scale)
        access.meet()  # of several residuals, each has its squares summed in the same place
        return nothing

    # The words of a residual may be those of a block's output.
    start, tag = env.exchange.layout.x_in, env.tag(LAYER)
    squares = residual._collect_squares(env, start, tag)
    access.store(env["squares"].at[env.iota(squares.shape, 0)], squares)
    lax.fori_loop(jnp.int32(0), jnp.int32(len(env.plan.segments)), collect, jnp.int32(0))


class Made(NamedTuple):
    """What a program's threads hold of each segment, and squares `[8]`."""

    fragments: dict[Segment, Fragments]
    squares: np.ndarray


def collected(plan: StreamPlan, given: Given, words: np.ndarray) -> Made:

    def launch(kernel: Any, *, shared_bytes: int, programs: int, name: str, **how: Any) -> Any:
        return run(kernel, ring_bytes=shared_bytes, once=False, **how)[0]

    d, pieces = plan.dims, max(part.pieces for part in plan.segments.values())
    cache = np.zeros((d.num_layers, d.batch, d.num_kv_heads, d.capacity, d.head_dim), jnp.bfloat16)
    state = StepState(cache, cache.copy(), np.zeros(d.batch, np.int32), words)  # type: ignore[arg-type]
    made = {
        "words": np.zeros((5, 4 * pieces, plan.threads), np.int32),
        "scales": np.zeros((5, plan.threads), np.float32),
        "squares": np.zeros(8, np.float32),
    }
    with mock.patch.object(launching, "launch", launch):
        made = run_stream(
            collect_all,
            plan,
            weights_for(d, given),
            state,
            jnp.zeros(d.columns, jnp.int32),
            updated=made,  # type: ignore[arg-type]
        )
    fragments = {
        segment: Fragments(tuple(made["words"][segment]), made["scales"][segment])
        for segment in plan.segments
    }
    return Made(fragments, np.asarray(made["squares"]))


def check_collected(bits: str, columns: int, **features: Any) -> Made:
    """What is collected against the activations; returns it."""
    plan = plan_of(bits, columns, **features)
    assert plan.half2
    assert all(part.pieces > 16 for part in plan.segments.values())
    given = given_for(plan)
    words, numbers = handed_over(plan, given)
    made = collected(plan, given, words)
    # As numbers, and not as texts that take indices anew.
    where = plan_of(bits, columns, "triton", **features)
    for segment, part in plan.segments.items():
        wanted = wanted_of(plan, given, numbers[segment], segment)
        first, column = (np.asarray(x) for x in (first_input(where, part), column_of(where)))
        apart = np.array(distances(plan, part))[:, None] + np.arange(PIECE)
        element = first + apart.reshape(-1, 1)
        there = (element < part.inner) & (column < columns)
        of_thread = wanted[np.minimum(column, columns - 1), np.minimum(element, part.inner - 1)]
        of_thread = np.where(there, of_thread, 0)
        fragments = jax.tree.map(jnp.asarray, made.fragments[segment])
        got = np.stack([np.asarray(x, np.float64) for x in inputs_of(part, fragments)])
        if part.bits == 16:
            allowed = 2.0**-8 * np.abs(of_thread)
        else:
            allowed = 0.5001 * np.asarray(fragments.scale) + 1e-6 * np.abs(of_thread)
            # No number is more than half of 16 bits of its quad's largest.
            largest = np.abs(of_thread).max(axis=0).reshape(-1, 4).max(axis=1).repeat(4)
            assert (np.asarray(fragments.scale) <= 1.001 * largest / (127 * 128) + 1e-20).all()
        assert (np.abs(got - of_thread) <= allowed).all(), segment
    block = numbers[Segment.QKV].astype(np.float64) * half2.RESIDUAL.unit
    mean = (block**2).mean(axis=1)
    np.testing.assert_allclose(made.squares[:columns], mean, rtol=1e-5)
    return made


@functools.cache
def sound(bits: str, columns: int) -> Made:
    return check_collected(bits, columns)


@pytest.mark.parametrize("columns", [3, 8])
@pytest.mark.parametrize("bits", FORMATS)
def test_fragments_are_the_activations_that_were_handed_over(bits, columns):
    assert all(map(plan_of(bits, columns).holds_words, plan_of(bits, columns).segments.values()))
    sound(bits, columns)


@pytest.mark.parametrize("bits", ["int4", "bfloat16"])
def test_fragments_of_words_are_those_of_numbers(bits, monkeypatch):
    """Bit by bit, those that threads make where they have room for float32."""
    made = sound(bits, 3)
    monkeypatch.setattr(plans, "MAX_PIECES", 32)
    assert not plan_of(bits, 3).wide
    other = check_collected(bits, 3)
    np.testing.assert_array_equal(made.squares, other.squares)
    for segment, fragments in made.fragments.items():
        of_numbers = other.fragments[segment]
        for one, two in zip(fragments.words, of_numbers.words, strict=True):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(fragments.scale, of_numbers.scale)


@pytest.mark.parametrize(
    "features", [{"norm_offset": 1.0}, {"pre_norm": False, "post_norm": True}], ids=str
)
def test_norms_of_families_are_theirs(features):
    """Weights with one added; and a residual that is not normed but before the head."""
    check_collected("int4" if "norm_offset" in features else "bfloat16", 3, **features)


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        # A norm's weights: where they begin, how many there are, of which norm.
        (norms, "_row", "row + first", "row + first + PIECE"),
        (norms, "_row", "size - first)", "size - first - PIECE)"),
        (norms, "_row", "[segment != Segment.QKV, is_head]", "[is_head, segment != Segment.QKV]"),
        (activations, "_norm_scale", "scale *= unit", "scale *= 1.01 * unit"),
        (activations, "_start_of_residual", "at.x_in, at.x_mid", "at.x_in, at.x_in"),
    ],
)
def test_a_planted_error_is_noticed(owner, name, old, new):
    with edited(owner, name, old, new), pytest.raises((AssertionError, MosaicError, PtxError)):
        check_collected("int8", 3)
