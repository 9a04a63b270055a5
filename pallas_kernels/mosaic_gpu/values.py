"""What stands for an array while the kernel is lowered."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pallas_kernels.mosaic_gpu.layout import Layout

__all__ = ["Lazy", "Pointer", "Registers", "Value", "uniform"]


@dataclasses.dataclass(frozen=True)
class Registers:
    """An array that threads hold.

    Attributes:
        shape: its shape.
        layout: where its elements are.
        regs: a thread's values, one a register.
    """

    shape: tuple[int, ...]
    layout: Layout
    regs: list[Any]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Lazy:
    """An array that follows from indices and single numbers: it is made wherever it is wanted."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[Layout], list[Any]]):
        self.shape = shape
        self._make = make
        # What was made, and in which block of code: it is there in that block, and in those within.
        self._made: dict[Layout, list[tuple[int, list[Any]]]] = {}

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def reshaped(self, shape: tuple[int, ...]) -> Lazy:
        """The same elements in the same order."""
        out = Lazy(shape, self._make)
        out._made = self._made
        return out

    def anew(self, number_anew: Callable[[], AbstractContextManager[None]]) -> Lazy:
        """The same elements, of nothing that was made before: see `Threads.number_anew`."""

        def make(layout: Layout) -> list[Any]:
            with number_anew():
                return self._make(layout)

        return Lazy(self.shape, make)

    def at(self, layout: Layout, blocks: list[int]) -> list[Any]:
        """A thread's values.

        Args:
            layout: where elements are wanted.
            blocks: the numbers of the blocks of code that are open, the innermost last.
        """
        made = self._made.setdefault(layout, [])
        for block, regs in made:
            if block in blocks:
                return regs
        regs = self._make(layout)
        made.append((blocks[-1], regs))
        return regs


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An array in device memory.

    Attributes:
        base: its address, 64 bits.
        item: bytes of an element.
    """

    base: Any
    item: int


Value = Registers | Lazy | Pointer


def uniform(shape: tuple[int, ...], value: Any) -> Registers | Lazy:
    """An array of one value."""
    if math.prod(shape) == 1:
        return Registers(shape, Layout(()), [value])
    return Lazy(shape, lambda layout: [value] * layout.registers)
