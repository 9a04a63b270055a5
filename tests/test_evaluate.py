"""Bits per byte and perplexity: what is counted, what is refused, and `ffjax eval`.

`tests/test_train.py` compares the bits with an independent sum.
"""

import dataclasses
import importlib
import io
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_folders import write_folder
from hf_models import MODELS
from test_hf_tokenizer import write as write_tokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers, processors

import checkpoints
import ffjax
from ffjax.cli import main
from ffjax.config import ModelConfig
from ffjax.evaluate import Evaluation, bits_per_byte, default_context, evaluate, make_windows
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.model import Transformer
from ffjax.stdlib_text import read_sources
from ffjax.tokenizer import ByteTokenizer

pytestmark = [
    pytest.mark.once(
        "A sample shows what a JAX makes of the programs; the rest is what they are given.",
        sample=[
            "test_bits_are_divided_by_bytes_and_perplexity_is_of_a_token",
            "test_json_has_the_figures_in_the_dtype_asked_for",
            "test_what_cannot_be_measured_is_a_sentence",
            "test_bad_input_is_a_sentence_and_code_2",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = ModelConfig(
    name="tiny-bytes",
    vocab_size=257,
    num_layers=1,
    model_dim=16,
    ffw_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_context=33,
)
TEXT = b"import os\r\n\xff\x00" * 9  # 117 bytes, some of them no UTF-8


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = nnx.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32))()
    model.embed[...] = model.embed[...] * 30  # so that a token depends on those before it
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    checkpoints.save(model, path)
    return str(path)


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text").write_bytes(TEXT)
    return str(tmp_path / "text")


# The arithmetic


def test_bits_are_divided_by_bytes_and_perplexity_is_of_a_token():
    result = Evaluation(bits=24.0, tokens=8, bytes=6, context=2)
    assert result.bits_per_byte == 4
    assert result.perplexity == 8
    assert Evaluation(bits=2e3, tokens=1, bytes=1, context=2).perplexity == math.inf


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary():
    model = nnx.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(1)))()
    model.final_norm[...] = jnp.zeros_like(model.final_norm[...])
    result = evaluate(model, [b"x" * 40, b"y" * 9], context=16)
    assert (result.bytes, result.tokens, result.context) == (49, 51, 16)
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bits == pytest.approx(51 * math.log2(257), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(51 * math.log2(257) / 49, rel=1e-6)


def test_the_batch_changes_nothing(model):
    results = [evaluate(model, [TEXT, b"end"], context=16, batch=batch) for batch in (1, 4, 99)]
    for result in results[1:]:
        assert result.bits == pytest.approx(results[0].bits, rel=1e-6)
        assert result.tokens == 118 + 4
    assert bits_per_byte(model, [TEXT, b"end"], context=16) == pytest.approx(
        results[0].bits_per_byte, rel=1e-6
    )


def test_a_longer_context_than_the_text_changes_nothing(model):
    short = evaluate(model, [b"twelve bytes"], context=14)
    long = evaluate(model, [b"twelve bytes"], context=32)
    assert long.bits == pytest.approx(short.bits, rel=1e-6)
    assert long.context == 32
    assert evaluate(model, [b"twelve bytes"], context=4).bits != pytest.approx(short.bits, rel=1e-3)


def test_a_short_text_computes_no_more_than_it_needs(model, monkeypatch):
    shapes = []

    def noted(model, windows, scored):
        shapes.append((windows.shape, scored.shape))
        return scored.sum(axis=1)

    monkeypatch.setattr("ffjax.evaluate._window_bits", noted)
    assert evaluate(model, [b"twelve bytes"], context=32).bits == 13
    assert evaluate(model, [TEXT], context=16, batch=5).bits == 118
    assert shapes == [((1, 14), (1, 13)), *[((5, 17), (5, 16))] * 3]


def test_the_default_context_is_the_models_even_and_bounded(model):
    assert default_context(model) == 32
    assert evaluate(model, [TEXT]) == evaluate(model, [TEXT], context=32)
    far = nnx.eval_shape(
        lambda: Transformer(dataclasses.replace(CONFIG, max_context=131_072), rngs=nnx.Rngs(0))
    )
    assert default_context(far) == 2048


def test_progress_sees_every_batch(model):
    seen = []

    def progress(batches):
        seen.append(len(batches))
        for first in batches:
            seen.append(first)
            yield first

    # 118 predictions in windows of 16 that advance by 8: 14, in threes.
    evaluate(model, [TEXT], context=16, batch=3, progress=progress)
    assert seen == [5, 0, 3, 6, 9, 12]


@pytest.mark.parametrize(
    ("texts", "options", "sentence"),
    [
        ([], {}, "at least one byte; the text is empty"),
        ([b""], {}, "at least one byte; the text is empty"),
        ([b"x"], {"context": 34}, "needs 34 positions; tiny-bytes was made for 33"),
        ([b"x"], {"context": 15}, "even, got 15"),
        ([b"x"], {"context": 0}, "even, got 0"),
        ([b"x"], {"batch": 0}, "at least one window, got batch=0"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(model, texts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(model, texts, **options)


def test_a_model_of_other_tokens_is_refused():
    words = dataclasses.replace(CONFIG, name="words", vocab_size=100)
    model = nnx.eval_shape(lambda: Transformer(words, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="vocabulary of 257; words has 100"):
        evaluate(model, [TEXT])


# Models with a tokenizer of their own


def _folder(directory: Path, *, bos: bool) -> Path:
    """A little model with a tokenizer that puts BOS, id 0, before a text, or nothing."""
    model = MODELS["tied"]
    sized = type(model)(5, {**model.settings, "vocab_size": 280, "num_hidden_layers": 1})
    folder = write_folder(directory / ("bos" if bos else "plain"), sized, eos_token_id=1)
    write_tokenizer(folder)
    if not bos:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    place = tmp_path_factory.mktemp("hf")
    return {bos: _folder(place, bos=bos) for bos in (True, False)}


WORDS = "hello world, return the hello: <|turn|>\r\n é 日本 🐍" * 2


def _oracle(folder: Path, text: str, context: int) -> tuple[float, int]:
    """Bits and tokens, each token by itself in float64, from the method's words alone."""
    rust = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    own = rust.encode(text, add_special_tokens=False).ids
    before = rust.encode("", add_special_tokens=True).ids
    tokens, half = [*(before or [1]), *own], context // 2
    model = checkpoints.load(folder, dtype="float32")
    forward = nnx.jit(lambda model, tokens: model(tokens))
    bits = 0.0
    for i in range(len(own)):  # predicts tokens[i + 1]
        start = max(0, math.ceil((i + 1 - context) / half)) * half
        window = tokens[start : i + 1]
        window[: len(before)] = before
        padded = jnp.array([window + [7] * (context - len(window))])
        logits = np.asarray(forward(model, padded), np.float64)[0, len(window) - 1]
        logits -= logits.max()
        bits += (math.log(np.exp(logits).sum()) - logits[tokens[i + 1]]) / math.log(2)
    return bits, len(own)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("context", [2, 16, 128])
def test_bits_of_a_models_own_tokens_against_an_independent_sum(folders, bos, context):
    model = checkpoints.load(folders[bos], dtype="float32")
    tokenizer = ffjax.load_tokenizer(folders[bos], model.config)
    texts = [WORDS, "h"]
    expected = [_oracle(folders[bos], text, context) for text in texts]
    result = evaluate(
        model, [text.encode() for text in texts], tokenizer=tokenizer, context=context, batch=3
    )
    assert result.bits == pytest.approx(sum(bits for bits, _ in expected), rel=1e-5)
    assert result.tokens == sum(count for _, count in expected)
    assert result.bytes == len(WORDS.encode()) + 1


def test_what_a_tokenizer_puts_around_a_text_is_not_the_texts(folders, tmp_path):
    tokenizer = HFTokenizer.read(folders[True])
    own = tokenizer.split("<|begin|>hello")
    assert own == ([0], [0, *HFTokenizer.read(folders[False]).encode("hello")])
    assert tokenizer.encode("<|begin|>hello") == own[0] + own[1]
    assert tokenizer.split("") == ([], [])
    assert HFTokenizer.read(folders[False]).split("hello")[0] == []
    assert ByteTokenizer().split("é") == ([], [0xC3, 0xA9])
    rust = RustTokenizer.from_file(str(folders[True] / "tokenizer.json"))
    rust.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|turn|> $A <|end|>",
        special_tokens=[("<|begin|>", 0), ("<|end|>", 1), ("<|turn|>", 2)],
    )
    around = HFTokenizer(rust, eot_ids=[1])
    assert around.split("hello") == ([0, 2], tokenizer.split("hello")[1])
    windows, scored = make_windows(WORDS.encode(), 4, around)
    assert [row[:2] for row in windows.tolist()] == [[0, 2]] * len(windows)
    assert scored[0].tolist() == [False, True, True, True]
    assert scored.sum() == len(tokenizer.split(WORDS)[1])
    with pytest.raises(ValueError, match=r"the 2 tokens that .*of 2 tokens it has not. Choose a"):
        make_windows(WORDS.encode(), 2, around)


def test_texts_and_models_that_do_not_fit_the_tokenizer_are_refused(model, folders):
    talker = checkpoints.load(folders[True])
    tokenizer = ffjax.load_tokenizer(folders[True], talker.config)
    with pytest.raises(ValueError, match="reads text in UTF-8; the byte at 11 is none"):
        evaluate(talker, [TEXT], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"tiny-bytes are 0 to 256; the text has 2\d\d at index 0"):
        evaluate(model, [b"hello"], tokenizer=tokenizer)
    rust = RustTokenizer.from_file(str(folders[True] / "tokenizer.json"))
    rust.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match="makes none of the text"):
        evaluate(talker, [b" "], tokenizer=HFTokenizer(rust, eot_ids=[1]))


# The command


def test_json_has_the_figures_in_the_dtype_asked_for(model, path, text, capsys):
    narrow = checkpoints.load(path, dtype="bfloat16")
    for more, judged, dtype in (
        ([], model, "float32"),
        (["--dtype", "bfloat16"], narrow, "bfloat16"),
    ):
        arguments = ["eval", path, "--text", text, "--context", "16", "--batch", "3", "--json"]
        assert main([*arguments, *more]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert err == ""
        expected = evaluate(judged, [TEXT], context=16, batch=3)
        assert report["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert report["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert (report["bytes"], report["tokens"], report["context"]) == (117, 118, 16)
        assert (report["model"], report["dtype"]) == ("tiny-bytes", dtype)
        assert report["device"]
        assert report["seconds"] > 0
    wide = evaluate(model, [TEXT], context=16, batch=3).bits_per_byte
    assert report["bits_per_byte"] != pytest.approx(wide, rel=1e-6)


def test_a_line_of_figures_and_no_bar_without_a_terminal(model, path, text, capsys):
    assert main(["eval", path, "--text", text]) == 0
    out, err = capsys.readouterr()
    expected = evaluate(model, [TEXT])
    assert out.startswith(
        f"tiny-bytes: {expected.bits_per_byte:.4f} bits per byte, "
        f"perplexity {expected.perplexity:.4f} a token, over 117 bytes of {text} "
        "(float32, windows of 32 on "
    )
    assert out.count("\n") == 1
    assert err == ""


@pytest.mark.parametrize("bos", [True, False])
def test_the_command_reads_a_folder_and_a_checkpoint_in_their_own_tokens(
    folders, bos, tmp_path, capsys
):
    (tmp_path / "text").write_bytes(WORDS.encode())
    checkpoints.convert_hf(folders[bos], tmp_path / "ours")
    bits, count = _oracle(folders[bos], WORDS, 16)
    for path in (folders[bos], tmp_path / "ours"):
        arguments = ["eval", str(path), "--text", str(tmp_path / "text"), "--context", "16"]
        assert main([*arguments, "--dtype", "float32", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["bits_per_byte"] == pytest.approx(bits / len(WORDS.encode()), rel=1e-5)
        assert report["perplexity"] == pytest.approx(2 ** (bits / count), rel=1e-4)
        assert (report["bytes"], report["tokens"]) == (len(WORDS.encode()), count)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bar_on_a_terminal_unless_it_is_json(path, text, monkeypatch, as_json):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["eval", path, "--text", text, *(["--json"] if as_json else [])]) == 0
    shown = terminal.getvalue()
    assert shown == "" if as_json else "eval:" in shown


def test_the_shipped_model_is_the_default(tmp_path, capsys):
    # Prose of Python's kind, and noise: it knows which is which.
    (tmp_path / "code").write_bytes(b"import os\nimport sys\n\n\ndef main():\n    return None\n")
    (tmp_path / "noise").write_bytes(bytes(range(128, 178)))
    bits = {}
    for name in ("code", "noise"):
        assert main(["eval", "--text", str(tmp_path / name), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["model"] == "python-bytes-3m"
        assert report["context"] == 2048
        bits[name] = report["bits_per_byte"]
    assert bits["code"] < 3 < 6 < bits["noise"]


def test_what_is_not_finite_is_null_in_json(model, text, tmp_path, capsys):
    graph, state = nnx.split(model)
    broken = nnx.merge(graph, state)
    broken.embed[...] = broken.embed[...] * jnp.nan
    checkpoints.save(broken, tmp_path / "nan")
    assert main(["eval", str(tmp_path / "nan"), "--text", text, "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["bits_per_byte"] is report["perplexity"] is None
    assert "ffjax eval: tiny-bytes gives no finite probabilities: see ffjax doctor " in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no/such/checkpoint", "--text", "TEXT"], "no/such/checkpoint"),
        (["PATH", "--text", "no/such/text"], "no/such/text"),
        (["PATH", "--text", "TEXT", "--dtype", "int3"], "--dtype: one of bfloat16, float32"),
        (["PATH", "--text", "TEXT", "--context", "34"], "was made for 33"),
        (["PATH", "--text", "TEXT", "--batch", "0"], "--batch: a whole number from 1"),
        (["TALKER", "--text", "TEXT"], "reads text in UTF-8; the byte at 11 is none"),
    ],
)
def test_bad_input_is_a_sentence_and_code_2(path, folders, text, capsys, arguments, sentence):
    places = {"PATH": path, "TEXT": text, "TALKER": str(folders[True])}
    assert main(["eval", *(places.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ffjax eval: ")
    assert sentence in err


# The examples


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_examples_measure_and_list_held_out_files(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    listing = importlib.import_module("stdlib_text")
    measuring = importlib.import_module("bits_per_byte")
    listing.main()
    lines = capsys.readouterr().out.splitlines()
    held_out = read_sources()[1]
    assert len(lines) == len(held_out) + 1
    assert lines[-1].endswith(f"bytes in {len(held_out)} files")
    monkeypatch.setattr(sys, "argv", ["bits_per_byte.py", "--files", "1"])
    measuring.main()
    [line] = capsys.readouterr().out.splitlines()
    smallest = min(held_out, key=lambda source: len(source.text))
    assert line.startswith(f"{smallest.name}: ")
    assert line.endswith(f" bits per byte over {len(smallest.text)} bytes")
