"""Whether the fused steps that speculation takes can run."""

from __future__ import annotations

from ffjax.decode import why_not_fused
from ffjax.model import Transformer

__all__ = ["check_fused"]


def check_fused(model: Transformer, batch: int, slots: int, tokens: int) -> None:
    """Refuses speculation by fused steps that cannot run on the model's device.

    Args:
        model: the model.
        batch: B.
        slots: S.
        tokens: T.

    Raises:
        NotImplementedError: they cannot.
    """
    if (reason := why_not_fused(model, batch, slots, tokens)) is not None:
        raise NotImplementedError(
            f"Speculation runs steps of {tokens} tokens of each sequence. {reason} Or leave "
            "speculation out."
        )
