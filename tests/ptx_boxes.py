"""PTX instructions that make tensor maps, and copies of the boxes that those tell of."""

from __future__ import annotations

import numpy as np
from ptx_table import WARP, Threads, instruction
from ptx_text import Corner, PtxError

__all__ = ["MAP_BYTES", "copy_box", "learn_map"]

MAP_BYTES = 128
# Of three dimensions, whose elements have 8 bytes and lie side by side: what a map must say.
_RANK, _ELEMENTS = 2, 4
_PLAIN = {
    ("rank", 0): _RANK,
    ("elemtype", 0): _ELEMENTS,
    **{("element_stride", i): 1 for i in range(3)},
    **{(name, 0): 0 for name in ("interleave_layout", "fill_mode")},
}
# Of each swizzle mode the bytes of a line, whose chunks of 16 bytes change places.
_LINES = {0: 16, 1: 32, 2: 64, 3: 128}
_SIZES = [
    ("swizzle_mode", 0),
    ("global_address", 0),
    *((name, i) for name in ("box_dim", "global_dim") for i in range(3)),
    *(("global_stride", i) for i in range(2)),
]
_FIELDS = " ".join({name for name, _ in [*_PLAIN, *_SIZES]})


@instruction("tensormap", also=f"replace tile b1024 cp_fenceproxy global shared::cta gpu release "
              f"tensormap::generic sync aligned {_FIELDS}")  # fmt: skip
def _(t: Threads) -> None:
    machine = t.machine
    if t.has("cp_fenceproxy"):
        [to], [source] = (np.unique(t.address(i, where)) for i, where in _BOTH)
        _look_at_size(t)
        for place, (_, name) in zip((source, to), reversed(_BOTH), strict=True):
            machine.places(name, np.array([place]), MAP_BYTES, MAP_BYTES)
        machine.maps[int(to)] = dict(machine.drafts[int(source)])
        return
    [field] = [m for m in t.instruction.modifiers if m in _FIELDS.split()]
    if len(t.threads) != 1:
        raise PtxError("Several threads write the same field of a tensor map.")
    [at] = t.address(0, "shared")
    held = machine.load("shared", np.array([at]), MAP_BYTES, t.threads)
    if int(at) not in machine.drafts:
        if held.any():
            raise PtxError("What becomes a tensor map is not zero before.")
        machine.drafts[int(at)] = {}
    numbers = [int(t.get(x, t.kind)[0]) for x in t.operands[1:]]
    machine.drafts[int(at)][field, numbers[0] if len(numbers) > 1 else 0] = numbers[-1]
    # In what form is nobody's business.
    machine.store("shared", np.array([at]), held ^ 0x5A, t.threads)


_BOTH = ((0, "global"), (1, "shared"))


def _look_at_size(t: Threads) -> None:
    if (t.get(t.operands[-1], "u32") != MAP_BYTES).any():
        raise PtxError(f"A tensor map has {MAP_BYTES} bytes.")


def learn_map(t: Threads) -> None:
    """A warp is told of a map that has been copied."""
    _look_at_size(t)
    [at] = np.unique(t.address(0, "global"))
    t.machine.known_maps |= {(int(warp), int(at)) for warp in np.unique(t.threads // WARP)}


def copy_box(t: Threads) -> None:
    """Starts the copies of a box's rows, whose pieces lie side by side."""
    if not (t.has("3d") and t.has("tile") and t.has("mbarrier::complete_tx::bytes")):
        raise PtxError("The machine has boxes of three dimensions that an mbarrier waits for.")
    if not t.has("L2::cache_hint") or len(t.operands) != 4:
        raise PtxError("A box is copied with a hint, and a policy.")
    t.get(t.operands[3], "b64")
    corner = t.operands[1]
    assert isinstance(corner, Corner)
    maps = t.get(corner.base, "b64").astype(np.int64)
    starts = np.stack([t.get(x, "s32").astype(np.int64) for x in corner.parts], axis=1)
    columns = t.threads, t.address(0, "shared"), maps, starts, t.address(2, "shared")
    for thread, to, at, start, barrier in zip(*columns, strict=True):
        if (int(thread) // WARP, int(at)) not in t.machine.known_maps:
            raise PtxError("No fence tells the warp of the tensor map.")
        _copy(t, int(thread), int(to), t.machine.maps[int(at)], start.tolist(), int(barrier))


def _copy(
    t: Threads, thread: int, to: int, fields: dict[tuple[str, int], int], start: list[int], bar: int
) -> None:
    if set(fields) != {*_PLAIN, *_SIZES} or any(fields[k] != v for k, v in _PLAIN.items()):
        raise PtxError(f"The tensor map is not one that the machine knows: {fields}.")
    box, whole = ([fields[name, i] for i in range(3)] for name in ("box_dim", "global_dim"))
    piece, row = (fields["global_stride", i] for i in range(2))
    if to % MAP_BYTES or any(not 0 < size <= 256 for size in box) or 8 * box[0] % 16 or row % 16:
        raise PtxError("A box has at most 256 elements a dimension, and lies at whole units.")
    if 8 * box[0] != piece or start[0] or whole[0] != box[0]:
        raise PtxError("Pieces of a row are copied whole, and lie side by side.")
    # Rows beyond the last one come as zeros.
    if any(not 0 <= s <= n - b for s, n, b in zip(start[:2], whole, box, strict=False)):
        raise PtxError(f"A box begins at {start}, and reaches beyond {whole}.")
    if not 0 <= start[2] < whole[2]:
        raise PtxError(f"A box begins at {start}, beyond {whole}.")
    size, line = piece * box[1], _LINES[fields["swizzle_mode", 0]]
    if fields["swizzle_mode", 0] and size != line:
        raise PtxError(f"Of lines of {line} bytes, a box's rows have {size}.")
    rows = start[2] + np.arange(min(box[2], whole[2] - start[2]))
    source = fields["global_address", 0] + rows * row + start[1] * piece
    t.machine.copy(thread, to, source, size, bar, line, zeros=(box[2] - len(rows)) * size)
