"""Errors that are planted in the kernel's texts, to see whether a tool finds their kind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.asm import Block
from pallas_kernels.inline_ptx import lowered
from pallas_kernels.program import iota
from pallas_kernels.stream import launch, product
from pallas_kernels.stream.plan import SegmentPlan, StreamPlan
from pallas_kernels.stream.ptx import cache

__all__ = ["PLANTED", "Planted", "plant"]

# Bytes beyond the beginning of the cache's keys: nobody allocates so much here.
_FAR = 1 << 30
# What zeroes shared memory, 16 bytes a thread: every thread comes there once a step.
_CLEARED = "{0, 0, 0, 0}"

_Counted = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Planted:
    """An error.

    Attributes:
        tool: that looks for its kind.
        what: it is, for the table.
        patch: patches the lowering; what it calls is called for every text that was changed.
    """

    tool: str
    what: str
    patch: Callable[[_Counted], Any]


def _texts(change: Callable[[str], str]) -> Callable[[_Counted], Any]:
    """Patches every inline PTX that `change` changes."""

    def patch(count: _Counted) -> Any:
        original = lowered.assembly

        def changed(results: Any, text: str, *rest: Any, **more: Any) -> Any:
            other = change(text)
            if other != text:
                count()
            return original(results, other, *rest, **more)

        return mock.patch.object(lowered, "assembly", changed)

    return patch


def _where_cleared(before: str = "", behind: str = "") -> Callable[[_Counted], Any]:
    """Puts PTX before, or after, the clearing of shared memory; %offset and %place are free."""

    def change(text: str) -> str:
        if _CLEARED not in text:
            return text
        return before + text.replace("done:", f"done: {behind}")

    return _texts(change)


def _feed_of_the_cache(change: Callable[..., None]) -> Callable[[_Counted], Any]:
    """Patches the text that asks for keys and values.

    Args:
        change: writes it, of what writes it as it is, and of that function's arguments.
    """

    def patch(count: _Counted) -> Any:
        original = cache.write_cache_feed

        def changed(b: Block, *rest: Any) -> None:
            before = b.text()
            change(original, b, *rest)
            if b.text() != before:
                count()

        return mock.patch.object(cache, "write_cache_feed", changed)

    return patch


def _load_beyond(original: Any, b: Block, feed: Any, ring: Any, keys: Any, *rest: Any) -> None:
    # Volatile, or the compiler leaves out what nobody reads.
    b.emit("ld.volatile.global.b32", b.u32("unused").name, str(keys + _FAR))
    original(b, feed, ring, keys, *rest)


def _copy_beyond(original: Any, b: Block, feed: Any, *rest: Any) -> None:
    # A box takes its map from memory that is not there.
    copy = Block.cp_bulk_box

    def copy_beyond(b: Block, to: Any, box: Any, *more: Any) -> None:
        b.add(box, box, _FAR)
        copy(b, to, box, *more)

    with mock.patch.object(Block, "cp_bulk_box", copy_beyond):
        original(b, feed, *rest)


def _no_arrival(text: str) -> str:
    """Without the wait for a tile of weights; attention waits in a text of its own."""
    return "mov.u32 $0, 0;" if "mbarrier.try_wait" in text and "mma" not in text else text


def _one_place(count: _Counted) -> Any:
    """Has all warps put their products where the first puts its own."""
    original = product.place_aside

    def place(plan: StreamPlan, part: SegmentPlan, start: Any, spare: Any) -> Any:
        count()
        assert plan.chunked, "Of several sequences, products lie in another order."
        warp = jnp.right_shift(iota((plan.threads,), 0), 5)
        return original(plan, part, start - warp * plan.columns(part) * 4 * part.rows, spare)

    return mock.patch.object(product, "place_aside", place)


def _no_meeting(text: str) -> str:
    """Without the barriers of a program that stand inside a text: those of each warp stay."""
    return text.replace("bar.sync 0;", "")


def _read_of_logits(count: _Counted) -> Any:
    """Reads the step's result before anyone has written it."""
    original = launch.stream_kernel

    def kernel(env: Any) -> None:
        count()
        # Of each program one. What is read is used, or it would not be.
        index = env.program % env.dims.vocab_size + jnp.arange(1)
        where = env.refs["logits"].at[0, index]
        plgpu.store(where, plgpu.load(where) + 1.0)
        original(env)

    return mock.patch.object(launch, "stream_kernel", kernel)


PLANTED: dict[str, Planted] = {
    "load": Planted("memcheck", "a load beyond the cache", _feed_of_the_cache(_load_beyond)),
    "bulk-copy": Planted(
        "memcheck", "a bulk copy from beyond the cache", _feed_of_the_cache(_copy_beyond)
    ),
    "no-barrier": Planted("racecheck", "barriers left out of attention", _texts(_no_meeting)),
    "no-arrival": Planted("racecheck", "a tile multiplied before it has come", _texts(_no_arrival)),
    "one-place": Planted("racecheck", "products of two warps in one place", _one_place),
    "early-read": Planted(
        "racecheck",
        "a read of what another warp writes",
        _where_cleared(
            behind="mov.u32 %offset, %tid.x; xor.b32 %offset, %offset, 32; "
            "shl.b32 %offset, %offset, 4; add.u32 %place, %offset, $1; "
            "ld.volatile.shared.b32 %offset, [%place]; "
        ),
    ),
    "unwritten": Planted("initcheck", "a load of what nobody has written", _read_of_logits),
    "divergent": Planted(
        "synccheck",
        "a barrier at which half of a warp stands",
        _where_cleared(
            before="{ .reg .pred %zp; .reg .b32 %zt; mov.u32 %zt, %laneid; "
            "setp.lt.u32 %zp, %zt, 16; @%zp bar.sync 0; @!%zp bar.sync 0; } "
        ),
    ),
    "wrong-mask": Planted(
        "synccheck",
        "a barrier of a warp by threads that it does not name",
        _where_cleared(before="bar.warp.sync 0x0000ffff; "),
    ),
}
"""By name."""


@contextlib.contextmanager
def plant(name: str) -> Iterator[None]:
    """Plants an error in all that is traced meanwhile.

    Raises:
        RuntimeError: nothing was changed: the kernel's texts are others than they were.
    """
    changed: list[None] = []
    with PLANTED[name].patch(lambda: changed.append(None)):
        yield
    if not changed:
        raise RuntimeError(
            f"The planted error {name!r} changed no text of the kernel. Write it anew, in "
            "tests/sanitize/planted.py."
        )
