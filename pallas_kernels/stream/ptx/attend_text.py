"""The inline PTX of attention over a span: see `attend`."""

from __future__ import annotations

import math
import struct

from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.ptx import lowered
from pallas_kernels.stream.ptx.arrival import arrival_lines
from pallas_kernels.stream.ptx.cache import CacheFeed, cache_feed_lines

__all__ = ["LOWEST", "attend_lines"]

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
        self.keys = f.block // f.warps  # of a tile, that a warp has where all share a part
        self.most = self.keys // 8 * f.abreast  # blocks of 8 keys that a warp has at most
        self.pieces = f.head_dim // 32  # of 8 elements of a row, 4 threads having one each
        self.chunks = f.head_dim // 8  # of a value: columns of a block of sums
        self.columns = 1 if f.paired else 2  # scores of an octet that a thread goes on with
        self.lines = f.lines
        self.resident = f.head_dim <= 128  # whether there are registers for the queries

    def _query(self, j: int) -> list[str]:
        return [f"%q{j if self.resident else j % 2}_{i}" for i in range(8)]

    def _load_query(self, j: int) -> list[str]:
        names, low = self._query(j), LOT * self.f.query_pitch
        at = f"%qa+{64 * (j - j % 2) + 16 * (j % 2)}"
        return [
            f"ld.shared.v4.b32 {{{', '.join(names[:4])}}}, [{at}];",
            f"ld.shared.v4.b32 {{{', '.join(names[4:])}}}, [{at}+{low}];",
        ]

    def _sum(self, chunk: int) -> list[str]:
        return [f"%o{chunk}_{n}" for n in range(4)]

    def _all_sums(self) -> list[str]:
        return [name for chunk in range(self.chunks) for name in self._sum(chunk)]

    def _all_scores(self, octets: int) -> list[str]:
        return [f"%s{t}_{n}" for t in range(octets) for n in range(self.columns)]

    def registers(self) -> list[str]:
        f = self.f
        queries = [x for j in range(self.pieces if self.resident else 2) for x in self._query(j)]
        words = [f"%{x}{n}" for x in "abkm" for n in range(4)]
        octets = [f"%{name}{t}" for t in range(self.most) for name in ("ph", "pl")]
        floats = [f"%s{t}_{n}" for t in range(self.most) for n in range(4)]
        return [
            ".reg .pred %p, %one, %late;",
            ".reg .b32 %thread, %g, %c, %first, %i, %count, %left, %new, %stage, %phase, %looks;",
            ".reg .b32 %qa, %at, %x, %y, %z, %mine, %half, %turn, %ka, %kb, %va, %vb;",
            *([".reg .b32 %lot, %lots, %from;"] if f.tokens > 1 else []),
            *([".reg .pred %alone;"] if f.abreast > 1 else []),
            f".reg .b32 {', '.join(words + queries + octets)};",
            ".reg .f32 %top, %total, %f, %h, %u, %w, %shrink;",
            f".reg .f32 {', '.join(floats + self._all_sums())};",
        ]

    def begin(self, ring: str, row: str) -> list[str]:
        f = self.f
        lines = [
            "mov.u32 %thread, %tid.x; shr.u32 %g, %thread, 2; and.b32 %g, %g, 7;",
            "and.b32 %c, %thread, 3; shr.u32 %first, %thread, 5;",
            *self._lot(row),
            "setp.ge.u32 %late, %g, 4;",
            f"mul.lo.u32 %first, %first, {self.keys}; mad.lo.u32 %mine, %c, 2, %first;",
            f"ld.shared.v4.b32 {{%x, %left, %count, %new}}, [{row}]; add.u32 %left, %left, %new;",
            f"ld.shared.v2.b32 {{%stage, %phase}}, [{ring}+{f.control + 24}];",
            f"mad.lo.u32 %qa, %g, {f.query_pitch}, {ring}; add.u32 %qa, %qa, {f.queries};",
            f"mad.lo.u32 %qa, %c, {self._chunks_of_a_thread() * 16}, %qa;",
            *([f"mad.lo.u32 %qa, %lot, {2 * LOT * f.query_pitch}, %qa;"] if f.abreast > 1 else []),
        ]
        if f.paired:
            lines.append(
                "@%late add.u32 %mine, %mine, 1; selp.b32 %half, 0xffff0000, 0xffff, %late;"
            )
        # Where a thread's keys, and the rows of values it names, lie in a tile.
        lines += [
            *self.lines.turn("%turn", ring),
            *self.lines.turned("%z", "%g", "%turn"),
            f"mul.lo.u32 %x, %c, {self._chunks_of_a_thread()}; xor.b32 %x, %x, %z;",
            f"add.u32 %ka, %first, %g; mul.lo.u32 %ka, %ka, {self.lines.width};",
            "mad.lo.u32 %ka, %x, 16, %ka; xor.b32 %kb, %ka, 16;",
            "and.b32 %y, %thread, 7;",
            *self.lines.turned("%z", "%y", "%turn"),
            "shr.u32 %x, %thread, 3; and.b32 %x, %x, 3; xor.b32 %x, %x, %z;",
            f"add.u32 %va, %first, %y; mul.lo.u32 %va, %va, {self.lines.width};",
            f"mad.lo.u32 %va, %x, 16, %va; add.u32 %va, %va, {f.values};",
            "xor.b32 %vb, %va, 64;",
        ]
        if self.resident:
            lines += [line for j in range(self.pieces) for line in self._load_query(j)]
        lines += self._seen(row)
        lines += [f"mov.f32 {name}, 0f00000000;" for name in self._all_sums()]
        lines += [f"mov.f32 %top, {LOWEST}; mov.f32 %total, 0f00000000; mov.u32 %i, 0;"]
        return lines

    def _chunks_of_a_thread(self) -> int:
        """Chunks of 16 bytes of a key that a thread multiplies side by side: of two pieces, two.

        Of neighbouring keys, whose chunks are turned by one place, threads then read different
        banks at a time.
        """
        return min(self.pieces, 2)

    def _lot(self, row: str) -> list[str]:
        """Which 8 of the part's queries a warp has, `lot`, and its `first` key, in units of `keys`.

        Warps of different queries have all keys of a tile each. Of a part that has 8 queries
        `alone` all warps have the same, and share the keys.
        """
        f = self.f
        if f.abreast == 1:
            return []
        each = f.warps // f.abreast
        return [
            f"ld.shared.b32 %lots, [{row}+20]; shr.u32 %lots, %lots, 8;",
            "and.b32 %lots, %lots, 0xff; setp.eq.u32 %alone, %lots, 1;",
            f"shr.u32 %lot, %first, {each.bit_length() - 1}; and.b32 %x, %first, {each - 1};",
            f"mul.lo.u32 %x, %x, {f.abreast};",
            "selp.b32 %lot, 0, %lot, %alone; selp.b32 %first, %first, %x, %alone;",
        ]

    def over_keys(self) -> list[str]:
        """Attention over the warp's keys of a tile; label `used` stands behind it."""
        few = self._over_octets(self.keys // 8)
        if self.f.abreast == 1:
            return few
        return [
            "@%alone bra few; setp.ge.u32 %p, %lot, %lots; @%p bra used; {",
            *self._over_octets(self.most),
            "} bra used; few: {",
            *few,
            "}",
        ]

    def _over_octets(self, octets: int) -> list[str]:
        """The same of so many times 8 keys."""
        return [*self.scores(octets), *self.softmax(octets), *self.values(octets)]

    def _seen(self, row: str) -> list[str]:
        """Of several tokens: what each thread's query does not see, since it is a later one's.

        Query n is of token t = n / G. It sees T - 1 - t new positions less than are there, which
        its thread reckons by as many positions more before its own, in `mine`. Of its window,
        `from` is the first of the part's positions from the thread's first one on.
        """
        f = self.f
        if f.tokens == 1:
            return []
        lines = [f"ld.shared.b32 %y, [{row}+20]; and.b32 %x, %g, {3 if f.paired else 7};"]
        if f.abreast > 1:
            lines.append(f"mad.lo.u32 %x, %lot, {LOT}, %x;")
        lines += [
            "and.b32 %z, %y, 0xff; add.u32 %x, %x, %z;",
            f"div.u32 %x, %x, {f.q_per_kv}; min.u32 %x, %x, {f.tokens - 1};",
        ]
        if f.windowed:
            lines.append("shr.u32 %y, %y, 16; sub.s32 %from, %x, %y; max.s32 %from, %from, 0;")
            lines.append("sub.s32 %from, %from, %mine;")
        # A part without new positions shows all it has.
        return [
            *lines,
            f"sub.s32 %x, {f.tokens - 1}, %x; setp.ne.u32 %p, %new, 0;",
            "@%p add.u32 %mine, %mine, %x;",
        ]

    def wait(self, ring: str, most: int) -> list[str]:
        f = self.f
        return [
            f"mad.lo.u32 %at, %stage, 8, {ring}; add.u32 %at, %at, {f.barriers};",
            *arrival_lines("%at", "%phase", most, f.bulk),
            f"mad.lo.u32 %at, %stage, {f.tile_bytes}, {ring}; add.u32 %at, %at, {f.tiles};",
        ]

    def add_new(self, ring: str) -> list[str]:
        """Puts the new position's key and value behind the cached ones in the last tile.

        Behind them values are zeros: what lies there else might be no number.
        """
        f = self.f
        if f.tokens > 1:
            return self._add_several(ring)
        lines = [
            f"setp.gt.s32 %p, %left, {f.block}; setp.eq.or.u32 %p, %new, 0, %p; @%p bra old;",
            f"setp.ge.u32 %p, %thread, {f.row_bytes // 16}; @%p bra put;",
            f"mad.lo.u32 %x, %thread, 16, {ring}; sub.u32 %z, %left, 1;",
            *self.lines.place("%y", "%z", "%thread", "%turn", "%k0"),
            "add.u32 %y, %y, %at;",
        ]
        for number in range(2):
            here = "{%a0, %a1, %a2, %a3}"
            lines.append(f"ld.shared.v4.b32 {here}, [%x+{f.new + number * f.row_bytes}];")
            lines.append(f"st.shared.v4.b32 [%y+{number * f.values}], {here};")
        return lines + self._clear()

    def _add_several(self, ring: str) -> list[str]:
        """The same of several: the last two tiles may have some each."""
        f = self.f
        pieces, total = f.row_bytes // 16, f.tokens * f.row_bytes // 16
        lines = [
            f"sub.s32 %k0, %left, {f.tokens}; setp.ge.s32 %p, %k0, {f.block};",
            "setp.eq.or.u32 %p, %new, 0, %p; @%p bra old;",
        ]
        here, threads = "{%a0, %a1, %a2, %a3}", 32 * f.warps
        for start in range(0, total, threads):
            lines += [
                # Piece %x of all new keys belongs to position %y of the tile.
                f"add.u32 %x, %thread, {start}; shr.u32 %y, %x, {pieces.bit_length() - 1};",
                f"add.s32 %y, %y, %k0; setp.lt.u32 %p, %y, {f.block};",
                f"setp.lt.and.u32 %p, %x, {total}, %p;",
                f"setp.lt.and.u32 %p, %thread, {threads}, %p;",
                f"and.b32 %k1, %x, {pieces - 1};",
                *self.lines.place("%k2", "%y", "%k1", "%turn", "%k3"),
                "add.u32 %y, %k2, %at;",
                f"mad.lo.u32 %x, %x, 16, {ring};",
            ]
            for number in range(2):
                at = f.new + number * f.tokens * f.row_bytes
                lines.append(f"@%p ld.shared.v4.b32 {here}, [%x+{at}];")
                lines.append(f"@%p st.shared.v4.b32 [%y+{number * f.values}], {here};")
        return lines + self._clear()

    def _clear(self) -> list[str]:
        """Zeros for values behind the last position, by all threads; then they meet."""
        f, width = self.f, self.lines.width
        places = range(f.values, f.tile_bytes, f.block * width)
        return [
            f"put: mul.lo.u32 %z, %left, {width}; mad.lo.u32 %z, %thread, 16, %z;",
            f"zero: setp.ge.u32 %p, %z, {f.block * width};",
            f"setp.ge.or.u32 %p, %thread, {32 * f.warps}, %p; @%p bra clear;",
            "add.u32 %y, %z, %at; mov.b32 %x, 0;",
            *(f"st.shared.v4.b32 [%y+{place}], {{%x, %x, %x, %x}};" for place in places),
            f"add.u32 %z, %z, {16 * 32 * f.warps}; bra zero;",
            # The place will be copied to, by other means where copies are bulk copies.
            f"clear: {'fence.proxy.async.shared::cta; ' if f.bulk else ''}{lowered.MEET} old:",
        ]

    def scores(self, octets: int) -> list[str]:
        """Products of 8 queries and the warp's keys, `s{t}_{n}`: of keys 8t + 2c + n.

        Paired, row g is of query g % 4: the first 4 are those of even keys, the late ones of odd
        keys. A thread goes on with `s{t}_0`, which is of its own; the other one means nothing.
        """
        lines = [f"mov.f32 %s{t}_{n}, 0f00000000;" for t in range(octets) for n in range(4)]
        lines.append("add.u32 %x, %ka, %at; add.u32 %y, %kb, %at;")
        for j in range(0, self.pieces, 2):
            lines += self._scores_of(j, octets)
        for t in range(octets):
            lines += [f"add.f32 %s{t}_{n}, %s{t}_{n}, %s{t}_{n + 2};" for n in range(2)]
            if self.f.paired:
                lines.append(f"selp.f32 %s{t}_0, %s{t}_1, %s{t}_0, %late;")
        return lines

    def _scores_of(self, first: int, octets: int) -> list[str]:
        """Adds the products of two pieces, or of the only one, of all the warp's keys."""
        f, pieces = self.f, range(first, min(first + 2, self.pieces))
        lines = [] if self.resident else [x for j in pieces for x in self._load_query(j)]
        for t in range(octets):
            at = 8 * t * self.lines.width + first // 2 * f.block * self.lines.width
            for name, base, _ in zip("km", "xy", pieces, strict=False):
                some = ", ".join(f"%{name}{n}" for n in range(4))
                lines.append(f"ld.shared.v4.b32 {{{some}}}, [%{base}+{at}];")
            sums = ", ".join(f"%s{t}_{n}" for n in range(4))
            for name, j in zip("km", pieces, strict=False):
                q = self._query(j)
                for half in range(2):
                    low, high = 2 * half, 2 * half + 1
                    lines.append(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        f"{{{sums}}}, {{{q[low]}, {q[4 + low]}, {q[high]}, {q[4 + high]}}}, "
                        f"{{%{name}{low}, %{name}{high}}}, {{{sums}}};"
                    )
        return lines

    def softmax(self, octets: int) -> list[str]:
        """Weights of the warp's keys, as two bfloat16 each; what was summed up is scaled."""
        lines = ["sub.s32 %y, %left, %mine;"]  # keys from the thread's first on
        for t in range(octets):
            for n in range(self.columns):
                s = f"%s{t}_{n}"
                if self.f.softcap is not None:
                    lines += self._cap(s)
                seen = f"setp.gt.s32 %p, %y, {8 * t + n};"
                if self.f.windowed:
                    seen += f" setp.le.and.s32 %p, %from, {8 * t + n}, %p;"
                lines.append(f"{seen} selp.f32 {s}, {s}, {LOWEST}, %p;")
        every = self._all_scores(octets)
        lines.append(f"mov.f32 %f, {every[0]};")
        lines += [f"max.f32 %f, %f, {s};" for s in every[1:]]
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %f, {step}, 31, 0xffffffff; max.f32 %f, %f, %h;")
        lines += [
            "max.f32 %f, %f, %top; sub.f32 %shrink, %top, %f; mov.f32 %top, %f;",
            "ex2.approx.ftz.f32 %shrink, %shrink; mul.f32 %total, %total, %shrink;",
        ]
        for s in every:
            lines.append(f"sub.f32 {s}, {s}, %top; ex2.approx.ftz.f32 {s}, {s};")
            lines.append(f"add.f32 %total, %total, {s};")
        for t in range(octets):
            lines += self._pack_paired(t) if self.f.paired else self._pack(t)
        shrink = [f"mul.f32 {name}, {name}, %shrink;" for name in self._all_sums()]
        return lines + shrink

    def _pack(self, t: int) -> list[str]:
        """An octet's weights as bfloat16, and what they leave."""
        return [
            f"cvt.rn.bf16x2.f32 %ph{t}, %s{t}_1, %s{t}_0;",
            f"shl.b32 %x, %ph{t}, 16; mov.b32 %f, %x; sub.f32 %f, %s{t}_0, %f;",
            f"and.b32 %x, %ph{t}, 0xffff0000; mov.b32 %h, %x; sub.f32 %h, %s{t}_1, %h;",
            f"cvt.rn.bf16x2.f32 %pl{t}, %h, %f;",
        ]

    def _pack_paired(self, t: int) -> list[str]:
        """The same of one key: the other one's place is 0."""
        return [
            f"cvt.rn.bf16x2.f32 %ph{t}, %s{t}_0, %s{t}_0;",
            f"and.b32 %x, %ph{t}, 0xffff0000; mov.b32 %h, %x; sub.f32 %h, %s{t}_0, %h;",
            f"cvt.rn.bf16x2.f32 %pl{t}, %h, %h;",
            f"and.b32 %ph{t}, %ph{t}, %half; and.b32 %pl{t}, %pl{t}, %half;",
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

    def values(self, octets: int) -> list[str]:
        """Adds weights times values.

        Of 8 keys, matrices of 8 elements each are read by 4, and come transposed: a thread has the
        same element of its two keys of each.
        """
        f, width = self.f, self.lines.width
        lines = ["add.u32 %x, %va, %at; add.u32 %y, %vb, %at;"]
        together = min(2, octets)
        for t in range(0, octets, together):
            for s in range(self.chunks // 4):
                for name, octet in zip("ab", range(t, t + together), strict=False):
                    base, at = "xy"[s % 2], 8 * octet * width + s // 2 * f.block * width
                    some = ", ".join(f"%{name}{n}" for n in range(4))
                    lines.append(
                        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
                        f"{{{some}}}, [%{base}+{at}];"
                    )
                for n in range(4):
                    lines.append(self._add_products(t, together, n, self._sum(4 * s + n)))
        return lines

    def _add_products(self, t: int, together: int, n: int, sums: list[str]) -> str:
        summed = ", ".join(sums)
        if together == 1:
            return (
                "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                f"{{{summed}}}, {{%ph{t}, %pl{t}}}, {{%a{n}}}, {{{summed}}};"
            )
        return (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            f"{{{summed}}}, {{%ph{t}, %pl{t}, %ph{t + 1}, %pl{t + 1}}}, {{%a{n}, %b{n}}}, "
            f"{{{summed}}};"
        )

    def _join_pairs(self) -> list[str]:
        """Adds what even and odd keys make: a thread then has the sums of both."""
        lines = [
            "shfl.sync.bfly.b32 %h, %top, 16, 31, 0xffffffff; max.f32 %f, %top, %h;",
            "sub.f32 %w, %top, %f; ex2.approx.ftz.f32 %w, %w; mov.f32 %top, %f;",
            "sub.f32 %u, %h, %f; ex2.approx.ftz.f32 %u, %u;",
        ]
        for own in ["%total", *(self._sum(x)[n] for x in range(self.chunks) for n in range(2))]:
            lines.append(f"shfl.sync.bfly.b32 %h, {own}, 16, 31, 0xffffffff;")
            lines.append(f"mul.f32 {own}, {own}, %w; fma.rn.f32 {own}, %h, %u, {own};")
        return lines

    def end(self, ring: str) -> list[str]:
        """Puts aside what the warp has made of its positions."""
        f = self.f
        lines = []
        for step in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 %h, %total, {step}, 31, 0xffffffff;")
            lines.append("add.f32 %total, %total, %h;")
        for x in range(self.chunks):
            low, high = self._sum(x)[:2], self._sum(x)[2:]
            lines += [f"add.f32 {a}, {a}, {b};" for a, b in zip(low, high, strict=True)]
        # Of two threads that have joined the same sums, one puts them aside.
        lines.append(f"setp.lt.u32 %one, %g, {LOT // 2 if f.paired else LOT};")
        if f.paired:
            lines += self._join_pairs()
        lines += [
            f"setp.ge.u32 %p, %thread, {32 * f.warps}; @%p bra idle; shr.u32 %x, %thread, 5;",
            f"mad.lo.u32 %x, %x, {LOT}, %g; mad.lo.u32 %y, %x, 8, {ring};",
            "setp.eq.and.u32 %p, %c, 0, %one;",
            f"@%p st.shared.v2.f32 [%y+{f.sums}], {{%top, %total}};",
            f"mad.lo.u32 %x, %x, {f.out_pitch}, {ring};",
            "mad.lo.u32 %x, %c, 8, %x;",
        ]
        for x in range(self.chunks):
            some = ", ".join(self._sum(x)[:2])
            lines.append(f"@%one st.shared.v2.f32 [%x+{f.out + 32 * x}], {{{some}}};")
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
        *text.over_keys(),
        f"used: {lowered.MEET}",
        *cache_feed_lines(f, ring, keys, values, parts, layer, 1),
        f"add.u32 %stage, %stage, 1; setp.eq.u32 %p, %stage, {f.stages};",
        "@%p mov.u32 %stage, 0; @%p xor.b32 %phase, %phase, 1;",
        f"sub.s32 %left, %left, {f.block}; add.u32 %i, %i, 1;",
        *([f"sub.s32 %from, %from, {f.block};"] if f.windowed else []),
        "bra tile; end:",
        *text.end(ring),
        "}",
    ]
