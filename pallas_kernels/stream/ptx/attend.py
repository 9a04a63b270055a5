"""Attention over the cache's tiles that have come to shared memory."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import core, state
from jax._src.pallas.triton import lowering

from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.cache import CacheFeed, cache_feed_lines, pointers

__all__ = ["LOWEST", "attend_lines", "attend_span"]

# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = "0fF149F2CA"  # -1e30
_ONE, _TWO = "0f3F800000", "0f40000000"


def _float(x: float) -> str:
    """As PTX writes a float32."""
    return f"0f{struct.unpack('>I', struct.pack('>f', x))[0]:08X}"


class _Attend:
    """The text of `attend_span`, piece by piece, in the order in which `attend_lines` has it."""

    def __init__(self, f: CacheFeed):
        self.f = f
        self.keys = f.block // f.warps  # of a tile, for each warp
        self.octets = self.keys // 8  # blocks of 8 keys: columns of a block of scores
        self.pieces = f.head_dim // 32  # of 8 elements of a row, 4 threads having one each
        self.blocks = f.head_dim // 16  # of elements of a value: 2 neighbours a thread
        # Threads of a query take so many blocks in turn, each another one first: no two of a
        # warp then read the same bank.
        self.turns = min(4, self.blocks)
        self.resident = f.head_dim <= 128  # whether there are registers for the queries

    def _query(self, j: int) -> list[str]:
        return [f"%q{j if self.resident else j % 2}_{i}" for i in range(8)]

    def _load_query(self, j: int) -> list[str]:
        names = self._query(j)
        low = LOT * self.f.query_pitch
        return [
            f"ld.shared.v4.b32 {{{', '.join(names[:4])}}}, [%qa+{64 * j}];",
            f"ld.shared.v4.b32 {{{', '.join(names[4:])}}}, [%qa+{64 * j + low}];",
        ]

    def _sum(self, s: int, i: int) -> list[str]:
        return [f"%o{s}_{i}_{n}" for n in range(4)]

    def _all_sums(self) -> list[str]:
        blocks = [self._sum(s, i) for s in range(self.blocks) for i in range(2)]
        return [name for block in blocks for name in block]

    def registers(self) -> list[str]:
        queries = [x for j in range(self.pieces if self.resident else 2) for x in self._query(j)]
        words = [f"%{x}{n}" for x in "abcdkm" for n in range(4)] + [f"%v{n}" for n in range(4)]
        octets = [f"%{name}{t}" for t in range(self.octets) for name in ("ph", "pl", "mask")]
        floats = [f"%s{t}_{n}" for t in range(self.octets) for n in range(4)]
        return [
            ".reg .pred %p, %odd, %one, %two;",
            ".reg .b32 %thread, %g, %c, %first, %i, %count, %left, %new, %stage, %phase, %looks;",
            ".reg .b32 %qa, %at, %x, %y, %z; .reg .f32 %top, %total, %f, %h;",
            f".reg .b32 {', '.join(words + queries + octets)};",
            f".reg .f32 %shrink, {', '.join(floats + self._all_sums())};",
        ]

    def begin(self, ring: str, row: str) -> list[str]:
        f = self.f
        lines = [
            "mov.u32 %thread, %tid.x; shr.u32 %g, %thread, 2; and.b32 %g, %g, 7;",
            "and.b32 %c, %thread, 3; shr.u32 %first, %thread, 5;",
            "and.b32 %x, %g, 1; setp.ne.u32 %odd, %x, 0;",
            "and.b32 %x, %c, 1; setp.ne.u32 %one, %x, 0; setp.ge.u32 %two, %c, 2;",
            f"mul.lo.u32 %first, %first, {self.keys};",
            f"ld.shared.v4.b32 {{%x, %left, %count, %new}}, [{row}]; add.u32 %left, %left, %new;",
            f"ld.shared.v2.b32 {{%stage, %phase}}, [{ring}+{f.control + 24}];",
            f"mad.lo.u32 %qa, %g, {f.query_pitch}, {ring}; mad.lo.u32 %qa, %c, 16, %qa;",
            f"add.u32 %qa, %qa, {f.queries};",
        ]
        if self.resident:
            lines += [line for j in range(self.pieces) for line in self._load_query(j)]
        lines += [f"mov.f32 {name}, 0f00000000;" for name in self._all_sums()]
        lines += [f"mov.f32 %top, {LOWEST}; mov.f32 %total, 0f00000000; mov.u32 %i, 0;"]
        return lines

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
        """Puts the new position's key and value behind the cached ones in the last tile."""
        f = self.f
        lines = [
            f"setp.gt.s32 %p, %left, {f.block}; setp.eq.or.u32 %p, %new, 0, %p; @%p bra old;",
            f"setp.ge.u32 %p, %thread, {f.row_bytes // 16}; @%p bra put;",
            f"mad.lo.u32 %x, %thread, 16, {ring}; sub.u32 %y, %left, 1;",
            f"mul.lo.u32 %y, %y, {f.row_bytes}; mad.lo.u32 %y, %thread, 16, %y;",
            "add.u32 %y, %y, %at;",
        ]
        for number in range(2):
            here = "{%a0, %a1, %a2, %a3}"
            lines.append(f"ld.shared.v4.b32 {here}, [%x+{f.new + number * f.row_bytes}];")
            lines.append(f"st.shared.v4.b32 [%y+{number * f.tile_bytes // 2}], {here};")
        # The place will be copied to by other means.
        lines.append(f"fence.proxy.async.shared::cta; put: {lowered.MEET} old:")
        return lines

    def scores(self) -> list[str]:
        """Products of 8 queries and the warp's keys, `s{t}_{n}`: of keys 8t + 2c + n."""
        f = self.f
        lines = [f"mov.f32 %s{t}_{n}, 0f00000000;" for t in range(self.octets) for n in range(4)]
        lines += [
            f"add.u32 %x, %first, %g; mad.lo.u32 %x, %x, {f.row_bytes}, %at;",
            "mad.lo.u32 %x, %c, 16, %x;",
        ]
        if self.pieces == 1:
            return lines + self._scores_of(
                0, lambda t: self._load("k", f"%x+{8 * t * f.row_bytes}")
            )
        # Of two pieces, threads of every other key read the second one first: so that the keys of
        # two neighbours lie in different banks.
        lines += [
            "selp.b32 %y, 64, 0, %odd; add.u32 %y, %x, %y;",
            "selp.b32 %z, 0, 64, %odd; add.u32 %z, %x, %z;",
        ]
        for j in range(0, self.pieces, 2):

            def load(t: int, j: int = j) -> list[str]:
                at = 8 * t * f.row_bytes + 64 * j
                swap = [
                    f"selp.b32 %{to}{n}, %{x}{n}, %{y}{n}, %odd;"
                    for to, x, y in (("k", "b", "a"), ("m", "a", "b"))
                    for n in range(4)
                ]
                return [*self._load("a", f"%y+{at}"), *self._load("b", f"%z+{at}"), *swap]

            lines += self._scores_of(j, load)
        return lines

    def _load(self, name: str, at: str) -> list[str]:
        return [f"ld.shared.v4.b32 {{%{name}0, %{name}1, %{name}2, %{name}3}}, [{at}];"]

    def _scores_of(self, first: int, load: Callable[[int], list[str]]) -> list[str]:
        """Adds the products of a piece, or two, of all the warp's keys: words `k`, and `m`."""
        pieces = range(first, min(first + 2, self.pieces))
        lines = [] if self.resident else [x for j in pieces for x in self._load_query(j)]
        for t in range(self.octets):
            lines += load(t)
            sums = ", ".join(f"%s{t}_{n}" for n in range(4))
            for j, k in zip(pieces, "km", strict=False):
                q = self._query(j)
                for half in range(2):
                    low, high = 2 * half, 2 * half + 1
                    lines.append(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        f"{{{sums}}}, {{{q[low]}, {q[4 + low]}, {q[high]}, {q[4 + high]}}}, "
                        f"{{%{k}{low}, %{k}{high}}}, {{{sums}}};"
                    )
        return lines

    def softmax(self) -> list[str]:
        """Weights of the warp's keys, as two bfloat16 each; what was summed up is scaled."""
        lines = ["mad.lo.u32 %y, %c, 2, %first; sub.s32 %y, %left, %y;"]  # keys from the first on
        for t in range(self.octets):
            for n in range(2):
                s = f"%s{t}_{n}"
                lines.append(f"add.f32 {s}, {s}, %s{t}_{n + 2};")
                if self.f.softcap is not None:
                    lines += self._cap(s)
                lines.append(f"setp.gt.s32 %p, %y, {8 * t + n}; selp.f32 {s}, {s}, {LOWEST}, %p;")
                keep = 0xFFFF << 16 * n
                if n == 0:
                    lines.append(f"selp.b32 %mask{t}, {keep}, 0, %p;")
                else:
                    lines.append(f"selp.b32 %x, {keep}, 0, %p; or.b32 %mask{t}, %mask{t}, %x;")
        every = [f"%s{t}_{n}" for t in range(self.octets) for n in range(2)]
        lines.append(f"max.f32 %f, {every[0]}, {every[1]};")
        lines += [f"max.f32 %f, %f, {s};" for s in every[2:]]
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %f, {step}, 31, 0xffffffff; max.f32 %f, %f, %h;")
        lines += [
            "max.f32 %f, %f, %top; sub.f32 %shrink, %top, %f; mov.f32 %top, %f;",
            "ex2.approx.ftz.f32 %shrink, %shrink; mul.f32 %total, %total, %shrink;",
        ]
        for s in every:
            lines.append(f"sub.f32 {s}, {s}, %top; ex2.approx.ftz.f32 {s}, {s};")
            lines.append(f"add.f32 %total, %total, {s};")
        for t in range(self.octets):
            lines += [
                f"cvt.rn.bf16x2.f32 %ph{t}, %s{t}_1, %s{t}_0;",
                f"shl.b32 %x, %ph{t}, 16; mov.b32 %f, %x; sub.f32 %f, %s{t}_0, %f;",
                f"and.b32 %x, %ph{t}, 0xffff0000; mov.b32 %h, %x; sub.f32 %h, %s{t}_1, %h;",
                f"cvt.rn.bf16x2.f32 %pl{t}, %h, %f;",
            ]
        return lines + [f"mul.f32 {name}, {name}, %shrink;" for name in self._all_sums()]

    def _cap(self, score: str) -> list[str]:
        """c * tanh(x) = c * (1 - 2 / (1 + exp(2x))), for powers of 2."""
        assert self.f.softcap is not None
        by, twice = _float(self.f.softcap * math.log2(math.e)), _float(2 * math.log2(math.e))
        return [
            f"mul.f32 %f, {score}, {twice}; ex2.approx.ftz.f32 %f, %f; add.f32 %f, %f, {_ONE};",
            f"rcp.approx.ftz.f32 %f, %f; mul.f32 %f, %f, {_TWO}; sub.f32 %f, {_ONE}, %f;",
            f"mul.f32 {score}, %f, {by};",
        ]

    def values(self) -> list[str]:
        """Adds weights times values.

        Of each block of 16 elements a thread has two neighbours of the values of two keys, or four:
        column n of the i-th product is the i-th of those that threads of g = n have.
        """
        f = self.f
        lines = [f"mad.lo.u32 %x, %c, 2, %first; mad.lo.u32 %x, %x, {f.row_bytes}, %at;"]
        lines.append("mad.lo.u32 %x, %g, 4, %x;")
        for r in range(self.turns):
            lines.append(f"add.u32 %v{r}, %c, {r}; and.b32 %v{r}, %v{r}, {self.turns - 1};")
            lines.append(f"mad.lo.u32 %v{r}, %v{r}, 32, %x;")
        together = min(2, self.octets)
        for t in range(0, self.octets, together):
            rows = [8 * (t + o) + n for o in range(together) for n in range(2)]
            for s in range(0, self.blocks, self.turns):
                for name, row in zip("abcd", rows, strict=False):
                    at = f.tile_bytes // 2 + row * f.row_bytes + 32 * s
                    lines += [f"ld.shared.b32 %{name}{r}, [%v{r}+{at}];" for r in range(self.turns)]
                    lines += self._turned(name)
                for block in range(self.turns):
                    for i in range(2):
                        lines += self._add_products(t, together, block, i, self._sum(s + block, i))
        return lines

    def _turned(self, name: str) -> list[str]:
        """Puts words in the order of blocks: the r-th is that of block r + c."""
        lines, size = [], self.turns
        for predicate, by in (("%one", 1), ("%two", 2))[: size.bit_length() - 1]:
            lines += [
                f"selp.b32 %k{n}, %{name}{(n - by) % size}, %{name}{n}, {predicate};"
                for n in range(size)
            ]
            lines += [f"mov.b32 %{name}{n}, %k{n};" for n in range(size)]
        return lines

    def _add_products(
        self, t: int, together: int, block: int, i: int, sums: list[str]
    ) -> list[str]:
        pick, summed = "0x7632" if i else "0x5410", ", ".join(sums)
        lines = [f"prmt.b32 %y, %a{block}, %b{block}, {pick}; and.b32 %y, %y, %mask{t};"]
        if together == 1:
            lines.append(
                "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                f"{{{summed}}}, {{%ph{t}, %pl{t}}}, {{%y}}, {{{summed}}};"
            )
            return lines
        lines.append(f"prmt.b32 %z, %c{block}, %d{block}, {pick}; and.b32 %z, %z, %mask{t + 1};")
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{{summed}}}, {{%ph{t}, %pl{t}, %ph{t + 1}, %pl{t + 1}}}, {{%y, %z}}, {{{summed}}};"
        )
        return lines

    def end(self, ring: str) -> list[str]:
        """Puts aside what the warp has made of its positions."""
        f = self.f
        lines = []
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %total, {step}, 31, 0xffffffff;")
            lines.append("add.f32 %total, %total, %h;")
        lines += [
            f"setp.ge.u32 %p, %thread, {32 * f.warps}; @%p bra idle; shr.u32 %x, %thread, 5;",
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
            f"idle: setp.eq.u32 %p, %thread, {f.thread};",
            f"@%p st.shared.b32 [{ring}+{f.control + 24}], %stage;",
            f"@%p st.shared.b32 [{ring}+{f.control + 28}], %phase;",
            lowered.MEET,
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
        "tile: setp.ge.u32 %p, %i, %count; @%p bra end;",
        *text.wait(ring, most),
        *text.add_new(ring),
        # A warp may have no position here.
        f"setp.ge.s32 %p, %first, %left; setp.ge.or.u32 %p, %first, {f.block}, %p; @%p bra used;",
        *text.scores(),
        *text.softmax(),
        *text.values(),
        f"used: {lowered.MEET}",
        *cache_feed_lines(f, ring, keys, values, parts, layer, 1),
        f"add.u32 %stage, %stage, 1; setp.eq.u32 %p, %stage, {f.stages};",
        "@%p mov.u32 %stage, 0; @%p xor.b32 %phase, %phase, 1;",
        f"sub.s32 %left, %left, {f.block}; add.u32 %i, %i, 1; bra tile; end:",
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
