"""Who runs a step of a quantized model, what the kernels are given of it, and what is refused."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, random_model
from flax import nnx
from numerics import assert_close
from quantize_cases import FOR_KERNELS, by_hand, kernel_config, named_arrays
from reference_cases import quick_jit, random_tokens

from ffjax import decode, fidelity
from ffjax.benchmark.inputs import random_model as benchmark_model
from ffjax.config import ModelConfig, preset
from ffjax.decode import (
    choose_kernel,
    decode_weights,
    resolve_implementation_config,
    why_not_fused_config,
)
from ffjax.formats import FLOATING, INT8, WeightFormats, int4
from ffjax.model import Transformer
from ffjax.quantization import dequantize
from pallas_kernels import support
from pallas_kernels.dims import WeightBits
from pallas_kernels.gpu import INTERPRETER

pytestmark = [
    pytest.mark.once(
        "What is chosen is plain Python; the arrays are those of other tests.",
        sample=[
            "test_the_kernel_is_chosen",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

every_format = pytest.mark.parametrize("formats", FOR_KERNELS.values(), ids=FOR_KERNELS)


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


@pytest.fixture
def on_a_gpu(monkeypatch) -> Iterator[None]:
    """One that has room for all that the kernel knows."""
    monkeypatch.setattr(decode.Gpu, "of", lambda device: INTERPRETER)
    monkeypatch.setattr(support, "why_not_on", lambda *_: None)
    decode._why_not.cache_clear()  # what was found out knows nothing of what was patched
    yield
    decode._why_not.cache_clear()


# What the kernels are told and given


def test_bits_are_those_of_each_matrix():
    formats = WeightFormats(qkv=INT8, attn_out=int4(), down=int4(), head=INT8)
    dims = dims_of(kernel_config(formats), 1, 8)
    assert dims.weight_bits == WeightBits(qkv=8, attn_out=4, gate_up=16, down=4, head=8)
    assert not dims_of(kernel_config(FLOATING), 1, 8).weight_bits.quantized


@pytest.mark.parametrize("name", ["int8", "mixed", "mixed otherwise"])
def test_the_kernels_are_given_the_models_own_integers_and_scales(name):
    formats = FOR_KERNELS[name]
    model = random_model(kernel_config(formats))
    weights = decode_weights(model, 16)
    expected = dims_of(model.config, 2, 8).abstract_weights()
    for name, want in expected._asdict().items():
        got = getattr(weights, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert (got.shape, got.dtype) == (want.shape, want.dtype), name
    own = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for name in formats.quantized:
        place = () if name == "head" else ("layers",)
        for part in (name, f"{name}_scale"):
            param = own[*place, part][...]
            given = getattr(weights, part)
            assert given.unsafe_buffer_pointer() == param.unsafe_buffer_pointer(), part


@every_format
@pytest.mark.parametrize("tied", [False, True])
def test_a_steps_bytes_are_those_of_the_arrays(formats, tied):
    formats = dataclasses.replace(formats, head=None) if tied else formats
    config = dataclasses.replace(kernel_config(formats), tied_embeddings=tied)
    table = 2 * config.vocab_size * config.model_dim
    # All arrays, of an embedding that is not the head a row a sequence.
    arrays = nnx.eval_shape(lambda: nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    rest = total - (0 if tied else table)
    assert dims_of(config, 3, 8).step_weight_bytes == rest + 3 * 2 * config.model_dim


def test_a_step_of_eight_billion_weights_reads_half_of_them_or_a_quarter():
    """By hand: 32 layers of 218,103,808 weights and 43,008 rows; a head of 525,336,576."""
    layers, rows, head = 32 * 218_103_808, 32 * 43_008, 128_256 * 4096
    rest = 2 * 4096 * (2 * 32 + 1 + 1)
    want = {
        "bfloat16": 2 * layers + 2 * head,
        "int8": layers + 4 * rows + 2 * head,
        "int4": layers // 2 + 2 * layers // 128 + 2 * head,
        "int4, head int8": layers // 2 + 2 * layers // 128 + head + 4 * 128_256,
    }
    formats = {
        "bfloat16": FLOATING,
        "int8": WeightFormats.of_layers(INT8),
        "int4": WeightFormats.of_layers(int4()),
        "int4, head int8": WeightFormats.of_layers(int4(), INT8),
    }
    for name, value in formats.items():
        config = dataclasses.replace(preset("llama3.1-8b"), weights=value)
        assert dims_of(config, 1, 8).step_weight_bytes == want[name] + rest, name


# Who runs a step


@every_format
def test_the_kernel_is_chosen(formats, on_a_gpu):
    asked = kernel_config(formats), jnp.bfloat16, 2, 8
    assert why_not_fused_config(*asked) is None
    assert choose_kernel(*asked) == ("pallas", None)
    for name in (None, "pallas"):
        assert resolve_implementation_config(*asked, name) == "pallas"


def test_what_the_kernel_has_no_room_for_is_its_own_sentence(on_a_gpu, monkeypatch):
    monkeypatch.setattr(support, "why_not_on", lambda *_: "There is no room.")
    decode._why_not.cache_clear()
    asked = kernel_config(FOR_KERNELS["int4"]), jnp.bfloat16, 2, 8
    assert choose_kernel(*asked) == (None, "There is no room.")
    assert resolve_implementation_config(*asked) == "xla"
    with pytest.raises(NotImplementedError, match=exactly("There is no room.")):
        resolve_implementation_config(*asked, "pallas")


# The gate


def test_without_a_gpu_the_gate_interprets_the_kernel(monkeypatch):
    monkeypatch.setattr("ffjax.decode.why_not_fused_config", lambda *_: "There is no GPU.")
    chosen = fidelity.choose_candidate(kernel_config(FOR_KERNELS["mixed"]), 2, 8)
    assert (chosen.implementation, chosen.why_interpreted) == ("pallas", "There is no GPU.")
    step: Any = chosen.step
    assert step.keywords == {"interpret": True}


def test_the_gates_reference_is_the_dequantized_model_in_float32():
    model = random_model(kernel_config(FOR_KERNELS["mixed"]))
    wide, stored = fidelity.upcast(model), named_arrays(model)
    assert wide.config == dataclasses.replace(model.config, weights=FLOATING)
    for name, got in named_arrays(wide).items():
        assert got.dtype == np.float32
        scale = stored.get(f"{name}_scale")
        want = stored[name] if scale is None else by_hand(stored[name], scale)
        assert got.tobytes() == want.astype(np.float32).tobytes(), name


def test_the_gate_compares_with_the_quantized_model_itself():
    """A candidate that rounds the weights again is as far off as that is; the model is not."""
    model = random_model(kernel_config(FOR_KERNELS["int8"], num_layers=1))
    prompts = fidelity.random_prompts(model.config, 2, 3)

    def coarse(model, cache, tokens):
        rounded = nnx.clone(model)
        rounded.layers.down[...] = rounded.layers.down[...] // 16 * 16
        return decode.reference_step(rounded, cache, tokens)

    result = fidelity.measure(model, prompts, coarse)
    same = fidelity.measure(model, prompts, decode.reference_step)
    assert same.kl.difference == (0, 0)
    assert 0 < same.kl.baseline.mean < 0.1 * result.kl.candidate.mean
    assert not result.passed
    tokens = random_tokens(model.config, 2, 3)
    whole = quick_jit(lambda model, tokens: model(tokens))
    exact = np.asarray(whole(dequantize(model, jnp.float32), tokens))
    assert_close(np.asarray(whole(model, tokens)), exact, "model_vs_oracle_bfloat16")


@pytest.mark.parametrize("name", ["int8 and its head", "int4 and its head"])
@pytest.mark.parametrize("make", [benchmark_model, fidelity.random_model])
def test_random_integers_are_not_made_of_floating_matrices(make, name):
    """8B fits where its bfloat16 weights would not: none as large as a matrix exists in between."""
    config = kernel_config(FOR_KERNELS[name], vocab_size=37)
    head, *layers = sorted(
        out * inner * (1 if which == "head" else config.num_layers)
        for which, (out, inner) in config.matrices.items()
    )

    def largest(config: ModelConfig) -> int:
        program = jax.make_jaxpr(lambda: nnx.state(make(config)))()
        return max(_floating_sizes(program.jaxpr))

    # The embedding, as large as the head, is bfloat16.
    assert largest(config) == config.vocab_size * config.model_dim == head < layers[0]
    assert largest(dataclasses.replace(config, weights=FLOATING)) == layers[-1]


def _floating_sizes(jaxpr: Any) -> list[int]:
    """Elements of every floating-point array that a program makes."""
    sizes = []
    for equation in jaxpr.eqns:
        outputs = [x.aval for x in equation.outvars]
        sizes += [x.size for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes += _floating_sizes(inner)
    return sizes
