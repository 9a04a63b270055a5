"""A tile's product, and sums of products."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax._src import core

from pallas_kernels.stream.ptx import lowered

__all__ = ["multiply_tile", "sum_shared"]


def _load_batched(q: int, pieces: int, step: int) -> list[str]:
    """Loads the q-th piece of a row, if there is such a row, and the next one with it."""
    x = [f"%x0_{q}_{i}" for i in range(4)]
    if q == pieces - 1 and q % 2 == 0:
        lines = [f"mov.b32 {name}, 0;" for name in x]
        return [*lines, f"@%mine ld.shared.v4.b32 {{{', '.join(x)}}}, [%a+{step * q}];"]
    u, v = ([f"%{name}{q // 2}_{i}" for i in range(4)] for name in "uv")
    if q % 2:
        return [f"selp.b32 {x[i]}, {u[i]}, {v[i]}, %odd;" for i in range(4)]
    lines = [f".reg .b32 {', '.join(u + v)};", *(f"mov.b32 {name}, 0;" for name in u + v)]
    lines.append(f"@%mine ld.shared.v4.b32 {{{', '.join(u)}}}, [%t+{step * q}];")
    lines.append(f"@%mine ld.shared.v4.b32 {{{', '.join(v)}}}, [%b+{step * q}];")
    return lines + [f"selp.b32 {x[i]}, {v[i]}, {u[i]}, %odd;" for i in range(4)]


def _multiply_text(
    rows: int, pieces: int, step: int, chunked: bool, threads: int, guarded: bool = False
) -> str:
    """Each thread's part of a tile's products: see `multiply_tile`.

    Operands: result $0, unused; address $1, pitch $2, where $3, the operand's words, and, where
    pieces are guarded, how many there are.
    """
    lines = [
        f"{{ .reg .pred %odd, %mine{', %p' if guarded else ''}; .reg .b32 %l, %g, %t, %a, %b;",
        "mov.u32 $0, 0;",
        f"mov.u32 %t, %tid.x; setp.ge.u32 %mine, %t, {threads}; @%mine bra idle;",
        "mov.u32 %l, %laneid; shr.u32 %g, %l, 2;",
    ]
    word = [f"${4 + i}" for i in range(4 * pieces)]
    sums = rows // 2 if chunked else 1
    chains = max(1, 4 // sums)
    for m in range(sums):
        for c in range(chains):
            names = ", ".join(f"%c{m}_{c}_{i}" for i in range(4))
            lines.append(f".reg .f32 {names};")
            lines.extend(f"mov.f32 %c{m}_{c}_{i}, 0f00000000;" for i in range(4))
    if chunked:
        lines.append("mov.u32 %a, $1;")
    else:
        # Threads of rows that there are not hold zeros.
        lines.append(f"setp.lt.u32 %mine, %g, {rows}; mul.lo.u32 %a, %g, $2;")
        lines.append("add.u32 %a, %a, $1;")
    if not chunked:
        # Of two pieces, threads of every other row read the second one first: rows begin in the
        # same bank.
        lines.append("and.b32 %b, %g, 1; setp.ne.u32 %odd, %b, 0;")
        lines.append(f"selp.b32 %t, {step}, 0, %odd; add.u32 %t, %a, %t;")
        lines.append(f"selp.b32 %b, 0, {step}, %odd; add.u32 %b, %a, %b;")
    for m in range(sums):
        if chunked:
            lines.append("add.u32 %b, %a, $2;")
        for q in range(pieces):
            x = [f"%x{m}_{q}_{i}" for i in range(4)]
            y = [f"%y{m}_{q}_{i}" for i in range(4)]
            lines.append(f".reg .b32 {', '.join(x + y)};")
            if chunked:
                lines.append(f"ld.shared.v4.b32 {{{', '.join(x)}}}, [%a+{step * q}];")
                lines.append(f"ld.shared.v4.b32 {{{', '.join(y)}}}, [%b+{step * q}];")
            else:
                lines.extend(f"mov.b32 {name}, 0;" for name in y)
                lines += _load_batched(q, pieces, step)
            if guarded:
                lines.append(f"setp.gt.s32 %p, ${4 + 4 * pieces}, {q};")
                lines += [f"selp.b32 {name}, {name}, 0, %p;" for name in x + y]
            for half in range(2):
                c = (2 * q + half) % chains
                d = ", ".join(f"%c{m}_{c}_{i}" for i in range(4))
                lo, hi = 2 * half, 2 * half + 1
                lines.append(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                    f"{{{d}}}, {{{x[lo]}, {y[lo]}, {x[hi]}, {y[hi]}}}, "
                    f"{{{word[4 * q + lo]}, {word[4 * q + hi]}}}, {{{d}}};"
                )
        if m + 1 < sums:
            lines.append("add.u32 %a, %b, $2;")
    for m in range(sums):
        for c in range(1, chains):
            lines.extend(f"add.f32 %c{m}_0_{i}, %c{m}_0_{i}, %c{m}_{c}_{i};" for i in range(4))
    if not chunked:
        lines.append("@%mine st.shared.v2.f32 [$3], {%c0_0_0, %c0_0_1}; idle: }")
        return " ".join(lines)
    # Of a block's 16 x 8 products those count whose row and column are the same chunk's; others
    # are stored where nobody looks.
    lines.append("and.b32 %b, %g, 1; setp.ne.u32 %odd, %b, 0;")
    values = [f"%v{r}" for r in range(rows)]
    lines.append(f".reg .f32 {', '.join(values)};")
    for r, value in enumerate(values):
        even, odd = (f"%c{r // 2}_0_{2 * (r % 2) + i}" for i in range(2))
        lines.append(f"selp.f32 {value}, {odd}, {even}, %odd;")
    size = min(4, rows)
    for r in range(0, rows, size):
        some = ", ".join(values[r : r + size])
        lines.append(f"st.shared.v{size}.f32 [$3+{4 * r}], {{{some}}};")
    lines.append("idle: }")
    return " ".join(lines)


_multiply_p = core.Primitive("ffjax_multiply")


@_multiply_p.def_effectful_abstract_eval
def _(address, pitch, where, *words, rows, step, chunked, threads, guarded):
    return core.ShapedArray(address.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_multiply_p)
def _(ctx, *args, rows, step, chunked, threads, guarded):
    args = lowered.values(ctx, args)
    text = _multiply_text(rows, (len(args) - 3) // 4, step, chunked, threads, guarded)
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    return lowered.assembly([result], text, "=&r" + ",r" * len(args), args, by_warps=True)[0]


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
    """Multiplies a tile in shared memory by an operand in registers, on tensor cores.

    Products of bfloat16, sums of float32. All threads of a warp take part, or none. What is summed
    over the inputs of a thread, or of the 4 threads of a column, is stored: chunked, every
    column's numbers of all rows; else, every row's numbers of all columns, two a thread.

    Args:
        address: int32 `[T]`, of each thread's first piece of the first row.
        pitch: int32 `[T]`, bytes from a row to the next; all the same.
        words: int32 `[T]`, 4 for each of a thread's pieces: the operand, two bfloat16 a word.
        where: int32 `[T]`, address in shared memory where what the thread stores begins. Chunked,
            what thread t stores is of use where t % 32 // 8 is t % 4.
        there: int32 `[T]`, how many of its pieces each thread has, where what lies beyond may be
            no number; None where it is one, and the operand 0.
        rows: of the tile, a power of two from 2 on.
        step: bytes from a thread's piece to its next one.
        chunked: whether the operand's 8 columns are chunks of one sequence.
        threads: that take part, from the first on.

    Returns:
        Nothing of use: a branch of a `cond` must have a result.
    """
    options = {"rows": rows, "step": step, "chunked": chunked, "threads": threads}
    guard = [] if there is None else [there]
    options["guarded"] = there is not None
    return _multiply_p.bind(address, pitch, where, *words, *guard, **options)


_sum_shared_p = core.Primitive("ffjax_sum_shared")


@_sum_shared_p.def_effectful_abstract_eval
def _(address, *, count, step):
    return core.ShapedArray(address.shape, jnp.float32), {lowered.ORDERED}


@lowered.rule(_sum_shared_p)
def _(ctx, address, *, count, step):
    [address] = lowered.values(ctx, [address])
    names = [f"%x{i}" for i in range(count)]
    lines = [f"{{ .reg .f32 {', '.join(names)};"]
    lines.extend(f"ld.shared.f32 {name}, [$1+{step * i}];" for i, name in enumerate(names))
    while len(names) > 1:
        pairs = zip(names[::2], names[1::2], strict=True)
        lines.extend(f"add.f32 {a}, {a}, {b};" for a, b in pairs)
        names = names[::2]
    lines.append(f"mov.f32 $0, {names[0]}; }}")
    result = lowered.like(ctx.avals_out[0].shape, lowered.f32())
    return lowered.assembly([result], " ".join(lines), "=f,r", [address])[0]


def sum_shared(address: Array, count: int, step: int) -> Array:
    """Sums of float32 numbers in shared memory, always in the same order.

    Args:
        address: int32, of each sum's first number.
        count: how many, a power of two.
        step: bytes from one to the next.
    """
    return _sum_shared_p.bind(address, count=count, step=step)
