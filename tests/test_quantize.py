"""A quantized model is what its integers and scales say, close to the model it was made of."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from numerics import assert_close, relative_error
from quantize_cases import (
    FORMATS,
    MIXED,
    by_hand,
    model_to_quantize,
    named_arrays,
    nbytes,
    numbers_of,
)
from reference_cases import CONFIGS, oracle_weights, quick_jit, random_model, random_tokens

import checkpoints
import ffjax
from ffjax.cache import KVCache
from ffjax.config import PRESETS, ModelConfig
from ffjax.decode import decode_step
from ffjax.evaluate import bits_per_byte
from ffjax.formats import FLOATING, INT8, WeightFormat, WeightFormats, int4
from ffjax.model import Transformer
from ffjax.packing import pack, unpack
from ffjax.quantization import dequantize, quantize
from ffjax.rounding import expand, round_matrix
from ffjax.stdlib_text import read_sources

pytestmark = [
    pytest.mark.once(
        "A sample of families shows what a JAX makes of the model.",
        sample=[
            "test_words_hold_what_a_loop_over_nibbles_finds",
            "test_a_word_by_hand",
            "test_int8_is_off_by_half_a_scale_at_most",
            "test_arrays_are_what_the_configuration_says[mixed]",
            "test_logits_are_those_of_the_oracle_with_the_weights_by_hand",
            "test_what_cannot_be_quantized_is_a_sentence",
            "test_formats_as_plain_data_and_back",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

every_format = pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)


@quick_jit
def whole(model, tokens):
    return model(tokens)


@quick_jit
def grow(model, tokens, cache):
    return model(tokens, cache)


def matrix(out: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, inputs)).astype(np.float32)


# Packing


def test_words_hold_what_a_loop_over_nibbles_finds():
    numbers = np.random.default_rng(0).integers(0, 16, (3, 5, 7 * 8))
    words = np.asarray(pack(jnp.asarray(numbers)))
    assert (words.shape, words.dtype) == ((3, 5, 7), np.int32)
    assert numbers_of(words).tolist() == numbers.tolist()
    again = np.asarray(unpack(jnp.asarray(words)))
    assert again.dtype == np.int8
    assert again.tolist() == numbers.tolist()


def test_a_word_by_hand():
    # Nibbles, the lowest first: e0 e2 e4 e6 e1 e3 e5 e7.
    word = np.asarray(pack(jnp.array([0, 1, 2, 3, 4, 5, 6, 15]))).view(np.uint32)
    assert hex(word[0]) == "0xf5316420"


def test_a_shift_an_and_and_an_or_make_pairs_of_bfloat16():
    """What a kernel does with a word, as the packing was made for."""
    numbers = np.random.default_rng(1).integers(0, 16, (11, 64))
    words = np.asarray(pack(jnp.asarray(numbers))).view(np.uint32)
    for i in range(4):
        pairs = (words >> np.uint32(4 * i)) & np.uint32(0x000F000F) | np.uint32(0x43004300)
        halves = pairs[..., None].view(np.uint16).view(jnp.bfloat16).astype(np.float32)
        assert halves[..., 0].tolist() == (128 + numbers[:, 2 * i :: 8]).tolist()
        assert halves[..., 1].tolist() == (128 + numbers[:, 2 * i + 1 :: 8]).tolist()


def test_rows_that_are_no_whole_words_are_refused():
    with pytest.raises(ValueError, match=r"A word holds 8 inputs: .* got 12\."):
        pack(jnp.zeros((2, 12), jnp.int32))


# Rounding


def _rounded(weight: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    integers, scale = round_matrix(jnp.asarray(weight), format)
    return np.asarray(integers), np.asarray(scale)


def test_int8_is_off_by_half_a_scale_at_most():
    weight = matrix(13, 37) * np.float32(2.0) ** np.arange(-6, 7, dtype=np.float32)[:, None]
    integers, scale = map(np.asarray, round_matrix(jnp.asarray(weight), INT8))
    assert (integers.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (13,))
    assert np.abs(integers.astype(int)).max(axis=1).tolist() == [127] * 13
    error = np.abs(by_hand(integers, scale) - weight)
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_int4_is_off_by_half_a_scale_at_most_unless_beyond_its_range(size):
    weight = matrix(11, 384)
    words, scale = map(np.asarray, round_matrix(jnp.asarray(weight), int4(size)))
    assert (words.dtype, words.shape) == (np.int32, (11, 48))
    assert (scale.dtype, scale.shape) == (jnp.bfloat16, (11, 384 // size))
    step = np.repeat(scale.astype(np.float32), size, axis=1)
    numbers, exact = numbers_of(words) - 8, by_hand(words, scale)
    error, limit = np.abs(exact - weight), 0.5001 * np.abs(step)
    # What is cut off: beyond -8 or 7 scales, and as near as these come.
    cut = (weight / step < -8.5) | (weight / step > 7.5)
    assert (error <= limit)[~cut].all()
    assert np.isin(numbers[cut], (-8, 7)).all()
    assert 0 < cut.mean() < 0.02
    assert (scale > 0).any() and (scale < 0).any()


@pytest.mark.parametrize("size", [32, 128])
def test_int4s_scales_leave_less_error_than_the_largest_magnitude_alone_would(size):
    weight = matrix(64, 256, seed=3)
    groups = weight.reshape(-1, size).astype(np.float64)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)

    def error_of(extreme: int) -> np.ndarray:
        step = largest / extreme
        return ((np.clip(np.round(groups / step), -8, 7) * step - groups) ** 2).sum(axis=1)

    exact = by_hand(*_rounded(weight, int4(size)))
    error = ((exact.reshape(-1, size) - groups) ** 2).sum(axis=1)
    # Theirs are not rounded to bfloat16, which may cost a group a little.
    assert (error <= 1.05 * np.minimum(error_of(-8), error_of(7))).all()
    assert error.sum() < 0.93 * error_of(-8).sum()


@pytest.mark.parametrize("format", [INT8, int4(32)], ids=str)
def test_rows_of_zeros_stay_zero(format):
    weight = jnp.asarray(matrix(4, 64)).at[1].set(0).at[2].set(-0.0)
    with jax.debug_nans(True):  # as an integer, NaN is 0 on some devices and not on others
        exact = np.asarray(expand(*round_matrix(weight, format), format, jnp.float32))
    assert not exact[1:3].any()
    assert exact[0].any() and exact[3].any()


def test_what_is_in_the_range_comes_back_exactly():
    numbers = np.random.default_rng(4).integers(-8, 8, (5, 128))
    numbers[:, ::32] = -8  # so that the scale is found: a power of two is exact in bfloat16
    weight = jnp.asarray(numbers * 2.0**-7, jnp.float32)
    words, _ = round_matrix(weight, int4(32))
    assert (numbers_of(np.asarray(words)) - 8).tolist() == numbers.tolist()


def test_groups_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match=r"a multiple of 128; they are 192\. .*=64"):
        round_matrix(jnp.zeros((3, 192)), int4())
    with pytest.raises(ValueError, match=r"a multiple of 32; they are 40\. Choose int8"):
        round_matrix(jnp.zeros((3, 40)), int4(32))


# The model


@every_format
def test_arrays_are_what_the_configuration_says(formats):
    model = quantize(model_to_quantize(), formats)
    assert model.config.weights == formats
    shapes = nnx.eval_shape(lambda: Transformer(model.config, rngs=nnx.Rngs(0)))
    want = dict(nnx.to_flat_state(nnx.state(shapes, nnx.Param)))
    got = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in want.items()
    }
    # Integers and scales, and no floating-point matrix beside them.
    c, arrays = model.config, named_arrays(model)
    for name, value in formats.quantized.items():
        place = name if name == "head" else f"layers.{name}"
        out, inputs = c.matrices[name]
        rows = (out,) if name == "head" else (c.num_layers, out)
        of = arrays[place], arrays[f"{place}_scale"]
        if value.bits == 8:
            assert [(a.shape, a.dtype) for a in of] == [((*rows, inputs), "int8"), (rows, "f4")]
        else:
            size = value.group_size or 0
            assert (of[0].shape, of[0].dtype) == ((*rows, inputs // 8), "int32")
            assert (of[1].shape, of[1].dtype) == ((*rows, inputs // size), jnp.bfloat16)


def test_what_is_not_quantized_is_shared():
    model = model_to_quantize()
    small = quantize(model, WeightFormats(down=INT8))
    for ours, theirs in [(small.embed, model.embed), (small.layers.qkv, model.layers.qkv)]:
        assert ours[...].unsafe_buffer_pointer() == theirs[...].unsafe_buffer_pointer()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.011), (4, 0.11)])
def test_weights_are_close_to_those_they_were_made_of(bits, most):
    model = model_to_quantize("float32")
    formats = WeightFormats.of_layers(WeightFormat(bits=bits, group_size=None if bits == 8 else 32))
    exact, original = named_arrays(dequantize(quantize(model, formats))), named_arrays(model)
    for name in ("qkv", "attn_out", "gate_up", "down"):
        got, want = exact[f"layers.{name}"].ravel(), original[f"layers.{name}"].ravel()
        assert 0.4 * most < relative_error(got, want) < most, name
    assert exact["embed"].tobytes() == original["embed"].tobytes()


@every_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dequantized_weights_are_the_products(formats, dtype):
    model = quantize(model_to_quantize(), formats)
    stored, exact = named_arrays(model), named_arrays(dequantize(model, dtype))
    assert dequantize(model, dtype).config == dataclasses.replace(model.config, weights=FLOATING)
    for name, got in exact.items():
        if (scale := stored.get(f"{name}_scale")) is not None:
            want = by_hand(stored[name], scale)
        else:
            want = stored[name]
        # By way of float32, in which products are computed.
        assert got.dtype == dtype
        assert got.tobytes() == want.astype(np.float32).astype(dtype).tobytes(), name


@every_format
def test_logits_are_those_of_the_oracle_with_the_weights_by_hand(formats):
    model = quantize(model_to_quantize("float32"), formats)
    tokens = random_tokens(model.config, 2, 9)
    want = oracle_weights(dequantize(model, jnp.float32))
    got = np.asarray(whole(model, tokens))
    for b in range(2):
        rows = np.stack(
            [oracle.next_logits(list(tokens[b, : t + 1]), want, model.config) for t in range(9)]
        )
        assert_close(got[b], rows, "model_vs_oracle_float32")


@every_format
def test_in_bfloat16_logits_are_as_close_to_float32_as_without_quantization(formats):
    model = quantize(model_to_quantize(), formats)
    tokens = random_tokens(model.config, 3, 12)
    want = np.asarray(whole(dequantize(model, jnp.float32), tokens))
    assert_close(np.asarray(whole(model, tokens)), want, "model_vs_oracle_bfloat16")


def test_int4_is_computed_with_the_very_weights_of_the_dequantized_model():
    model = quantize(model_to_quantize(), "int4", 32)
    tokens = random_tokens(model.config, 3, 12)
    got, want = whole(model, tokens), whole(dequantize(model), tokens)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_runs_with_every_format(name):
    fields = {"model_dim": 96, "ffw_dim": 160, "head_dim": 64}
    model = random_model(name, "float32", config=tuple(fields.items()))
    tied = model.config.tied_embeddings
    small = quantize(model, dataclasses.replace(MIXED, head=None) if tied else MIXED)
    tokens = random_tokens(small.config, 2, 7)
    assert_close(
        np.asarray(whole(small, tokens)),
        np.asarray(whole(dequantize(small), tokens)),
        "cached_vs_whole_float32",
    )


def test_decoding_with_a_cache_is_the_whole_sequence_again():
    model = quantize(model_to_quantize("float32"), MIXED)
    tokens = random_tokens(model.config, 2, 9)
    cache = KVCache.create(model.config, 2, 10, jnp.float32)
    first, cache = grow(model, tokens[:, :5], cache)
    rest, _ = grow(model, tokens[:, 5:], cache)
    assert_close(
        np.concatenate([first, rest], axis=1),
        np.asarray(whole(model, tokens)),
        "cached_vs_whole_float32",
    )


def test_random_weights_of_a_quantized_configuration_have_unit_gain():
    config = dataclasses.replace(model_to_quantize().config, weights=MIXED)
    model = Transformer(config, rngs=nnx.Rngs(0))
    exact = named_arrays(dequantize(model, jnp.float32))
    for name in ("layers.qkv", "layers.attn_out", "layers.down", "head"):
        deviation = exact[name].std() * np.sqrt(exact[name].shape[-1])
        assert 0.9 < deviation < 1.2, name
        assert abs(exact[name].mean()) < 0.05 * exact[name].std(), name


def test_a_head_of_its_own_is_quantized_where_asked_and_a_tied_one_untied():
    untied = quantize(model_to_quantize(), "int4", 32, head="int8")
    assert str(untied.config.weights) == (
        "int4 in groups of 32: qkv, attn_out, gate_up, down; int8: head"
    )
    tied = model_to_quantize(name="grouped, tied, stretched rope")
    assert quantize(tied, "int8").head is None
    small = quantize(tied, "int8", head="int8")
    assert not small.config.tied_embeddings
    assert small.config.num_params == tied.config.num_params + tied.embed[...].size
    exact = named_arrays(dequantize(small, jnp.float32))
    assert relative_error(exact["head"].ravel(), exact["embed"].ravel()) < 0.011
    assert tied.config.tied_embeddings  # what was given stays as it was


def test_progress_counts_the_bytes_of_matrices():
    model, told = model_to_quantize(), []
    quantize(model, MIXED, progress=lambda *figures: told.append(figures))
    arrays = named_arrays(model)
    total = sum(
        arrays[name].nbytes for name in ("layers.qkv", "layers.attn_out", "layers.down", "head")
    )
    assert [of for _, of in told] == [total] * 4
    assert told[-1][0] == total
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_model_takes_the_bytes_that_its_formats_say():
    shipped = checkpoints.load(checkpoints.SHIPPED_MODEL)
    c = shipped.config
    rest = 2 * (c.vocab_size * c.model_dim + (2 * c.num_layers + 1) * c.model_dim)
    rows = c.num_layers * sum(out for out, _ in c.matrices.values())
    numbers = c.num_layers * sum(out * inputs for out, inputs in c.matrices.values())
    assert nbytes(shipped) == rest + 2 * numbers
    assert nbytes(quantize(shipped, "int8")) == rest + numbers + 4 * rows
    for size in (32, 64, 128):
        assert nbytes(quantize(shipped, "int4", size)) == rest + numbers // 2 + 2 * numbers // size


# What is refused


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda m: quantize(m, "int2"), ValueError, "to 'int8' or 'int4', got 'int2'"),  # pyright: ignore[reportArgumentType]
        (lambda m: quantize(m, "int8", head="fp8"), ValueError, "to 'int8' or 'int4', got 'fp8'"),  # pyright: ignore[reportArgumentType]
        (lambda m: quantize(m, "int4", 16), ValueError, "32, 64 or 128 inputs, got group_size=16"),
        (
            lambda m: quantize(m, "int4"),
            ValueError,
            "qkv of custom cannot be int4 in groups of 128. .* multiple of 128; they are 96. "
            "Choose group_size=32",
        ),
        (
            lambda m: quantize(m, MIXED, head="int8"),
            TypeError,
            "says the head's format itself; head='int8'",
        ),
        (
            lambda m: quantize(quantize(m, "int8"), "int8"),
            ValueError,
            r"rounded once, and those of custom are quantized already \(int8: qkv, .*down\)",
        ),
    ],
)
def test_what_cannot_be_quantized_is_a_sentence(ask, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        ask(model_to_quantize())
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(odd):
    model = nnx.clone(model_to_quantize())
    model.layers.down[...] = model.layers.down[...].at[1, 2, 3].set(odd)
    with pytest.raises(ValueError, match=r"finite numbers only, and layers\.down of custom"):
        quantize(model, "int8")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WeightFormat(bits=3), "Quantized weights have 4 or 8 bits, got 3."),
        (lambda: WeightFormat(bits=8.0), "Quantized weights have 4 or 8 bits, got 8.0."),  # pyright: ignore[reportArgumentType]
        (
            lambda: WeightFormat(bits=8, group_size=128),
            "int8 weights have one scale a row, their group_size is None; or groups of 32. Got "
            "group_size=128.",
        ),
        (
            lambda: WeightFormat(bits=4),
            "A group of int4 weights has 32, 64 or 128 inputs, got group_size=None.",
        ),
        (
            lambda: WeightFormats(down="int8"),  # pyright: ignore[reportArgumentType]
            "WeightFormats.down is a WeightFormat or None, got 'int8'.",
        ),
        (
            lambda: WeightFormats.from_dict({"embed": None}),
            "weights is a table of the fields qkv, attn_out, gate_up, down, head; got "
            "{'embed': None}.",
        ),
        (
            lambda: WeightFormats.from_dict({"qkv": {"group_size": 32}}),
            "weights.qkv needs bits, got {'group_size': 32}.",
        ),
        (
            lambda: WeightFormats.from_dict({"qkv": "int8"}),
            "weights.qkv is a table of the fields bits, group_size, scale_dtype, offset; got "
            "'int8'.",
        ),
        (
            lambda: dataclasses.replace(PRESETS["llama3.1-8b"], weights={}),
            "ModelConfig.weights must be a WeightFormats, got {}.",
        ),
        (
            lambda: dataclasses.replace(PRESETS["llama3.2-1b"], weights=WeightFormats(head=INT8)),
            "A tied head is the embedding, which is not quantized: weights.head must be None where "
            "tied_embeddings is true, got int8. ffjax.quantize with head= makes a model whose head "
            "is an array of its own.",
        ),
    ],
)
def test_formats_that_cannot_be_are_refused(make, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


@every_format
def test_formats_as_plain_data_and_back(formats):
    config = dataclasses.replace(model_to_quantize().config, weights=formats)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.weights == formats
    assert again != dataclasses.replace(config, weights=FLOATING)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_quantized(name):
    config = PRESETS[name]
    # What the kernel reads; 576 inputs are no whole groups of 128.
    group = 64 if config.model_dim % 128 else 128
    assert group == 128 or name == "smollm2-135m"
    for layers in (INT8, int4(group)):
        formats = WeightFormats.of_layers(layers, None if config.tied_embeddings else layers)
        assert str(dataclasses.replace(config, weights=formats).weights).startswith(f"{layers}: ")


# What it is for


@pytest.fixture(scope="module")
def held_out() -> tuple[Transformer, bytes, float]:
    """The shipped model, a text that it never saw, and how well it predicts that."""
    texts = [source.text for source in read_sources()[1]]
    text = min(texts, key=lambda text: abs(len(text) - 4000))
    model = checkpoints.load(checkpoints.SHIPPED_MODEL)
    return model, text, bits_per_byte(model, [text], context=512)


@pytest.mark.parametrize(
    ("arguments", "most"), [(("int8",), 0.005), (("int4", 128), 0.05), (("int4", 32), 0.05)]
)
def test_the_shipped_model_predicts_about_as_well(arguments, most, held_out):
    model, text, plain = held_out
    assert bits_per_byte(quantize(model, *arguments), [text], context=512) < plain * (1 + most)


def test_it_is_generated_with_like_any_other_model():
    model = ffjax.quantize(ffjax.load(ffjax.SHIPPED_MODEL), "int4")
    out = ffjax.generate(model, [[1, 2, 3], [4]], max_new_tokens=3)
    assert out.implementation in ("xla", "pallas")
    assert [len(tokens) for tokens in out.tokens] == [3, 3]
    step = nnx.jit(decode_step)(model, KVCache.create(model.config, 1, 4), jnp.array([7]))
    assert step.token.tolist() == jax.device_get(step.logits).argmax(-1).tolist()
