"""The fields of a config.json: each is understood, or refused by its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from checkpoints.hf_families import HARMLESS
from checkpoints.manifest import CheckpointError

__all__ = ["CONFIG", "Fields"]

CONFIG = "config.json"


class Fields:
    """The fields of a config.json, each taken once; what is left at the end was not understood."""

    def __init__(self, data: dict[str, Any], defaults: dict[str, Any], where: Path):
        """Starts with all of them, and with what a silent one means."""
        self._left = dict(data)
        self._defaults = defaults
        self.where = where

    def take(self, name: str) -> Any:
        """A field's value, or its default; None where neither is there."""
        return self._left.pop(name, self._defaults.get(name))

    def has(self, name: str) -> bool:
        """Whether the file gives the field, and not as null."""
        return self._left.get(name) is not None

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
        """True or false."""
        value = self.take(name)
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

    def finish(self) -> None:
        """Whether every field that asks for something was understood.

        Raises:
            CheckpointError: one was not.
        """
        unknown = [
            f"{name} ({json.dumps(value)[:60]})"
            for name, value in sorted(self._left.items())
            if name not in HARMLESS and value is not None and value is not False
        ]
        if unknown:
            raise CheckpointError(
                f"{CONFIG} of {self.where} has fields that are not supported, and might change "
                f"what the model computes: {', '.join(unknown)}. Remove those that do not."
            )
