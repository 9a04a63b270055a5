"""The table of what choosing costs, on a CPU: that every way runs and is told."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.benchmark import sampling
from ffjax.benchmark.inputs import random_model, scale_logits
from ffjax.benchmark.sampling import SAMPLERS, Blocks, microseconds
from ffjax.config import preset

pytestmark = pytest.mark.filterwarnings("error")


def test_every_way_is_in_the_table(monkeypatch, capsys):
    made = []

    class Stub:
        def __init__(self, _model, batch, params, *, position):
            made.append((batch, params, position))
            self.steps, self.seconds = 8, 8e-6 * (3 + len(made))

        def compile(self):
            pass

        def run(self):
            return self.seconds

    monkeypatch.setattr(sampling, "Blocks", Stub)
    monkeypatch.setattr(sampling, "random_model", lambda config: config)
    monkeypatch.setattr(sampling, "scale_logits", lambda _, factor: scales.append(factor))
    scales = []
    sampling.main(["--config", "llama3.2-1b", "--batches", "3", "--position", "9"])
    assert scales == [1.0]
    assert made == [(3, params, 9) for params in SAMPLERS.values()]
    out = capsys.readouterr().out
    assert "| batch 3, greedy step 4.0 us | more, us | |" in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and "%" in line]
    want = [f"| {name} | {i}.0 | {i * 25:.1f}% |" for i, name in enumerate(SAMPLERS) if i]
    assert rows == want


@pytest.mark.parametrize("name", ["python-bytes-3m", "gemma3-1b"])  # the latter's norms are 1 + w
def test_logits_are_scaled(name):
    config = dataclasses.replace(preset(name), num_layers=1, vocab_size=64)
    model = random_model(config)
    tokens = jnp.arange(5)[None]
    before = np.asarray(model(tokens), np.float32)
    scale_logits(model, 4.0)
    np.testing.assert_allclose(np.asarray(model(tokens)), 4 * before, rtol=0.03, atol=0.03)


def test_blocks_go_on_and_begin_anew():
    from flax import nnx
    from generate_cases import TINY

    from ffjax.model import Transformer

    model = Transformer(TINY, rngs=nnx.Rngs(0))
    way = Blocks(model, 2, SAMPLERS["all that, and a repetition penalty"], position=5, blocks=2)
    way.compile()
    times = microseconds({"one": way}, 2)
    assert len(times["one"]) == 2 and min(times["one"]) > 0
    cache, *_ = way._going
    assert cache.lengths.tolist() == [5 + way.steps] * 2
