"""How texts are cut into words before byte-level BPE, by the name that a GGUF file gives.

The file has that name and nothing else; what it stands for is known to the reader. Here it is
said as the tokenizer.json of the models with that name does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["SPLITS", "Split"]


class Split(NamedTuple):
    """How a text is cut.

    Attributes:
        pattern: of words, a regular expression; None: that of GPT-2.
        single_digits: whether each digit stands alone, before the pattern.
        normalizer: what is done to the text first: "NFC", or None.
        whole_words: whether a word that is in the vocabulary is that token, whatever merges say.
        bos: whether BOS begins a text where the file does not say it.
    """

    pattern: str | None = None
    single_digits: bool = False
    normalizer: str | None = None
    whole_words: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """The pre_tokenizer of tokenizer.json."""
        steps: list[dict[str, Any]] = []
        if self.single_digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern is not None:
            cut = {"type": "Split", "pattern": {"Regex": self.pattern}}
            steps.append({**cut, "behavior": "Isolated", "invert": False})
        steps.append(
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": self.pattern is None,
            }
        )
        return {"type": "Sequence", "pretokenizers": steps}


def _words(letters: str, digits: str, behind: str = r"[\r\n]*") -> str:
    """The pattern of the newer models, which differ in three places.

    Args:
        letters: a word of letters.
        digits: a number.
        behind: what belongs to punctuation before it.
    """
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    return rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{behind}|{spaces}"


_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
# A capital begins a word within a word.
_CASED = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"

# The same, with what is short for a verb at the word's end.
_CASED_AND_SHORT = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDINGS}?"

_GPT4 = Split(_words(_LETTERS, r"\p{N}{1,3}"))
_LLAMA3 = _GPT4._replace(whole_words=True, bos=True)
_DIGITS = Split(single_digits=True)

SPLITS = {
    "gpt-2": Split(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,  # Granite 3
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _GPT4,  # OLMo 2 and 3, Phi 4
    "smaug-bpe": _GPT4,  # SmolLM3
    "gpt-4o": Split(_words(_CASED_AND_SHORT, r"\p{N}{1,3}", r"[\r\n/]*")),  # Phi 4 mini
    "qwen2": Split(_words(_LETTERS, r"\p{N}"), normalizer="NFC"),  # Qwen 2, 2.5 and 3
    "tekken": Split(
        _words(_CASED, r"\p{N}", r"[\r\n/]*"), whole_words=True, bos=True
    ),  # Mistral NeMo
}
