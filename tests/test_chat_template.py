"""Chat templates: which there are, what they are given, and what is said when one fails."""

import dataclasses
import enum
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_folders import edit_json
from test_hf_tokenizer import BEGIN, END, write
from test_hf_tokenizer import model_folder as model_folder  # a fixture

import checkpoints
from ffjax.chat_files import ChatTemplate
from ffjax.chat_template import write_conversation
from ffjax.cli import main
from ffjax.hf_tokenizer import HFTokenizer

pytestmark = pytest.mark.filterwarnings("error")

ASK = [{"role": "user", "content": "hello"}]
CHAT = [*ASK, {"role": "assistant", "content": "it is"}]


def settings(template=None) -> dict:
    return {"bos_token": BEGIN, "eos_token": END, "chat_template": template}


def read(directory: Path, template=None, **files) -> HFTokenizer:
    return HFTokenizer.read(write(directory, tokenizer_config__json=settings(template), **files))


def written(text: str, messages=ASK, **arguments) -> str:
    arguments = {"reply": False, **arguments}
    return write_conversation(ChatTemplate("default", text, "a test"), messages, **arguments)


# Which


@pytest.mark.parametrize("kind", ["list", "object"])
def test_a_template_is_chosen_by_its_name(kind, tmp_path):
    named = {"tool_use": "T", "rag": "R"}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    tokenizer = read(tmp_path, listed if kind == "list" else named)
    assert tokenizer.render(ASK, template="rag") == "R"
    assert tokenizer.render(ASK, tools=[]) == "T"
    assert tokenizer.render(ASK, template="rag", tools=[]) == "R"
    with pytest.raises(ValueError, match=r"has only 'rag', 'tool_use'\. Choose one of them"):
        tokenizer.render(ASK)
    with pytest.raises(ValueError, match=r"there is no 'x'\. This tokenizer has 'rag', 'tool_use'"):
        tokenizer.chat(ASK, template="x")


def test_files_of_templates_take_the_place_of_those_in_the_settings(tmp_path):
    folder = write(tmp_path, tokenizer_config__json=settings({"default": "S", "other": "O"}))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("R")
    (more / "notes.txt").write_text("no template")
    tokenizer = HFTokenizer.read(folder)
    assert list(tokenizer.chat_templates) == ["rag"]
    (folder / "chat_template.jinja").write_text("F")
    tokenizer = HFTokenizer.read(folder)
    assert tokenizer.render(ASK) == "F"
    assert tokenizer.render(ASK, template="rag") == "R"
    (more / "default.jinja").write_text("A")
    assert HFTokenizer.read(folder).render(ASK) == "A"


def test_the_template_of_a_processor_is_none_of_a_tokenizer(tmp_path):
    tokenizer = read(tmp_path, chat_template__json={"chat_template": "P"})
    assert tokenizer.chat_templates == {}
    with pytest.raises(ValueError, match=r"has none: .*chat_template.json is for processors"):
        tokenizer.render(ASK)


def test_a_template_that_is_no_text_is_a_sentence(tmp_path):
    folder = write(tmp_path, tokenizer_config__json=settings())
    (folder / "chat_template.jinja").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"UTF-8; the byte at 2 of .*chat_template.jinja is none"):
        HFTokenizer.read(folder)


# What it is given


def test_variables_tools_and_documents_reach_the_template(tmp_path):
    text = "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}{{ enable_thinking }}{{ x }}"
    tokenizer = read(tmp_path, text)
    assert tokenizer.render(ASK) == f"{BEGIN}{END}NoneNone"
    given = tokenizer.render(
        ASK,
        tools=[{"name": "f"}],
        documents=[{"title": "t"}],
        variables={"enable_thinking": False, "x": {"y": [1]}, "bos_token": "B"},
    )
    assert given == f"B{END}[{{'name': 'f'}}][{{'title': 't'}}]False{{'y': [1]}}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), "3"),
        (np.bool_(False), "False"),
        (np.float32(0.5), "0.5"),
        (np.zeros(2), "<ndarray>"),
        (Path("x"), "<PosixPath>"),
        ((1, [2]), "(1, [2])"),
        (enum.Enum("Kind", {"A": "a"}, type=str).A, "a"),
        (dataclasses.make_dataclass("Point", ["x"])(1), "{'x': 1}"),
    ],
)
def test_a_template_sees_plain_values_alone(value, expected):
    assert written("{{ x }}", variables={"x": value}) == expected
    assert written("{{ messages[0].content }}", [{"role": "user", "content": value}]) == expected


def test_messages_may_be_dataclasses_and_what_is_none_is_left_out():
    message = dataclasses.make_dataclass("Message", ["role", "content", "tool_calls"])
    text = "{{ messages[0].role }}{{ messages[0].tool_calls is defined }}"
    assert written(text, [message("user", "x", None)]) == "userFalse"
    assert written(text, [message("user", "x", [])]) == "userTrue"


def test_the_given_messages_stay_as_they_were():
    messages = [{"role": "assistant", "content": [{"text": "a"}], "thinking": "b", "x": None}]
    before = json.dumps(messages)
    text = "{{ messages[0].content[0].text }}{{ messages[0].reasoning_content }}"
    assert written(text, messages, continue_final_message=True) == "a"
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("content", "text", "expected"),
    [
        ("it is ", "<{{ messages[-1].content }}>", "<it is "),
        ("it is ", "<{{ messages[-1].content | trim }}>", "<it is"),
        ([{"text": "a"}, {"image": 1}, {"text": "b"}], "{{ messages[-1].content[2].text }}!", "b"),
        ("ab", "{{ messages[-1].content }},{{ messages[-1].content }}.", "ab,ab"),
    ],
)
def test_the_last_message_may_go_on(content, text, expected):
    messages = [*ASK, {"role": "assistant", "content": content}]
    assert written(text, messages, continue_final_message=True) == expected


def test_a_thought_may_go_on_under_any_of_its_names():
    messages = [*ASK, {"role": "assistant", "thinking": "hm"}]
    for name in ("thinking", "reasoning_content"):
        text = f"<{{{{ messages[-1].{name} }}}}></think>"
        assert written(text, messages, continue_final_message=name) == "<hm"


@pytest.mark.parametrize(
    ("messages", "text", "arguments", "words"),
    [
        (CHAT, "{{ messages[-1].content }}", {"reply": True}, "both were asked for"),
        (ASK[:0], "x", {}, "has at least one message"),
        ([{"role": "x"}], "{{ content }}", {}, "it has no content"),
        ([{"role": "x", "content": 3}], "{{ content }}", {}, "it holds no text"),
        (CHAT, "{{ messages[-1].role }}", {}, "does not write a message's content"),
        (CHAT, "{{ messages[0].content }}", {}, "does not write the last message as it is"),
        (CHAT, "{{ messages[-1].content | upper }}", {}, "does not write the last message as it"),
    ],
)
def test_a_message_that_cannot_go_on_is_a_sentence(messages, text, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        written(text, messages, continue_final_message=True, **arguments)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"messages": ["hello"]}, "A message is an object with role and content, .* got str"),
        ({"tools": [len]}, "A tool is a JSON schema; got builtin_function_or_method"),
        ({"tools": "f"}, "A tool is a JSON schema, and there is a list of them; got str"),
        ({"documents": ["x"]}, "A document is an object with title and text; got str"),
        ({"variables": {"tools": []}}, "other than messages, tools, .* got 'tools'"),
    ],
)
def test_what_a_template_cannot_be_given(arguments, words):
    with pytest.raises((TypeError, ValueError), match=words):
        written("x", **arguments)


# What fails

FAILURES = [
    ("{{ 1 / 0 }}", r"in line 1, ZeroDivisionError: division by zero\.$"),
    ("a\n{{ messages.nothing() }}", r"in line 2, .*has no attribute 'nothing'\.$"),
    ("\n\n{{ missing | tojson }}", r"in line 3, TypeError: Object of type Undefined is not JSON"),
    ("{{ raise_exception('No.') }}", r"in line 1, No\.$"),
    ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
    ("{{ 'a' | nofilter }}", "in line 1, No filter named 'nofilter'"),
    ("{% for %}", "in line 1, Expected an expression"),
    ("{% include 'x' %}", "no loader for this environment"),
    ("{{ dict.mro() }}", "has no attribute 'mro'"),
    ("{% set n = namespace(_x=1) %}", "begin with no underscore, got '_x'"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "begin with no underscore, got '_x'"),
    ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__'"),
    ("{{ range(999999) | list }}", "OverflowError: Range too big"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{{ '%d' | format('x') }}", "TypeError"),
]


@pytest.mark.parametrize(("text", "words"), FAILURES)
def test_whatever_happens_inside_a_template_is_a_sentence(text, words, tmp_path):
    tokenizer = read(tmp_path, [{"name": "rag", "template": text}])
    start = r"^The chat template 'rag' of tokenizer_config.json cannot write this conversation: "
    with pytest.raises(ValueError, match=f"{start}(.*){words}") as caught:
        tokenizer.chat(ASK, template="rag")
    assert str(caught.value).endswith(".")


# The command line


@pytest.fixture
def talker(model_folder, tmp_path) -> Path:
    """A folder with a model, whose templates have names."""
    folder = shutil.copytree(model_folder, tmp_path / "talker")
    named = {"rag": "hello {{ style }} {{ on }}", "bad": "{{ 1 / 0 }}"}
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    (folder / "additional_chat_templates").mkdir()
    return folder


def run(capsys, folder: Path, *more: str) -> tuple[int, str, str]:
    arguments = ["generate", "--model", str(folder), "--prompt", "hello", "--max-new-tokens", "2"]
    code = main([*arguments, *more])
    return code, *capsys.readouterr()


def test_generate_takes_a_template_by_name_and_variables(talker, capsys):
    names = ["--chat", "--chat-template", "rag", "--json"]
    code, out, _ = run(
        capsys, talker, *names, "--template-var", "style=a=b", "--template-var", "on=false"
    )
    assert code == 0
    expected = HFTokenizer.read(talker)
    tokens = expected.chat(ASK, template="rag", variables={"style": "a=b", "on": False})
    assert expected.decode(tokens) == "hello a=b False"
    assert json.loads(out)["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--chat"], "this tokenizer has only 'bad', 'rag'. Choose one of them"),
        (["--chat", "--chat-template", "x"], "there is no 'x'"),
        (["--chat", "--chat-template", "bad"], "'bad' of tokenizer_config.json cannot write"),
        (["--chat", "--template-var", "x"], "--template-var takes NAME=VALUE"),
        (["--chat", "--template-var", "a b=1"], "got 'a b=1'"),
        (["--chat", "--chat-template", "rag", "--template-var", "tools=[]"], "got 'tools'"),
        (["--template-var", "x=1"], "say how --chat writes the prompt, and it was not given"),
        (["--chat-template", "rag"], "say how --chat writes the prompt, and it was not given"),
    ],
)
def test_what_generate_cannot_write_is_a_sentence(more, words, talker, capsys):
    code, out, err = run(capsys, talker, *more)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


# What is kept

BESIDE = {
    "special_tokens_map.json": '{"bos_token": "<|begin|>"}',
    "added_tokens.json": '{"<|tool|>": 277}',
    "chat_template.jinja": "F",
    "additional_chat_templates/rag.jinja": "R",
    "additional_chat_templates/tool_use.jinja": "T",
}


def test_convert_save_and_export_keep_all_files_of_a_tokenizer(talker, tmp_path, capsys):
    for name, text in BESIDE.items():
        (talker / name).write_text(text)
    ours, back, saved = (tmp_path / name for name in ("ours", "back", "saved"))
    assert main(["convert", str(talker), str(ours)]) == 0
    assert main(["export", str(ours), str(back)]) == 0
    checkpoints.save(checkpoints.load(ours), saved, tokenizer_from=ours)
    for place in (talker, ours / "huggingface", back, saved / "huggingface"):
        for name, text in BESIDE.items():
            assert (place / name).read_text() == text
        tokenizer = HFTokenizer.read(place)
        assert tokenizer.encode("<|tool|>") == [0, 277]
        assert {name: one.text for name, one in tokenizer.chat_templates.items()} == {
            "default": "F",
            "rag": "R",
            "tool_use": "T",
        }
    capsys.readouterr()
    assert main(["inspect", str(ours)]) == 0
    assert "chat templates default, rag, tool_use" in capsys.readouterr().out
    assert main(["inspect", str(ours), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["tokenizer"]
    assert report["chat_templates"] == ["default", "rag", "tool_use"]
    assert (report["chat_template"], report["beyond_the_model"]) == (True, 0)
