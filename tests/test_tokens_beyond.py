"""Tokenizers with tokens that their model has no row for, as Gemma 3's has one for images."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hf_folders import edit_json
from test_hf_tokenizer import model_folder as model_folder  # a fixture

import checkpoints
import ffjax
from ffjax.cli import main
from ffjax.hf_tokenizer import HFTokenizer

pytestmark = [
    pytest.mark.once(
        "Tokenizers are no part of JAX; a sample generates.",
        sample=[
            "test_the_library_evaluates_and_generates_beside_such_a_token",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

ROWS = 280
IMAGE = "<image_soft_token>"


def _in_tokenizer_json(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    entry = {**data["added_tokens"][0], "content": IMAGE}
    first = 1 + max(data["model"]["vocab"].values())
    fill = [{**entry, "content": f"<unused{i}>", "id": i} for i in range(first, ROWS)]
    data["added_tokens"] += [*fill, {**entry, "id": ROWS}]
    file.write_text(json.dumps(data))


def _listed(folder: Path) -> None:
    names = [f"<unused{i}>" for i in range(3)]
    edit_json(folder / "tokenizer_config.json", additional_special_tokens=[*names, IMAGE])


def _as_pad(folder: Path) -> None:
    names = [f"<unused{i}>" for i in range(3)]
    (folder / "added_tokens.json").write_text(
        json.dumps({name: 277 + i for i, name in enumerate([*names, IMAGE])})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": IMAGE}))


def _as_one_end_of_several(folder: Path) -> None:
    _listed(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ROWS]}))


WAYS = [_in_tokenizer_json, _listed, _as_pad, _as_one_end_of_several]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__.strip("_"))
def folder(request, model_folder, tmp_path) -> Path:
    folder = shutil.copytree(model_folder, tmp_path / "talker")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    request.param(folder)
    assert HFTokenizer.read(folder).encode(IMAGE) == [0, ROWS]
    return folder


def test_all_but_a_prompt_that_holds_the_token_works(folder, tmp_path, capsys):
    ours, text, bad = tmp_path / "ours", tmp_path / "text", tmp_path / "bad"
    text.write_text("hello world")
    bad.write_text(f"hello {IMAGE}")
    assert main(["convert", str(folder), str(ours)]) == 0
    for path in map(str, (folder, ours)):
        generate = ["generate", "--model", path, "--max-new-tokens", "3", "--prompt"]
        assert main([*generate, "hello"]) == 0
        assert main([*generate, "hello", "--chat"]) == 0
        assert main(["eval", path, "--text", str(text), "--context", "8"]) == 0
        assert main(["inspect", path]) == 0
        assert "281 tokens (1 of them unknown to the model)" in capsys.readouterr().out
        for command, what in (
            ([*generate, f"hello {IMAGE}"], "the prompt"),
            ([*generate, f"hello {IMAGE}", "--chat"], "the prompt"),
            (["eval", path, "--text", str(bad), "--context", "8"], "the text"),
            (["doctor", path, "--text", IMAGE, "--no-self-test"], "the text"),
        ):
            assert main(command) == 2
            out, err = capsys.readouterr()
            assert f"are 0 to {ROWS - 1}; {what} has " in err
            assert str(ROWS) in err
            assert out == ""


def test_the_library_evaluates_and_generates_beside_such_a_token(folder):
    with warnings.catch_warnings(action="ignore"):  # an end of text that the model cannot say
        model = checkpoints.load(folder)
    tokenizer = ffjax.load_tokenizer(folder, model.config)
    assert tokenizer.vocab_size == ROWS + 1
    assert max(tokenizer.eot_ids) < ROWS
    out = ffjax.generate(model, tokenizer.encode("hello"), 3, stop_token=tokenizer.eot_ids)
    assert len(out.tokens[0]) <= 3
    assert ffjax.evaluate.evaluate(model, [b"hello"], tokenizer=tokenizer, context=8).bits > 0
    texts = [b"hello", f"a{IMAGE}".encode()]
    with pytest.raises(ValueError, match=r"0 to 279; text 1 has 280 at index 1\. Leave out"):
        ffjax.evaluate.evaluate(model, texts, tokenizer=tokenizer, context=8)


def test_a_token_beyond_is_decoded_all_the_same(folder):
    tokenizer = HFTokenizer.read(folder)
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([*hello, ROWS, *hello]) == "hellohello"


def test_a_prompt_of_ids_beyond_names_the_first():
    model = checkpoints.load(checkpoints.SHIPPED_MODEL)
    with pytest.raises(ValueError, match=r"0 to 256; the prompt has 257 at index 1\. Leave out"):
        ffjax.generate(model, np.array([1, 257, 300]), 3)
