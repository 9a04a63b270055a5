"""What may be chosen freely about a streamed step: it changes its speed and nothing else."""

from __future__ import annotations

import dataclasses

__all__ = ["Tuning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """The tunables of a streamed step.

    Attributes:
        matrix_rows: rows of the matrix that a tile is multiplied as: 64 or 128.
        depth: inputs of a piece of a tile at most, a power of two from 16 to 512; small
            models get less.
        programs_per_core: programs that share a multiprocessor: 1 or 2.
        num_warps: warps of a program, 4, 8 or 16; None: by the operand's size.
        num_stages: tiles in flight plus one; None: as many as shared memory holds.

    Raises:
        ValueError: a value is none of these.
    """

    matrix_rows: int = 64
    depth: int = 256
    programs_per_core: int = 1
    num_warps: int | None = None
    num_stages: int | None = None

    def __post_init__(self):
        depths = [1 << n for n in range(4, 10)]
        for name, allowed in {
            "matrix_rows": [64, 128],
            "depth": depths,
            "programs_per_core": [1, 2],
            "num_warps": [None, 4, 8, 16],
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"A streamed step's {name} is one of {', '.join(map(str, allowed))}; "
                    f"got {getattr(self, name)!r}."
                )
        if self.num_stages is not None and self.num_stages < 2:
            raise ValueError(
                "A stream has a tile in flight while another is used: num_stages is at least 2, "
                f"got {self.num_stages}."
            )
