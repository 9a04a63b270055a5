"""A tile's product, and sums of products."""

from __future__ import annotations

from collections.abc import Sequence

from jax import Array

from pallas_kernels.asm import LANE, TID, Block, Register
from pallas_kernels.inline_ptx.operation import Operation

__all__ = ["multiply_tile", "sum_shared"]


def _write_product(
    b: Block,
    address: Register,
    pitch: Register,
    where: Register,
    *activations: Register,
    rows: int,
    step: int,
    chunked: bool,
    threads: int,
    guarded: bool,
) -> None:
    """Each thread's part of a tile's products: see `multiply_tile`.

    `activations` are the words, and, where pieces are guarded, how many there are.
    """
    b.warps_jump_whole = True
    words, there = (activations[:-1], activations[-1]) if guarded else (activations, None)
    pieces = len(words) // 4
    # What is added to the same sums waits: of few rows, sums are several chains.
    sums_count = rows // 2 if chunked else 1
    chains = max(1, 4 // sums_count)
    thread, lane, group, idle = *b.u32s("thread", "lane", "group"), b.label("idle")
    row, next_row, is_idle, is_there = *b.u32s("row", "next_row"), *b.preds("is_idle", "is_there")
    b.mov(thread, TID)
    b.setp("ge", is_idle, thread, threads)
    b.bra_if(is_idle, idle)
    b.mov(lane, LANE)
    b.shr(group, lane, 2)
    sums = [[[b.f32("sum") for _ in range(4)] for _ in range(chains)] for _ in range(sums_count)]
    for chain in (x for some in sums for x in some):
        for number in chain:
            b.mov(number, 0.0)
    pairs = _Pairs(b, address, pitch, rows, step, pieces, thread, group, row, next_row)
    if chunked:
        b.mov(row, address)
    else:
        pairs.begin()
    for m in range(sums_count):
        if chunked:
            b.add(next_row, row, pitch)
        for q in range(pieces):
            x, y = b.u32s(*["x"] * 4), b.u32s(*["y"] * 4)
            if chunked:
                b.ld_shared(x, row + step * q)
                b.ld_shared(y, next_row + step * q)
            else:
                for word in y:
                    b.mov(word, 0)
                pairs.load(x, q)
            if there is not None:
                b.setp("gt", is_there, there, q)
                for word in (*x, *y):
                    b.selp(word, word, 0, is_there)
            for half in range(2):
                to, lo, hi = sums[m][(2 * q + half) % chains], 2 * half, 2 * half + 1
                columns = [words[4 * q + lo], words[4 * q + hi]]
                b.mma_bf16(to, [x[lo], y[lo], x[hi], y[hi]], columns, to)
        if chunked and m + 1 < sums_count:
            b.add(row, next_row, pitch)
    for first, *others in sums:
        for other in others:
            for to, number in zip(first, other, strict=True):
                b.add(to, to, number)
    if chunked:
        _write_diagonal(b, where, group, next_row, [chain[0] for chain in sums], rows)
    else:
        with b.when(pairs.mine):
            b.st_shared(where, sums[0][0][:2])
    b.mark(idle)


class _Pairs:
    """Reads of a row a thread: rows begin in the same bank.

    Of two pieces, threads of every other row read the second one first.
    """

    def __init__(
        self,
        b: Block,
        address: Register,
        pitch: Register,
        rows: int,
        step: int,
        pieces: int,
        thread: Register,
        group: Register,
        row: Register,
        next_row: Register,
    ):
        self._b, self._address, self._pitch = b, address, pitch
        self._rows, self._step, self._pieces = rows, step, pieces
        self._group, self._row = group, row
        # Where the first of two reads is, and the second: in registers that others are done with.
        self._first, self._second = thread, next_row
        self.mine, self._odd = b.pred("mine"), b.pred("odd")
        self._reads: list[list[Register]] = []

    def begin(self) -> None:
        """Where the thread's row begins."""
        b, step, parity = self._b, self._step, self._second
        b.comment("Threads of rows that there are not hold zeros.")
        b.setp("lt", self.mine, self._group, self._rows)
        b.mul_lo(self._row, self._group, self._pitch)
        b.add(self._row, self._row, self._address)
        b.comment("Of two pieces, threads of every other row read the second one first.")
        b.and_(parity, self._group, 1)
        b.setp("ne", self._odd, parity, 0)
        b.selp(self._first, step, 0, self._odd)
        b.add(self._first, self._row, self._first)
        b.selp(self._second, 0, step, self._odd)
        b.add(self._second, self._row, self._second)

    def load(self, x: list[Register], q: int) -> None:
        """Loads the q-th piece of a row, if there is such a row, and the next one with it."""
        b, at = self._b, self._step * q
        if q == self._pieces - 1 and q % 2 == 0:
            for word in x:
                b.mov(word, 0)
            with b.when(self.mine):
                b.ld_shared(x, self._row + at)
            return
        if q % 2 == 0:
            self._reads = [b.u32s(*["first"] * 4), b.u32s(*["second"] * 4)]
            for word in (x for some in self._reads for x in some):
                b.mov(word, 0)
            with b.when(self.mine):
                b.ld_shared(self._reads[0], self._first + at)
                b.ld_shared(self._reads[1], self._second + at)
        one, other = self._reads
        for word, first, second in zip(x, one, other, strict=True):
            b.selp(word, *((first, second) if q % 2 else (second, first)), self._odd)


def _write_diagonal(
    b: Block,
    where: Register,
    group: Register,
    spare: Register,
    sums: list[list[Register]],
    rows: int,
) -> None:
    """Stores each row's product: row and column are the same chunk's.

    Of a block's 16 x 8 products only those count; others are stored where nobody looks.
    """
    odd, parity = b.pred("odd"), spare
    b.comment("Only products on the chunk diagonal are used: a thread has an even or an odd one.")
    b.and_(parity, group, 1)
    b.setp("ne", odd, parity, 0)
    values = [b.f32("value") for _ in range(rows)]
    for r, value in enumerate(values):
        even_one, odd_one = sums[r // 2][2 * (r % 2) : 2 * (r % 2) + 2]
        b.selp(value, odd_one, even_one, odd)
    size = min(4, rows)
    for r in range(0, rows, size):
        b.st_shared(where + 4 * r, values[r : r + size])


_multiply = Operation("ffjax_multiply", _write_product)


def multiply_tile(
    address: Array,
    pitch: Array,
    words: Sequence[Array],
    where: Array,
    there: Array | None = None,
    *,
    rows: int,
    step: int,
    chunked: bool,
    threads: int,
) -> Array:
    """Multiplies a tile in shared memory by activations in registers, on tensor cores.

    Products of bfloat16, sums of float32. All threads of a warp take part, or none. What is summed
    over the inputs of a thread, or of the 4 threads of a column, is stored: chunked, every
    column's numbers of all rows; else, every row's numbers of all columns, two a thread.

    Args:
        address: int32 `[threads]`, of each thread's first piece of the first row.
        pitch: int32 `[threads]`, bytes from a row to the next; all the same.
        words: int32 `[threads]`, 4 for each of a thread's pieces: activations, two bfloat16 a word.
        where: int32 `[threads]`, address in shared memory where what the thread stores begins.
            Chunked, what thread t stores is of use where t % 32 // 8 is t % 4.
        there: int32 `[threads]`, how many of its pieces each thread has, where what lies beyond may
            be no number; None where it is one, and the activations are 0.
        rows: of the tile, a power of two from 2 on.
        step: bytes from a thread's piece to its next one.
        chunked: whether the activations' 8 columns are chunks of one sequence.
        threads: that take part, from the first on.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    guard = [] if there is None else [there]
    return _multiply(
        *(address, pitch, where, *words, *guard),
        rows=rows,
        step=step,
        chunked=chunked,
        threads=threads,
        guarded=bool(guard),
    )[0]


def _write_sum(b: Block, total: Register, address: Register, *, count: int, step: int) -> None:
    numbers = [b.f32("number") for _ in range(count)]
    for i, number in enumerate(numbers):
        b.ld_shared(number, address + step * i)
    while len(numbers) > 1:
        for one, other in zip(numbers[::2], numbers[1::2], strict=True):
            b.add(one, one, other)
        numbers = numbers[::2]
    b.mov(total, numbers[0])


_sum_shared = Operation("ffjax_sum_shared", _write_sum)


def sum_shared(address: Array, count: int, step: int) -> Array:
    """Sums of float32 numbers in shared memory, always in the same order.

    Args:
        address: int32, of each sum's first number.
        count: how many, a power of two.
        step: bytes from one to the next.
    """
    options = {"early": False, "count": count, "step": step}
    return _sum_shared(address, results=["float32"], **options)[0]
