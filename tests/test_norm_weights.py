"""Where a compiled step reads the weights of norms: within their arrays, and those of its row."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, small_config
from stream_cases import FAMILIES, H200

from pallas_kernels.dims import WeightBits
from pallas_kernels.stream import norms
from pallas_kernels.stream.fragment_layout import first_input, pieces_there
from pallas_kernels.stream.plan import PIECE, Segment, StreamPlan
from pallas_kernels.stream.planner import make_stream_plan

pytestmark = pytest.mark.once(
    "A sample of shapes shows what a JAX makes of the interpreted kernel.",
    sample=[
        "test_weights_of_norms_are_read_within_their_rows[gemma3-3]",
    ],
)

LAYERS = 3
# Elements of a line of the L2 cache.
LINE = 64
NORMED = (Segment.QKV, Segment.GATE_UP, Segment.HEAD)


class Read(NamedTuple):
    """What `ptx.load_pieces` was asked for."""

    refs: list[Any]
    beyond: list[Any]
    offset: Any
    places: list[int]
    there: Any

    def array(self) -> Any:
        chosen = self.refs[0]
        for condition, ref in zip(self.beyond, self.refs[1:], strict=True):
            chosen = ref if np.asarray(condition).all() else chosen
        return chosen

    def elements(self) -> np.ndarray:
        """All that is read, of the array taken as flat."""
        offset, there = np.asarray(self.offset), np.asarray(self.there)
        first = [offset[there > q] + place for q, place in enumerate(self.places)]
        return np.concatenate([x[:, None] + np.arange(PIECE) for x in first]).ravel()


def env_of(plan: StreamPlan, arrays: dict[str, np.ndarray]) -> Any:
    """As much of an environment as norms look at."""

    class Env(types.SimpleNamespace):
        def __getitem__(self, name):
            return arrays[name]

    d = plan.dims
    return Env(plan=plan, dims=d, features=d.features, interpret=False, shared=jnp.int32(0))


@pytest.mark.drawn("Each family, with one of the batches.")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_weights_of_norms_are_read_within_their_rows(monkeypatch, family, batch):
    config = small_config(**{**FAMILIES.get(family, {}), "num_layers": LAYERS})
    plan = make_stream_plan(dims_of(config, batch, 64), H200)
    d, read = plan.dims, []

    def record(refs, beyond, offset, places, there):
        read.append(Read(refs, beyond, offset, places, there))
        return [jnp.zeros(offset.shape, jnp.int32)] * (4 * len(places))

    monkeypatch.setattr(norms.ptx, "load_pieces", record)
    layered, once = np.zeros((LAYERS, d.model_dim)), np.zeros(d.model_dim)
    arrays = {"attn_norm": layered, "mlp_norm": layered.copy(), "final_norm": once}

    env = env_of(plan, arrays)
    for segment in plan.segments:
        part = plan.segments[segment]
        for layer in range(LAYERS):
            norms.norm_weights(env, part, jnp.int32(segment), jnp.int32(layer))
            [one] = read
            array, elements = one.array(), one.elements()
            assert 0 <= elements.min() <= elements.max() < array.size, (segment, layer)
            if segment == Segment.HEAD or (d.features.pre_norm and segment in NORMED):
                row = 0 if segment == Segment.HEAD else layer
                want = np.arange(d.model_dim) + row * d.model_dim
                assert set(elements) == set(want), (segment, layer)
                name = {Segment.QKV: "attn_norm", Segment.GATE_UP: "mlp_norm"}
                assert array is arrays[name.get(segment, "final_norm")]
            read.clear()


@pytest.mark.parametrize("model_dim", [4352, 5120])
@pytest.mark.parametrize("bits", [8, 4, 16])
def test_weights_of_norms_of_wide_rows_are_asked_for_and_loaded(monkeypatch, bits, model_dim):
    """Of rows that threads hold as words: lines of the cache first, and then what they hold."""
    config = small_config(model_dim=model_dim, ffw_dim=4224, num_layers=LAYERS)
    formats = WeightBits(qkv=bits, attn_out=bits, gate_up=8 if bits == 16 else bits, head=8)
    plan = make_stream_plan(dataclasses.replace(dims_of(config, 3, 64), weight_bits=formats), H200)
    d, asked = plan.dims, []

    def record(row, there, places, counts):
        asked.append((Read(row.refs, row.beyond, row.offsets, places, there), counts))

    monkeypatch.setattr(norms.ptx, "prefetch_pieces", record)
    layered, once = np.zeros((LAYERS, d.model_dim)), np.zeros(d.model_dim)
    arrays = {"attn_norm": layered, "mlp_norm": layered.copy(), "final_norm": once}
    env = env_of(plan, arrays)
    for segment, name in zip(NORMED, arrays, strict=True):
        part = plan.segments[segment]
        assert plan.holds_words(part)
        for layer in range(LAYERS):
            where = part, jnp.int32(segment), jnp.int32(layer)
            norms.ask_for_norm_row(env, *where)
            [(lines, counts)] = asked
            loaded = norms.norm_row(env, *where)
            weights = loaded.weights
            pieces = Read(
                list(weights.refs),
                list(weights.beyond),
                weights.offsets,
                list(loaded.places),
                pieces_there(plan, part, jnp.int32(d.model_dim) - first_input(plan, part))
                if loaded.there is None
                else loaded.there,
            )
            assert (loaded.there is None) == (d.model_dim == plan.span(segment))
            start = 0 if segment == Segment.HEAD else layer * d.model_dim
            assert lines.array() is pieces.array() is arrays[name]
            assert set(pieces.elements()) == set(range(start, start + d.model_dim))
            offset, there = np.asarray(lines.offset), np.asarray(lines.there)
            first = np.concatenate(
                [offset[there > n] + x for x, n in zip(lines.places, counts, strict=True)]
            )
            assert start <= first.min() <= first.max() < start + d.model_dim
            want = range(start // LINE, (start + d.model_dim - 1) // LINE + 1)
            assert set(first // LINE) == set(want)
            # Nobody asks for much twice: two threads share half a line, at the most.
            assert len(first) <= 8 * len(want)
            asked.clear()
