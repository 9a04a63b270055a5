"""What a benchmark looks at in a generation's loop besides its tokens."""

from __future__ import annotations

from ffjax.cache import KVCache
from ffjax.loop import Loop

__all__ = ["cache_of", "prefill_of", "temp_bytes_of"]


def cache_of(loop: Loop) -> KVCache:
    """The loop's cache as it is now; the loop's next call uses it up."""
    return loop._cache


def prefill_of(loop: Loop) -> str | None:
    """Which implementation feeds the prompts; None where the loop does not say."""
    return getattr(loop, "prefill_implementation", None)


def temp_bytes_of(loop: Loop) -> int | None:
    """Most bytes that one of the prefill's programs has for intermediates, as it was compiled.

    Weights, cache and results are not among them. None where the loop does not say.
    """
    return getattr(loop, "prefill_temp_bytes", None)
