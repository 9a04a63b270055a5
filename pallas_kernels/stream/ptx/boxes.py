"""Boxes: tiles whose rows lie apart, and that come by one copy, which a tensor map tells where."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from pallas_kernels.asm import TID, Block, Register
from pallas_kernels.inline_ptx.operation import Operation, Pointer
from pallas_kernels.stream.plan import BOX_UNIT

__all__ = ["MAP_BYTES", "TensorMap", "make_map"]

MAP_BYTES = 128
# What the instruction calls elements of 8 bytes.
_ELEMENTS = 4


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A matrix as its copies see it: elements of `BOX_UNIT` bytes, in pieces, in rows.

    Attributes:
        pieces: of a whole row.
        rows: of the matrix.
        box: elements of a piece, pieces and rows of a copy.
        swizzle: how a copy's chunks of 16 bytes change places, as PTX numbers it; 0: not at all.
        thread: the first one of the warp that makes it, which alone may use it.
    """

    pieces: int
    rows: int
    box: tuple[int, int, int]
    thread: int
    swizzle: int = 0

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """What `tensormap.replace` is to write besides the address: field, type, operands."""
        piece_bytes = BOX_UNIT * self.box[0]
        strides = piece_bytes, piece_bytes * self.pieces
        return [
            ("rank", "b32", (len(self.box) - 1,)),
            *(("box_dim", "b32", (i, size)) for i, size in enumerate(self.box)),
            ("global_dim", "b32", (0, self.box[0])),
            ("global_dim", "b32", (1, self.pieces)),
            ("global_dim", "b32", (2, self.rows)),
            *(("global_stride", "b64", (i, size)) for i, size in enumerate(strides)),
            *(("element_stride", "b32", (i, 1)) for i in range(len(self.box))),
            ("elemtype", "b32", (_ELEMENTS,)),
            *((name, "b32", (0,)) for name in ("interleave_layout", "fill_mode")),
            ("swizzle_mode", "b32", (self.swizzle,)),
        ]


def _write_map(
    b: Block,
    where: Register,
    weights: Register,
    scratch: Register,
    place: Register,
    *,
    tensor: TensorMap,
) -> None:
    thread, is_other, over = b.u32("thread"), b.pred("is_other"), b.label("over")
    b.comment("One warp makes it, in shared memory: first it is zero.")
    b.mov(thread, TID)
    b.sub(thread, thread, tensor.thread)
    b.setp("gt", is_other, thread, 31)
    b.bra_if(is_other, over)
    word, wide = b.u32("word"), b.u64("wide_scratch")
    b.mad_lo(word, thread, 4, scratch)
    b.st_shared(word, 0)
    b.bar_warp()
    made, is_later = b.label("made"), b.pred("is_later")
    b.comment("Its first thread sets every field.")
    b.setp("ne", is_later, thread, 0)
    b.bra_if(is_later, made)
    b.widen(wide, scratch.as_("u32"))
    b.tensormap_replace("global_address", "b64", wide, weights)
    for field, kind, values in tensor.fields:
        b.tensormap_replace(field, kind, wide, *values)
    b.st_shared(place, where)
    b.mark(made)
    b.comment("The warp copies it to global memory, where copies look for it.")
    b.bar_warp()
    b.tensormap_publish(where, scratch, MAP_BYTES)
    b.fence_tensormap(where, MAP_BYTES)
    b.comment("A copy will come to where it was made.")
    b.fence_proxy_async()
    b.mark(over)


_make_map = Operation("ffjax_make_map", _write_map)


def make_map(
    words: Any, offset: Array, weights: Any, scratch: Array, place: Array, tensor: TensorMap
) -> None:
    """Makes a tensor map (PTX's `tensormap.replace`) and says where it is.

    The map's encoding is opaque; every field is set explicitly, in what was zero.

    Args:
        words: int32 array that holds it.
        offset: int32 scalar, where in the array: whole lines of `MAP_BYTES`.
        weights: the matrix.
        scratch: int32 scalar, `MAP_BYTES` of shared memory, at a multiple of as many.
        place: int32 scalar, address of the 8 bytes of shared memory that get its address.
        tensor: the rest.
    """
    operands = Pointer(words, offset, written=True), Pointer(weights), scratch, place
    _make_map(*operands, tensor=tensor)
