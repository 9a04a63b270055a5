"""Which thread holds which element of an array, and in which of its registers.

All sizes are powers of two. So an element's number, counted along the last axis first, has bits;
each of them is a bit of the thread's number or of the register's. A thread's bit that stands for
no bit of an element is *free*: the threads that differ in it hold the same elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["Layout", "bits_of_axes", "log2"]


def log2(number: int) -> int:
    """Of a power of two.

    Raises:
        ValueError: it is none.
    """
    if number < 1 or number & (number - 1):
        raise ValueError(f"The kernel's arrays have powers of two of elements, got {number}.")
    return number.bit_length() - 1


def bits_of_axes(shape: Sequence[int]) -> list[list[int]]:
    """The bits of an element's number that each axis has, the lowest first."""
    out: list[list[int]] = []
    first = 0
    for size in reversed(shape):
        out.insert(0, list(range(first, first + log2(size))))
        first += log2(size)
    return out


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where an array's elements are.

    Attributes:
        places: of each bit of an element's number: a thread's bit i is i, a register's bit j is
            -1 - j.
        register_bits: bits of a register's number; each is some element's.
    """

    places: tuple[int, ...]
    register_bits: int = 0

    @classmethod
    def plain(cls, shape: Sequence[int], threads: int) -> Layout:
        """The one that texts of PTX count on.

        Threads hold neighbouring elements, one thread after the other; arrays of fewer elements
        than threads are repeated.
        """
        bits = log2(math.prod(shape))
        inside = max(0, bits - log2(threads))
        return cls(tuple(-1 - i if i < inside else i - inside for i in range(bits)), inside)

    @property
    def registers(self) -> int:
        """Registers that a thread has for the array."""
        return 1 << self.register_bits

    def free(self, threads: int) -> int:
        """The free bits of a thread's number, as a mask."""
        return (threads - 1) & ~sum(1 << place for place in self.places if place >= 0)

    def restricted(self, bits: Sequence[int]) -> tuple[Layout, list[int]]:
        """That of an array whose element has these bits alone, in this order.

        Returns:
            The layout, and for each register of this one the number of that one's.
        """
        places = [self.places[bit] for bit in bits]
        kept = sorted({place for place in places if place < 0}, reverse=True)
        new = {old: -1 - i for i, old in enumerate(kept)}
        which = [
            sum(((number >> (-1 - old)) & 1) << i for i, old in enumerate(kept))
            for number in range(self.registers)
        ]
        return Layout(tuple(new.get(p, p) for p in places), len(kept)), which

    def element(self, register: int) -> int:
        """What a register's number adds to an element's."""
        return sum(
            1 << bit
            for bit, place in enumerate(self.places)
            if place < 0 and register >> (-1 - place) & 1
        )

    def elements(self, threads: int) -> np.ndarray:
        """The number of the element in each thread's registers: `[threads, registers]`."""
        thread = np.arange(threads)
        own = sum(
            (((thread >> place) & 1) << bit for bit, place in enumerate(self.places) if place >= 0),
            np.zeros(threads, np.int64),
        )
        return np.stack([own + self.element(k) for k in range(self.registers)], axis=1)
