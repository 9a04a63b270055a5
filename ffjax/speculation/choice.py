"""What may be asked for as speculation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ffjax.speculation.lookup import Lookup
from pallas_kernels.support import MAX_BATCH

if TYPE_CHECKING:
    from ffjax.decode import Implementation
    from ffjax.loop import Loop
    from ffjax.model import Transformer
    from ffjax.prefill.choice import Prefill
    from ffjax.requests import Request

__all__ = ["MAX_SEQUENCES", "SPECULATIONS", "Speculation", "checked_speculation", "loop_for"]

SPECULATIONS = ("none", "lookup")
"""What speculation is called."""

Speculation = Lookup | Literal["none", "lookup"]
"""By name, or a `ffjax.Lookup` with settings of its own."""

MAX_SEQUENCES = MAX_BATCH // 2
"""Most sequences that speculate: a step has room for a draft of each."""


def checked_speculation(speculation: Any) -> Lookup | None:
    """Where drafts come from; None: there are none.

    Args:
        speculation: None, a name or a `Lookup`.

    Raises:
        ValueError: there is no speculation of that name.
        TypeError: it is something else.
    """
    if speculation is None or isinstance(speculation, Lookup):
        return speculation
    names = f"None, {', '.join(map(repr, SPECULATIONS))} or a ffjax.Lookup"
    if not isinstance(speculation, str):
        raise TypeError(f"speculation is {names}; got {speculation!r}.")
    if speculation not in SPECULATIONS:
        raise ValueError(f"speculation is {names}; got {speculation!r}.")
    return Lookup() if speculation == "lookup" else None


def _for_batch(lookup: Lookup, batch: int) -> Lookup:
    """The same with T chosen.

    Raises:
        ValueError: there are too many sequences, or too many tokens of each.
    """
    if batch > MAX_SEQUENCES:
        raise ValueError(
            f"Speculation takes 1 to {MAX_SEQUENCES} sequences, since a step has room for "
            f"{MAX_BATCH} tokens; there are {batch} prompts. Split them, or leave speculation out."
        )
    if lookup.tokens is None:
        return dataclasses.replace(lookup, tokens=MAX_BATCH // batch)
    if batch * lookup.tokens > MAX_BATCH:
        raise ValueError(
            f"A step has room for {MAX_BATCH} tokens, of all sequences together; speculation asks "
            f"for {lookup.tokens} of each of {batch}. Ask for up to {MAX_BATCH // batch}."
        )
    return lookup


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

    lookup = checked_speculation(speculation)
    if lookup is None:
        return Loop(model, request, implementation, prefill)
    from ffjax.speculation.loop import SpeculativeLoop

    source = _for_batch(lookup, request.batch)
    return SpeculativeLoop(model, request, source, implementation, prefill)
