"""Attention over the cache's tiles that have come to shared memory."""

from __future__ import annotations

import math
import struct
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state
from jax._src.pallas.triton import lowering

from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.cache import (
    CacheFeed,
    ask_tile_lines,
    next_tile_lines,
    pointers,
)

__all__ = ["LOWEST", "attend_lines", "attend_span", "query_place"]

# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = "0fF149F2CA"  # -1e30
_ONE, _TWO = "0f3F800000", "0f40000000"
# How far scores in base 2 may exceed the maximum that weights are taken from before it is raised.
_SLACK = 8.0


def _float(x: float) -> str:
    """As PTX writes a float32."""
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"


def query_place(pitch: int, row: Any, element: Any) -> Any:
    """Where an element of a query lies, bytes behind the first; what bfloat16 leaves of it, 4 on.

    Two neighbours, and what is left of them, lie behind each other, and so does what a thread
    multiplies at once: of 8 neighbours the first 4 in the query's own row, the others 8 rows on.

    Args:
        pitch: from a query to the next, bytes.
        row: the query's number, below `LOT`: an integer or an array of them.
        element: likewise, of the query.
    """
    later, within = (element >> 2) & 1, 2 * (element & 1) + 8 * ((element >> 1) & 1)
    return (row + later * LOT) * pitch + 16 * (element >> 3) + within


class _Attend:
    """The text of `attend_span`, piece by piece, in the order in which `attend_lines` has it.

    One warp has each scheduler to itself: what nobody waits for yet is loaded first, sums that do
    not depend on each other take turns, and what is seldom needed stands behind the loop.
    """

    def __init__(self, f: CacheFeed):
        self.f = f
        self.keys = f.block // f.warps  # of a tile, for each warp
        self.feeding = f.thread // 32 * self.keys  # `first` of the feeding thread's warp
        self.octets = self.keys // 8  # blocks of 8 keys: columns of a block of scores
        self.pieces = f.head_dim // 32  # of 8 elements of a row, 4 threads having one each
        self.blocks = f.head_dim // 16  # of elements of a value: 2 neighbours a thread
        # Threads of a query take so many blocks in turn, each another one first: no two of a
        # warp then read the same bank.
        self.turns = min(4, self.blocks)
        # Whether there are registers for the queries, and for values besides the scores.
        self.resident = f.head_dim <= 128
        # Sums of a block of scores that are added up in the end: some products at a time.
        self.chains = max(1, (4 if self.resident else 2) // self.octets)
        # Blocks of keys whose values are put in order before the scores are known, not after.
        self.early = range(self.octets // 2 if self.resident else 0)
        self.late = range(len(self.early), self.octets)

    def _query(self, j: int) -> list[str]:
        return [f"%q{j if self.resident else j % 2}_{i}" for i in range(8)]

    def _load_query(self, j: int) -> list[str]:
        names = self._query(j)
        low = LOT * self.f.query_pitch
        return [
            f"ld.shared.v4.b32 {{{', '.join(names[:4])}}}, [%qa+{64 * j}];",
            f"ld.shared.v4.b32 {{{', '.join(names[4:])}}}, [%qa+{64 * j + low}];",
        ]

    def _scores(self) -> list[str]:
        return [f"%s{t}_{n}" for t in range(self.octets) for n in range(2)]

    def _sum(self, s: int, i: int) -> list[str]:
        return [f"%o{s}_{i}_{n}" for n in range(4)]

    def _all_sums(self) -> list[str]:
        blocks = [self._sum(s, i) for s in range(self.blocks) for i in range(2)]
        return [name for block in blocks for name in block]

    def registers(self) -> list[str]:
        octets, four = range(self.octets), range(4)
        words = [x for j in range(self.pieces if self.resident else 2) for x in self._query(j)]
        words += [
            f"%{x}{t}_{j}_{n}"
            for x in "rk"
            for t in octets
            for j in range(self.pieces)
            for n in four
        ]
        blocks = range(self.blocks)
        words += [
            f"%{x}{t}_{n}_{s}" for x in "wu" for t in octets for n in range(2) for s in blocks
        ]
        words += [f"%y{t}_{s}_{i}" for t in octets for s in blocks for i in range(2)]
        words += [f"%{name}{t}" for t in octets for name in ("ph", "pl", "mask")]
        words += [f"%v{r}" for r in range(self.turns)]
        floats = [f"%z{t}_{i}_{n}" for t in octets for i in range(self.chains) for n in four]
        floats += [f"%{x}{t}_{n}" for x in "se" for t in octets for n in range(2)]
        return [
            ".reg .pred %p, %odd, %one, %two, %masked, %asks;",
            ".reg .b32 %g, %c, %first, %left, %mine, %new, %stage, %phase, %looks;",
            ".reg .b32 %qa, %ka, %va, %at, %x, %y, %size; .reg .b64 %from;",
            f".reg .b32 {', '.join(words)};",
            f".reg .f32 %top, %total, %shrink, %f, %h, %some<{self.octets}>;",
            f".reg .f32 {', '.join(floats + self._all_sums())};",
        ]

    def _lane(self) -> list[str]:
        """The thread's place in its warp: `g` and `c`, a query, or a key, and a fourth of it."""
        return [
            "mov.u32 %x, %tid.x; shr.u32 %g, %x, 2; and.b32 %g, %g, 7; and.b32 %c, %x, 3;",
        ]

    def begin(self, ring: str, row: str) -> list[str]:
        f = self.f
        lines = [
            *self._lane(),
            f"mov.u32 %x, %tid.x; shr.u32 %first, %x, 5; mul.lo.u32 %first, %first, {self.keys};",
            "and.b32 %x, %g, 1; setp.ne.u32 %odd, %x, 0;",
            "and.b32 %x, %c, 1; setp.ne.u32 %one, %x, 0; setp.ge.u32 %two, %c, 2;",
            f"ld.shared.v4.b32 {{%x, %left, %y, %new}}, [{row}]; add.u32 %left, %left, %new;",
            # A warp that does not attend puts nothing anywhere.
            f"setp.ge.u32 %p, %first, {f.block}; @%p mov.u32 %new, 0;",
            f"ld.shared.v2.b32 {{%stage, %phase}}, [{ring}+{f.control + 24}];",
            f"mad.lo.u32 %qa, %g, {f.query_pitch}, {ring}; mad.lo.u32 %qa, %c, 16, %qa;",
            f"add.u32 %qa, %qa, {f.queries};",
            # Places of the thread's first words in a tile.
            f"add.u32 %x, %first, %g; mul.lo.u32 %x, %x, {f.row_bytes};",
            "mad.lo.u32 %ka, %c, 16, %x;",
            f"mad.lo.u32 %x, %c, 2, %first; mul.lo.u32 %x, %x, {f.row_bytes};",
            f"mad.lo.u32 %va, %g, 4, %x; and.b32 %y, %c, {self.turns - 1};",
            "mad.lo.u32 %va, %y, 32, %va;",
        ]
        if self.pieces > 1:
            # Of two pieces, threads of every other key read the second one first: so that the keys
            # of two neighbours lie in different banks.
            lines.append("selp.b32 %y, 64, 0, %odd; add.u32 %ka, %ka, %y;")
        if self.resident:
            lines += [line for j in range(self.pieces) for line in self._load_query(j)]
        else:
            lines += [f"mov.b32 %mask{t}, -1;" for t in range(self.octets)]
        lines += [f"mov.f32 {name}, 0f00000000;" for name in self._all_sums()]
        return [*lines, f"mov.f32 %top, {LOWEST}; mov.f32 %total, 0f00000000;"]

    def plan(self, ring: str, parts: str, layer: str) -> list[str]:
        """What to ask for in this tile's place: worked out while the tile is on its way."""
        return [
            f"setp.ne.u32 %p, %first, {self.feeding}; @%p bra.uni known;",
            f"mov.u32 %x, %tid.x; setp.ne.u32 %p, %x, {self.f.thread}; @%p bra known;",
            *next_tile_lines(self.f, ring, parts, layer),
            "known:",
        ]

    def wait(self, ring: str, most: int) -> list[str]:
        f = self.f
        return [
            f"mad.lo.u32 %at, %stage, 8, {ring}; mov.u32 %looks, 0;",
            f"look: mbarrier.try_wait.parity.shared::cta.b64 %p, [%at+{f.barriers}], %phase;",
            "@%p bra come; add.u32 %looks, %looks, 1;",
            f"setp.lt.u32 %p, %looks, {most}; @%p bra look; trap; come:",
            f"mad.lo.u32 %at, %stage, {f.tile_bytes}, {ring}; add.u32 %at, %at, {f.tiles};",
        ]

    def add_new(self, ring: str) -> list[str]:
        """Puts the new position's key and value behind the cached ones in the last tile.

        The warp does whose position it is: nobody else looks there.
        """
        f = self.f
        units = f.row_bytes // 16
        assert units <= 32, "A row is put there by a warp's threads, 16 bytes each."
        here = "{%r0_0_0, %r0_0_1, %r0_0_2, %r0_0_3}"
        return [
            # Keys that the warp has from its first one on.
            "sub.s32 %mine, %left, %first;",
            f"sub.u32 %x, %mine, 1; setp.ge.u32 %p, %x, {self.keys};",
            "setp.eq.or.u32 %p, %new, 0, %p; @%p bra.uni old;",
            f"mov.u32 %x, %laneid; setp.ge.u32 %p, %x, {units}; @%p bra put;",
            f"sub.u32 %y, %left, 1; mad.lo.u32 %y, %y, {f.row_bytes}, %at;",
            f"mad.lo.u32 %y, %x, 16, %y; mad.lo.u32 %x, %x, 16, {ring};",
            f"ld.shared.v4.b32 {here}, [%x+{f.new}]; st.shared.v4.b32 [%y+0], {here};",
            f"ld.shared.v4.b32 {here}, [%x+{f.new + f.row_bytes}];",
            f"st.shared.v4.b32 [%y+{f.tile_bytes // 2}], {here};",
            "put: bar.warp.sync 0xffffffff; old:",
        ]

    def scores(self) -> list[str]:
        """Products of 8 queries and the warp's keys, `s{t}_{n}`: of keys 8t + 2c + n."""
        f = self.f
        lines = ["add.u32 %x, %ka, %at; xor.b32 %y, %ka, 64; add.u32 %y, %y, %at;"]
        if self.resident:
            lines += [x for j in range(0, self.pieces, 2) for x in self._load_keys(j)]
            lines += self._place_values()
            starts = range(0, self.blocks, self.turns)
            lines += [x for s in starts for x in self._load_values(s)]
            lines += [x for s in starts for x in self._sorted_values(s, self.early)]
        lines += [
            f"mov.f32 %z{t}_{i}_{n}, 0f00000000;"
            for t in range(self.octets)
            for i in range(self.chains)
            for n in range(4)
        ]
        for j in range(self.pieces):
            if j % 2 == 0:
                if not self.resident:
                    lines += self._load_keys(j)
                    lines += [x for i in range(j, j + 2) for x in self._load_query(i)]
                if self.pieces > 1:
                    lines += self._sorted_pieces(j)
            q = self._query(j)
            for half in range(2):
                chain = (2 * j + half) % self.chains
                for t in range(self.octets):
                    sums = ", ".join(f"%z{t}_{chain}_{n}" for n in range(4))
                    lines.append(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        f"{{{sums}}}, {{{', '.join(q[4 * half : 4 * half + 4])}}}, "
                        f"{{%k{t}_{j}_{2 * half}, %k{t}_{j}_{2 * half + 1}}}, {{{sums}}};"
                    )
        for t in range(self.octets):
            for n in range(2):
                parts = [f"%z{t}_{i}_{m}" for i in range(self.chains) for m in (n, n + 2)]
                lines += self._folded("add", parts)
                lines.append(f"mov.f32 %s{t}_{n}, {parts[0]};")
                if f.softcap is not None:
                    lines += self._cap(f"%s{t}_{n}")
        return lines

    def _load_keys(self, j: int) -> list[str]:
        """Words of two pieces of the warp's keys, or of the only one."""
        lines = []
        for t in range(self.octets):
            at = 8 * t * self.f.row_bytes + 64 * j
            if self.pieces == 1:
                lines += self._load_words(f"%k{t}_0", f"%x+{at}")
            else:
                lines += self._load_words(f"%r{t}_{j}", f"%x+{at}")
                lines += self._load_words(f"%r{t}_{j + 1}", f"%y+{at}")
        return lines

    def _load_words(self, name: str, at: str) -> list[str]:
        return [f"ld.shared.v4.b32 {{{name}_0, {name}_1, {name}_2, {name}_3}}, [{at}];"]

    def _sorted_pieces(self, j: int) -> list[str]:
        """Of two pieces: the words that were loaded first are those of either."""
        return [
            f"selp.b32 %k{t}_{j + i}_{n}, %r{t}_{j + 1 - i}_{n}, %r{t}_{j + i}_{n}, %odd;"
            for t in range(self.octets)
            for i in range(2)
            for n in range(4)
        ]

    def _folded(self, operation: str, names: list[str]) -> list[str]:
        """Combines numbers in pairs; the first register has the result."""
        lines, left = [], names
        while len(left) > 1:
            lines += [
                f"{operation}.f32 {a}, {a}, {b};"
                for a, b in zip(left[::2], left[1::2], strict=True)
            ]
            left = left[::2]
        return lines

    def _highest(self) -> list[str]:
        """The thread's highest score, in %some0."""
        scores = self._scores()
        names = [f"%some{t}" for t in range(self.octets)]
        lines = [
            f"max.f32 {name}, {scores[2 * i]}, {scores[2 * i + 1]};" for i, name in enumerate(names)
        ]
        return lines + self._folded("max", names)

    def weights(self) -> list[str]:
        """Weights of the warp's keys, as two bfloat16 each.

        They are powers of 2 of what scores exceed a maximum by that is seldom raised: only when
        some score of the warp's exceeds it by more than the slack. Weights may thus reach 2^8: it
        is all the same to floating-point numbers, and all is divided by their sum in the end.
        """
        lines = [
            f"setp.lt.s32 %masked, %mine, {self.keys};",
            *self._highest(),
            f"add.f32 %h, %top, {_float(_SLACK)}; setp.gt.or.f32 %p, %some0, %h, %masked;",
            "vote.sync.any.pred %p, %p, 0xffffffff; @%p bra.uni care; weigh:",
        ]
        every = self._scores()
        powers = [s.replace("s", "e") for s in every]
        for s, e in zip(every, powers, strict=True):
            lines.append(f"sub.f32 {e}, {s}, %top; ex2.approx.ftz.f32 {e}, {e};")
        for t in range(self.octets):
            lines += [
                f"cvt.rn.bf16x2.f32 %ph{t}, %e{t}_1, %e{t}_0;",
                f"shl.b32 %x, %ph{t}, 16; mov.b32 %f, %x; sub.f32 %f, %e{t}_0, %f;",
                f"and.b32 %x, %ph{t}, 0xffff0000; mov.b32 %h, %x; sub.f32 %h, %e{t}_1, %h;",
                f"cvt.rn.bf16x2.f32 %pl{t}, %h, %f;",
            ]
        names = [f"%some{t}" for t in range(self.octets)]
        for i, name in enumerate(names):
            lines.append(f"add.f32 {name}, {powers[2 * i]}, {powers[2 * i + 1]};")
        return [*lines, *self._folded("add", names), "add.f32 %total, %total, %some0;"]

    def care(self) -> list[str]:
        """What most tiles do without: keys beyond the span, and a maximum that is raised."""
        lines = [
            "care: @!%masked bra.uni raise; mov.u32 %y, %tid.x; and.b32 %y, %y, 3;",
            "shl.b32 %y, %y, 1; sub.s32 %y, %mine, %y;",
        ]
        blocks = range(self.blocks)
        for t in range(self.octets):
            for n in range(2):
                s = f"%s{t}_{n}"
                lines.append(f"setp.gt.s32 %p, %y, {8 * t + n}; selp.f32 {s}, {s}, {LOWEST}, %p;")
                if self.resident and t in self.late:
                    words = [f"%w{t}_{n}_{b}" for b in blocks]
                    lines += [f"selp.b32 {word}, {word}, 0, %p;" for word in words]
                elif n == 0:
                    lines.append(f"selp.b32 %mask{t}, {0xFFFF}, 0, %p;")
                else:
                    lines.append(
                        f"selp.b32 %x, {0xFFFF0000}, 0, %p; or.b32 %mask{t}, %mask{t}, %x;"
                    )
        lines += [x for t in self.early for b in blocks for x in self._masked(t, b)]
        lines += [*self._highest(), "raise: mov.f32 %f, %some0;"]
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %f, {step}, 31, 0xffffffff; max.f32 %f, %f, %h;")
        lines += [
            "max.f32 %f, %f, %top; sub.f32 %shrink, %top, %f; mov.f32 %top, %f;",
            "ex2.approx.ftz.f32 %shrink, %shrink; mul.f32 %total, %total, %shrink;",
        ]
        return [
            *lines,
            *(f"mul.f32 {name}, {name}, %shrink;" for name in self._all_sums()),
            "bra.uni weigh;",
        ]

    def _cap(self, score: str) -> list[str]:
        """c * tanh(x) = c * (1 - 2 / (1 + exp(2x))), for powers of 2."""
        assert self.f.softcap is not None
        by, twice = _float(self.f.softcap * math.log2(math.e)), _float(2 * math.log2(math.e))
        return [
            f"mul.f32 %f, {score}, {twice}; ex2.approx.ftz.f32 %f, %f; add.f32 %f, %f, {_ONE};",
            f"rcp.approx.ftz.f32 %f, %f; mul.f32 %f, %f, {_TWO}; sub.f32 %f, {_ONE}, %f;",
            f"mul.f32 {score}, %f, {by};",
        ]

    def _place_values(self) -> list[str]:
        return [
            f"xor.b32 %v{r}, %va, {32 * r}; add.u32 %v{r}, %v{r}, %at;" for r in range(self.turns)
        ]

    def _masked(self, t: int, s: int) -> list[str]:
        return [f"and.b32 %y{t}_{s}_{i}, %y{t}_{s}_{i}, %mask{t};" for i in range(2)]

    def _load_values(self, s: int) -> list[str]:
        f = self.f
        return [
            f"ld.shared.b32 %w{t}_{n}_{s + r}, "
            f"[%v{r}+{f.tile_bytes // 2 + (8 * t + n) * f.row_bytes + 32 * s}];"
            for t in range(self.octets)
            for n in range(2)
            for r in range(self.turns)
        ]

    def _sorted_values(self, s: int, octets: range) -> list[str]:
        """Words `y{t}_{s}_{i}`: of two keys the i-th elements of blocks from s on.

        Of each block of 16 elements a thread has two neighbours of the values of two keys, or four:
        column n of the i-th product is the i-th of those that threads of g = n have. The r-th word
        that was loaded is that of block r ^ c.
        """
        lines, size = [], self.turns
        for t in octets:
            for n in range(2):
                for predicate, by in (("%one", 1), ("%two", 2))[: size.bit_length() - 1]:
                    to, source = ("u", "w") if by == 1 else ("w", "u")
                    lines += [
                        f"selp.b32 %{to}{t}_{n}_{s + r}, %{source}{t}_{n}_{s + (r ^ by)}, "
                        f"%{source}{t}_{n}_{s + r}, {predicate};"
                        for r in range(size)
                    ]
            name = "w" if size == 4 else "u"
            for r in range(s, s + size):
                for i, pick in enumerate(("0x5410", "0x7632")):
                    lines.append(
                        f"prmt.b32 %y{t}_{r}_{i}, %{name}{t}_0_{r}, %{name}{t}_1_{r}, {pick};"
                    )
        return lines

    def values(self) -> list[str]:
        """Adds weights times values."""
        lines = [] if self.resident else self._place_values()
        for s in range(0, self.blocks, self.turns):
            blocks = range(s, s + self.turns)
            lines += [] if self.resident else self._load_values(s)
            lines += self._sorted_values(s, self.late)
            if not self.resident:
                lines += [x for t in self.late for b in blocks for x in self._masked(t, b)]
                lines += self._products_of(blocks)
        return lines + (self._products_of(range(self.blocks)) if self.resident else [])

    def _products_of(self, blocks: range) -> list[str]:
        lines, together = [], min(2, self.octets)
        for t in range(0, self.octets, together):
            octets = range(t, t + together)
            weights = ", ".join(f"%{x}{o}" for o in octets for x in ("ph", "pl"))
            for s in blocks:
                for i in range(2):
                    summed = ", ".join(self._sum(s, i))
                    words = ", ".join(f"%y{o}_{s}_{i}" for o in octets)
                    lines.append(
                        f"mma.sync.aligned.m16n8k{8 * together}.row.col.f32.bf16.bf16.f32 "
                        f"{{{summed}}}, {{{weights}}}, {{{words}}}, {{{summed}}};"
                    )
        return lines

    def used(self, ring: str, keys: str, values: str) -> list[str]:
        """The tile is free when all warps have told so; the feeding thread's alone waits for it.

        A warp comes back to a tile's barrier only when the tile has been asked for anew, which is
        behind its last meeting.
        """
        f = self.f
        threads = f.thread + 32
        return [
            # The place of what is new will be copied to by other means.
            f"used: sub.u32 %x, %mine, 1; setp.ge.u32 %p, %x, {self.keys};",
            "setp.eq.or.u32 %p, %new, 0, %p; @%p bra.uni clean;",
            "fence.proxy.async.shared::cta; clean:",
            f"add.u32 %x, %stage, 1; setp.eq.u32 %p, %first, {self.feeding}; @%p bra.uni feed;",
            f"bar.arrive %x, {threads}; bra.uni told;",
            f"feed: bar.sync %x, {threads};",
            f"mov.u32 %x, %tid.x; setp.ne.u32 %p, %x, {f.thread}; @%p bra told;",
            *ask_tile_lines(f, ring, "%stage", keys, values),
            "told:",
        ]

    def end(self, ring: str) -> list[str]:
        """Puts aside what the warp has made of its positions."""
        f = self.f
        lines = self._lane()
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %total, {step}, 31, 0xffffffff;")
            lines.append("add.f32 %total, %total, %h;")
        lines += [
            f"setp.ge.u32 %p, %first, {f.block}; @%p bra.uni idle;",
            "mov.u32 %x, %tid.x; shr.u32 %x, %x, 5;",
            f"mad.lo.u32 %x, %x, {LOT}, %g; mad.lo.u32 %y, %x, 8, {ring};",
            f"setp.eq.u32 %p, %c, 0; @%p st.shared.v2.f32 [%y+{f.sums}], {{%top, %total}};",
            f"mad.lo.u32 %x, %x, {f.out_pitch}, {ring};",
            "mad.lo.u32 %x, %c, 16, %x;",
        ]
        for s in range(self.blocks):
            blocks = [self._sum(s, i) for i in range(2)]
            lines += [f"add.f32 {x[n]}, {x[n]}, {x[n + 2]};" for x in blocks for n in range(2)]
            some = ", ".join(x[n] for n in range(2) for x in blocks)
            lines.append(f"st.shared.v4.f32 [%x+{f.out + 64 * s}], {{{some}}};")
        # Those who wait for words next look where the tiles have got to.
        lines += [
            f"idle: mov.u32 %x, %tid.x; setp.eq.u32 %p, %x, {f.thread};",
            f"@%p st.shared.b32 [{ring}+{f.control + 24}], %stage;",
            f"@%p st.shared.b32 [{ring}+{f.control + 28}], %phase;",
            "bar.sync 0;",
        ]
        return lines


def attend_lines(
    f: CacheFeed, ring: str, keys: str, values: str, parts: str, row: str, layer: str, most: int
) -> list[str]:
    """Attention over a part: see `attend_span`."""
    text = _Attend(f)
    return [
        "{",
        *text.registers(),
        *text.begin(ring, row),
        "tile:",
        *text.plan(ring, parts, layer),
        *text.wait(ring, most),
        *text.add_new(ring),
        # A warp may have no position here.
        f"setp.le.s32 %p, %mine, 0; setp.ge.or.u32 %p, %first, {f.block}, %p; @%p bra.uni used;",
        *text.scores(),
        *text.weights(),
        *text.values(),
        *text.used(ring, keys, values),
        f"add.u32 %stage, %stage, 1; setp.eq.u32 %p, %stage, {f.stages};",
        "@%p mov.u32 %stage, 0; @%p xor.b32 %phase, %phase, 1;",
        f"sub.s32 %left, %left, {f.block}; setp.gt.s32 %p, %left, 0;",
        "@%p bra.uni tile; bra.uni end;",
        *text.care(),
        "end:",
        *text.end(ring),
        "}",
    ]


_attend_p = core.Primitive("ffjax_attend")


@_attend_p.def_effectful_abstract_eval
def _(keys, values, ring, parts, row, layer, *, feed, most):
    effects = {lowered.ORDERED, state.ReadEffect(0), state.ReadEffect(1)}
    return core.ShapedArray((1,), jnp.int32), effects


@lowering.register_lowering(_attend_p)
def _(ctx, keys, values, *args, feed, most):
    lines = attend_lines(feed, "$3", "$1", "$2", "$4", "$5", "$6", most)
    text = " ".join(["{", *lines, "mov.u32 $0, 0; }"])
    arguments = [*pointers([keys, values]), *lowered.values(ctx, args)]
    result = lowered.like((1,), lowered.i32())
    return lowered.assembly([result], text, "=&r,l,l,r,r,r,r", arguments)[0]


def attend_span(
    keys: Any,
    values: Any,
    ring: Array,
    parts: Array,
    row: Array,
    layer: Array,
    feed: CacheFeed,
    most: int,
) -> None:
    """Attention of up to 8 queries over a part's positions, on tensor cores.

    Queries, and the new position's key and value, lie in shared memory: a barrier stands before.
    Each warp has its own positions of every tile, and its own softmax, taken online; what it
    makes of them lies in shared memory when all are done. Tiles that have been used are asked for
    anew, as far as the layer has any.

    Args:
        keys: ref of the cache's keys.
        values: ref of its values.
        ring: int32 scalar, the ring's address.
        parts: int32 scalar, address of the rows of the layer's parts.
        row: int32 scalar, address of the row of this one.
        layer: int32 scalar.
        feed: the rest.
        most: how often to look whether a tile has come before the launch ends in an error.
    """
    scalars = [jnp.full((1,), x) for x in (ring, parts, row, layer)]
    _attend_p.bind(keys, values, *scalars, feed=feed, most=most)
