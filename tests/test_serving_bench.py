"""The benchmark of serving: what it counts, over a batch without a model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fake_batch import EOS, NAN, FakeBatch

from ffjax.benchmark import serving
from ffjax.config import preset
from ffjax.tokenizer import ByteTokenizer


@pytest.fixture
def fast(monkeypatch):
    """No model's steps: a batch of letters, and a bare step of a millisecond."""

    def batch(model, *, rows, capacity, **how):
        return FakeBatch(rows=rows, capacity=capacity, step_seconds=0.001)

    monkeypatch.setattr(serving, "LiveBatch", batch)
    monkeypatch.setattr(serving, "_bare_step", lambda *_: 0.001)


LOAD = ["--requests", "12", "--clients", "3", "--rows", "2", "--new", "30", "--prompt", "3", "40"]


def test_latencies_stand_beside_the_bare_step(fast):
    config = preset("python-bytes-3m")
    load = serving.Load(requests=12, clients=3, rows=2, new=30, prompt=(3, 40))
    report = serving.measure(SimpleNamespace(config=config), ByteTokenizer(), load)  # pyright: ignore
    data = json.loads(json.dumps(serving.as_data(report)))
    assert (data["requests"], data["lost"], data["other_than_alone"]) == (12, 0, 0)
    assert data["compared_with_alone"] == 12 and data["client"].startswith("openai ")
    first, token, gap = data["latency_ms"].values()
    # Blocks of 8 steps of a millisecond, and three clients for two rows.
    assert token["median"] >= 0.9 and gap["median"] >= 7 and first["p99"] > 20
    assert gap["p99"] >= gap["median"]
    assert token["over_bare_step"] == pytest.approx(token["median"])
    text = serving.as_text(report)
    assert "0 answers were lost" in text and "| to the first token |" in text


def test_what_is_lost_is_counted_and_said(fast, capsys, monkeypatch):
    bodies = serving.Load.bodies

    def some_wrong(self, vocabulary):
        made = bodies(self, vocabulary)
        made[1]["prompt"] = [97, NAN]
        made[2]["ignore_eos"], made[2]["stop_token_ids"] = False, [*range(97, 123), 32, EOS]
        return made

    monkeypatch.setattr(serving.Load, "bodies", some_wrong)
    assert serving.main([*LOAD, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["lost"] == 2 and "NaN or infinite" in report["errors"][0]


def test_what_cannot_be_is_a_sentence(capsys):
    assert serving.main(["--config", "nothing"]) == 2
    assert "No preset is called 'nothing'" in capsys.readouterr().err
