"""What is raised when a model computes no numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffjax.generation import GenerateOutput
    from ffjax.text.completion import Completion

__all__ = ["NotFiniteError"]


class NotFiniteError(FloatingPointError):
    """The logits of a sequence are NaN or infinite: they choose no token.

    Attributes:
        sequence: which one, counted from 0.
        count: new tokens it had got before; None where nobody has counted.
        output: what came before, of all sequences. None while the error is on its way.
        completions: the same as texts, where `ffjax.Generator` writes them; else None.
    """

    def __init__(self, sequence: int, count: int | None = None, fault: str | None = None):
        """Of a sequence, after so many new tokens; with what a kernel that gave up has said."""
        cause = (
            "The weights may hold NaN, or the activations overflow: `ffjax doctor MODEL` finds the "
            "tensor."
            if fault is None
            else f"{fault} That is no fault of the model: report it with what `ffjax doctor` "
            "prints, and use implementation='xla' meanwhile."
        )
        after = "" if count is None else f" after {count} new token{'' if count == 1 else 's'}"
        super().__init__(
            f"Logits must be finite; those of sequence {sequence} were NaN or infinite{after}, so "
            f"they choose none. {cause}"
        )
        self.sequence = sequence
        self.count = count
        self.output: GenerateOutput | None = None
        self.completions: list[Completion] | None = None
