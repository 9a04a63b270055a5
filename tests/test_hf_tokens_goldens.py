"""Drawn folders of tokens and chat templates, beside what transformers makes of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from token_folders import CALLS, CONVERSATIONS, FOLDERS, IDS, MESSAGES, TEXTS, folder, templates

from ffjax.chat_files import ChatTemplate
from ffjax.chat_template import write_conversation
from ffjax.hf_tokenizer import HFTokenizer

pytestmark = pytest.mark.filterwarnings("error")

_FILE = Path(__file__).parent / "goldens" / "tokens.json.gz"
RECORDED = json.loads(gzip.decompress(_FILE.read_bytes()))


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call of `apply_chat_template` as one of `chat`."""
    left = dict(call)
    return {
        "reply": left.pop("add_generation_prompt", False),
        "template": left.pop("chat_template", None),
        "tools": left.pop("tools", None),
        "documents": left.pop("documents", None),
        "continue_final_message": left.pop("continue_final_message", False),
        "variables": left,
    }


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_a_folder_is_read_as_transformers_reads_it(seed, tmp_path):
    recorded = RECORDED["folders"][seed]
    assert recorded is not None
    tokenizer = HFTokenizer.read(folder(seed, tmp_path / "it"))
    assert tokenizer.special_tokens == recorded["roles"]
    assert [tokenizer.encode(text) for text in TEXTS] == recorded["ids"]
    assert [tokenizer.decode(ids) for ids in IDS] == recorded["texts"]
    for ids in IDS:
        decoder = tokenizer.stream()
        pieces = [decoder.push(token) for token in ids]
        assert "".join([*pieces, decoder.finish()]).count("h") == tokenizer.decode(ids).count("h")
    for call, expected in zip(CALLS, recorded["chats"], strict=True):
        name = call.get("chat_template")
        if name is not None and name not in tokenizer.chat_templates:
            expected = None  # transformers takes a name that it does not know for a template
        if expected is not None:
            assert tokenizer.render(MESSAGES, **_arguments(call)) == expected
            continue
        with pytest.raises(ValueError, match=r"[.)]$"):
            tokenizer.render(MESSAGES, **_arguments(call))
    if recorded["chat_ids"] is not None:
        assert tokenizer.chat(MESSAGES, reply=False) == recorded["chat_ids"]


@pytest.mark.parametrize("which", range(CONVERSATIONS))
def test_a_template_writes_what_it_writes_in_transformers(which):
    text, messages, call = list(templates())[which]
    expected = RECORDED["templates"][which]
    arguments = _arguments(call)
    del arguments["template"]
    arguments["variables"] = {"bos_token": "<s>", "eos_token": "</s>", **arguments["variables"]}
    template = ChatTemplate("drawn", text, "a test")
    if expected is not None:
        # Where a template writes a message twice, transformers leaves its mark in the first.
        expected = expected.replace("CONTINUE_FINAL_MESSAGE_TAG ", "")
        assert write_conversation(template, messages, **arguments) == expected
        return
    with pytest.raises((ValueError, TypeError), match=r"\.$"):
        write_conversation(template, messages, **arguments)
