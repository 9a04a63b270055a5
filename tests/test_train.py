"""The training script learns, keeps whole files out, and measures what it says it measures."""

import importlib
import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
from ffjax.config import ModelConfig
from ffjax.evaluate import bits_per_byte, make_windows
from ffjax.model import Transformer
from ffjax.stdlib_text import Source, is_held_out, read_sources

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
train = importlib.import_module("train")

pytestmark = [
    pytest.mark.once(
        "A script for who trains; a sample counts bits.",
        sample=[
            "test_bits_per_byte_of_one_text_against_an_independent_sum[16]",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

EOT = 256
CONFIG = ModelConfig(
    name="tiny",
    vocab_size=257,
    num_layers=2,
    model_dim=24,
    ffw_dim=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    tied_embeddings=True,
    max_context=512,
)
SOURCES = [
    Source("a.py", b"def double(x):\n    return 2 * x\n" * 20),
    Source("b.py", b"import os\n\nprint(os.getcwd())\n" * 20),
]


def plan(**changes):
    return train.Plan(**{"steps": 20, "batch": 4, "context": 32, "steps_a_call": 8, **changes})


# Text


def test_held_out_files_of_this_python_are_whole_and_in_no_training_text():
    kept, held_out = read_sources()
    names = [[source.name for source in part] for part in (kept, held_out)]
    assert not set(names[0]) & set(names[1])
    assert all(part == sorted(part) for part in names)
    root = Path(os.__file__).parent
    for source in held_out:
        assert source.text == (root / source.name).read_bytes().replace(b"\r\n", b"\n")
    # Nor under another name, apart from what is too short to be anybody's.
    texts = {source.text for source in kept}
    assert not [source.name for source in held_out if source.text in texts and source.text[200:]]
    total = sum(len(source.text) for source in kept + held_out)
    assert 0.02 < sum(len(source.text) for source in held_out) / total < 0.1
    assert total > 4_000_000


def test_only_the_librarys_own_sources_are_read(tmp_path):
    names = {"os.py": b"a\r\nb\n", "json/decoder.py": b"c\n", "empty.py": b""}
    left_out = ["test/test_os.py", "json/tests/x.py", "site-packages/x.py", "encodings/cp437.py"]
    left_out += [
        "idlelib/idle_test/x.py",
        "pydoc_data/topics.py",
        "lib2to3/pytree.py",
        "_sysconfigdata__linux_.py",
    ]
    left_out += ["README.txt"]
    for name, data in {**names, **dict.fromkeys(left_out, b"no\n")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    kept, held_out = read_sources(tmp_path)
    found = {source.name: source.text for source in kept + held_out}
    assert found == {"json/decoder.py": b"c\n", "os.py": b"a\nb\n"}


def test_a_files_name_alone_decides_whether_it_is_held_out():
    # Recorded: the shipped model was trained under this choice.
    assert is_held_out("json/__init__.py")
    assert not is_held_out("os.py")
    names = [f"package/module{i}.py" for i in range(4000)]
    assert 200 < sum(map(is_held_out, names)) < 300  # 250 expected


def test_files_are_separated_by_end_of_text():
    tokens = train.as_tokens([Source("a", b"\x00\xff"), Source("b", b"c")])
    assert tokens.tolist() == [EOT, 0, 255, EOT, ord("c"), EOT]


# Bits per byte


def oracle(model: Transformer, data: bytes, context: int) -> float:
    """Bits per byte, token by token, in float64, from the method's words alone."""
    tokens = [EOT, *data, EOT]
    bits = 0.0
    for i in range(len(tokens) - 1):  # predicts tokens[i + 1]
        windows_before = max(0, math.ceil((i + 1 - context) / (context // 2)))
        window = tokens[windows_before * (context // 2) : i + 1]
        # What follows a token changes nothing before it: one shape, one program.
        padded = jnp.array([window + [7] * (context - len(window))])
        logits = np.asarray(forward(model, padded), np.float64)[0, len(window) - 1]
        logits -= logits.max()
        bits += (math.log(np.exp(logits).sum()) - logits[tokens[i + 1]]) / math.log(2)
    return bits / len(data)


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@pytest.mark.parametrize("size", [1, 14, 15, 16, 23, 24, 61])
def test_bits_per_byte_of_one_text_against_an_independent_sum(size):
    # Weights of which the predictions depend strongly on what came before.
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 30
    data = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
    expected = oracle(model, data, 16)
    assert expected > 8
    assert bits_per_byte(model, [data], context=16, batch=3) == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_weighs_texts_by_their_bytes():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    texts = [b"x" * 5, b"import os\n" * 9]
    each = [bits_per_byte(model, [data], context=16) for data in texts]
    both = bits_per_byte(model, texts, context=16)
    assert both == pytest.approx((5 * each[0] + 90 * each[1]) / 95, rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    model.final_norm[...] = jnp.zeros_like(model.final_norm[...])
    # 40 bytes, and the end of the text.
    assert bits_per_byte(model, [b"y" * 40], context=16) == pytest.approx(
        math.log2(257) * 41 / 40, rel=1e-6
    )


@pytest.mark.parametrize("context", [0, 1, 15])
def test_a_window_that_cannot_be_halved_is_refused(context):
    with pytest.raises(ValueError, match=f"even, got {context}"):
        make_windows(b"abc", context)


# Training


def test_training_learns_the_text():
    losses, progress = [], None
    settings = plan(steps=60, steps_a_call=20, learning_rate=1e-2)
    for progress in train.train(CONFIG, SOURCES, settings):
        losses += progress.losses.tolist()
        assert progress.steps == len(losses)
    assert progress is not None
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log2(257), rel=0.02)
    assert np.mean(losses[-8:]) < 0.6 * losses[0]
    trained = progress.model()
    assert trained.dtype == jnp.bfloat16
    texts = [source.text for source in SOURCES]
    fresh = Transformer(CONFIG, rngs=nnx.Rngs(0))
    learned = bits_per_byte(trained, texts, context=32)
    assert learned < 0.6 * bits_per_byte(fresh, texts, context=32)


def test_how_many_steps_a_call_takes_changes_nothing():
    def losses(**changes):
        runs = train.train(CONFIG, SOURCES, plan(steps=4, **changes))
        return np.concatenate([progress.losses for progress in runs])

    together, apart = losses(steps_a_call=4), losses(steps_a_call=2)
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    assert len(set(together.tolist())) == 4  # every step draws windows of its own


def test_weight_decay_touches_the_matrices_of_the_layers_alone():
    weights = nnx.state(Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    optimizer = train.make_optimizer(plan(weight_decay=0.5))

    @jax.jit
    def second_update(weights):
        still = jax.tree.map(jnp.zeros_like, weights)
        # The first step's learning rate is zero.
        _, state = optimizer.update(still, optimizer.init(weights), weights)
        return optimizer.update(still, state, weights)[0]

    updates = nnx.to_flat_state(second_update(weights))
    moved = {path[-1] for path, leaf in updates if jnp.any(leaf[...] != 0)}
    assert moved == {"qkv", "attn_out", "gate_up", "down"}


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch": -1}, {"context": 0}, {"context": 33}, {"steps_a_call": 0}]
)
def test_an_impossible_plan_is_refused(change):
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name}.*got {value}"):
        plan(**change)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="window of 32 tokens needs a longer text than 5 tokens"):
        next(train.train(CONFIG, [Source("a", b"abc")], plan()))


def test_the_script_saves_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "preset", lambda name: CONFIG)
    monkeypatch.setattr(train, "read_sources", lambda: (SOURCES, SOURCES[:1]))
    out = tmp_path / "model"
    arguments = ["--batch=4", "--context=32", "--steps-a-call=4", "--steps=8", f"--out={out}"]
    train.main(arguments)
    printed = capsys.readouterr().out
    source = checkpoints.Manifest.read(out).source
    assert source is not None
    assert (source["steps"], source["batch"], source["context"]) == (8, 4, 32)
    assert source["train_bytes"] == sum(len(s.text) for s in SOURCES)
    assert source["held_out_bytes"] == len(SOURCES[0].text)
    model = checkpoints.load(out)
    assert model.dtype == jnp.bfloat16
    again = bits_per_byte(model, [SOURCES[0].text], context=32)
    assert source["held_out_bits_per_byte"] == pytest.approx(again, abs=1e-4)
    assert f"held out: {source['held_out_bits_per_byte']:.4f} bits per byte" in printed
    assert printed.count("goes on:") == 3

    train.main(["--eval-only", str(out), "--context=32"])
    assert f"held out: {source['held_out_bits_per_byte']:.4f} bits" in capsys.readouterr().out

    with pytest.raises(FileExistsError, match="A training replaces nothing"):
        train.main(arguments)
