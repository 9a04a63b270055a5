"""The model in the package is small, loads, and has learned Python."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import checkpoints
from ffjax.config import preset
from ffjax.evaluate import bits_per_byte
from ffjax.generation import generate
from ffjax.stdlib_text import read_sources
from ffjax.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.once(
        "What the model predicts is no matter of a Python; a sample loads it.",
        sample=[
            "test_it_is_the_preset_in_bfloat16",
            "test_its_manifest_says_how_it_was_made",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]


@pytest.fixture(scope="module")
def model():
    return checkpoints.load(checkpoints.SHIPPED_MODEL)


def test_it_lies_in_the_package_and_takes_less_than_8_megabytes():
    assert checkpoints.SHIPPED_MODEL.parent == Path(checkpoints.__file__).parent
    sizes = [f.stat().st_size for f in checkpoints.SHIPPED_MODEL.rglob("*") if f.is_file()]
    assert 1_000_000 < sum(sizes) < 8_000_000


def test_it_is_the_preset_in_bfloat16(model):
    assert model.config == preset("python-bytes-3m")
    assert model.dtype == jnp.bfloat16
    assert 2_000_000 < model.config.num_params < 4_000_000


def test_its_manifest_says_how_it_was_made():
    source = checkpoints.Manifest.read(checkpoints.SHIPPED_MODEL).source
    assert source is not None
    assert source["held_out_bits_per_byte"] < 1.8
    assert source["context"] >= 1024
    assert source["train_bytes"] > 4_000_000
    assert source["held_out_bytes"] > 100_000
    assert {"python", "steps", "batch", "seed", "learning_rate", "evaluation"} <= source.keys()


def test_it_predicts_held_out_files_in_under_1_8_bits_a_byte(model):
    _, held_out = read_sources()
    # The beginnings of the longest files, a slice that two slow cores can read.
    longest = sorted(held_out, key=lambda source: -len(source.text))[:6]
    slices = [source.text[:2000] for source in longest]
    assert bits_per_byte(model, slices, context=1024, batch=3) < 1.8


def test_far_into_a_file_it_still_predicts(model):
    _, held_out = read_sources()
    longest = max(held_out, key=lambda source: len(source.text))
    data = longest.text[:2040]
    near = bits_per_byte(model, [data[1020:]], context=1024, batch=1)
    whole = bits_per_byte(model, [data], context=2048, batch=1)
    first = bits_per_byte(model, [data[:1020]], context=1024, batch=1)
    # The second half, with the first before it, costs no more than standing alone.
    assert 2 * whole - first < near + 0.1


def test_it_writes_python(model):
    tokenizer = ByteTokenizer()
    prompt = "import os\nimport sys\n\n\ndef "
    out = generate(model, [tokenizer.encode(prompt)], 40, implementation="xla")
    written = tokenizer.decode(out.tokens[0])
    name, bracket, rest = written.partition("(")
    assert name.isidentifier()
    assert bracket
    assert ":\n    " in rest
