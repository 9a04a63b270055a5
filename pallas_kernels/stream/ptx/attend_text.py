"""The inline PTX of attention over a KV split: see `attend`."""

from __future__ import annotations

import math

from pallas_kernels.asm import TID, Block, Label, Register
from pallas_kernels.stream.plan import LOT
from pallas_kernels.stream.ptx.arrival import write_arrival
from pallas_kernels.stream.ptx.cache import CacheFeed, write_cache_feed

__all__ = ["LOWEST", "write_attention"]

# Stands for minus infinity: it survives a subtraction from itself.
LOWEST = -1e30
# The bfloat16 in a word's upper half.
_UPPER, _LOWER = 0xFFFF0000, 0xFFFF


def write_attention(
    b: Block,
    keys: Register,
    values: Register,
    ring: Register,
    parts: Register,
    row: Register,
    layer: Register,
    *,
    feed: CacheFeed,
    most: int,
) -> None:
    """Attention over a part: see `attend_split`."""
    f = feed
    text = _Attend(b, f, ring)
    text.begin(row)
    end, used, done, idle = b.label("end"), b.label("used"), b.pred("done"), b.pred("no_key")
    tile = b.marked("tile")
    b.setp("ge", done, text.tile, text.tiles)
    b.bra_if(done, end)
    text.wait(most)
    text.add_new()
    b.comment("A warp may have no position here.")
    b.setp("ge", idle, text.first.as_("s32"), text.left)
    b.setp("ge", idle, text.first, f.block, either=idle)
    b.bra_if(idle, used)
    text.over_keys(used)
    b.mark(used)
    b.bar_program()
    write_cache_feed(b, f, ring, keys, values, parts, layer, 1)
    around = b.pred("around")
    b.add(text.stage, text.stage, 1)
    b.setp("eq", around, text.stage, f.stages)
    with b.when(around):
        b.mov(text.stage, 0)
        b.xor(text.phase, text.phase, 1)
    b.sub(text.left, text.left, f.block)
    b.add(text.tile, text.tile, 1)
    if f.windowed:
        b.sub(text.seen_from, text.seen_from, f.block)
    b.bra(tile)
    b.mark(end)
    text.end()


class _Attend:
    """The text of `attend_split`, piece by piece, in the order in which `write_attention` has
    it."""

    def __init__(self, b: Block, f: CacheFeed, ring: Register):
        self.b, self.f, self.ring, self.lines = b, f, ring, f.lines
        self.keys = f.block // f.warps  # of a tile, that a warp has where all share a part
        self.most = self.keys // 8 * f.abreast  # blocks of 8 keys that a warp has at most
        self.pieces = f.head_dim // 32  # of 8 elements of a row, 4 threads having one each
        self.chunks = f.head_dim // 8  # of a value: columns of a block of sums
        self.columns = 1 if f.paired else 2  # scores of an octet that a thread goes on with
        self.resident = f.head_dim <= 128  # whether there are registers for the queries

        # Threads: of a product's rows `group`, of its columns two from `column` on.
        self.thread, self.group, self.column = b.u32s("thread", "group", "column")
        self.late = b.pred("late")  # of the upper 4 rows
        self.half = b.u32("half")  # paired, the half of a word that is the thread's
        # Tiles: this one's number, how many, where it lies, and its stage.
        self.tile, self.tiles, self.at, self.stage, self.phase = b.u32s(
            *("tile", "tiles", "tile_place", "stage", "phase")
        )
        # Positions: `left` from the tile's beginning on, `new` of them new; in a tile the warp's
        # first, and the thread's first, which is later where its query sees less.
        self.left, self.new = b.s32("left"), b.u32("new")
        self.first, self.mine = b.u32("first"), b.s32("mine")
        self.seen_from = b.s32("seen_from")  # the first position of the window
        # Of several times 8 queries: which the warp has, of how many; whether there are no others.
        self.lot, self.lots, self.alone = b.u32("lot"), b.u32("lots"), b.pred("alone")
        # Where the thread's keys of even pieces lie in a tile, and of odd ones; its values.
        self.key, self.other_key, self.value, self.other_value = b.u32s(
            *("key", "other_key", "value", "other_value")
        )
        self.query_place, self.turn = b.u32("query_place"), b.u32("turn")
        count = self.pieces if self.resident else 2
        self.queries = [[b.u32("query") for _ in range(8)] for _ in range(count)]
        self.scores = [[b.f32("score") for _ in range(4)] for _ in range(self.most)]
        # Weights as bfloat16, and what these leave.
        self.high = [b.u32("weight_high") for _ in range(self.most)]
        self.low = [b.u32("weight_low") for _ in range(self.most)]
        self.sums = [[b.f32("sum") for _ in range(4)] for _ in range(self.chunks)]
        self.top, self.total = b.f32("top"), b.f32("total")  # of scores, and of weights
        # What is soon done with shares registers: ptxas else finds longer code, or spills.
        self.x, self.y, self.z = b.u32s(*["scratch"] * 3)
        self.number, self.other = b.f32s(*["number"] * 2)
        self.key_words = [b.u32s(*["key_word"] * 4) for _ in range(2)]
        self.value_words = [b.u32s(*["value_word"] * 4) for _ in range(2)]

    def _load_query(self, j: int) -> list[Register]:
        words, low = self._query(j), LOT * self.f.query_pitch
        at = self.query_place + (64 * (j - j % 2) + 16 * (j % 2))
        self.b.ld_shared(words[:4], at)
        self.b.ld_shared(words[4:], at + low)
        return words

    def _query(self, j: int) -> list[Register]:
        return self.queries[j if self.resident else j % 2]

    def _all_sums(self) -> list[Register]:
        return [x for some in self.sums for x in some]

    # Before the first tile

    def begin(self, row: Register) -> None:
        """Where the thread's part of everything lies."""
        b, f = self.b, self.f
        b.mov(self.thread, TID)
        b.shr(self.group, self.thread, 2)
        b.and_(self.group, self.group, 7)
        b.and_(self.column, self.thread, 3)
        b.shr(self.first, self.thread, 5)
        self._choose_lot(row)
        b.setp("ge", self.late, self.group, 4)
        b.mul_lo(self.first, self.first, self.keys)
        b.mad_lo(self.mine, self.column, 2, self.first)
        b.comment("The part: cached positions, tiles, new positions. And the next tile's stage.")
        b.ld_shared([self.x, self.left, self.tiles, self.new], row + 0)
        b.add(self.left, self.left, self.new)
        b.ld_shared([self.stage, self.phase], self.ring + (f.control + 24))
        at = self.query_place
        b.mad_lo(at, self.group, f.query_pitch, self.ring)
        b.add(at, at, f.queries)
        b.mad_lo(at, self.column, self._chunks_of_a_thread() * 16, at)
        if f.abreast > 1:
            b.mad_lo(at, self.lot, 2 * LOT * f.query_pitch, at)
        if f.paired:
            b.comment("The upper 4 rows are those of odd keys.")
            with b.when(self.late):
                b.add(self.mine, self.mine, 1)
            b.selp(self.half, _UPPER, _LOWER, self.late)
        self._place_rows()
        if self.resident:
            for j in range(self.pieces):
                self._load_query(j)
        self._see(row)
        for number in self._all_sums():
            b.mov(number, 0.0)
        b.mov(self.top, LOWEST)
        b.mov(self.total, 0.0)
        b.mov(self.tile, 0)

    def _place_rows(self) -> None:
        """Where a thread's keys, and the rows of values it names, lie in a tile."""
        b, width = self.b, self.lines.width
        chunk, position, turned = self.x, self.y, self.z
        b.comment("Where the thread's keys lie in a tile.")
        self.lines.write_turn(b, self.turn, self.ring)
        self.lines.write_turned(b, turned, self.group, self.turn)
        b.mul_lo(chunk, self.column, self._chunks_of_a_thread())
        b.xor(chunk, chunk, turned)
        b.add(self.key, self.first, self.group)
        b.mul_lo(self.key, self.key, width)
        b.mad_lo(self.key, chunk, 16, self.key)
        b.xor(self.other_key, self.key, 16)
        b.comment("And the rows of values that it names.")
        b.and_(position, self.thread, 7)
        self.lines.write_turned(b, turned, position, self.turn)
        b.shr(chunk, self.thread, 3)
        b.and_(chunk, chunk, 3)
        b.xor(chunk, chunk, turned)
        b.add(self.value, self.first, position)
        b.mul_lo(self.value, self.value, width)
        b.mad_lo(self.value, chunk, 16, self.value)
        b.add(self.value, self.value, self.f.values)
        b.xor(self.other_value, self.value, 64)

    def _chunks_of_a_thread(self) -> int:
        """Chunks of 16 bytes of a key that a thread multiplies side by side: of two pieces, two.

        Of neighbouring keys, whose chunks are turned by one place, threads then read different
        banks at a time.
        """
        return min(self.pieces, 2)

    def _choose_lot(self, row: Register) -> None:
        """Which 8 of the part's queries a warp has, `lot`, and its `first` key, in units of `keys`.

        Warps of different queries have all keys of a tile each. Of a part that has 8 queries
        `alone` all warps have the same, and share the keys.
        """
        b, f = self.b, self.f
        if f.abreast == 1:
            return
        each, begin = f.warps // f.abreast, self.x
        b.comment("Which 8 of the part's queries the warp has.")
        b.ld_shared(self.lots, row + 20)
        b.shr(self.lots, self.lots, 8)
        b.and_(self.lots, self.lots, 0xFF)
        b.setp("eq", self.alone, self.lots, 1)
        b.shr(self.lot, self.first, each.bit_length() - 1)
        b.and_(begin, self.first, each - 1)
        b.mul_lo(begin, begin, f.abreast)
        b.selp(self.lot, 0, self.lot, self.alone)
        b.selp(self.first, self.first, begin, self.alone)

    def _see(self, row: Register) -> None:
        """Of several tokens: what each thread's query does not see, since it is a later one's.

        Query n is of token t = n / G. It sees T - 1 - t new positions less than are there, which
        its thread reckons by as many positions more before its own, in `mine`. Of its window,
        `seen_from` is the first of the part's positions from the thread's first one on.
        """
        b, f = self.b, self.f
        if f.tokens == 1:
            return
        token, words, first_query, has_new = self.x, self.y, self.z, b.pred("has_new")
        b.comment("What the thread's query does not see: a later token's positions.")
        b.ld_shared(words, row + 20)
        b.and_(token, self.group, 3 if f.paired else 7)
        if f.abreast > 1:
            b.mad_lo(token, self.lot, LOT, token)
        b.and_(first_query, words, 0xFF)
        b.add(token, token, first_query)
        b.div(token, token, f.q_per_kv)
        b.min(token, token, f.tokens - 1)
        if f.windowed:
            b.shr(words, words, 16)
            b.sub(self.seen_from, token, words)
            b.max(self.seen_from, self.seen_from, 0)
            b.sub(self.seen_from, self.seen_from, self.mine)
        b.comment("A part without new positions shows all it has.")
        b.sub(token.as_("s32"), f.tokens - 1, token)
        b.setp("ne", has_new, self.new, 0)
        with b.when(has_new):
            b.add(self.mine, self.mine, token)

    # Each tile

    def wait(self, most: int) -> None:
        """Waits for the tile."""
        b, f, barrier = self.b, self.f, self.at
        b.mad_lo(barrier, self.stage, 8, self.ring)
        b.add(barrier, barrier, f.barriers)
        write_arrival(b, barrier, self.phase, most, f.bulk)
        b.mad_lo(self.at, self.stage, f.tile_bytes, self.ring)
        b.add(self.at, self.at, f.tiles)

    def add_new(self) -> None:
        """Puts the new position's key and value after the cached ones in the last tile.

        After them values are zeros: what lies there else might be no number.
        """
        b, f = self.b, self.f
        old, is_old = b.label("old"), b.pred("is_old")
        b.comment("New positions come after the cached ones in the last tile; zeros after them.")
        if f.tokens > 1:
            self._add_several(old)
            return
        put, has_none = b.label("put"), b.pred("has_none")
        source, to, position = self.x, self.y, self.z
        piece, turned = self.value_words[0], self.key_words[0][0]
        b.setp("gt", is_old, self.left, f.block)
        b.setp("eq", is_old, self.new, 0, either=is_old)
        b.bra_if(is_old, old)
        b.setp("ge", has_none, self.thread, f.row_bytes // 16)
        b.bra_if(has_none, put)
        b.mad_lo(source, self.thread, 16, self.ring)
        b.sub(position, self.left, 1)
        self.lines.write_place(b, to, position, self.thread, self.turn, turned)
        b.add(to, to, self.at)
        for number in range(2):
            b.ld_shared(piece, source + (f.new + number * f.row_bytes))
            b.st_shared(to + number * f.values, piece)
        self._clear(put, old)

    def _add_several(self, old: Label) -> None:
        """The same of several: the last two tiles may have some each."""
        b, f = self.b, self.f
        pieces, total = f.row_bytes // 16, f.tokens * f.row_bytes // 16
        piece, position, words, is_old = self.x, self.y, self.value_words[0], b.pred("is_old")
        first, chunk, to, turned = self.key_words[0]
        first = first.as_("s32")
        b.sub(first, self.left, f.tokens)
        b.setp("ge", is_old, first, f.block)
        b.setp("eq", is_old, self.new, 0, either=is_old)
        b.bra_if(is_old, old)
        threads = 32 * f.warps
        for start in range(0, total, threads):
            is_here = b.pred("is_here")
            b.comment("A piece of all new keys belongs to some position of the tile.")
            b.add(piece, self.thread, start)
            b.shr(position, piece, pieces.bit_length() - 1)
            b.add(position, position, first)
            b.setp("lt", is_here, position, f.block)
            b.setp("lt", is_here, piece, total, also=is_here)
            b.setp("lt", is_here, self.thread, threads, also=is_here)
            b.and_(chunk, piece, pieces - 1)
            self.lines.write_place(b, to, position, chunk, self.turn, turned)
            b.add(position, to, self.at)
            b.mad_lo(piece, piece, 16, self.ring)
            for number in range(2):
                at = f.new + number * f.tokens * f.row_bytes
                with b.when(is_here):
                    b.ld_shared(words, piece + at)
                    b.st_shared(position + number * f.values, words)
        self._clear(b.label("put"), old)

    def _clear(self, put: Label, old: Label) -> None:
        """Zeros for values after the last position, by all threads; then they meet."""
        b, f, width = self.b, self.f, self.lines.width
        zero, at, offset, is_done = self.x, self.y, self.z, b.pred("is_done")
        clear = b.label("clear")
        b.mark(put)
        b.mul_lo(offset, self.left, width)
        b.mad_lo(offset, self.thread, 16, offset)
        again = b.marked("zeros")
        b.setp("ge", is_done, offset, f.block * width)
        b.setp("ge", is_done, self.thread, 32 * f.warps, either=is_done)
        b.bra_if(is_done, clear)
        b.add(at, offset, self.at)
        b.mov(zero, 0)
        for place in range(f.values, f.tile_bytes, f.block * width):
            b.st_shared(at + place, [zero] * 4)
        b.add(offset, offset, 16 * 32 * f.warps)
        b.bra(again)
        b.mark(clear)
        if f.bulk:
            b.comment("The place will be copied to, by other means than a thread's stores.")
            b.fence_proxy_async()
        b.bar_program()
        b.mark(old)

    def over_keys(self, used: Label) -> None:
        """Attention over the warp's keys of a tile.

        Args:
            used: where a warp goes on that has no query.
        """
        b = self.b
        if self.f.abreast == 1:
            self._over_octets(self.keys // 8)
            return
        few, has_none = b.label("few"), b.pred("has_no_query")
        b.bra_if(self.alone, few)
        b.setp("ge", has_none, self.lot, self.lots)
        b.bra_if(has_none, used)
        self._over_octets(self.most)
        b.bra(used)
        b.mark(few)
        self._over_octets(self.keys // 8)

    def _over_octets(self, octets: int) -> None:
        """The same of so many times 8 keys."""
        self._score(octets)
        self._weigh(octets)
        self._add_values(octets)

    def _score(self, octets: int) -> None:
        """Products of 8 queries and the warp's keys, `scores[t][n]`: of keys 8t + 2c + n.

        Paired, row g is of query g % 4: the first 4 are those of even keys, the late ones of odd
        keys. A thread goes on with `scores[t][0]`, of its own; the other one means nothing.
        """
        b, some = self.b, self.scores[:octets]
        at = [self.x, self.y]
        b.comment("Scores: queries times keys.")
        for scores in some:
            for score in scores:
                b.mov(score, 0.0)
        b.add(at[0], self.key, self.at)
        b.add(at[1], self.other_key, self.at)
        for j in range(0, self.pieces, 2):
            self._score_pieces(j, octets, at)
        for scores in some:
            for n in range(2):
                b.add(scores[n], scores[n], scores[n + 2])
            if self.f.paired:
                b.selp(scores[0], scores[1], scores[0], self.late)

    def _score_pieces(self, first: int, octets: int, at: list[Register]) -> None:
        """Adds the products of two pieces, or of the only one, of all the warp's keys."""
        b, f, pieces = self.b, self.f, range(first, min(first + 2, self.pieces))
        if not self.resident:
            for j in pieces:
                self._load_query(j)
        for t in range(octets):
            offset = 8 * t * self.lines.width + first // 2 * f.block * self.lines.width
            loaded = self.key_words[: len(pieces)]
            for words, base in zip(loaded, at, strict=False):
                b.ld_shared(words, base + offset)
            for words, j in zip(loaded, pieces, strict=True):
                q = self._query(j)
                for low, high in ((0, 1), (2, 3)):
                    a = [q[low], q[4 + low], q[high], q[4 + high]]
                    b.mma_bf16(self.scores[t], a, [words[low], words[high]], self.scores[t])

    def _weigh(self, octets: int) -> None:
        """Weights of the warp's keys, as two bfloat16 each; what was summed up is scaled."""
        b, there = self.b, self.y.as_("s32")
        b.comment("Which of the scores are of positions that there are, and that the query sees?")
        b.sub(there, self.left, self.mine)  # keys from the thread's first on
        every = []
        for t in range(octets):
            for n, score in enumerate(self.scores[t][: self.columns]):
                every.append(score)
                if self.f.softcap is not None:
                    self._cap(score, self.f.softcap)
                is_seen = b.pred("is_seen")
                b.setp("gt", is_seen, there, 8 * t + n)
                if self.f.windowed:
                    b.setp("le", is_seen, self.seen_from, 8 * t + n, also=is_seen)
                b.selp(score, score, LOWEST, is_seen)
        b.comment("The largest score so far; what was summed up by a smaller one shrinks.")
        largest, other, shrink = self.number, self.other, b.f32("shrink")
        b.mov(largest, every[0])
        for score in every[1:]:
            b.max(largest, largest, score)
        for step in (1, 2):
            b.shfl_bfly(other, largest, step)
            b.max(largest, largest, other)
        b.max(largest, largest, self.top)
        b.sub(shrink, self.top, largest)
        b.mov(self.top, largest)
        b.ex2(shrink, shrink)
        b.mul(self.total, self.total, shrink)
        for score in every:
            b.sub(score, score, self.top)
            b.ex2(score, score)
            b.add(self.total, self.total, score)
        for t in range(octets):
            (self._pack_paired if self.f.paired else self._pack)(t)
        for number in self._all_sums():
            b.mul(number, number, shrink)

    def _rest(self, rest: Register, score: Register, word: Register, upper: bool) -> None:
        """What a bfloat16 in one half of a word leaves of a score."""
        b, bits = self.b, self.x
        if upper:
            b.and_(bits, word, _UPPER)
        else:
            b.shl(bits, word, 16)
        b.mov(rest, bits)
        b.sub(rest, score, rest)

    def _pack(self, t: int) -> None:
        """An octet's weights as bfloat16, and what they leave."""
        b, (first, second, *_), word = self.b, self.scores[t], self.high[t]
        low, high = self.number, self.other
        b.to_bf16x2(word, second, first)
        self._rest(low, first, word, upper=False)
        self._rest(high, second, word, upper=True)
        b.to_bf16x2(self.low[t], high, low)

    def _pack_paired(self, t: int) -> None:
        """The same of one key: the other one's place is 0."""
        b, score, word, rest = self.b, self.scores[t][0], self.high[t], self.other
        b.to_bf16x2(word, score, score)
        self._rest(rest, score, word, upper=True)
        b.to_bf16x2(self.low[t], rest, rest)
        b.and_(word, word, self.half)
        b.and_(self.low[t], self.low[t], self.half)

    def _cap(self, score: Register, cap: float) -> None:
        """c * tanh(x) = c * (1 - 2 / (1 + exp(2x))), for powers of 2."""
        b, tanh = self.b, self.number
        b.mul(tanh, score, 2 * math.log2(math.e))
        b.ex2(tanh, tanh)
        b.add(tanh, tanh, 1.0)
        b.rcp(tanh, tanh)
        b.mul(tanh, tanh, 2.0)
        b.sub(tanh, 1.0, tanh)
        b.mul(score, tanh, cap * math.log2(math.e))

    def _add_values(self, octets: int) -> None:
        """Adds weights times values.

        Of 8 keys, matrices of 8 elements each are read by 4, and come transposed: a thread has the
        same element of its two keys of each.
        """
        b, f, width = self.b, self.f, self.lines.width
        at = [self.x, self.y]
        b.comment("Weights times values.")
        b.add(at[0], self.value, self.at)
        b.add(at[1], self.other_value, self.at)
        together = min(2, octets)
        for t in range(0, octets, together):
            weights = [x for i in range(t, t + together) for x in (self.high[i], self.low[i])]
            for s in range(self.chunks // 4):
                loaded = self.value_words[:together]
                for words, octet in zip(loaded, range(t, t + together), strict=True):
                    offset = 8 * octet * width + s // 2 * f.block * width
                    b.ldmatrix(words, at[s % 2] + offset, transposed=True)
                for n in range(4):
                    sums = self.sums[4 * s + n]
                    b.mma_bf16(sums, weights, [words[n] for words in loaded], sums)

    # After the last tile

    def _join_pairs(self) -> None:
        """Adds what even and odd keys make: a thread then has the sums of both."""
        b = self.b
        largest, other, mine, its = self.number, self.other, *b.f32s("own_weight", "other_weight")
        b.shfl_bfly(other, self.top, 16)
        b.max(largest, self.top, other)
        b.sub(mine, self.top, largest)
        b.ex2(mine, mine)
        b.mov(self.top, largest)
        b.sub(its, other, largest)
        b.ex2(its, its)
        for own in [self.total, *(sums[n] for sums in self.sums for n in range(2))]:
            b.shfl_bfly(other, own, 16)
            b.mul(own, own, mine)
            b.fma(own, other, its, own)

    def end(self) -> None:
        """Puts aside what the warp has made of its positions."""
        b, f = self.b, self.f
        b.comment("The sums of the four threads of a row, and of both halves of its queries.")
        other = self.other
        for step in (1, 2):
            b.shfl_bfly(other, self.total, step)
            b.add(self.total, self.total, other)
        for sums in self.sums:
            for low, high in zip(sums[:2], sums[2:], strict=True):
                b.add(low, low, high)
        b.comment("Of two threads that have joined the same sums, one puts them aside.")
        one, is_idle, is_first = b.pred("one"), b.pred("is_idle"), b.pred("is_first")
        row, sums_at, idle = self.x, self.y, b.label("idle")
        b.setp("lt", one, self.group, f.rows)
        if f.paired:
            self._join_pairs()
        b.setp("ge", is_idle, self.thread, 32 * f.warps)
        b.bra_if(is_idle, idle)
        b.shr(row, self.thread, 5)
        b.mad_lo(row, row, f.rows, self.group)
        b.mad_lo(sums_at, row, 8, self.ring)
        b.setp("eq", is_first, self.column, 0, also=one)
        with b.when(is_first):
            b.st_shared(sums_at + f.sums, [self.top, self.total])
        b.mad_lo(row, row, f.out_pitch, self.ring)
        b.mad_lo(row, self.column, 8, row)
        for x, sums in enumerate(self.sums):
            with b.when(one):
                b.st_shared(row + (f.out + 32 * x), sums[:2])
        b.comment("Those who wait for words next look where the tiles have got to.")
        b.mark(idle)
        asks = b.pred("asks")
        b.setp("eq", asks, self.thread, f.thread)
        with b.when(asks):
            b.st_shared(self.ring + (f.control + 24), self.stage)
            b.st_shared(self.ring + (f.control + 28), self.phase)
        b.bar_program()
