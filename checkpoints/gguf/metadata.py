"""Looks up the fields of a GGUF file, and remembers which were asked for."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from checkpoints.gguf.header import Header
from checkpoints.manifest import CheckpointError

__all__ = ["Metadata"]


class Metadata:
    """The fields of a GGUF file.

    Attributes:
        file: the file, for messages.
        fields: values by name.
    """

    def __init__(self, header: Header):
        """Takes all fields of a header."""
        self.file = header.file
        self.fields = header.fields
        self._taken: set[str] = set()

    def get(self, name: str) -> Any:
        """A field's value; None where there is none."""
        self._taken.add(name)
        return self.fields.get(name)

    def number(self, name: str, kind: str, default: Any = None) -> Any:
        """A positive number: "int" or "float". A list of layers is one number if all are the same.

        Args:
            name: the field.
            kind: "int", or "float" for any number.
            default: where there is no such field. None: there must be one.

        Raises:
            CheckpointError: there is none, or it is no such number.
        """
        value = self.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"The metadata of {self.file} lacks {name}.")
            return default
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise self.unsupported(name, value.tolist(), "the same in every layer")
            value = value[0].item()
        whole = kind == "int"
        good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not good or not 0 < value < math.inf:
            rule = "a positive integer" if whole else "a positive number"
            raise CheckpointError(f"{name} of {self.file} is {rule}, got {value!r}.")
        return value if whole else _shortest(value)

    def text(self, name: str) -> str | None:
        """A text; None where there is none.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{name} of {self.file} is a text, got {_shown(value)}.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{name} of {self.file} is true or false, got {_shown(value)}.")
        return value

    def unsupported(self, what: str, value: Any, *supported: Any) -> CheckpointError:
        """The error of a value that is not supported."""
        return CheckpointError(
            f"{what} {_shown(value)} is not supported; supported: "
            f"{', '.join(map(str, supported))}. The metadata of {self.file} asks for it."
        )

    def left(self, prefix: str) -> dict[str, Any]:
        """The fields whose names begin so, and for which nobody has asked."""
        return {
            name: value
            for name, value in self.fields.items()
            if name.startswith(prefix) and name not in self._taken
        }


def _shortest(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _shown(value: Any, most: int = 60) -> str:
    """A value in short."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."
