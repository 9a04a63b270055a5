"""How the programs of a row tell each other what each has found in its part of it.

All meet some times. At a meeting each program writes what it has into a place of its own, and reads
all places of its row until each holds what belongs to this meeting; then all add it up alike. Words
carry a tag that says which meeting they belong to, as those of the fused kernel do, so that
nothing is counted, locked or fenced: a word is there or it is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.draw.plan import DrawPlan
from pallas_kernels.program import iota
from pallas_kernels.sync import MAX_POLLS, trap_if_over

__all__ = ["Exchange", "board_shape"]

# What a meeting tells is read before the next one ends, and so may be overwritten behind that.
_BUFFERS = 2
# A word's low bits are its meeting's tag: not zero, which is nobody's, and another for the next
# meeting that has the same buffer.
_TAG_BITS = 2
# Programs of a row poll lines of their own row: 32 words of 4 bytes.
_LINE = 32


def board_shape(plan: DrawPlan, words: int) -> jax.ShapeDtypeStruct:
    """What launches hand on, int32 `[B, words]`; zeros to begin with.

    The first line of a row holds how many meetings it has had, and the rest what was told.

    Args:
        plan: the launch.
        words: that a program tells at a meeting.
    """
    told = _BUFFERS * plan.parts * words if plan.parts > 1 else 0
    return jax.ShapeDtypeStruct((plan.batch, _LINE + told), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One program's end of it.

    Attributes:
        plan: the launch.
        board: the array of `board_shape`.
        row: this program's, int32.
        part: of the row, int32.
        words: how many a program tells at a meeting, a power of two, at most 32.
    """

    plan: DrawPlan
    board: Any
    row: Array
    part: Array
    words: int

    def meetings_before(self) -> Array:
        """How many the row has had in all launches before: int32."""
        return plgpu.load(self.board.at[self.row, jnp.int32(0)])

    def leave(self, meetings: Array) -> None:
        """Says how many the row has had; all have read the former number before they met."""
        first = jnp.full((1,), self.part == 0)
        row, place = jnp.full((1,), self.row), jnp.zeros((1,), jnp.int32)
        plgpu.store(self.board.at[row, place], jnp.full((1,), meetings), mask=first)

    def _place(self, meeting: Array, part: Array, i: Array) -> tuple[Array, Array]:
        """Indices of words into the board."""
        at = (meeting % _BUFFERS * self.plan.parts + part) * self.words
        at = jnp.broadcast_to(_LINE + at + i, i.shape)
        return jnp.full_like(at, self.row), at

    def tag(self, meeting: Array) -> Array:
        """What marks the words of a meeting, int32: 1 or 2."""
        return lax.div(meeting, jnp.int32(_BUFFERS)) % 2 + 1

    def tell(self, meeting: Array, told: Array) -> None:
        """Writes what this program has to say.

        Args:
            meeting: int32, how many came before; of the row, in all launches.
            told: int32 `[words]`, from 0 to 2^30 - 1.
        """
        if self.plan.parts == 1:
            return
        words = lax.shift_left(told, jnp.full_like(told, _TAG_BITS)) | self.tag(meeting)
        place = self._place(meeting, self.part, iota((self.words,), 0))
        plgpu.store(self.board.at[place], words)
        plgpu.debug_barrier()  # nothing is put off until behind the reading

    def told(self, meeting: Array, own: Array) -> Array:
        """What the programs of the row have told, int32 `[parts or more, words]`.

        Where a program has more threads than there are words, the words repeat from the row that is
        number `parts`. For else several threads would read the same word, some before it was
        written and some behind that, and would not agree on whether it was there.

        Args:
            meeting: as in `tell`.
            own: what this program told.
        """
        parts = self.plan.parts
        if parts == 1:
            return own[None]
        shape = max(parts, 32 * self.plan.num_warps // self.words), self.words
        place = self._place(meeting, iota(shape, 0) % parts, iota(shape, 1))
        tag = self.tag(meeting)

        def read() -> Array:
            return plgpu.load(self.board.at[place], volatile=True)

        def incomplete(state: tuple[Array, Array]) -> Array:
            words, polls = state
            wrong = (words & (2**_TAG_BITS - 1)) != tag
            return (jnp.max(wrong.astype(jnp.int32)) > 0) & (polls >= 0)

        def poll(state: tuple[Array, Array]) -> tuple[Array, Array]:
            return read(), trap_if_over(state[1] + 1, MAX_POLLS)

        words, _ = lax.while_loop(incomplete, poll, (read(), jnp.int32(0)))
        return lax.shift_right_logical(words, jnp.full_like(words, _TAG_BITS))

    def sums(self, told: Array) -> Array:
        """What all programs' words of `told` sum up to, int32 `[words]`."""
        return jnp.sum(jnp.where(iota(told.shape, 0) < self.plan.parts, told, 0), axis=0)
