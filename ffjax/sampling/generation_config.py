"""Hugging Face's `generation_config.json`, as arguments of `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fields_of"]

_SAME_NAME = ("temperature", "top_k", "top_p", "min_p")
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a configuration sets; null is as good as not there.

    Args:
        config: the file's content.
    """
    given = {name: value for name, value in config.items() if value is not None}
    fields = {ours: given[theirs] for theirs, ours in _RENAMED.items() if theirs in given}
    if "repetition_penalty" in given:
        fields["repetition_penalty"] = given["repetition_penalty"]
    if given.get("do_sample") is True:
        # What transformers draws with where the file names nothing else.
        fields |= {"temperature": 1.0, "top_k": 50}
        fields |= {name: given[name] for name in _SAME_NAME if name in given}
    forbidden = [*given.get("suppress_tokens", ())]
    # Of words that never come, those of one token: others hang on what came before.
    forbidden += [ids[0] for ids in given.get("bad_words_ids", ()) if len(ids) == 1]
    if forbidden:
        fields["bad_token_ids"] = tuple(forbidden)
    return fields
