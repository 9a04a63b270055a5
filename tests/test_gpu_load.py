"""Checkpoints saved from a GPU and loaded onto it, block by block."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from quantize_cases import GROUPED, kernel_config

import checkpoints
from checkpoints import blocks
from ffjax.benchmark.inputs import random_model
from ffjax.config import ModelConfig
from ffjax.formats import INT8, WeightFormats

pytestmark = pytest.mark.gpu

CONFIGS: dict[str, ModelConfig] = {
    "bfloat16": kernel_config(WeightFormats(), num_layers=30),
    "int8": kernel_config(WeightFormats.of_layers(INT8, INT8), num_layers=30),
    "groups": kernel_config(GROUPED["of files"], num_layers=30),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_bit_for_bit(monkeypatch, tmp_path, name):
    monkeypatch.setattr(blocks, "_CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 19)
    model = random_model(CONFIGS[name])
    checkpoints.save(model, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model")
    kept, found = (nnx.to_flat_state(nnx.state(x, nnx.Param)) for x in (model, loaded))
    several = 0
    for (path, one), (other_path, other) in zip(kept, found, strict=True):
        assert path == other_path
        assert {x.platform for x in other[...].devices()} == {jax.default_backend()}
        assert np.asarray(one[...]).tobytes() == np.asarray(other[...]).tobytes()
        several += blocks.is_large(one.shape, one.dtype)
    assert several >= 3
