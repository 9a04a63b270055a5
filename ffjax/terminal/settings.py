"""`/set`: the sampling parameters of the answers to come."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from ffjax.biases import biases_of

__all__ = ["changed", "described", "names"]

_NOTHING = ("none", "null", "off")
# What the command line calls them.
_ALSO = {"max_new_tokens": "max_tokens"}


def names(sampling: Any) -> list[str]:
    """The parameters' names.

    Args:
        sampling: an `ffjax.SamplingParams`, or another frozen dataclass.
    """
    return [field.name for field in dataclasses.fields(sampling)]


def described(sampling: Any) -> str:
    """The parameters that differ from what a fresh one has, and the main ones, a line each."""
    fresh = type(sampling)()
    main = ("max_tokens", "temperature", "top_k", "top_p")
    lines = []
    for name in names(sampling):
        value = getattr(sampling, name)
        if name in main or value != getattr(fresh, name):
            lines.append(f"{name} {_text(value)}")
    return "\n".join(lines)


def changed(sampling: Any, text: str) -> tuple[Any, str]:
    """The parameters with one changed, and what to say of it.

    Args:
        sampling: the parameters.
        text: a name and a value, as in "temperature 0.7" or "top_k=40". The value is JSON, or
            none, or a text as it stands.

    Raises:
        ValueError: there is no such parameter, or the value is none of its.
        TypeError: as ValueError.
    """
    given, _, value = text.replace("=", " ", 1).partition(" ")
    name = given.lstrip("-").replace("-", "_").lower()
    name = _ALSO.get(name, name)
    known = names(sampling)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" Is {near[0]} meant?" if near else f" There are {', '.join(known)}."
        raise ValueError(f"There is no setting {given!r}.{meant}")
    if not value.strip():
        return sampling, f"{name} {_text(getattr(sampling, name))}"
    after = dataclasses.replace(sampling, **{name: _value(name, value.strip())})
    return after, f"{name} {_text(getattr(after, name))}"


def _value(name: str, text: str) -> Any:
    if text.lower() in _NOTHING:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if name == "logit_bias" and isinstance(value, dict):
        return biases_of(value)
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
