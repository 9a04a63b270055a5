"""`logit_bias` as JSON has it: an object, whose keys are texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffjax.shortened import shortened

__all__ = ["biases_of"]

# Token ids have 32 bits.
_MOST_DIGITS = 10


def biases_of(given: Mapping[str, Any]) -> dict[int, Any]:
    """The biases of an object in JSON, by token id.

    Args:
        given: numbers by token id. `SamplingParams` looks at the numbers, and they stay as they
            come.

    Raises:
        ValueError: a key is no token id.
    """
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= _MOST_DIGITS):
            raise ValueError(
                'logit_bias maps token ids to numbers, as in {"42": -100}; got the key '
                f"{shortened(key)!r}. A token id is a whole number from 0, of up to "
                f"{_MOST_DIGITS} digits."
            )
    return {int(key): value for key, value in given.items()}
