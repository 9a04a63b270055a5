"""The executable specification: against the reference, and against the interpreted kernel.

Steps of every family, format and number of tokens are held against it where they are run anyway: in
`test_stream_families`, `test_stream_tokens`, `test_stream_stages` and so on, by `spec_cases`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

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
from quantize_cases import FOR_KERNELS, GROUPED, kernel_config
from spec_cases import alone, check_specification
from step_cases import bits, reference
from stream_cases import FAMILIES, env_of

from ffjax.commands import spec as command
from ffjax.config import ModelConfig
from pallas_kernels.dims import DecodeWeights
from pallas_kernels.gpu import INTERPRETER
from pallas_kernels.launch import StepState
from pallas_kernels.spec.bisecting import bisect, compare_layer
from pallas_kernels.spec.cutting import first_layers
from pallas_kernels.spec.differences import Difference
from pallas_kernels.spec.handed import as_bfloat16, as_plain, as_residual, as_word
from pallas_kernels.spec.inputs import plain_inputs
from pallas_kernels.spec.running import Run, interpreted
from pallas_kernels.spec.segments import NAMES
from pallas_kernels.spec.step import step
from pallas_kernels.stream import kernel, kv_splits
from pallas_kernels.stream.fragment_layout import distances, first_input
from pallas_kernels.stream.fragments import inputs_of, pack
from pallas_kernels.stream.half2 import PLAIN, RESIDUAL, pack_half2, unpack_half2
from pallas_kernels.stream.launch import layout_of, stream_step
from pallas_kernels.stream.plan import PIECE, Segment, StreamPlan
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.stream.segments import attention, qkv

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the specification.",
        sample=["test_a_step_is_the_reference_s[gemma3, 3 tokens, no room for one]"],
    ),
    pytest.mark.by_numpy,
    pytest.mark.filterwarnings("error"),
]

CAPACITY = 110
FORMATS = FOR_KERNELS | GROUPED
# Of each its configuration, the sequences' lengths, and T.
STEPS = {
    "integers, 3 tokens": (kernel_config(FORMATS["mixed otherwise"]), [65, 0], 3),
    "gemma3, 3 tokens, no room for one": (small_config(**FAMILIES["gemma3"]), [108, 39], 3),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_reference_s(name):
    config, lengths, tokens = STEPS[name]
    model = random_model(config)
    cache = filled_cache(config, lengths, CAPACITY, tokens=tokens)  # NaN where nobody may read
    some = random_tokens(config, len(lengths), tokens=tokens)
    want = reference(model, cache, some)
    check_specification(alone(model, cache, some), model, cache, some, want)


def test_thirty_layers_are():
    config = small_config(num_layers=30, model_dim=48, ffw_dim=80, head_dim=32)
    model = random_model(config)
    cache, tokens = filled_cache(config, [7, 30], 40), random_tokens(config, 2)
    want = reference(model, cache, tokens)
    plan = alone(model, cache, tokens)
    check_specification(plan, model, cache, tokens, want, "fused_vs_model_deep")


def test_live_tokens_are_what_a_sequence_grows_by_and_every_name_is_explained():
    config, lengths, tokens = STEPS["gemma3, 3 tokens, no room for one"]
    model = random_model(config)
    cache = filled_cache(config, lengths, CAPACITY, tokens=tokens)
    some = random_tokens(config, 2, tokens=tokens)
    weights, state = kernel_inputs(model, cache, tokens)
    made = step(alone(model, cache, some), weights, state, some.reshape(-1), jnp.array([0, 2]))
    assert made.lengths.tolist() == [108, 41]
    names = set().union(*made.layers, made.head)
    assert names | {"partial"} == set(NAMES)


# The forms of numbers


def test_numbers_are_handed_over_in_the_kernel_s_forms():
    """Of every exponent that there is, NaN and infinity among them."""
    pattern = jax.random.bits(jax.random.key(0), (4096,), jnp.uint32)
    x = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    some = jax.random.normal(jax.random.key(1), (4096,)) * jnp.exp2(jnp.arange(4096) % 50 - 30.0)
    x = jnp.concatenate([x, some, jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan])])
    x = jnp.where(jnp.abs(x) < 1e-37, 0.0, x)  # CPUs may take denormal numbers for 0
    one, two = (make_stream_plan(dims_of(small_config(), n, 16), INTERPRETER) for n in (1, 2))
    assert two.half2 and not one.half2
    for form, as_form in ((RESIDUAL, as_residual), (PLAIN, as_plain)):
        handed = unpack_half2(pack_half2(x, x, jnp.int32(3), form), form)[1] * form.unit
        np.testing.assert_array_equal(as_form(two, x), handed)
        np.testing.assert_array_equal(as_form(one, x), as_word(x))
    some = np.array([1 + 2.0**-16, 1 + 2.0**-16 - 2.0**-23, -(2 - 2.0**-17), np.inf], np.float32)
    assert as_word(jnp.array(some)).tolist() == [1 + 2.0**-15, 1, -2, np.inf]


INTEGERS = [("int8", 1), ("of files", 1), ("of files, otherwise", 1), ("of files", 3)]


@pytest.mark.parametrize(("name", "batch"), INTEGERS)
def test_digits_share_a_scale_as_in_the_kernel(name, batch):
    """What each thread holds of a product's inputs, when it has packed them."""
    config = kernel_config(FORMATS[name], ffw_dim=1536)
    plan = make_stream_plan(dims_of(config, batch, 16), INTERPRETER)
    for segment, part in plan.segments.items():
        if part.bits == 16:
            continue
        x = np.asarray(jax.random.normal(jax.random.key(segment), (batch, part.inner)) ** 3)
        start = np.asarray(first_input(plan, part))
        inputs = np.stack([start + d + j for d in distances(plan, part) for j in range(PIECE)])
        column = np.arange(plan.threads) % 32 // 4 if batch > 1 else np.zeros(plan.threads, int)
        column = np.broadcast_to(column, inputs.shape)
        there = (inputs < part.inner) & (column < batch)
        held = np.zeros(inputs.shape, np.float32)
        held[there] = x[column[there], inputs[there]]
        packed = pack(env_of(plan, 0), part, list(jnp.asarray(held)))
        got = np.stack(inputs_of(part, packed))[there]
        want = np.asarray(plain_inputs(plan, segment, jnp.asarray(x)))
        np.testing.assert_allclose(got, want[column[there], inputs[there]], rtol=1e-6)


# Planted faults


class Case(NamedTuple):
    """A step of two layers: its plan and what it is given."""

    plan: StreamPlan
    weights: DecodeWeights
    state: StepState
    tokens: jax.Array


def case(config: ModelConfig, lengths: list[int]) -> Case:
    model, tokens = random_model(config), random_tokens(config, len(lengths))
    cache = filled_cache(config, lengths, CAPACITY)
    return Case(alone(model, cache, tokens), *kernel_inputs(model, cache), tokens)


def spread(given: Case) -> tuple[StreamPlan, DecodeWeights, StepState, jax.Array]:
    return given.plan, given.weights, given.state, given.tokens


def found_in(given: Case, run: Run, **how: bool) -> Difference | None:
    return bisect(*spread(given), run, **how)


@pytest.fixture(scope="module")
def integers() -> Case:
    return case(kernel_config(FORMATS["int8 and its head"]), [65])


def with_weights(weights: DecodeWeights, only: int | None = None) -> Run:
    """A kernel that is given other weights than those that the specification knows.

    Args:
        weights: these.
        only: in steps of so many layers; None: in all.
    """

    def run(plan, right, state, tokens, *, hidden_layers):
        some = right if only not in (None, plan.dims.num_layers) else weights
        return interpreted(plan, some, state, tokens, hidden_layers=hidden_layers)

    return run


# Of each array: where it is changed, by what factor, and where that is found.
WRONG_WEIGHTS = {
    "a key's scale": ("qkv_scale", (1, 2 * 64 + 5), 1.5, (1, "qkv", "qkv")),
    "a norm that is dropped": ("attn_norm", 1, None, (1, "qkv", "qkv")),
    "an output's scale": ("attn_out_scale", (1, 7), 1.5, (1, "attn_out", "x_mid")),
    "the other norm, dropped": ("mlp_norm", 1, None, (1, "gate_up", "ffw")),
    "a gate's scale": ("gate_up_scale", (1, 383), 1.1, (1, "gate_up", "ffw")),
    "a residual's scale": ("down_scale", (1, 255), 1.5, (1, "down", "residual_out")),
    "a norm of the first layer": ("mlp_norm", 0, None, (0, "gate_up", "ffw")),
    "the last norm, dropped": ("final_norm", (), None, (2, "head", "logits")),
    "a token's scale": ("head_scale", (100,), 1.5, (2, "head", "logits")),
    "an embedding": ("embed", (..., 9), 1.5, (0, "embed", "residual")),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_are_found_in_their_layer_and_segment(integers, name):
    array, where, factor, found = WRONG_WEIGHTS[name]
    old = getattr(integers.weights, array)
    new = old.at[where].set(1 if factor is None else old[where] * factor)
    one = found_in(integers, with_weights(integers.weights._replace(**{array: new})))
    assert one is not None
    assert (one.layer, one.segment, one.buffer) == found
    at = {"a gate's scale": (383,), "a residual's scale": (255,), "an embedding": (9,)}
    assert one.place == at.get(name, one.place)
    if factor is not None and array != "embed":
        assert one.count < one.size / 2


def test_a_sound_step_has_no_difference_and_arguments_stay(integers):
    before = bits(integers.state)
    assert found_in(integers, interpreted) is None
    assert bits(integers.state) == before


def test_what_shows_in_the_whole_step_alone_is_said_to(integers):
    new = integers.weights.mlp_norm.at[0].set(1)
    run = with_weights(integers.weights._replace(mlp_norm=new), only=2)
    one = found_in(integers, run)
    assert one is not None
    assert (one.layer, one.segment, one.buffer) == (0, None, "residual_out")
    assert "depends on the number of layers" in str(one)
    assert compare_layer(*spread(integers), run, 0) is None


def test_a_fault_below_a_layer_s_rounding_is_found_where_every_layer_is_looked_at(integers):
    element = int(jnp.argmax(jnp.abs(step(*spread(integers)).layers[0]["ffw"])))
    scale = integers.weights.gate_up_scale
    assert scale is not None
    new = scale.at[0, element].multiply(1.01)
    run = with_weights(integers.weights._replace(gate_up_scale=new))
    assert found_in(integers, run) is None
    one = found_in(integers, run, every_layer=True)
    assert one is not None
    assert (one.layer, one.segment, one.buffer) == (0, "gate_up", "ffw")
    assert (one.place, one.count) == ((element,), 1)


def planted(plan, weights, state, tokens, *, hidden_layers):
    """The kernel as it is now: nothing that was compiled before is taken."""
    how = {"hidden_layers": hidden_layers, "interpret": True}
    step = jax.jit(functools.partial(stream_step, plan, **how), compiler_options=QUICK_COMPILE)
    return step(weights, state, tokens)


def test_a_key_that_is_rotated_one_position_off_is_found(monkeypatch):
    def finish(env, rotations, flush, outputs, sums):
        pair = flush.group(outputs.number) * (env.segment(Segment.QKV).rows // 2) + outputs.pair
        head = pair // (env.dims.head_dim // 2)
        wrong = (head >= env.dims.num_heads) & (flush.layer == 1)
        further = dataclasses.replace(env, lengths=tuple(n + 1 for n in env.lengths))
        other = qkv.make_rotations(further)
        cos = jnp.where(wrong, other.cos, rotations.cos)
        sin = jnp.where(wrong, other.sin, rotations.sin)
        mixed = rotations._replace(cos=cos, sin=sin)
        qkv.finish_qkv(env, mixed, flush, outputs, sums)

    monkeypatch.setattr(kernel, "finish_qkv", finish)
    one = found_in(case(small_config(), [65]), planted)
    assert one is not None
    assert (one.layer, one.segment, one.buffer, one.place[0]) == (1, "qkv", "qkv", 2)
    assert str(one).startswith(
        "Layer 1, segment qkv: 'qkv' differs from the specification. The first place is sequence "
        "0, token 0, head 2, element 0. The kernel has "
    )


def in_splits(given: Case) -> Case:
    """With up to 4 KV splits a head."""
    cut = dataclasses.replace(given.plan.attention, block=16, min_split=32, max_splits=4)
    return given._replace(plan=dataclasses.replace(given.plan, attention=cut))


def test_a_kv_split_that_is_forgotten_is_found(monkeypatch):
    def fewer(env, layer, sequence):
        count = kv_splits.num_splits_of(env, layer, sequence)
        return count - ((layer == 1) & (count > 2))

    monkeypatch.setattr(attention, "num_splits_of", fewer)
    one = found_in(in_splits(case(small_config(), [100, 3])), planted)
    assert one is not None
    assert (one.layer, one.segment, one.buffer) == (1, "attention", "attn")
    assert one.sequence == 0 and one.count > 100  # of 128 elements, and 128 that are right


def test_a_word_that_nobody_has_written_is_found(monkeypatch):
    finish = kernel.finish_gate_up

    def skipping(env, flush):
        jax.lax.cond(flush.layer == 1, lambda: None, lambda: finish(env, flush))

    monkeypatch.setattr(kernel, "finish_gate_up", skipping)
    one = found_in(case(small_config(), [65]), planted)
    assert one is not None
    assert (one.layer, one.segment, one.buffer, one.written) == (1, "gate_up", "ffw", False)
    assert "No program has written it in this layer" in str(one)


# Of each buffer of the exchange: whose it is, and what it is called.
CHANGED_WORDS = {
    "x_in": ("embed", "x_in"),
    "qkv": ("qkv", "qkv"),
    "parts": ("attention", "parts"),
    "attn": ("attention", "attn"),
    "x_mid": ("attn_out", "x_mid"),
    "ffw": ("gate_up", "ffw"),
    "x_head": ("down", "x_out"),
    "best": ("head", "best"),
}


@pytest.mark.parametrize("buffer", CHANGED_WORDS)
def test_one_word_that_changes_behind_the_step_is_found(buffer):
    given = in_splits(case(small_config(num_layers=1), [100]))
    at = getattr(layout_of(given.plan), buffer) + (0 if buffer == "best" else 6)

    def run(*step, hidden_layers):
        made = interpreted(*step, hidden_layers=hidden_layers)
        words = made.state.counters.at[at].add(jnp.int32(-(2**31)))  # the other sign
        return made._replace(state=made.state._replace(counters=words))

    one = found_in(given, run)
    assert one is not None
    assert (one.segment, one.buffer, one.count) == (*CHANGED_WORDS[buffer], 1)
    assert one.written


# The command


def test_the_command_says_what_it_finds(monkeypatch, capsys):
    dims = dims_of(small_config(num_layers=1), 1, 16)
    monkeypatch.setattr(command, "dims_of", lambda asked: dims)
    arguments = ["--config", "llama3.2-1b", "--position", "9"]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 layers, 1 sequences, 1 tokens each, interpreted on a CPU."
    assert said[1] == "Every buffer is what the specification says, but for rounding."

    def wrong(plan, weights, *rest, hidden_layers):
        weights = weights._replace(mlp_norm=weights.mlp_norm * 2)
        return interpreted(plan, weights, *rest, hidden_layers=hidden_layers)

    monkeypatch.setattr(command, "interpreted", wrong)
    assert command.main([*arguments, "--layer", "0"]) == 1
    assert "Layer 0, segment gate_up: 'ffw' differs" in capsys.readouterr().out


def test_what_it_cannot_run_gets_a_sentence(monkeypatch, capsys):
    dims = dims_of(small_config(model_dim=140), 2, 16)  # rows of no whole 16 bytes
    monkeypatch.setattr(command, "dims_of", lambda asked: dims)
    assert command.main(["--config", "llama3.2-1b", "--batch", "2"]) == 2
    assert "copies rows of weights of whole 8 elements" in capsys.readouterr().err
    for wrong, sentence in (
        (["--position", "3,4,5"], "one for each of 2 sequences"),
        (["--position", "-1"], "none below 0"),
    ):
        with pytest.raises(SystemExit):
            command.main(["--config", "llama3.2-1b", "--batch", "2", *wrong])
        assert sentence in capsys.readouterr().err


def test_a_step_is_cut_behind_a_layer_that_there_is():
    plan = make_stream_plan(dims_of(small_config(**FAMILIES["gemma3"]), 1, 16), INTERPRETER)
    assert first_layers(plan, 2).dims.features.local_layers == (True, True)
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 of them; got {layers}"):
            first_layers(plan, layers)


def test_a_gpu_s_compiler_keeps_what_is_rounded_to_bfloat16():
    """XLA leaves out conversions there and back on a GPU, and keeps this operation."""
    made = jax.make_jaxpr(as_bfloat16)(jnp.float32(1.0))
    assert [eqn.primitive.name for eqn in made.jaxpr.eqns] == ["reduce_precision"]
