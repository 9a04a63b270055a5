"""Each phase alone, dealt out to several programs, against a few lines of numpy.

A phase is launched by itself, its programs one after another, so nothing waits. All
buffers start as NaN: what no program writes, and what a program should not read, shows.
The oracle takes the phase's inputs as the phase before has stored them.
"""

import functools
from collections.abc import Callable, Iterator

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
from numerics import assert_close

from pallas_kernels.gpu import Gpu
from pallas_kernels.launch import StepState, run_kernel
from pallas_kernels.phases.attention import attention
from pallas_kernels.phases.attn_out import attn_out
from pallas_kernels.phases.down import down
from pallas_kernels.phases.embed import embed
from pallas_kernels.phases.gate_up import gate_up
from pallas_kernels.phases.head import head
from pallas_kernels.phases.qkv import qkv
from pallas_kernels.plan import Plan, Tile, make_plan
from pallas_kernels.scratch import scratch_shapes

pytestmark = pytest.mark.filterwarnings("error")

# Programs, configuration, cache capacity, lengths. Three programs share each phase's work
# unevenly; of forty some have none, and a long sequence's attention is cut into parts.
CASES = {
    "3 programs": (
        3,
        small_config(num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=97),
        140,
        [0, 129, 64],
    ),
    "40 programs": (
        40,
        small_config(num_layers=1, num_heads=4, num_kv_heads=1, head_dim=128, tied_embeddings=True),
        900,
        [896, 63],
    ),
    "5 programs, inputs wider than a tile": (
        5,
        small_config(num_layers=1, model_dim=2192, ffw_dim=2320),
        20,
        [7],
    ),
}


def f64(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


class Snapshot:
    """All buffers after a phase."""

    def __init__(self, plan: Plan, buffers: dict[str, jax.Array]):
        self.plan, self.buffers = plan, buffers

    def __getitem__(self, name: str) -> np.ndarray:
        return f64(self.buffers[name])

    def operand(self, name: str, tile: Tile) -> np.ndarray:
        """An operand buffer as `[B, in]` (its layout: see `scratch`)."""
        i = np.arange(tile.inner)
        b = np.arange(self.plan.dims.batch)[:, None]
        return self[name][i // tile.depth * self.plan.padded_batch + b, i % tile.depth]

    def normed(self) -> np.ndarray:
        """What a mat-vec after a norm multiplies with, `[B, D]`."""
        mean = (self["x"] ** 2).mean(axis=1, keepdims=True)
        return self.operand("x_operand", self.plan.qkv) / np.sqrt(mean + self.plan.dims.norm_eps)


class Trace:
    """A step run phase by phase, and what each phase left."""

    def __init__(self, programs: int, config, capacity: int, lengths: list[int]):
        self.config, self.lengths = config, lengths
        self.dims = dims_of(config, len(lengths), capacity)
        self.plan = make_plan(self.dims, Gpu.named("small", "9.0", programs))
        self.tokens = random_tokens(config, len(lengths))
        model = random_model(config)
        self.weights, self.state = kernel_inputs(model, filled_cache(config, lengths, capacity))
        shapes = scratch_shapes(self.plan) | {
            "logits": jax.ShapeDtypeStruct((len(lengths), config.vocab_size), jnp.float32),
            "token": jax.ShapeDtypeStruct((len(lengths),), jnp.int32),
        }
        self.buffers = self.state._asdict() | {
            name: jnp.full(x.shape, -7 if x.dtype == jnp.int32 else jnp.nan, x.dtype)
            for name, x in shapes.items()
        }
        self.after = {"start": Snapshot(self.plan, self.buffers)}
        self._run(embed)
        for layer in range(config.num_layers):
            for phase in (qkv, attention, attn_out, gate_up, down):
                self._run(phase, layer)
        self._run(head)

    def _run(self, phase: Callable[..., None], layer: int | None = None) -> None:
        def body(env):
            phase(env) if layer is None else phase(env, jnp.int32(layer))

        state = StepState(*(self.buffers[name] for name in StepState._fields))
        scratch = {n: x for n, x in self.buffers.items() if n not in StepState._fields}
        run = functools.partial(run_kernel, body, self.plan, interpret=True)
        launch = jax.jit(run, compiler_options=QUICK_COMPILE)
        self.buffers = launch(self.weights, state, self.tokens, scratch=scratch)
        name = phase.__name__ if layer is None else f"{phase.__name__} {layer}"
        self.after[name] = Snapshot(self.plan, self.buffers)

    def layers(self, phase: str, *, since: str) -> Iterator[tuple[int, Snapshot, Snapshot]]:
        """Layer, the buffers after phase `since`, and those after `phase`, layer by layer."""
        for layer in range(self.config.num_layers):
            yield layer, self.after[f"{since} {layer}"], self.after[f"{phase} {layer}"]

    def check_residual(self, after: Snapshot, expected: np.ndarray, norm) -> None:
        """The residual, and what its readers need of it."""
        assert_close(after["x"], expected, "accumulated")
        weighted = after["x"] * f64(norm)
        assert_close(after.operand("x_operand", self.plan.qkv), weighted, "rounded")


@pytest.fixture(scope="module", params=CASES)
def trace(request) -> Trace:
    return Trace(*CASES[request.param])


def test_embed_is_the_tokens_rows(trace):
    rows = f64(trace.weights.embed)[np.asarray(trace.tokens)]
    trace.check_residual(trace.after["embed"], rows, trace.weights.attn_norm[0])


def _rotate(x: np.ndarray, trace: Trace) -> np.ndarray:
    """RoPE of `[B, heads, H]` at each sequence's new position."""
    positions = np.asarray(trace.lengths, np.float64)[:, None, None]
    angle = positions * np.asarray(trace.weights.inv_freq, np.float64)
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _projected(trace: Trace, layer: int, before: Snapshot) -> list[np.ndarray]:
    """Queries, keys and values of the new position after RoPE, `[B, heads, H]` each."""
    d = trace.dims
    qkv = before.normed() @ f64(trace.weights.qkv[layer]).T
    heads = qkv.reshape(d.batch, -1, d.head_dim)
    q, k, v = np.split(heads, [d.num_heads, d.num_heads + d.num_kv_heads], axis=1)
    return [_rotate(q, trace), _rotate(k, trace), v]


def _residual_before(trace: Trace, layer: int) -> Snapshot:
    """The buffers a layer starts from."""
    return trace.after["embed" if layer == 0 else f"down {layer - 1}"]


def test_the_cache_gains_the_new_position_and_nothing_else(trace):
    rows = np.arange(trace.dims.batch)
    for layer in range(trace.config.num_layers):
        before, after = _residual_before(trace, layer), trace.after[f"attention {layer}"]
        _, key, value = _projected(trace, layer, before)
        for name, new in (("k", key), ("v", value)):
            assert_close(after[name][layer, rows, :, trace.lengths], new, "rounded")
            cache = after[name]
            cache[layer, rows, :, trace.lengths] = before[name][layer, rows, :, trace.lengths]
            np.testing.assert_array_equal(cache, before[name])


def test_attention_is_softmax_over_the_live_positions(trace):
    d = trace.dims
    for layer in range(trace.config.num_layers):
        after = trace.after[f"attention {layer}"]
        q, _, _ = _projected(trace, layer, _residual_before(trace, layer))
        out = []
        for b, length in enumerate(trace.lengths):
            for n in range(d.num_heads):
                live = (layer, b, n // d.q_per_kv, slice(length + 1))
                score = after["k"][live] @ q[b, n] / np.sqrt(d.head_dim)
                weight = np.exp(score - score.max())
                out.append(weight / weight.sum() @ after["v"][live])
        expected = np.reshape(out, (d.batch, d.attn_dim))
        assert_close(after.operand("attn_operand", trace.plan.attn_out), expected, "rounded")


def test_attn_out_is_added_to_the_residual(trace):
    for layer, before, after in trace.layers("attn_out", since="attention"):
        attended = before.operand("attn_operand", trace.plan.attn_out)
        expected = before["x"] + attended @ f64(trace.weights.attn_out[layer]).T
        trace.check_residual(after, expected, trace.weights.mlp_norm[layer])


def test_gate_up_is_swiglu(trace):
    for layer, before, after in trace.layers("gate_up", since="attn_out"):
        gate, up = np.split(before.normed() @ f64(trace.weights.gate_up[layer]).T, 2, axis=1)
        hidden = after.operand("ffw_operand", trace.plan.down)
        assert_close(hidden, gate / (1 + np.exp(-gate)) * up, "rounded")


def test_down_is_added_to_the_residual(trace):
    norms = [*trace.weights.attn_norm[1:], trace.weights.final_norm]
    for layer, before, after in trace.layers("down", since="gate_up"):
        hidden = before.operand("ffw_operand", trace.plan.down)
        expected = before["x"] + hidden @ f64(trace.weights.down[layer]).T
        trace.check_residual(after, expected, norms[layer])


def test_head_gives_logits_and_the_best_token(trace):
    before = trace.after[f"down {trace.config.num_layers - 1}"]
    logits = trace.buffers["logits"]
    assert_close(logits, before.normed() @ f64(trace.weights.head).T, "accumulated")
    assert trace.buffers["token"].tolist() == np.argmax(logits, axis=1).tolist()


def test_the_last_program_ends_the_step(trace):
    assert trace.buffers["lengths"].tolist() == [n + 1 for n in trace.lengths]
    for name, after in trace.after.items():
        assert not after["counters"].any(), name


def test_the_best_token_of_equal_logits_is_the_lowest_across_programs(trace):
    """Each program's best may tie with another's: all rows of the head equal."""
    weights = trace.weights._replace(head=jnp.ones_like(trace.weights.head))
    tied = object.__new__(Trace)
    tied.__dict__ = trace.__dict__ | {"weights": weights, "after": {}}
    tied._run(head)
    assert tied.buffers["token"].tolist() == [0] * trace.dims.batch
