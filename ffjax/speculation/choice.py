"""What may be asked for as speculation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ffjax.speculation.draft import MOST_BY_ITSELF, Draft, check_draft, check_draft_capacity
from ffjax.speculation.lookup import Lookup
from pallas_kernels.support import MAX_BATCH

if TYPE_CHECKING:
    from ffjax.decode import Implementation
    from ffjax.loop import Loop
    from ffjax.model import Transformer
    from ffjax.prefill.choice import Prefill
    from ffjax.requests import Request

__all__ = [
    "MAX_SEQUENCES",
    "SPECULATIONS",
    "Speculation",
    "checked_speculation",
    "live_speculation",
    "loop_for",
]

SPECULATIONS = ("none", "lookup")
"""What speculation is called."""

Speculation = Lookup | Draft | Literal["none", "lookup"]
"""By name, a `ffjax.Lookup` with settings of its own, or a `ffjax.Draft`: a draft model."""

MAX_SEQUENCES = MAX_BATCH // 2
"""Most sequences that speculate: a step has room for a draft of each."""


def checked_speculation(
    speculation: Any, model: Transformer | None = None
) -> Lookup | Draft | None:
    """Where drafts come from; None: there are none.

    Args:
        speculation: None, a name, a `Lookup` or a `Draft`.
        model: that a draft model has to fit; None: it is not looked at.

    Raises:
        ValueError: there is no speculation of that name, or the draft model does not fit.
        TypeError: it is something else.
    """
    if isinstance(speculation, Draft) and model is not None:
        check_draft(speculation, model)
    if speculation is None or isinstance(speculation, Lookup | Draft):
        return speculation
    names = f"None, {', '.join(map(repr, SPECULATIONS))}, a ffjax.Lookup or a ffjax.Draft"
    if not isinstance(speculation, str):
        raise TypeError(f"speculation is {names}; got {speculation!r}.")
    if speculation not in SPECULATIONS:
        raise ValueError(f"speculation is {names}; got {speculation!r}.")
    return Lookup() if speculation == "lookup" else None


def _for_batch(asked: Any, batch: int, them: str) -> Any:
    """The same `Lookup` or `Draft` with T chosen.

    Args:
        asked: it.
        batch: B.
        them: who the sequences are, and what to do if they are too many.

    Raises:
        ValueError: there are too many sequences, or too many tokens of each.
    """
    if batch > MAX_SEQUENCES:
        raise ValueError(
            f"Speculation takes 1 to {MAX_SEQUENCES} sequences at a time, since a step has room "
            f"for {MAX_BATCH} tokens; {them}, or leave speculation out."
        )
    if asked.tokens is None:
        most = MOST_BY_ITSELF if isinstance(asked, Draft) else MAX_BATCH
        return dataclasses.replace(asked, tokens=min(most, MAX_BATCH // batch))
    if batch * asked.tokens > MAX_BATCH:
        raise ValueError(
            f"A step has room for {MAX_BATCH} tokens, of all sequences together; speculation asks "
            f"for {asked.tokens} of each of {batch}. Ask for up to {MAX_BATCH // batch}."
        )
    return asked


def live_speculation(
    speculation: Speculation | None,
    rows: int,
    model: Transformer | None = None,
    capacity: int | None = None,
) -> Lookup | Draft | None:
    """What a live batch's drafts come from, T chosen; None: there are none.

    Args:
        speculation: what is asked for.
        rows: B.
        model: that a draft model has to fit; None: it is not looked at.
        capacity: tokens of a sequence that a draft model has to take; None: likewise.

    Raises:
        ValueError: there are too many rows, or tokens of each, or no such speculation; or the draft
            model does not fit.
        TypeError: it is something else.
    """
    asked = checked_speculation(speculation, model)
    if asked is None:
        return None
    if isinstance(asked, Draft) and capacity is not None:
        check_draft_capacity(asked, capacity)
    return _for_batch(asked, rows, f"this batch has {rows}. Ask for fewer")


def loop_for(
    model: Transformer,
    request: Request,
    implementation: Implementation | None,
    prefill: Prefill | None,
    speculation: Speculation | None,
) -> Loop:
    """What runs a request on the device.

    Raises:
        ValueError: as `ffjax.generate`.
        TypeError: likewise.
        NotImplementedError: likewise.
    """
    from ffjax.loop import Loop

    asked = checked_speculation(speculation)
    if asked is None:
        return Loop(model, request, implementation, prefill)
    asked = _for_batch(asked, request.batch, f"there are {request.batch} prompts. Split them")
    if isinstance(asked, Draft):
        from ffjax.speculation.draft_loop import DraftLoop

        return DraftLoop(model, request, asked, implementation, prefill)
    from ffjax.speculation.loop import SpeculativeLoop

    return SpeculativeLoop(model, request, asked, implementation, prefill)
