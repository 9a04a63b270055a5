"""The table of what choosing costs, on a CPU: that every way runs and is told."""

import pytest

from ffjax.benchmark import sampling
from ffjax.benchmark.sampling import SAMPLERS, Blocks, microseconds

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
    sampling.main(["--config", "llama3.2-1b", "--batches", "3", "--position", "9"])
    assert made == [(3, params, 9) for params in SAMPLERS.values()]
    out = capsys.readouterr().out
    assert "| batch 3, greedy step 4.0 us | more, us | |" in out
    rows = [line for line in out.splitlines() if line.startswith("| ") and "%" in line]
    want = [f"| {name} | {i}.0 | {i * 25:.1f}% |" for i, name in enumerate(SAMPLERS) if i]
    assert rows == want


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
