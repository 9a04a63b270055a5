"""The inline PTX of attention, run on a CPU by `ptx_machine`, against plain numpy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from ptx_inline import map_text
from ptx_machine import Machine, PtxError
from ptx_mutations import mutated

from pallas_kernels.asm import Block
from pallas_kernels.dims import next_power_of_2
from pallas_kernels.stream import ptx
from pallas_kernels.stream.plan import LOT, query_pitch
from pallas_kernels.stream.ptx.attend_text import write_attention
from pallas_kernels.stream.ptx.cache import CacheFeed, write_cache_feed

pytestmark = pytest.mark.once("The machine and the texts are ours: no JAX runs.")

LAYERS, CAPACITY = 2, 320
MOST_LOOKS = 1 << 22
WORDS = 8
# Queries are of 16 bits, and 16 bits of weights are left.
WORST = 5e-4


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def halves(x: np.ndarray) -> np.ndarray:
    """The bits of numbers that are bfloat16, uint16."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


class Part(NamedTuple):
    """A KV split: cached positions of one head; and whether the new positions are its own.

    Of several tokens: its first query; and how many tokens later than the second one a window
    begins to lose positions.
    """

    head: int
    start: int
    live: int
    new: bool
    first_query: int = 0
    spare: int = 0
    lots: int = 0  # how many times 8 queries; 0: as many as there is room for


class Setting(NamedTuple):
    """Heads, and how attention is cut."""

    head_dim: int
    block: int
    warps: int
    stages: int = 2
    softcap: float | None = None
    threads: int = 128
    paired: bool = False
    bulk: bool = True
    tokens: int = 1
    group: int = LOT
    abreast: int = 1
    windowed: bool = False

    @property
    def rows(self) -> int:
        """Queries that a warp has room for."""
        return LOT // 2 if self.paired else LOT

    def queries(self, part: Part) -> int:
        """Those of a part; of one token all that there is room for."""
        if self.tokens == 1:
            return self.rows
        return min(self.tokens * self.group - part.first_query, LOT * self.lots(part))

    def lots(self, part: Part) -> int:
        return part.lots or self.abreast

    def tiles(self, part: Part) -> int:
        return -(-(part.live + part.new * self.tokens) // self.block)


SETTINGS = {
    "heads of 64": Setting(64, 128, 4),
    "heads of 128": Setting(128, 64, 4, stages=3),
    "heads of 128, 8 warps": Setting(128, 64, 8, threads=256),
    "heads of 256": Setting(256, 32, 4, softcap=50.0),
    "heads of 32": Setting(32, 128, 4),
    "warps that do not attend": Setting(64, 32, 4, stages=4, threads=256),
    "4 queries of 64": Setting(64, 128, 4, paired=True),
    "4 queries of 128": Setting(128, 64, 4, stages=3, paired=True),
    "4 queries of 256, 8 warps": Setting(256, 64, 8, softcap=50.0, threads=256, paired=True),
    "4 queries of 256": Setting(256, 32, 4, paired=True),
    "4 queries of 32": Setting(32, 128, 4, paired=True),
    "heads of 64, 16 bytes a thread": Setting(64, 32, 4, bulk=False),
    "4 queries of 128, 16 bytes a thread": Setting(128, 16, 2, paired=True, bulk=False),
    "4 queries of 256, 16 bytes a thread": Setting(
        256, 8, 1, softcap=50.0, threads=256, paired=True, bulk=False
    ),
}


class Bench:
    """A program's memory with a cache, and the rows of its parts, the same in every layer."""

    def __init__(self, setting: Setting, parts: list[Part], delay: int = 40, order=None):
        s = self.setting = setting
        self.parts, rng = parts, np.random.default_rng(s.head_dim)
        self.heads = 1 + max(p.head for p in parts)
        shape = (2, LAYERS, self.heads, CAPACITY, s.head_dim)
        self.cache = as_bfloat16(rng.normal(size=shape))
        nobodys = np.ones((self.heads, CAPACITY), bool)
        for p in parts:
            nobodys[p.head, p.start : p.start + p.live] = False
        self.cache[:, :, nobodys] = np.nan
        row, tile = 2 * s.head_dim, 4 * s.block * s.head_dim
        pitch = query_pitch(s.head_dim)
        sizes = {
            "before": 3 * 128,  # so that no tile begins where chunks are in order
            "tiles": s.stages * tile,
            "out": s.warps * s.rows * (2 * row + 16),
            "queries": 2 * LOT * s.abreast * pitch,
            "new": 2 * row * s.tokens,
            "sums": 8 * s.warps * s.rows,
            "maps": 16,
            "rows": 4 * WORDS * (1 + len(parts)),
            "barriers": 16 * ((s.stages + 1) // 2),
            "control": 4 * WORDS * (1 if s.bulk else s.threads // 32),
        }
        starts, end = {}, 0
        # Both lie where attention's results are put, as `SharedLayout` has it.
        queries, new = sizes.pop("queries"), sizes.pop("new")
        sizes["out"] = max(sizes["out"], queries + new)
        for name, size in sizes.items():
            starts[name] = end
            end += size
        starts |= {"queries": starts["out"], "new": starts["out"] + queries}
        self.rows = starts.pop("rows")
        del starts["before"]
        self.feed = CacheFeed(
            **starts,
            head_dim=s.head_dim,
            block=s.block,
            warps=s.warps,
            stages=s.stages,
            layer_rows=self.heads * CAPACITY,
            query_pitch=pitch,
            out_pitch=2 * row + 16,
            abreast=s.abreast,
            tokens=s.tokens,
            q_per_kv=s.group,
            windowed=s.windowed,
            paired=s.paired,
            softcap=s.softcap,
            thread=s.threads - 32,
            sharing=0 if s.bulk else s.threads,
        )
        size = self.cache[0].size * 4
        self.machine = Machine(s.threads, end, size + 2 * ptx.MAP_BYTES, delay=delay, order=order)
        self.ring = self.machine.shared_base
        self.keys = self.machine.memory_base
        self.values = self.keys + 2 * self.cache[0].size
        for at, x in zip((self.keys, self.values), self.cache, strict=True):
            self.machine.view(at, x.size, np.uint16)[:] = halves(x).ravel()
        if s.bulk:
            tensor = self.feed.tensor_map(LAYERS)
            for number, of in enumerate((self.keys, self.values)):
                scratch = self.ring + self.feed.tiles + ptx.MAP_BYTES * number
                self.machine.view(scratch, ptx.MAP_BYTES, np.uint8)[:] = 0xA5
                place = self.ring + self.feed.maps + 8 * number
                where = self.keys + size + ptx.MAP_BYTES * number
                map_text(tensor).run(self.machine, where, of, scratch, place)
        for i in range(s.stages):
            at = self.ring + self.feed.barriers + 8 * i
            self.machine.start_barrier(at, 1 if s.bulk else s.threads)
        feeders = 1 if s.bulk else s.threads // 32
        words = [s.stages, *[0] * (WORDS - 1)] * feeders
        self.at("control", WORDS * feeders, np.uint32)[:] = words
        rows = self.machine.view(self.ring + self.rows, WORDS * (1 + len(parts)), np.uint32)
        rows[:] = 0
        rows[0] = len(parts)
        for i, p in enumerate(parts):
            unit = (p.head * CAPACITY + p.start) * row // 16
            query = p.first_query | p.spare << 16
            if s.tokens > 1:
                query |= s.lots(p) << 8
            words = [unit, p.live, s.tiles(p), p.new * s.tokens, 0, query]
            rows[WORDS * (i + 1) :][:6] = words

    def at(self, name: str, count: int, dtype: type) -> np.ndarray:
        return self.machine.view(self.ring + getattr(self.feed, name), count, dtype)

    def ask(self, layer: int) -> None:
        b = Block()
        given = b.operands(ring="s32", keys="u64", values="u64", parts="s32", layer="s32")
        write_cache_feed(b, self.feed, *given, freed=0)
        rows = self.ring + self.rows
        operands = [self.ring, self.keys, self.values, rows, layer]
        self.machine.run(b.text(), b.constraints, operands)

    def attend(self, layer: int, j: int, q: np.ndarray, new: np.ndarray, edit=None):
        """What the warps make of the j-th part together: maximum, sum, weighted values."""
        f, s = self.feed, self.setting
        high = as_bfloat16(q)
        rows = LOT * s.abreast
        for i, x in enumerate((high, as_bfloat16(q - high))):
            for number in range(rows):
                at = 2 * LOT * (number // LOT) + LOT * i + number % LOT
                place = self.machine.view(
                    self.ring + f.queries + at * f.query_pitch, s.head_dim, np.uint16
                )
                number %= s.rows if s.paired else rows
                place[:] = halves(x[number]) if number < len(x) else 0xFFFF
        self.at("new", new.size, np.uint16)[:] = halves(new).ravel()
        row = self.ring + self.rows + 4 * WORDS * (1 + j)
        b = Block()
        kinds = {"keys": "u64", "values": "u64", "ring": "s32", "parts": "s32"}
        given = b.operands(**kinds, row="s32", layer="s32")
        write_attention(b, *given, feed=f, most=MOST_LOOKS)
        text = b.text() if edit is None else mutated(b.text(), edit)
        operands = [self.keys, self.values, self.ring, self.ring + self.rows, row, layer]
        self.machine.run(text, b.constraints, operands)

        alone = s.tokens > 1 and s.lots(self.parts[j]) == 1

        def together(x: np.ndarray) -> np.ndarray:
            """Rows of warps, those of the same queries side by side: `[warps, queries, ..]`."""
            if alone:
                return x.reshape(-1, s.rows, *x.shape[1:])
            return (
                x.reshape(s.abreast, -1, s.rows, *x.shape[1:])
                .swapaxes(0, 1)
                .reshape(-1, s.rows * s.abreast, *x.shape[1:])
            )

        sums = together(self.at("sums", 2 * s.warps * s.rows, np.float32).reshape(-1, 2))
        top, total = sums[:, : len(q)].T
        out = self.at("out", s.warps * s.rows * f.out_pitch // 4, np.float32)
        out = together(out.reshape(s.warps * s.rows, -1))
        out = out[:, : len(q), : s.head_dim].astype(np.float64)
        best = top.max(axis=1)
        weight = np.exp2(top - best[:, None]).T
        return best, (weight * total.T).sum(axis=0), (weight[..., None] * out).sum(axis=0)

    def wanted(self, layer: int, part: Part, q: np.ndarray, new: np.ndarray):
        s = self.setting
        keys, values = self.cache[:, layer, part.head, part.start : part.start + part.live].astype(
            np.float64
        )
        if part.new:
            keys, values = (np.vstack(x) for x in ((keys, new[0]), (values, new[1])))
        scores = q.astype(np.float64) @ keys.T
        if (cap := s.softcap) is not None:
            scores = cap * math.log2(math.e) * np.tanh(scores)
        position = np.arange(len(keys))
        token = ((part.first_query + np.arange(len(q))) // s.group)[:, None]
        seen = position <= part.live + token if s.tokens > 1 else position >= 0
        if s.windowed:
            seen &= position >= token - part.spare
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp2(scores - scores.max(axis=1)[:, None])
        return scores.max(axis=1), weights.sum(axis=1), weights @ values


def run(
    setting: Setting,
    parts: list[Part],
    edit=None,
    delay: int = 40,
    layers: int = LAYERS,
    order=None,
) -> float:
    """Attends all parts of some layers; the largest error."""
    bench, rng, worst = Bench(setting, parts, delay, order), np.random.default_rng(5), 0.0
    for layer in range(layers):
        bench.ask(layer)
        for j, part in enumerate(parts):
            scale = 1.5 / math.sqrt(setting.head_dim)
            q = rng.normal(size=(setting.queries(part), setting.head_dim)) * scale
            q = as_bfloat16(q) + as_bfloat16(q - as_bfloat16(q))
            new = as_bfloat16(rng.normal(size=(2, setting.tokens, setting.head_dim)))
            if not part.new:
                new[:] = np.nan
            got = bench.attend(layer, j, q, new, edit)
            for x, y in zip(got, bench.wanted(layer, part, q, new), strict=True):
                worst = max(worst, float(np.abs(x - y).max()) if np.isfinite(x).all() else np.inf)
            if edit is not None and worst > WORST:
                return worst  # the fault is found
    if setting.bulk:
        tiles, lines = sum(setting.tiles(part) for part in parts), bench.feed.lines
        most = 2 * layers * tiles * setting.block * lines.count  # rows of all boxes
        assert len(bench.machine.copies) <= most
    else:  # no position is copied twice
        cached = sum(part.live for part in parts)
        assert len(bench.machine.copies) == layers * cached * 2 * setting.head_dim // 8
    if edit is None and setting.head_dim > 32:  # two keys of 64 bytes lie side by side
        assert bench.machine.conflicts == 0
    return worst


PARTS = {
    "nothing but the new one": [Part(0, 0, 0, True)],
    "a full tile, and the new one in the next": [Part(1, 3, 128, True)],
    "odd": [Part(0, 0, 97, True)],
    "three, of which one ends inside": [
        Part(0, 5, 256, False),
        Part(1, 0, 33, True),
        Part(2, 64, 129, True),
    ],
}


# Of each setting the kind that has the most tiles, and it all of two settings; where threads copy,
# the machine takes ten times as long.
SPLITS = [
    f"test_attention_over_a_split[{name}-{parts}]"
    for name, setting in SETTINGS.items()
    for parts in PARTS
    if name in ("heads of 64", "4 queries of 64")
    or parts == ("odd" if not setting.bulk else "three, of which one ends inside")
]


@pytest.mark.drawn("Each setting and each kind of split.", sample=SPLITS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", SETTINGS)
def test_attention_over_a_split(name, parts):
    assert run(SETTINGS[name], PARTS[parts]) < WORST


@pytest.mark.parametrize("name", ["heads of 64", "heads of 64, 16 bytes a thread"])
@pytest.mark.parametrize("delay", [0, 3000])
def test_tiles_that_come_at_once_and_late(delay, name):
    parts = PARTS["three, of which one ends inside"]
    assert run(SETTINGS[name], parts, delay=delay) < WORST


# Steps of several tokens


def several(head_dim: int, block: int, warps: int, tokens: int, group: int, **fields) -> Setting:
    """As plans have it: queries side by side as far as there are warps; 4 at most paired."""
    queries = tokens * group
    abreast = min(next_power_of_2(-(-queries // LOT)), warps)
    fields = {"threads": 32 * max(warps, 4), **fields}
    return Setting(
        head_dim,
        block,
        warps,
        paired=queries <= LOT // 2,
        tokens=tokens,
        group=group,
        abreast=abreast,
        **fields,
    )


SEVERAL = {
    "2 tokens of 1 query of 64": several(64, 64, 4, 2, 1),
    "2 tokens of 2 queries of 256": several(256, 32, 4, 2, 2, softcap=50.0, windowed=True),
    "4 tokens of 1 query of 32, 8 warps": several(32, 64, 8, 4, 1, windowed=True),
    "3 tokens of 1 query of 128, 16 bytes a thread": several(128, 16, 2, 3, 1, bulk=False),
    "2 tokens of 4 queries of 128": several(128, 64, 4, 2, 4, stages=3),
    "8 tokens of 1 query of 32": several(32, 32, 4, 8, 1, stages=4, threads=256, windowed=True),
    "3 tokens of 5 queries of 64": several(64, 64, 4, 3, 5, windowed=True),
    "4 tokens of 4 queries of 128, 8 warps": several(128, 64, 8, 4, 4, softcap=50.0),
    "2 tokens of 7 queries of 64, 16 bytes a thread": several(
        64, 32, 4, 2, 7, bulk=False, windowed=True
    ),
    "8 tokens of 4 queries of 64": several(64, 64, 4, 8, 4),
    "4 tokens of 7 queries of 256": several(256, 32, 4, 4, 7, softcap=50.0, windowed=True),
    "8 tokens of 3 queries of 32, 8 warps": several(32, 64, 8, 8, 3, windowed=True),
    "8 tokens of 8 queries of 128, 8 warps": several(128, 64, 8, 8, 8, windowed=True),
    "3 tokens of 16 queries of 64, 8 warps": several(64, 64, 8, 3, 16),
    "8 tokens of 16 queries of 64, 8 warps": several(64, 64, 8, 8, 16, windowed=True),
    "3 tokens of 16 queries of 32": several(32, 32, 4, 3, 16, windowed=True),
    "2 tokens of 12 queries of 256, 1 warp": several(256, 8, 1, 2, 12, bulk=False, windowed=True),
}


def parts_of(s: Setting) -> list[Part]:
    """All that a part of several tokens can be, in turn, so that each finds what others left."""
    lots = range(0, s.tokens * s.group, LOT * s.abreast)
    beyond = s.tokens  # where no window loses anything
    full = -(-64 // s.block) * s.block
    # Nothing but new positions; and new ones at every place in the last tile, or the last two.
    live = [0, *range(s.block - s.tokens, s.block + 1), 2 * s.block - 1]
    parts = [Part(i % 2, 3 * i, n, True, lots[i % len(lots)], beyond) for i, n in enumerate(live)]
    # A head's queries dealt to several parts, where there are programs for them.
    for each in (1, 2):
        for first in range(0, s.tokens * s.group, LOT * each) if each < s.abreast else ():
            parts.append(Part(1, 3, full - 2, True, first, beyond, each))
    # A head's KV splits: the first one has no new positions.
    for first in lots:
        parts.append(Part(0, 5, full, False, first, 0))
        parts.append(Part(0, 5 + full, s.block // 2 + 1, True, first, beyond))
    if s.windowed:
        for window in (1, 2, s.tokens, s.tokens + 2, s.block):
            for spare in (0, 1, s.tokens - 1):
                if spare <= window - 1:
                    first = lots[(window + spare) % len(lots)]
                    parts.append(Part(1, window, window - 1 - spare, True, first, spare))
    return parts


# These take as long as all others together.
LARGE = ("8 tokens of 8 queries of 128, 8 warps", "8 tokens of 16 queries of 64, 8 warps")
NOT_LARGE = [
    f"test_attention_of_several_tokens_over_a_split[{name}]"
    for name in SEVERAL
    if name not in LARGE
]


@pytest.mark.drawn("Fewer queries go the same ways as many.", sample=NOT_LARGE)
@pytest.mark.parametrize("name", SEVERAL)
def test_attention_of_several_tokens_over_a_split(name):
    s = SEVERAL[name]
    assert run(s, parts_of(s), layers=1) < WORST


@pytest.mark.parametrize("delay", [0, 3000])
def test_tiles_of_several_tokens_that_come_at_once_and_late(delay):
    s = SEVERAL["3 tokens of 5 queries of 64"]
    assert run(s, parts_of(s), delay=delay) < WORST


def test_warps_attend_to_several_tokens_in_any_order():
    s = SEVERAL["3 tokens of 16 queries of 32"]
    order = np.random.default_rng(4)
    assert run(s, parts_of(s), layers=1, order=order) < WORST


BOX = (
    "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    ".L2::cache_hint"
)
EDITS = {
    "what was summed up is not scaled": ("ex2.approx.ftz.f32 shrink, shrink", ""),
    "values beyond the split count": (
        "st.shared.v4.b32 [scratch_2+*], {scratch_1, *, *, *}",
        "@is_done_1 st.shared.v4.b32 [scratch_2+*], {scratch_1, *, *, *}",
    ),
    "the new position is left out": (
        "st.shared.v4.b32 [scratch_2], {value_word_1, *, *, *}",
        "@is_old_1 st.shared.v4.b32 [scratch_2], {value_word_1, *, *, *}",
    ),
    "threads of a query do not tell each other their maximum": (
        "shfl.sync.bfly.b32 number_2, number_1, 2, 31, 0xffffffff",
        "mov.b32 number_2, number_1",
    ),
    "tiles are used before they have come": ("@has_come bra come", "bra come"),
    "a tile is asked for while it is used": ("bar.sync 0 #2", ""),
    "every tile is taken to begin like the first 128 bytes": (
        "shr.u32 turn, turn, 7",
        "mov.b32 turn, 0",
    ),
    "keys' chunks are taken in order": ("xor.b32 scratch_1, scratch_1, scratch_3 #1", ""),
    "a thread has one of its two chunks twice": (
        "xor.b32 other_key, key, 16",
        "mov.b32 other_key, key",
    ),
    "values' chunks are taken in order": ("xor.b32 scratch_1, scratch_1, scratch_3 #2", ""),
    "half of the values are taken twice": (
        "xor.b32 other_value, value, 64",
        "mov.b32 other_value, value",
    ),
    "the new position's chunks are in order": (
        "xor.b32 key_word_1, key_word_1, thread",
        "mov.b32 key_word_1, thread",
    ),
    "values are copies of keys": (
        f"{BOX} *, [value_map, {{element, line, begin}}]",
        f"{BOX} *, [key_map, {{element, line, begin}}]",
    ),
    "a tile without cached positions is waited for": (
        "selp.b32 bytes, 32768, 0, some",
        "mov.b32 bytes, 32768",
    ),
}


PLAIN_EDITS = {
    "a weight's lower half is lost": (
        "cvt.rn.bf16x2.f32 weight_low_1, number_2, number_1",
        "mov.b32 weight_low_1, 0",
    ),
}

PAIRED_EDITS = {
    "a weight's lower half is lost": (
        "cvt.rn.bf16x2.f32 weight_low_1, number_2, number_2",
        "mov.b32 weight_low_1, 0",
    ),
    "a weight has its neighbour's place too": ("and.b32 weight_high_1, weight_high_1, half", ""),
    "threads go on with another's score": ("selp.f32 score_1, score_2, score_1, late", ""),
    "an odd key is taken for the even one": ("@late add.s32 mine, mine, 1", ""),
    "odd keys are left out": ("fma.rn.f32 sum_1, number_2, other_weight, sum_1", ""),
    "pairs are joined by the wrong sums": (
        "shfl.sync.bfly.b32 number_2, sum_17, 16",
        "shfl.sync.bfly.b32 number_2, sum_1, 16",
    ),
}


SMALL_COPY_EDITS = {
    "a barrier is told before the values are asked for": (
        "add.u64 source, offset, $1",
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [barrier_1]; add.u64 source, offset, $1",
    ),
    "a tile is asked for while it is used": ("bar.sync 0 #2", ""),
    "one thread of a warp copies alone": ("@idle bra asked", "@!lead_1 bra asked"),
    "chunks are copied in order": ("xor.b32 turned, turned, chunk", "mov.b32 turned, chunk"),
    "warps share their control words": ("mad.lo.u32 own, warp, 32", "mad.lo.u32 own, warp, 0"),
}


SEVERAL_EDITS = {
    "positions of later tokens are seen": ("@has_new add.s32 mine, mine, scratch_1", ""),
    "cached positions are taken for later tokens'": (
        "setp.ne.u32 has_new, new, 0",
        "setp.ge.u32 has_new, new, 0",
    ),
    "queries of a part are all of the first token": (
        "div.u32 scratch_1, scratch_1, 16",
        "mov.b32 scratch_1, 0",
    ),
    "all warps have the first queries": ("shr.u32 lot, first, 0", "mov.b32 lot, 0"),
    "warps take turns with the queries": ("shr.u32 lot, first, 0", "xor.b32 lot, first, 1"),
    "a later part's queries are the first ones": ("add.u32 scratch_1, scratch_1, scratch_3", ""),
    "no window begins later": ("setp.le.and.s32 is_seen, seen_from, 0, is_seen", ""),
    "every window moves from the first token on": (
        "sub.s32 seen_from, scratch_1, scratch_2",
        "mov.b32 seen_from, scratch_1",
    ),
    "windows move with the tiles": ("sub.s32 seen_from, seen_from, 32", ""),
    "warps of few queries have those of many": ("selp.b32 lot, 0, lot, alone", ""),
    "warps of few queries have the keys of many": (
        "selp.b32 first, first, scratch_1, alone",
        "mov.b32 first, scratch_1",
    ),
    "warps of many queries have the keys of few": ("selp.b32 first, first, scratch_1, alone", ""),
    "few queries are taken for many": ("@alone bra few", ""),
    "many queries are taken for few": ("@alone bra few", "bra few"),
    "the last tile but one has no new position": (
        "setp.ge.s32 is_old, key_word_1, 32",
        "setp.gt.s32 is_old, left_1, 32",
    ),
    "the last tile has only what begins there": (
        "setp.ge.s32 is_old, key_word_1, 32",
        "setp.ge.u32 is_old, key_word_1, 32",
    ),
    "new positions go beyond a tile": (
        "setp.lt.u32 is_here, scratch_2, 32",
        "setp.lt.s32 is_here, scratch_2, 32",
    ),
    "there are more pieces than new ones": (
        "setp.lt.and.u32 is_here, scratch_1, 12, is_here",
        "",
    ),
    "new values take the keys' place": (
        "@is_here st.shared.v4.b32 [scratch_2+2048]",
        "@is_here st.shared.v4.b32 [scratch_2]",
    ),
}


FAULTS = [
    (setting, name, edit)
    for setting, own in (
        ("heads of 64", {**EDITS, **PLAIN_EDITS}),
        ("4 queries of 64", {**EDITS, **PAIRED_EDITS}),
        ("heads of 64, 16 bytes a thread", SMALL_COPY_EDITS),
    )
    for name, edit in own.items()
]


@pytest.mark.drawn("Each fault, in one of the settings that have it.")
@pytest.mark.parametrize(("setting", "name", "edit"), FAULTS, ids=lambda x: str(x)[:60])
def test_a_fault_is_found(setting, name, edit):
    # Memory begins as NaN; copies are late enough to be missed.
    parts = [part for some in PARTS.values() for part in some]
    try:
        worst = run(SETTINGS[setting], parts, edit, delay=3000)
    except PtxError:
        return
    assert worst > WORST, name


@pytest.mark.parametrize("name", SEVERAL_EDITS)
def test_a_fault_of_several_tokens_is_found(name):
    s = SEVERAL["3 tokens of 16 queries of 32"]
    try:
        worst = run(s, parts_of(s), SEVERAL_EDITS[name], layers=1)
    except PtxError:
        return
    assert worst > WORST, name
