"""A tokenizer.json behind our protocol: text, streams, ends of text, conversations."""

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_folders import edit_json, write_folder
from hf_models import MODELS
from test_checkpoints import build
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import checkpoints
from ffjax.cli import main
from ffjax.config import preset
from ffjax.hf_tokenizer import HFTokenizer
from ffjax.streaming import stream
from ffjax.text.tokenizers import load_tokenizer
from ffjax.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer

pytestmark = pytest.mark.filterwarnings("error")

BEGIN, END, TURN = "<|begin|>", "<|end|>", "<|turn|>"
SPECIAL = [BEGIN, END, TURN]
TEXTS = [
    "",
    "hello world",
    " two  spaces ",
    "def f():\n\treturn 'é ß €'\r\n",
    "日本語 🐍🐍",
    "a\ufffdb",
    "\ufffd",
]


def _finished(tokenizer: RustTokenizer) -> RustTokenizer:
    """With BOS before every text, as Llama's has it."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def byte_level() -> RustTokenizer:
    """As Llama 3's, Qwen's and OLMo's: BPE over bytes."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, return the hello"] * 9, trainer)
    return _finished(tokenizer)


def metaspace() -> RustTokenizer:
    """As Llama 2's, TinyLlama's and Gemma's: words begin with ▁, rare characters are bytes."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"helo wrdtn", "▁h", "lo", "▁w", "▁▁"]
    tokenizer = RustTokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "h"), ("l", "o"), ("▁", "w"), ("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _finished(tokenizer)


KINDS = {"byte_level": byte_level, "metaspace": metaspace}
every_kind = pytest.mark.parametrize("kind", KINDS)

# The shape of Llama 3's, with a system message that not every model takes.
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- raise_exception('No system message, please.') }}
    {%- endif %}
    {{- '<|turn|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
{%- endif %}
"""


def write(directory: Path, kind: str = "byte_level", **files) -> Path:
    """A folder with a tokenizer; files by name, with `__` for the dot."""
    directory.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    files = {"tokenizer_config__json": {"bos_token": BEGIN, "eos_token": END}, **files}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)
    return directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def streamed(tokenizer: Tokenizer, tokens) -> list[str]:
    decoder: StreamDecoder = tokenizer.stream()
    return [*(decoder.push(token) for token in tokens), decoder.finish()]


def streamed_in_blocks(tokenizer: Tokenizer, tokens, random) -> str:
    """The same, several tokens at a time."""
    decoder, pieces, at = tokenizer.stream(), [], 0
    while at < len(tokens):
        count = int(random.integers(1, 9))
        pieces.append(decoder.push_all(tokens[at : at + count]))
        at += count
    return "".join([*pieces, decoder.finish()])


# Text


@every_kind
@pytest.mark.parametrize("text", TEXTS)
def test_decode_and_stream_undo_encode(kind, text, folders):
    tokenizer: Tokenizer = HFTokenizer.read(folders[kind])
    tokens = tokenizer.encode(text)
    assert tokens[0] == 0  # BOS, as tokenizer.json says
    assert tokenizer.decode(tokens) == text
    assert "".join(streamed(tokenizer, tokens)) == text


def test_a_stream_joined_is_what_decode_returns_for_any_bytes(folders):
    tokenizer = HFTokenizer.read(folders["byte_level"])
    random = np.random.default_rng(0)
    for _ in range(300):
        # Special tokens, cut-off characters, spaces at the start: what a model may say.
        tokens = random.integers(0, tokenizer.vocab_size, 14).tolist()
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
        assert streamed_in_blocks(tokenizer, tokens, random) == tokenizer.decode(tokens)


def test_a_stream_joined_is_what_decode_returns_for_any_pieces(folders):
    tokenizer = HFTokenizer.read(folders["metaspace"])
    random = np.random.default_rng(0)
    snake = tokenizer.encode("🐍")[2:]
    others = [i for i in range(tokenizer.vocab_size) if not 4 + 0x80 <= i < 4 + 0x100]
    for _ in range(300):
        drawn = [[int(x)] if x else snake for x in random.choice(others, 14)]
        tokens = [token for group in drawn for token in group]
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens)
        assert streamed_in_blocks(tokenizer, tokens, random) == tokenizer.decode(tokens)


def test_a_byte_that_is_no_character_costs_a_stream_no_other(folders):
    tokenizer = HFTokenizer.read(folders["metaspace"])
    snake, bad = tokenizer.encode("🐍")[2:], 4 + 0xFF
    letters = tokenizer.encode("ho")[1:]
    pieces = streamed(tokenizer, [*letters, *snake, bad, *letters, bad])
    assert "".join(pieces) == "ho🐍\ufffd ho\ufffd"


@every_kind
def test_a_stream_holds_a_character_back_until_it_is_whole(kind, folders):
    tokenizer = HFTokenizer.read(folders[kind])
    tokens = tokenizer.encode("🐍")
    assert len(tokens) >= 5  # one for each byte
    pieces = streamed(tokenizer, tokens)
    assert pieces == [""] * (len(tokens) - 1) + ["🐍", ""]
    cut = streamed(tokenizer, tokens[:-1])
    assert "".join(cut[:-1]) == ""
    assert set(cut[-1]) == {"\ufffd"}


def test_a_stream_keeps_the_space_between_prompt_and_reply(folders):
    tokenizer = HFTokenizer.read(folders["metaspace"])
    tokens = tokenizer.encode("hello world")
    decoder = tokenizer.stream()
    pieces = [decoder.push(token) for token in tokens]
    assert " w" in pieces  # decoded alone, the word would have lost its space


@every_kind
def test_special_tokens_and_a_padded_vocabulary_have_no_text(kind, folders):
    tokenizer = HFTokenizer.read(folders[kind])
    tokens = tokenizer.encode("hello")
    assert tokenizer.decode([1, *tokens, 2, 100_000, 1]) == "hello"
    assert "".join(streamed(tokenizer, [1, *tokens, 2, 100_000, 1])) == "hello"
    with pytest.raises(ValueError, match=r"ids are 0 to \d+, got -1"):
        tokenizer.decode([3, -1])


def test_what_cannot_be_encoded(folders):
    tokenizer = HFTokenizer.read(folders["byte_level"])
    with pytest.raises(ValueError, match=r"'\\ud800' at index 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="encodes a str, got bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_settings_of_training_batches_are_put_aside(tmp_path):
    folder = write(tmp_path)
    plain = HFTokenizer.read(folder).encode("hello world hello")
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert HFTokenizer.read(folder).encode("hello world hello") == plain


# Ends of text


def test_what_ends_a_text_is_looked_for_where_transformers_does(tmp_path):
    folder = write(tmp_path, config__json={"eos_token_id": 2})
    assert HFTokenizer.read(folder).eot_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    tokenizer = HFTokenizer.read(folder)
    assert (tokenizer.eot_ids, tokenizer.eot_id) == ((2, 1), 2)
    (folder / "generation_config.json").write_text('{"temperature": 1.0}')
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 2}}')
    assert HFTokenizer.read(folder).eot_ids == (2,)
    (folder / "config.json").unlink()
    assert HFTokenizer.read(folder).eot_ids == (1,)  # tokenizer_config.json's eos_token
    settings = {"eos_token": {"content": TURN, "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert HFTokenizer.read(folder).eot_ids == (2,)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names a token that ends a text: give eos_token_id"):
        HFTokenizer.read(folder)


# Files


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read from tokenizer.json; .* has none"):
        HFTokenizer.read(tmp_path)
    folder = write(tmp_path / "it")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is damaged: it is not JSON"):
        HFTokenizer.read(folder)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json holds no object"):
        HFTokenizer.read(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged: the tokenizers library"):
        HFTokenizer.read(folder)
    with pytest.raises(ValueError, match="eot_ids is empty"):
        HFTokenizer(byte_level(), eot_ids=[])


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_package_that_is_not_installed(package, tmp_path, monkeypatch):
    folder = write(tmp_path, chat_template__jinja=TEMPLATE)
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(NotImplementedError, match=rf"{package}\. Install .* 'ffjax\[hf\]'"):
        HFTokenizer.read(folder).chat([{"role": "user", "content": "x"}])


# Conversations

CHAT = [
    {"role": "user", "content": " hello "},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "<return>"},
]
WRITTEN = (
    "<|begin|><|turn|>user\nhello<|end|><|turn|>assistant\nworld<|end|>"
    "<|turn|>user\n<return><|end|><|turn|>assistant\n"
)


def _settings(template) -> dict:
    return {"bos_token": {"content": BEGIN}, "eos_token": END, "chat_template": template}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config__json": _settings(TEMPLATE)},
        {
            "tokenizer_config__json": _settings(
                [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": TEMPLATE},
                ]
            )
        },
        {"tokenizer_config__json": _settings("no"), "chat_template__jinja": TEMPLATE},
        {  # that file is for processors of images and sound
            "tokenizer_config__json": _settings(TEMPLATE),
            "chat_template__json": {"chat_template": "no"},
        },
    ],
    ids=["in the settings", "one of several", "a file", "beside a file of JSON"],
)
def test_a_conversation_is_written_as_the_template_says(files, tmp_path):
    tokenizer = HFTokenizer.read(write(tmp_path, **files))
    assert tokenizer.render(CHAT) == WRITTEN
    assert tokenizer.render(CHAT, reply=False) == WRITTEN.removesuffix("<|turn|>assistant\n")
    tokens = tokenizer.chat(CHAT)
    assert tokens.count(0) == 1  # BOS comes from the template, not once more from the tokenizer
    assert tokens[:2] == [0, 2]
    assert tokenizer.decode(tokens).startswith("user\nhelloassistant\nworld")


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfor %}", " hello \nworld\n<return>\n"),
        ("    {% if true %}\nx\n    {% endif %}\ny", "x\ny"),  # blocks leave no white space
        ("{{ messages[2] | tojson }}", '{"role": "user", "content": "<return>"}'),
        ("{{ {'é': 1} | tojson(indent=1) }}", '{\n "é": 1\n}'),
        ("{% for m in messages %}{% break %}{% endfor %}z", "z"),
        ("{% generation %}it{% endgeneration %}", "it"),
        ("{{ strftime_now('%%') }}{{ tools }}{{ missing }}", "%None"),
    ],
)
def test_templates_find_what_transformers_gives_them(template, written, tmp_path):
    folder = write(tmp_path, tokenizer_config__json=_settings(template))
    assert HFTokenizer.read(folder).render(CHAT) == written


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE, r"No system message, please\.$"),
        ("{% if %}", "Expected an expression"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),  # it came with a download
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_conversation_that_cannot_be_written(template, reason, tmp_path):
    tokenizer = HFTokenizer.read(write(tmp_path, tokenizer_config__json=_settings(template)))
    with pytest.raises(ValueError, match=f"cannot write this conversation: .*(?:{reason})"):
        tokenizer.chat([{"role": "system", "content": "x"}])


def test_a_tokenizer_without_a_template(folders):
    with pytest.raises(ValueError, match="needs a chat template, and this tokenizer has none"):
        HFTokenizer.read(folders["byte_level"]).chat(CHAT)


# With a model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model with a few tokens more than the tokenizer has, and a template."""
    model = MODELS["tied"]
    sized = type(model)(5, {**model.settings, "vocab_size": 280, "num_hidden_layers": 1})
    folder = write_folder(
        tmp_path_factory.mktemp("hf") / "talker", sized, eos_token_id=1, bos_token_id=0
    )
    write(folder, tokenizer_config__json=_settings(TEMPLATE))
    return folder


@pytest.fixture(scope="module")
def checkpoint(model_folder) -> Path:
    out = model_folder.parent / "ours"
    assert main(["convert", str(model_folder), str(out)]) == 0
    return out


def test_the_tokenizer_stays_with_the_weights(model_folder, checkpoint, tmp_path):
    config = checkpoints.Manifest.read(checkpoint).config
    back = tmp_path / "back"
    checkpoints.export_hf(checkpoint, back)
    for path in (model_folder, checkpoint, back):
        tokenizer = load_tokenizer(path, config)
        assert isinstance(tokenizer, HFTokenizer)
        assert tokenizer.eot_ids == (1,)
        assert tokenizer.render(CHAT) == WRITTEN


def test_a_model_is_saved_with_the_tokenizer_it_is_given(model_folder, checkpoint, tmp_path):
    model = checkpoints.load(checkpoint)
    alone = tmp_path / "alone"  # as transformers saves a tokenizer
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder / name, alone / name)
    for place in (model_folder, str(checkpoint), alone):
        out = tmp_path / f"from-{Path(place).name}"
        checkpoints.save(model, out, tokenizer_from=place)
        tokenizer = load_tokenizer(out, model.config)
        assert isinstance(tokenizer, HFTokenizer)
        assert tokenizer.eot_ids == (1,)
        assert tokenizer.render(CHAT) == WRITTEN
        assert "huggingface/tokenizer.json" in checkpoints.Manifest.read(out).files
        checkpoints.load(out)
    # Over the checkpoint that it came from.
    files = {file.name: file.read_bytes() for file in (out / "huggingface").iterdir()}
    checkpoints.save(model, out, tokenizer_from=out, overwrite=True)
    assert {file.name: file.read_bytes() for file in (out / "huggingface").iterdir()} == files
    checkpoints.save(model, out, overwrite=True)
    assert checkpoints.tokenizer_directory(out) is None


def test_a_tokenizer_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    for place in (tmp_path / "nothing", checkpoints.SHIPPED_MODEL):
        with pytest.raises(FileNotFoundError, match=rf"keeps one; {place} is not\. Leave it out"):
            checkpoints.save(build(), tmp_path / "ours", tokenizer_from=place)
    assert list(tmp_path.iterdir()) == []


def test_without_a_tokenizer_tokens_are_bytes():
    shipped = checkpoints.SHIPPED_MODEL
    tokenizer = load_tokenizer(shipped, preset("python-bytes-3m"))
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.eot_ids == (tokenizer.eot_id,)
    with pytest.raises(ValueError, match=r"of 257; llama3.2-1b has 128256"):
        load_tokenizer(shipped, preset("llama3.2-1b"))


def _reply(path: Path, capsys, *more: str) -> dict:
    arguments = ["generate", "--model", str(path), "--max-new-tokens", "9", "--json", *more]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def _continued(model, prompt: list[int]) -> list[int]:
    """By what the command line runs, so that both share what is compiled."""
    return [token for (token,) in stream(model, [prompt], 9, stop_token=1) if token is not None]


def test_generate_speaks_the_models_own_tokens(model_folder, checkpoint, capsys):
    model = checkpoints.load(checkpoint)
    tokenizer = HFTokenizer.read(model_folder)
    prompt = tokenizer.encode("hello")
    expected = _continued(model, prompt)
    for path in (model_folder, checkpoint):
        report = _reply(path, capsys, "--prompt", "hello")
        assert report["tokens"] == expected
        assert report["prompt_tokens"] == len(prompt)
        both = tokenizer.decode([*prompt, *expected])
        assert report["text"] == both.removeprefix(tokenizer.decode(prompt))


def test_generate_takes_the_prompt_as_a_message(model_folder, checkpoint, capsys):
    tokenizer = HFTokenizer.read(model_folder)
    prompt = tokenizer.chat([{"role": "user", "content": "hello"}])
    report = _reply(checkpoint, capsys, "--prompt", "hello", "--chat")
    model = checkpoints.load(checkpoint)
    assert report["tokens"] == _continued(model, prompt)
    arguments = ["generate", "--model", str(checkpoint), "--max-new-tokens", "9"]
    assert main([*arguments, "--prompt", "hello", "--chat"]) == 0
    assert capsys.readouterr().out == report["text"] + "\n"  # the reply alone


def test_a_text_ends_at_any_of_several_tokens(model_folder, tmp_path, capsys):
    free = _reply(model_folder, capsys, "--prompt", "hello")["tokens"]
    assert len(free) == 9
    stop = free[4]
    folder = shutil.copytree(model_folder, tmp_path / "talker")
    edit_json(folder / "config.json", eos_token_id=[1, stop])
    report = _reply(folder, capsys, "--prompt", "hello")
    assert report["finish_reason"] == "stop"
    assert report["tokens"] == free[: free.index(stop)]


def test_chat_without_a_template_is_a_sentence(capsys):
    assert main(["generate", "--prompt", "x", "--chat"]) == 2
    assert "--chat needs a chat template, and this model's tokens are bytes" in (
        capsys.readouterr().err
    )


def test_a_conversion_says_when_there_is_no_tokenizer(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    out, err = capsys.readouterr()
    assert "ours: hf, llama, " in out
    assert "There is no tokenizer.json in" in err
    assert "GB of host memory" in err


def test_random_models_of_ours_have_no_tokenizer(tmp_path):
    checkpoints.save(build(), tmp_path / "ours")
    assert checkpoints.tokenizer_directory(tmp_path / "ours") is None
