"""Boxes: tiles whose rows lie apart, and that come by one copy, which a tensor map tells where."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state

from pallas_kernels.stream.plan import BOX_UNIT
from pallas_kernels.stream.ptx import lowered

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
    def fields(self) -> list[tuple[str, str, str]]:
        """What `tensormap.replace` is to write besides the address: field, type, operands."""
        piece_bytes = BOX_UNIT * self.box[0]
        strides = piece_bytes, piece_bytes * self.pieces
        return [
            ("rank", "b32", f"{len(self.box) - 1}"),
            *(("box_dim", "b32", f"{i}, {size}") for i, size in enumerate(self.box)),
            ("global_dim", "b32", f"0, {self.box[0]}"),
            ("global_dim", "b32", f"1, {self.pieces}"),
            ("global_dim", "b32", f"2, {self.rows}"),
            *(("global_stride", "b64", f"{i}, {size}") for i, size in enumerate(strides)),
            *(("element_stride", "b32", f"{i}, 1") for i in range(len(self.box))),
            ("elemtype", "b32", f"{_ELEMENTS}"),
            *((name, "b32", "0") for name in ("interleave_layout", "fill_mode")),
            ("swizzle_mode", "b32", f"{self.swizzle}"),
        ]


_make_map_p = core.Primitive("ffjax_make_map")


@_make_map_p.def_effectful_abstract_eval
def _(words, weights, offset, scratch, place, *, tensor):
    effects = {lowered.ORDERED, state.WriteEffect(0), state.ReadEffect(1)}
    return core.ShapedArray((1,), jnp.int32), effects


def _make_map_text(tensor: TensorMap) -> str:
    """Operands: the result, the map's address, the matrix's, the scratch's, and the place."""
    replace, where = "tensormap.replace.tile", "shared::cta.b1024"
    return " ".join(
        [
            "{ .reg .pred %p; .reg .b32 %t, %a; .reg .b64 %s; mov.u32 %t, %tid.x;",
            f"sub.u32 %t, %t, {tensor.thread}; setp.gt.u32 %p, %t, 31; @%p bra over;",
            "mad.lo.u32 %a, %t, 4, $3; st.shared.b32 [%a], 0;",
            f"{lowered.REJOIN} setp.ne.u32 %p, %t, 0; @%p bra made; cvt.u64.u32 %s, $3;",
            f"{replace}.global_address.{where}.b64 [%s], $2;",
            *(f"{replace}.{field}.{where}.{kind} [%s], {x};" for field, kind, x in tensor.fields),
            f"st.shared.b64 [$4], $1; made: {lowered.REJOIN}",
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"
            f" [$1], [$3], {MAP_BYTES};",
            f"fence.proxy.tensormap::generic.acquire.gpu [$1], {MAP_BYTES};",
            # A copy will come to where it was made.
            "fence.proxy.async.shared::cta; over: mov.u32 $0, 0; }",
        ]
    )


@lowered.rule(_make_map_p)
def _(ctx, words, weights, *args, tensor):
    offset, scratch, place = lowered.values(ctx, args)
    pointer = lowered.spread(lowered.pointer(weights), [1])
    arguments = [lowered.addresses(words, offset, (1,)), pointer, scratch, place]
    result = lowered.like((1,), lowered.i32())
    return lowered.assembly([result], _make_map_text(tensor), "=r,l,l,r,r", arguments)[0]


def make_map(
    words: Any, offset: Array, weights: Any, scratch: Array, place: Array, tensor: TensorMap
) -> None:
    """Makes a tensor map (PTX's `tensormap.replace`) and says where it is.

    In what form it says things is nobody's business: every field is replaced, in what was zero.

    Args:
        words: int32 array that holds it.
        offset: int32 scalar, where in the array: whole lines of `MAP_BYTES`.
        weights: the matrix.
        scratch: int32 scalar, `MAP_BYTES` of shared memory, at a multiple of as many.
        place: int32 scalar, address of the 8 bytes of shared memory that get its address.
        tensor: the rest.
    """
    numbers = (jnp.full((1,), x) for x in (offset, scratch, place))
    _make_map_p.bind(words, weights, *numbers, tensor=tensor)
