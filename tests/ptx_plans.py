"""As much of a `StreamPlan` as `fragment_layout` looks at, for tests of a tile's product."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pallas_kernels.stream.plan import COLUMNS, QUAD, line_of

__all__ = ["Planned"]


class Planned:
    """A tile that has a plan; for dataclasses.

    Attributes:
        bits: of a weight.
        chunked: whether there is one sequence.
        product_warps: that multiply.
        warps: of the program.
    """

    bits: int
    chunked: bool
    product_warps: int
    warps: int

    @property
    def plan(self) -> Any:
        """What stands in for a plan."""
        return SimpleNamespace(
            threads=32 * self.warps,
            product_warps=self.product_warps,
            chunked=self.chunked,
            bulk=True,
            wide=False,
            indices_anew=False,
            line=lambda part: self.line,
            columns=lambda part: self.columns,
        )

    @property
    def line(self) -> int:
        """Reads of a row that a warp makes side by side."""
        return line_of(self.chunked, self.bits)

    @property
    def columns(self) -> int:
        """Chunks of one sequence's inputs; or sequences, and what fills them up."""
        return self.line // QUAD if self.chunked else COLUMNS
