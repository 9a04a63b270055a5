"""Records what Hugging Face transformers makes of the folders of `token_folders.py`.

Run it where transformers, tokenizers and jinja2 are installed (torch, jax and ffjax need not be);
the tests read what it writes, and need none of them but the last two:

    pip install transformers==5.24.0 tokenizers jinja2
    python tests/record_hf_tokens.py

It writes `goldens/tokens.json.gz`: for each folder the special tokens by role, the ids of texts,
the texts of ids and the conversations, and for each template the conversation. null: transformers
raises an error.
"""

# The environments that check types and run the tests have no transformers.
# pyright: reportMissingImports=false

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from token_folders import CALLS, FOLDERS, IDS, MESSAGES, TEXTS, folder, templates

GOLDENS = Path(__file__).parent / "goldens"


def answer(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:
        return None


def of_folder(directory: Path) -> dict[str, Any] | None:
    loaded = answer(lambda: transformers.AutoTokenizer.from_pretrained(directory))
    if loaded is None:
        return None

    def chat(call: dict[str, Any]) -> str:
        return loaded.apply_chat_template(MESSAGES, tokenize=False, **call)

    return {
        "roles": loaded.special_tokens_map,
        "ids": [loaded(text)["input_ids"] for text in TEXTS],
        "texts": [loaded.decode(ids, skip_special_tokens=True) for ids in IDS],
        "chats": [answer(lambda call=call: chat(call)) for call in CALLS],
        "chat_ids": answer(lambda: loaded.apply_chat_template(MESSAGES)["input_ids"]),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        made = [folder(seed, Path(place) / str(seed)) for seed in range(FOLDERS)]
        folders = [of_folder(directory) for directory in made]
        loaded = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(made[0] / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        )

    def chat(text: str, messages: list[Any], call: dict[str, Any]) -> str:
        return loaded.apply_chat_template(messages, chat_template=text, tokenize=False, **call)

    recorded = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "folders": folders,
        "templates": [answer(lambda one=one: chat(*one)) for one in templates()],
    }
    text = json.dumps(recorded, ensure_ascii=False, separators=(",", ":"))
    (GOLDENS / "tokens.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    for name in ("folders", "templates"):
        failed = sum(one is None for one in recorded[name])
        print(f"{name}: {len(recorded[name])}, of which transformers refuses {failed}")


if __name__ == "__main__":
    main()
