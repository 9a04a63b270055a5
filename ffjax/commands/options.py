"""Types of options, which refuse what is out of range before a model is read.

`argparse` puts the option's name before what they say.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np

from ffjax.benchmark.span import Span
from ffjax.seeds import MAX_SEED

__all__ = ["DTYPES", "number", "seed", "share", "spans", "whole", "wholes"]

DTYPES = ("bfloat16", "float32")
"""What weights can be cast to."""

# Numbers on a device have 32 bits.
_MOST = 2**31 - 1
_MOST_NUMBER = float(np.finfo(np.float32).max)


def whole(least: int, most: int = _MOST, *, even: bool = False) -> Callable[[str], int]:
    """The type of an option that is a whole number within limits.

    Args:
        least: the smallest one.
        most: the largest one.
        even: whether it is a multiple of two.
    """
    limit = "" if most == _MOST else f" to {most}"
    rule = f"{'an even' if even else 'a'} whole number from {least}{limit}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or (even and value % 2):
            raise argparse.ArgumentTypeError(f"{rule} is needed, got {text!r}")
        return value

    return read


def wholes(least: int, most: int = _MOST) -> Callable[[str], tuple[int, ...]]:
    """The type of an option that is one whole number or several, with commas between them."""
    one = whole(least, most)
    limit = "" if most == _MOST else f" to {most}"

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(one(part) for part in text.split(","))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"whole numbers from {least}{limit} are needed, with commas between them, as "
                f"1,2,4; got {text!r}"
            ) from None

    return read


def spans(least: int) -> Callable[[str], tuple[Span, ...]]:
    """The type of an option that is one length or several, or lengths from one to another."""
    one = whole(least)

    def span(text: str) -> Span:
        shortest, dash, longest = text.partition("-")
        ends = one(shortest), one(longest if dash else shortest)
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError("the shorter length comes first")
        return Span(*ends)

    def read(text: str) -> tuple[Span, ...]:
        try:
            return tuple(map(span, text.split(",")))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"lengths from {least} are needed, with commas between them, as 16,128 or "
                f"10-1500; got {text!r}"
            ) from None

    return read


def number(least: float | None = None, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a number, one that float32 can hold.

    Args:
        least: the smallest one. None: any that float32 can hold.
        above: whether it must be larger than that.
    """
    lowest = -_MOST_NUMBER if least is None else least

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= _MOST_NUMBER or (above and value == lowest):
            limit = "" if least is None else f" {'above' if above else 'from'} {least:g}"
            limit += f", at most {_MOST_NUMBER:.2g}," if value > _MOST_NUMBER else ""
            raise argparse.ArgumentTypeError(f"a number{limit} is needed, got {text!r}")
        return value

    return read


def share(*, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a number from 0 to 1.

    Args:
        above: whether it must be above 0.
    """

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1 or (above and value == 0):
            limit = "above 0, at most 1," if above else "from 0 to 1"
            raise argparse.ArgumentTypeError(f"a number {limit} is needed, got {text!r}")
        return value

    return read


def seed(text: str) -> int:
    """The type of an option that is a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"a whole number from 0 to 2^64 - 1 is needed, got {text!r}"
        )
    return value
