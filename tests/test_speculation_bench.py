"""The benchmark of speculation: the same tokens, and how many a step made."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import sys

import jax.numpy as jnp
import pytest
from flax import nnx
from generate_cases import TINY

import checkpoints
import ffjax
from ffjax.benchmark import speculation
from ffjax.benchmark.parting import apart
from ffjax.model import Transformer

pytestmark = pytest.mark.once(
    "What is timed and how it is printed is arithmetic; a sample runs the programs.",
    sample=[
        "test_what_cannot_be_is_a_sentence",
    ],
)

FEW = ["--max-new-tokens", "17", "--repetitions", "1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(Transformer(TINY, rngs=nnx.Rngs(2), dtype=jnp.float32), path)
    return str(path)


@pytest.fixture
def prompt(tmp_path) -> str:
    (tmp_path / "text.py").write_text("def add(a, b):\n" * 2)
    return str(tmp_path / "text.py")


def test_drafts_stand_beside_a_generation_without(path, prompt, capsys):
    asked = ["--model", path, "--draft", path, "--prompt-file", prompt, *FEW]
    assert speculation.main([*asked, "--tokens", "2,4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {(row["speculation"], row["tokens"]): row for row in report["rows"]}
    assert [*rows] == [("none", None), *((s, t) for t in (2, 4) for s in ("lookup", "draft"))]
    assert all(row["differs_at"] is None and row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["none", None]["accepted"] is None and rows["none", None]["tokens_per_step"] == 1
    assert rows["draft", 2]["tokens_per_step"] == 2 and rows["draft", 4]["tokens_per_step"] == 4
    assert rows["draft", 4]["accepted"] == 12
    assert report["prompt_tokens"] == {"text.py": 30}


def test_the_table_says_where_tokens_differ(path, prompt, capsys, monkeypatch):
    generate = speculation.generate

    def changed(*args, **how):
        out = generate(*args, **how)
        tokens = [[*out.tokens[0][:5], 0, *out.tokens[0][6:]]]
        return out if how["speculation"] is None else dataclasses.replace(out, tokens=tokens)

    monkeypatch.setattr(speculation, "generate", changed)
    assert speculation.main(["--model", path, "--prompt-file", prompt, *FEW]) == 1
    said = capsys.readouterr().out
    assert "17 new tokens after text.py (30 tokens)" in said
    assert "the same |" in said
    [gap] = re.findall(r"other from 5, (\d+\.\d+) apart \|", said)
    assert float(gap) > 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_reference_prefers_the_token_that_it_chose(temperature):
    model, prompt = Transformer(TINY, rngs=nnx.Rngs(2), dtype=jnp.float32), [1, 2, 3]
    chosen = ffjax.generate(model, prompt, 9, temperature=temperature, seed=7).tokens[0]
    for token in range(5):
        other = [*chosen[:6], token, *chosen[7:]]
        gap = apart(model, prompt, other, chosen, temperature, 7)
        if token == chosen[6]:
            assert gap is None
            continue
        assert gap is not None and gap > 0
        assert apart(model, prompt, chosen, other, temperature, 7) == -gap
    assert apart(model, prompt, chosen, chosen, temperature, 7) is None
    assert apart(model, prompt, chosen[:4], chosen, temperature, 7) is None


@pytest.mark.parametrize("drafted", [False, True])
def test_a_replay_is_right_as_often_as_it_is_to_be(drafted, capsys, monkeypatch):
    monkeypatch.setattr(speculation, "preset", lambda name: TINY)

    def float32_model(config, seed=0):
        return Transformer(config, rngs=nnx.Rngs(seed), dtype=jnp.float32)

    monkeypatch.setattr(speculation, "random_model", float32_model)
    asked = ["--config", "tiny", "--replay", "0,0.6,1", "--tokens", "4", "--repetitions", "1"]
    draft = ["--draft-config", "tiny"] if drafted else []
    assert speculation.main([*asked, *draft, "--max-new-tokens", "81", "--json"]) == 0
    rows = {row["speculation"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert [*rows] == ["none", "p=0", "p=0.6", "p=1"]
    assert rows["p=1"]["tokens_per_step"] == 4
    # 1 + 0.6 + 0.36 + 0.216
    assert 1.6 < rows["p=0.6"]["tokens_per_step"] < 2.8
    assert rows["p=0"]["tokens_per_step"] < 1.2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--config", "llama3.2-1b"], "--config and --replay go together"),
        (["--replay", "0.5"], "--config and --replay go together"),
        (["--config", "llama3.2-1b", "--replay", "much"], "chances from 0 to 1.*got 'much'"),
        (["--config", "nothing", "--replay", "0.5"], "No preset is called 'nothing'"),
        (["--draft-config", "llama3.2-1b"], "Give a draft model by --draft"),
        (["--prompt-file", "nowhere"], "nowhere"),
        (["--prompt-file", os.devnull], f"at least one character; {os.devnull} has none"),
        (
            ["--config", "python-bytes-3m", "--replay", "0.5", "--prompt-file", "some"],
            "--config takes no --prompt-file",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(asked, says, capsys):
    assert speculation.main(asked) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_step_has_room_for_eight_tokens(capsys):
    with pytest.raises(SystemExit):
        speculation.main(["--tokens", "4,9"])
    assert "whole numbers from 2 to 8 are needed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_module_that_is_run_speaks_for_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speculation", "--replay", "0.5"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(speculation.__name__, run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Give both, or neither." in said
    assert "error inside ffjax" not in said
