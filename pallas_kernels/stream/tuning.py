"""What may be chosen freely about a fused step, and the table of what was measured best.

A choice changes the step's speed, and the order of its sums, and nothing else. `tuned.json`
holds a row for each device, model shape, batch and tokens of a step that was tuned, by
`ffjax tune` or by hand. Where it has none, the rule is the defaults of `Tuning`: tiles of 32 KiB,
two on their way, 8 more asked for into the L2 cache while a program waits, and after a segment of
bfloat16 weights no more than one. Where shared memory is too small for that, tiles are smaller: see
`planner.fitting`.

A cache that a step with one tuning was made with goes on with that one: words of the exchange
that a tuning leaves alone have old tags.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from pallas_kernels.backends import BACKENDS, Backend
from pallas_kernels.dims import GROUP, Dims, next_power_of_2

__all__ = ["TILE_BYTES", "Tuning", "row_key", "tuning_for"]

TILE_BYTES = (8192, 16384, 32768, 65536)
_CACHE_TILE_BYTES = (8192, 16384, 32768)
# The sizes that a step's best tuning depends on; layers and vocabulary only repeat tiles.
_SIZES = ("model_dim", "ffw_dim", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """The tunables of a fused step.

    Attributes:
        tile_bytes: bytes of a tile at most, a power of two from 8 KiB to 64 KiB.
        num_warps: warps of a program, 4 or 8; None: as few as hold the activations. Those
            beyond do not multiply: one of them feeds the ring.
        slots: tiles that shared memory holds, fewer where there is no room for them; None: as many
            as there is room for.
        in_flight: of them those that are asked for and have not come, at most, 1 to 16.
        l2_tiles: tiles beyond those that are asked for into the L2 cache while the program
            waits for others, 0 to 16.
        l2_bytes: bytes of them that each look at missing words asks for, a power of two from 4 to
            64 KiB.
        next_tiles: tiles beyond a segment that may have been asked for when its last tile has been
            used, 1 to 16, or as many as there are slots. What they bring stands before the words
            that the program waits for next. None: 1; as many as there are slots where some weights
            are quantized, since then it is less.
        collect_tiles: tiles that are asked for when a segment's activations have been collected,
            attention's output excepted, 0 to 4: where the ring is full, a copy of a tile each, into
            the L2 cache. Then memory has nothing to do, and nobody waits for words.
        hidden_copies: of the hidden activations, 1 or 2: a program reads one of them.
        cache_tile_bytes: bytes of a tile of keys and values, 8, 16 or 32 KiB.
        cache_tiles: such tiles that shared memory holds, 2 to 6.
        backend: that of Pallas which compiles the kernel, "triton" or "mosaic_gpu"; None: see
            `backends.default_backend`.

    Raises:
        ValueError: a value is none of these.
    """

    tile_bytes: int = 32 * 1024
    num_warps: int | None = None
    slots: int | None = None
    in_flight: int = 2
    l2_tiles: int = 8
    l2_bytes: int = 8 * 1024
    next_tiles: int | None = None
    collect_tiles: int = 0
    hidden_copies: int = 1
    cache_tile_bytes: int = 32 * 1024
    cache_tiles: int = 2
    backend: Backend | None = None

    def __post_init__(self):
        for name, allowed in {
            "tile_bytes": list(TILE_BYTES),
            "num_warps": [None, 4, 8],
            "in_flight": list(range(1, 17)),
            "l2_tiles": list(range(17)),
            "l2_bytes": [4096 << i for i in range(5)],
            "next_tiles": [None, *range(1, 17)],
            "collect_tiles": list(range(5)),
            "hidden_copies": [1, 2],
            "cache_tile_bytes": list(_CACHE_TILE_BYTES),
            "cache_tiles": list(range(2, 7)),
            "backend": [None, *BACKENDS],
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"A fused step's {name} is one of {', '.join(map(str, allowed))}; "
                    f"got {getattr(self, name)!r}."
                )
        if self.slots is not None and self.slots < 2:
            raise ValueError(
                "The ring has a tile in flight while another is used: slots is at least 2, "
                f"got {self.slots}."
            )

    @property
    def smallest(self) -> bool:
        """Whether no tuning has smaller tiles, of weights or of keys and values."""
        sizes = self.tile_bytes, self.cache_tile_bytes
        return sizes == (min(TILE_BYTES), min(_CACHE_TILE_BYTES))


def row_key(device: str, dims: Dims) -> dict[str, Any]:
    """What a row of the table is found by.

    Args:
        device: what the GPU calls itself.
        dims: the sizes; batches and tokens are rounded up to powers of two.
    """
    sizes = {name: getattr(dims, name) for name in _SIZES}
    bits = list(dataclasses.astuple(dims.weight_bits))
    several = {"tokens": next_power_of_2(dims.tokens)} if dims.tokens > 1 else {}
    return {
        "device": device,
        "batch": next_power_of_2(dims.batch),
        **several,
        **sizes,
        "weight_bits": bits,
        **_groups(dims),
    }


def _groups(dims: Dims) -> dict[str, Any]:
    """The groups of quantized matrices, where some are not of 128 inputs with a scale alone."""
    stored = [dims.stored(field.name) for field in dataclasses.fields(dims.weight_bits)]
    groups = [one.groups for one in stored]
    if all(group is None or (group.size, group.offset) == (GROUP, None) for group in groups):
        return {}
    named = [group and f"{group.size} {group.offset or ''}".strip() for group in groups]
    return {"groups": named}


@functools.cache
def _table() -> list[dict[str, Any]]:
    file = resources.files("pallas_kernels.stream") / "tuned.json"
    return json.loads(file.read_text(encoding="utf-8"))


def tuning_for(device: str, dims: Dims) -> Tuning | None:
    """The tuning of the table's row for this device, shape, batch and tokens.

    Several tokens of a sequence without a row of their own take that of as many sequences of one
    token each, whose products are the same. Weights in other groups than those of 128 without one
    take that of weights of as many bits. None where there is neither.

    Raises:
        ValueError: the row holds an impossible tuning.
        TypeError: the row holds a tunable that there is not.
    """
    sizes = [dims]
    if dims.tokens > 1:
        sizes.append(dataclasses.replace(dims, batch=dims.columns, tokens=1))
    keys = []
    for one in sizes:
        key = row_key(device, one)
        keys += [key, {name: value for name, value in key.items() if name != "groups"}]
    for key in keys:
        for row in _table():
            # A row with one of these is for what has it alone.
            others = {name: None for name in ("tokens", "groups") if name not in key}
            if all(row.get(name) == value for name, value in (key | others).items()):
                return Tuning(**row["tuning"])
    return None
