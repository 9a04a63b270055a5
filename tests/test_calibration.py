"""A calibrated model is rounded for what its layers compute, and is a model like any other."""

import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_close
from quantize_cases import named_arrays
from reference_cases import CONFIGS, quick_jit, random_model, random_tokens

import checkpoints
import ffjax
from ffjax import Calibration, calibration_tokens
from ffjax.calibration import _rounded
from ffjax.cli import main
from ffjax.commands.inspect import inspect
from ffjax.formats import INT8, WeightFormats, int4
from ffjax.layer_inputs import embed, head_sums, layer_sums, run_layer
from ffjax.model import LayerAt, Transformer
from ffjax.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; what is refused is Python.",
        sample=[
            "test_what_layers_take_is_what_the_model_shows[two ropes, one stretched]",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# Heads as wide as the model, and hidden activations too: few programs are compiled.
SIZES = (
    *(("model_dim", 96), ("ffw_dim", 96), ("head_dim", 32)),
    *(("num_heads", 3), ("num_kv_heads", 1)),
)


def small_model(dtype: str = "float32") -> Transformer:
    """One that reads bytes."""
    return random_model("grouped, untied", dtype, config=(*SIZES, ("vocab_size", 257)))


def tokens_of(model: Transformer) -> np.ndarray:
    """More tokens than a matrix has inputs: 16 sequences of 24."""
    return random_tokens(model.config, 16, 24)


# What matrices are given


@quick_jit
def shown_and_computed(model, tokens):
    """What the model shows of two layers; what each makes by itself; the sums of the second."""
    shown = model.observe(tokens, lambda x: x)
    split, stacked = nnx.split(model), model.stacked_weights()
    x, outs, sums = embed(*split, tokens), [], None
    for layer in range(2):
        local, other = (None if kind is None else kind[layer] for kind in model.layer_kinds())
        at = LayerAt(jnp.int32(0), local, {key: of[layer] for key, of in stacked.items()})
        zeros = jnp.zeros((model.config.ffw_dim,) * 2)
        sums = layer_sums(*split, at, at, other, x, None, (zeros, None), name="down")
        outs.append(x := run_layer(*split, at, other, x))
    return shown["residual_out"], shown["hidden"], outs, sums


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_what_layers_take_is_what_the_model_shows[two ropes, one stretched]",
        "test_what_layers_take_is_what_the_model_shows[every bias]",
        "test_what_layers_take_is_what_the_model_shows[caps, norms on both sides, GELU]",
        "test_what_layers_take_is_what_the_model_shows[every scale]",
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_layers_take_is_what_the_model_shows(name):
    """Layer after layer by itself, of every structural kind, against the model as a whole."""
    model = random_model(name, "float32", config=(("num_layers", 2),))
    tokens = random_tokens(model.config, 2, 9)
    want, hidden, got, (hessian, missed) = shown_and_computed(model, tokens)
    for pair in zip(got, want, strict=True):
        assert_close(np.asarray(pair[0]), np.asarray(pair[1]), "cached_vs_whole_float32")
    hidden = np.asarray(hidden[1]).reshape(-1, model.config.ffw_dim)
    assert_close(np.asarray(hessian), hidden.T @ hidden, "cached_vs_whole_float32")
    assert missed is None


def test_sums_are_of_what_each_matrix_takes():
    model = small_model()
    tokens, c = tokens_of(model), model.config
    shown = nnx.jit(lambda model: model.observe(tokens, lambda x: x))(model)
    split, w = nnx.split(model), {n: of[0] for n, of in model.stacked_weights().items()}
    at = LayerAt(jnp.int32(0), None, w)
    x = embed(*split, tokens)
    other = x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape))

    def both(size: int, add, *more, **how):
        zeros = jnp.zeros((size, size))
        return map(np.asarray, add(*split, *more, x, other, (zeros, zeros), **how))

    normed = {
        name: np.asarray(value * jax.lax.rsqrt((value**2).mean(-1, keepdims=True) + c.norm_eps))
        for name, value in (("x", x), ("other", other))
    }
    taken, before = (normed[name] * np.asarray(w["attn_norm"]) for name in ("x", "other"))
    taken, before = taken.reshape(-1, c.model_dim), before.reshape(-1, c.model_dim)
    hessian, missed = both(c.model_dim, layer_sums, at, at, None, name="qkv")
    assert np.allclose(hessian, taken.T @ taken, rtol=1e-4, atol=1e-3)
    assert np.allclose(missed, (before - taken).T @ taken, rtol=1e-3, atol=1e-3)
    hessian, _ = both(c.num_heads * c.head_dim, layer_sums, at, at, None, name="attn_out")
    attended = np.asarray(shown["attended"][0]).reshape(len(taken), -1)
    assert np.allclose(hessian, attended.T @ attended, rtol=1e-4, atol=1e-3)
    taken = (normed["x"] * np.asarray(model.final_norm[...])).reshape(len(taken), -1)
    hessian, _ = both(c.model_dim, head_sums)
    assert np.allclose(hessian, taken.T @ taken, rtol=1e-4, atol=1e-3)


# The model


def test_products_change_least_of_all():
    """On the tokens that it was rounded for; what is stored has the shapes of plain rounding."""
    model = small_model()
    tokens = tokens_of(model)
    logits = jax.jit(lambda state, graph: nnx.merge(graph, state)(tokens), static_argnums=1)

    def off(other: Transformer) -> float:
        of = [logits(state, graph) for graph, state in map(nnx.split, (model, other))]
        return float(jnp.square(of[0] - of[1]).mean())

    formats = WeightFormats.of_layers(int4(32))
    told: list[tuple[int, int]] = []
    made = {
        "plain": ffjax.quantize(model, formats),
        "calibrated": ffjax.quantize(
            model,
            formats,
            calibration=Calibration(tokens=tokens, batch=16),
            progress=lambda *figures: told.append(figures),
        ),
        "not catching up": ffjax.quantize(
            model, formats, calibration=Calibration(tokens=tokens, batch=16, catch_up=False)
        ),
    }
    errors = {name: off(other) for name, other in made.items()}
    assert errors["calibrated"] < 0.8 * errors["not catching up"] < 0.6 * errors["plain"]
    plain, calibrated = (named_arrays(made[name]) for name in ("plain", "calibrated"))
    assert made["plain"].config == made["calibrated"].config
    assert {n: (a.shape, a.dtype) for n, a in plain.items()} == {
        n: (a.shape, a.dtype) for n, a in calibrated.items()
    }
    assert calibrated["layers.attn_norm"].tobytes() == plain["layers.attn_norm"].tobytes()
    # Four matrices of each of three layers.
    arrays = named_arrays(model)
    total = sum(arrays[f"layers.{n}"].nbytes for n in ("qkv", "attn_out", "gate_up", "down"))
    assert [of for _, of in told] == [total] * 12
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1][0] == total


def test_a_tied_head_becomes_an_array_of_its_own_and_what_has_no_format_stays():
    fields = (*SIZES, ("num_layers", 1))
    model = random_model("grouped, tied, stretched rope", "bfloat16", config=fields)
    calibration = Calibration(tokens=random_tokens(model.config, 3, 8), batch=2)
    made = ffjax.quantize(model, WeightFormats(down=INT8, head=int4(32)), calibration=calibration)
    assert model.config.tied_embeddings and not made.config.tied_embeddings
    arrays, before = named_arrays(made), named_arrays(model)
    assert arrays["head"].dtype == np.int32
    for name in ("embed", "layers.qkv", "layers.gate_up", "layers.attn_out"):
        assert arrays[name].tobytes() == before[name].tobytes()
    plain = named_arrays(ffjax.quantize(model, made.config.weights))
    assert arrays["head"].tobytes() != plain["head"].tobytes()
    assert (arrays["layers.down"] != plain["layers.down"]).any()


def test_dampening_is_raised_where_float32_needs_it():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.float32)
    x = np.random.default_rng(1).standard_normal((7, 64)).astype(np.float32)
    sums = jnp.asarray(x.T @ x), None
    tokens = np.zeros((1, 1), int)
    made = [
        _rounded(weight, sums, int4(32), Calibration(tokens=tokens, dampening=d), "down")
        for d in (0, 1e-3)
    ]
    assert all(np.array_equal(*pair) for pair in zip(*made, strict=True))


# What is refused


@pytest.mark.parametrize("texts", ["text", b"text", ["text"]])
def test_calibration_texts_are_bytes_of_several_files(texts):
    with pytest.raises(TypeError, match="several texts, a list of bytes, one for each file"):
        calibration_tokens(texts)


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"tokens": [1, 2]}, ValueError, r"tokens \[n, T\] .* got shape \(2,\)"),
        ({"tokens": np.zeros((0, 4), int)}, ValueError, r"got shape \(0, 4\)"),
        ({"tokens": [[1, 2], [3]]}, ValueError, r"sequences of one length, tokens \[n, T\]"),
        ({"tokens": [[2**32 + 5]]}, ValueError, "from 0 on; got 4294967301"),
        ({"tokens": [[-1]]}, ValueError, "from 0 on; got -1"),
        ({"tokens": [[0.5]]}, TypeError, "Tokens are integers, got float64"),
        ({"batch": 0}, ValueError, "at least one sequence, got batch=0"),
        ({"dampening": 1.5}, ValueError, "from 0 to 1, got 1.5"),
        ({"dampening": float("nan")}, ValueError, "from 0 to 1, got nan"),
        ({"order": "random"}, ValueError, "order 'stored' or 'largest', got 'random'"),
    ],
)
def test_a_calibration_that_cannot_be_is_a_sentence(fields, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        Calibration(**{"tokens": [[1, 2]], **fields})
    assert str(caught.value).endswith(".")


def test_tokens_and_positions_that_a_model_has_not_are_refused():
    model = small_model()
    with pytest.raises(ValueError, match=r"0 to 256; the calibration text has 257 at index 1\."):
        ffjax.quantize(model, "int4", 32, calibration=Calibration(tokens=[[0, 257]]))
    long = Calibration(tokens=np.zeros((1, 8193), int))
    with pytest.raises(ValueError, match=r"have 8193 tokens; custom was made for 8192 positions"):
        ffjax.quantize(model, "int4", 32, calibration=long)


def test_activations_that_are_not_finite_are_refused():
    fields = (*SIZES, ("num_layers", 1))
    model = nnx.clone(random_model("grouped, tied, stretched rope", "bfloat16", config=fields))
    model.layers.mlp_norm[...] = model.layers.mlp_norm[...].at[0, 3].set(jnp.inf)
    calibration = Calibration(tokens=random_tokens(model.config, 2, 8), batch=2)
    sentence = r"those of gate_up of layer 0 of custom are not finite numbers\. See `ffjax doctor`"
    with pytest.raises(ValueError, match=sentence):
        ffjax.quantize(model, WeightFormats(gate_up=int4(32)), calibration=calibration)


# The text


class Words:
    """Tokens are words; BOS is 1, and 2 ends a text."""

    eot_id, eot_ids, vocab_size = 2, (2,), 100

    def split(self, text: str) -> tuple[list[int], list[int]]:
        return [1], [int(word) for word in text.split()]


def test_sequences_are_spread_over_the_texts():
    rows = calibration_tokens([bytes(range(10)), bytes(range(10, 20))], sequences=3, length=6)
    assert rows.dtype == np.int32
    eot = ByteTokenizer.eot_id
    # Of 22 tokens, from 0, 8 and 16.
    assert rows.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [8, 9, eot, 10, 11, 12],
        [15, 16, 17, 18, 19, eot],
    ]


def test_each_sequence_begins_as_the_tokenizer_begins_a_text():
    text = " ".join(map(str, range(10, 30))).encode()
    rows = calibration_tokens([text], Words(), sequences=9, length=8)  # pyright: ignore[reportArgumentType]
    assert rows.shape == (3, 8)  # 21 tokens are three times seven
    assert rows[:, 0].tolist() == [1, 1, 1]
    assert rows[:, 1:].ravel().tolist() == [*range(10, 30), 2]
    # A short text is one sequence of its length.
    assert calibration_tokens([b"5 6 7"], Words(), length=512).tolist() == [[1, 5, 6, 7, 2]]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("texts", "how", "sentence"),
    [
        ([b""], {}, "a text of at least one token; there is none."),
        ([], {}, "a text of at least one token; there is none."),
        ([b"5"], {"length": 1}, "room for the 1 tokens that the tokenizer puts before"),
        ([b"5"], {"length": 0}, "got sequences=128, length=0."),
        ([b"5", b"6 \xff"], {}, "of calibration text 1, the byte at 2 is none."),
    ],
)
def test_a_text_that_cannot_be_is_a_sentence(texts, how, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        calibration_tokens(texts, Words(), **how)  # pyright: ignore[reportArgumentType]


# The command line


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, and texts."""
    place = tmp_path_factory.mktemp("calibration")
    checkpoints.save(small_model("bfloat16"), place / "model")
    (place / "a.txt").write_bytes(b"import os\n" * 30)
    (place / "b.txt").write_bytes(bytes(range(256)))
    return place


def test_quantize_with_a_text_from_the_command_line(place, capsys):
    asked = ["quantize", str(place / "model"), str(place / "out"), "--weights", "int4"]
    asked += ["--group-size", "32", "--calibrate", str(place / "a.txt")]
    asked += ["--calibrate", str(place / "b.txt"), "--sequences", "6", "--length", "16"]
    asked += ["--calibrate-batch", "3", "--dampening", "0.02", "--no-catching-up"]
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert "int4 in groups of 32: qkv, attn_out, gate_up, down" in printed.out
    assert "calibrating with " in printed.err
    texts = [(place / name).read_bytes() for name in ("a.txt", "b.txt")]
    tokens = calibration_tokens(texts, sequences=6, length=16)
    how = Calibration(tokens=tokens, batch=3, dampening=0.02, catch_up=False)
    made = ffjax.quantize(small_model("bfloat16"), "int4", 32, calibration=how)
    loaded = checkpoints.load(place / "out")
    want, got = named_arrays(made), named_arrays(loaded)
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in want.items()}
    ids = jnp.asarray(tokens[:1])
    assert np.asarray(loaded(ids)).tobytes() == np.asarray(made(ids)).tobytes()
    # What is kept of how it was made.
    kept = inspect(place / "out")["source"]["calibration"]
    assert kept.pop("texts") == [
        {"name": "a.txt", "sha256": _sha256(texts[0])},
        {"name": "b.txt", "sha256": _sha256(texts[1])},
    ]
    assert kept == {
        "method": "GPTQ",
        "sequences": 6,
        "length": 16,
        "dampening": 0.02,
        "order": "largest",
    }
    assert main(["inspect", str(place / "out")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["calibrated"].startswith("method GPTQ; sequences 6; length 16; ")
    assert json.dumps(_sha256(texts[1])) in lines["calibrated"]
    assert main(["inspect", str(place / "model")]) == 0
    assert "calibrated" not in capsys.readouterr().out


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def test_a_calibration_that_is_broken_off_leaves_nothing(place, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ffjax.calibration.layer_sums", stop)
    asked = ["quantize", str(place / "model"), str(place / "broken"), "--weights", "int4"]
    asked += ["--group-size", "32", "--calibrate", str(place / "a.txt")]
    before = sorted(place.iterdir())
    assert main(asked) == 130
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--length", "9"], "--length is of calibration. Give --calibrate FILE, or leave it out."),
        (["--in-stored-order"], "--in-stored-order is of calibration."),
        (["--dampening", "0"], "--dampening is of calibration."),
        (["--calibrate="], "--calibrate is empty. Give a file."),
        (["--calibrate", "nothing.txt"], "nothing.txt"),
        (["--calibrate", "x", "--dampening", "2"], "--dampening: a number from 0 to 1 is needed"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_loaded(place, capsys, more, sentence):
    out = place / "never"
    asked = ["quantize", str(place / "model"), str(out), "--weights", "int4", *more]
    assert main(asked) == 2
    printed, err = capsys.readouterr()
    assert sentence in err
    assert "Traceback" not in err
    assert not out.exists()
    assert printed == ""
