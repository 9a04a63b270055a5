"""The fields of a config.json: each is understood, harmless, refused, or named in a warning."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints.hf_effects import TRANSFORMERS, guards, is_harmless, understood
from checkpoints.manifest import CheckpointError

__all__ = ["CONFIG", "Fields", "HFFolderWarning", "listed", "warn"]

CONFIG = "config.json"


class HFFolderWarning(UserWarning):
    """Something in a Hugging Face folder that is left out, and is taken to change nothing."""


def warn(text: str) -> None:
    """Warns of what is left out of a Hugging Face folder."""
    warnings.warn(text, HFFolderWarning, stacklevel=3)


def listed(pairs: Iterable[tuple[str, Any]]) -> str:
    """Fields with their values as the file writes them, long ones cut."""
    return ", ".join(f"{name} ({_short(json.dumps(value))})" for name, value in pairs)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


class Fields:
    """The fields of a config.json, each taken once; what is left at the end was not understood.

    Attributes:
        where: the folder, for messages.
        taken: the names that were asked for.
    """

    def __init__(self, data: dict[str, Any], defaults: dict[str, Any], where: Path):
        """Starts with all of them, and with what a silent one means."""
        self._left = dict(data)
        self._defaults = defaults
        self.where = where
        self.taken: set[str] = set()

    def take(self, name: str) -> Any:
        """A field's value, or its default; None where neither is there."""
        self.taken.add(name)
        return self._left.pop(name, self._defaults.get(name))

    def has(self, name: str) -> bool:
        """Whether the file gives the field, and not as null."""
        return self._left.get(name) is not None

    def drop(self, *names: str) -> None:
        """Leaves out fields that are read elsewhere."""
        for name in names:
            self._left.pop(name, None)

    def number(self, name: str, kind: str) -> Any:
        """A number of a kind: "int", "float", "int?" or "float?"."""
        value = self.take(name)
        if value is None and kind.endswith("?"):
            return None
        if value is None:
            raise CheckpointError(f"{CONFIG} of {self.where} lacks {name}.")
        whole = kind.startswith("int")
        good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not good or not 0 < value < math.inf:
            rule = "a positive integer" if whole else "a positive number"
            raise CheckpointError(f"{CONFIG} of {self.where}: {name} is {rule}, got {value!r}.")
        return value if whole else float(value)

    def flag(self, name: str) -> bool:
        """True or false; null is what the family assumes."""
        value = self.take(name)
        value = self._defaults.get(name) if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{CONFIG} of {self.where}: {name} is true or false, got {value!r}."
            )
        return value

    def unsupported(self, what: str, value: Any, *supported: Any) -> CheckpointError:
        """The error of a value that is not supported."""
        return CheckpointError(
            f"{what} {value!r} is not supported; supported: {', '.join(map(str, supported))}. "
            f"{CONFIG} of {self.where} asks for it."
        )

    def finish(self, family: str, shadowed: Iterable[tuple[str, Any]] = ()) -> None:
        """Judges the fields that nobody took; those of no known effect are named in one warning.

        Args:
            family: the model's family.
            shadowed: fields that others of the same names took the place of.

        Raises:
            CheckpointError: one asks for what is not supported.
        """
        guarded = guards(family)
        left = sorted([*self._left.items(), *shadowed], key=lambda pair: pair[0])
        refused, unknown = {}, []
        for name, value in left:
            if name in guarded:
                if not guarded[name].allows(value):
                    refused[name] = value
            elif name not in understood(family) and not is_harmless(name, family):
                unknown.append((name, value))
        if refused:
            reasons = [
                f"{listed([(name, value)])[:-1]}: {guarded[name].why}; supported: "
                f"{json.dumps(guarded[name].harmless[0])})"
                for name, value in refused.items()
            ]
            hint = (
                "Take the version of the model that is not quantized"
                if "quantization_config" in refused
                else "Take another model; or, where you know that a field changes nothing in this "
                f"one, leave it out: --ignore-field {next(iter(refused))} (in Python, "
                "ignore_fields)"
            )
            raise CheckpointError(
                f"{CONFIG} of {self.where} asks for what is not supported, and what would change "
                f"the numbers: {', '.join(reasons)}. {hint}."
            )
        self._warn(unknown)

    def _warn(self, unknown: list[tuple[str, Any]]) -> None:
        said = []
        if unknown:
            said.append(
                f"nothing is known to read {listed(unknown)}, neither in transformers "
                f"{TRANSFORMERS} nor here, and it is taken to change nothing"
            )
        if code := self._left.get("auto_map"):
            said.append(
                f"auto_map names code of the model's own ({_short(json.dumps(code))}), which is "
                "not run, as in transformers without trust_remote_code"
            )
        if said:
            warn(f"In {CONFIG} of {self.where}: {'; '.join(said)}.")
