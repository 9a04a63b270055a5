"""What the kernel that draws does in PTX: a meeting of the programs of a row.

The compiler's own sums over a program's threads take a round through shared memory and two barriers
each, and a meeting would need a dozen. Here it has two barriers in all.

A meeting has `SLOTS` slots. A slot holds 62 bits: how many tokens lie above a place and what they
sum up to (`COUNT_AT`), which are added up, or a token with its noise, of which the greatest stays.
The last slots hold tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax._src import core, state

from pallas_kernels.stream.ptx import lowered

__all__ = ["COUNT_AT", "SLOTS", "TAG_BITS", "TOKEN_BITS", "look", "reserve", "tell", "told"]

# Slots of a meeting, a power of two: of 8 bytes each, a program's fill two sectors of memory.
SLOTS = 8
# A count lies above so many bits of a mass: V masses sum up to less (`pallas_kernels.draw.mass`).
COUNT_AT = 45
# A word's low bits say which meeting it belongs to; 62 bits are left.
TAG_BITS = 2
# Of these a token takes so many, turned round so that of equals the lowest is the greatest.
TOKEN_BITS = 30

_SLOT_BYTES = 8
_ALL = "0xffffffff"
_LANES = 32
# Lanes of a warp that hold the same slot.
_ALIKE = range(_LANES // SLOTS)

_reserve_p = core.Primitive("ffjax_draw_reserve")


@_reserve_p.def_effectful_abstract_eval
def _(x, *, size):
    return core.ShapedArray(x.shape, jnp.int32), {lowered.ORDERED}


@lowered.rule(_reserve_p)
def _(ctx, x, *, size):
    text = f".shared .align 16 .b8 ffjax_draw_slots[{size}]; mov.u32 $0, ffjax_draw_slots;"
    result, arguments = (
        lowered.like(ctx.avals_out[0].shape, lowered.i32()),
        lowered.values(ctx, [x]),
    )
    return lowered.assembly([result], text, "=r,r", arguments)[0]


def reserve(warps: int) -> Array:
    """Shared memory for a program's meetings: its address, int32 `[1]`.

    To be called once in a kernel, and outside of what may run twice.

    Args:
        warps: of the program.
    """
    return _reserve_p.bind(jnp.zeros((1,), jnp.int32), size=2 * warps * SLOTS * _SLOT_BYTES)


_look_p = core.Primitive("ffjax_draw_look")


@_look_p.def_effectful_abstract_eval
def _(logits, *args, places, best, winners, together):
    return core.ShapedArray(logits.shape, jnp.int32), {lowered.ORDERED}


def _ahead_lines(slot: int) -> list[str]:
    """%v of a slot: of a warp's numbers with noise, %o, the greatest, and its token, %m."""
    return [
        f"redux.sync.max.u32 %t, %o, {_ALL};",
        "setp.eq.u32 %p, %t, %o; selp.u32 %m, %m, 0, %p;",
        f"redux.sync.max.u32 %m, %m, {_ALL};",
        f"cvt.u64.u32 %x, %t; shl.b64 %x, %x, {TOKEN_BITS}; cvt.u64.u32 %y, %m;",
        f"or.b64 %v{slot}, %x, %y;",
    ]


def _look_text(places: int, best: bool, winners: int, k: int) -> str:
    """Operands: k results, k of each: logits, masses, places, noisy logits, tokens, the address."""
    ahead = range(places - winners, places)

    def of(argument: int, i: int = 0) -> str:
        return f"${(1 + argument) * k + i}"

    lines = [
        "{ .reg .pred %p; .reg .b32 %low, %high, %at, %t, %n, %o, %m; .reg .f32 %f, %least;",
        f".reg .b32 %s<{SLOTS}>, %c<{SLOTS}>; .reg .b64 %x, %y, %best, %v<{SLOTS}>;",
        *(f"mov.u32 ${i}, 0;" for i in range(k)),
        f".reg .pred %q; .reg .b32 %w<{SLOTS}>, %i<{SLOTS}>;",
        *(f"mov.u32 %s{place}, 0; mov.u32 %c{place}, 0;" for place in range(places)),
        *(f"mov.u32 %w{place}, {1 << 31}; mov.u32 %i{place}, 0;" for place in ahead),
        "mov.u64 %best, 0;",
    ]
    if places:
        lines.append(f"mov.b32 %least, {of(2)};")
        lines += [f"min.f32 %least, %least, {of(2 + place)};" for place in range(1, places)]
    for i in range(k):
        if places:
            # A warp of which no token lies above any place goes on to its next ones.
            lines.append(f"setp.gt.f32 %p, {of(0, i)}, %least;")
            lines.append(f"vote.sync.any.pred %p, %p, {_ALL}; @!%p bra over{i};")
        noisy, token = 2 + places, 3 + places
        if best:
            # As an integer that is ordered alike; -0 is 0.
            lines += [
                f"mov.b32 %f, {of(noisy, i)}; add.f32 %f, %f, 0f00000000; mov.b32 %o, %f;",
                "shr.s32 %m, %o, 31; and.b32 %m, %m, 0x7fffffff; xor.b32 %o, %o, %m;",
            ]
        for place in range(places):
            lines.append(f"setp.gt.f32 %p, {of(0, i)}, {of(2 + place)};")
            lines.append(f"@%p add.u32 %s{place}, %s{place}, {of(1, i)};")
            lines.append(f"@%p add.u32 %c{place}, %c{place}, 1;")
            if place in ahead:
                # Of equals the first one stays: a thread's tokens come by their numbers.
                lines.append(f"setp.gt.and.s32 %q, %o, %w{place}, %p;")
                lines.append(f"@%q mov.b32 %w{place}, %o; @%q mov.b32 %i{place}, {of(token, i)};")
        if best and not winners:
            lines += [
                f"xor.b32 %o, %o, 0x80000000; sub.u32 %m, {2**TOKEN_BITS - 1}, {of(token, i)};",
                "mov.b64 %y, {%m, %o}; max.u64 %best, %best, %y;",
            ]
        lines.append(f"over{i}:")
    for place in range(places):
        # A thread's sum has 32 bits; its halves are summed apart, the upper one with the count.
        lines += [
            f"and.b32 %low, %s{place}, 65535; shr.u32 %high, %s{place}, 16;",
            f"shl.b32 %n, %c{place}, 21; add.u32 %high, %high, %n;",
            f"redux.sync.add.u32 %low, %low, {_ALL}; redux.sync.add.u32 %high, %high, {_ALL};",
            "shr.u32 %n, %high, 21; and.b32 %high, %high, 2097151;",
            "cvt.u64.u32 %x, %low; mul.wide.u32 %y, %high, 65536; add.u64 %x, %x, %y;",
            f"cvt.u64.u32 %y, %n; shl.b64 %y, %y, {COUNT_AT}; add.u64 %v{place}, %x, %y;",
        ]
    lines += [f"mov.u64 %v{place}, 0;" for place in range(places, SLOTS)]
    if best and not winners:
        lines += ["mov.b64 {%m, %o}, %best;", *_ahead_lines(SLOTS - 1)]
    for slot, place in zip(range(SLOTS - winners, SLOTS), ahead, strict=True):
        lines += [
            f"xor.b32 %o, %w{place}, 0x80000000; sub.u32 %m, {2**TOKEN_BITS - 1}, %i{place};",
            *_ahead_lines(slot),
        ]
    address = 2 + places + 2 * best
    lines += [
        "mov.u32 %t, %tid.x; and.b32 %n, %t, 31; shr.u32 %t, %t, 5;",
        f"mad.lo.u32 %at, %t, {SLOTS * _SLOT_BYTES}, {of(address)}; setp.eq.u32 %p, %n, 0;",
        *(
            f"@%p st.shared.v2.b64 [%at+{i * _SLOT_BYTES}], {{%v{i}, %v{i + 1}}};"
            for i in range(0, SLOTS, 2)
        ),
        "}",
    ]
    return " ".join(lines)


@lowered.rule(_look_p)
def _(ctx, *args, places, best, winners, together):
    arguments = lowered.values(ctx, args)
    text = _look_text(places, best, winners, together)
    constraints = ",".join(["=&r"] * together + ["r"] * (together * len(arguments)))
    result = lowered.like(ctx.avals_out[0].shape, lowered.i32())
    # Whole warps jump.
    return lowered.assembly([result], text, constraints, arguments, together, by_warps=True)[0]


def _bits(x: Array) -> Array:
    return x if x.dtype == jnp.int32 else lax.bitcast_convert_type(x, jnp.int32)


def look(
    logits: Array,
    mass: Array,
    places: list[Array],
    best: tuple[Array, Array] | None,
    winners: int,
    shared: Array,
    together: int,
) -> None:
    """Puts what each warp finds in its tokens into shared memory.

    Args:
        logits: float32 `[1, W]`.
        mass: int32 `[1, W]`: what a thread's sum up to has 32 bits.
        places: float32 scalars, at most `SLOTS`: their slots are the first ones.
        best: logits with noise, float32 `[1, W]`, and tokens, int32 `[1, W]`; of the greatest the
            token goes to the last slot, a NaN being greater than all else. Where there are places,
            those whose logits lie beneath all of them may be left out.
        winners: 0; or of how many of the last places the greatest above each is wanted, which go to
            as many slots. Then none is NaN.
        shared: from `reserve`.
        together: tokens that a thread has.
    """
    shape = logits.shape
    arrays = [logits, mass, *places, *(best or ()), jnp.sum(shared)]
    arrays = [_bits(jnp.broadcast_to(x, shape)) for x in arrays]
    options = {"places": len(places), "best": best is not None, "winners": winners}
    options["together"] = together
    _look_p.bind(*arrays, **options)


def _joined_lines(value: str, best: int) -> list[str]:
    """Sums `value` up over lanes that hold the same slot; in the last ones, the greatest stays."""
    lines = []
    for by in (8, 16):
        lines += [
            f"mov.b64 {{%a, %b}}, {value};",
            f"shfl.sync.bfly.b32 %a, %a, {by}, 31, {_ALL};",
            f"shfl.sync.bfly.b32 %b, %b, {by}, 31, {_ALL};",
            "mov.b64 %y, {%a, %b};",
            *_join_lines(value, "%y", best),
        ]
    return lines


def _join_lines(value: str, other: str, best: int) -> list[str]:
    if not best:
        return [f"add.u64 {value}, {value}, {other};"]
    return [
        f"max.u64 %z, {value}, {other}; add.u64 {value}, {value}, {other};",
        f"@%last mov.u64 {value}, %z;",
    ]


def _of_warps_lines(address: str, warps: int, best: int) -> list[str]:
    """What so many warps have put at `address`, joined: %x, of each lane's slot."""
    lines = [
        "mov.u64 %x, 0;",
        f"shr.u32 %a, %lane, 3; mad.lo.u32 %at, %lane, {_SLOT_BYTES}, {address};",
    ]
    for first in range(0, warps, len(_ALIKE)):
        at = f"[%at+{first * SLOTS * _SLOT_BYTES}]"
        if first + len(_ALIKE) <= warps:
            lines.append(f"ld.shared.b64 %y, {at};")
        else:
            lines.append(f"setp.lt.u32 %p, %a, {warps - first}; mov.u64 %y, 0;")
            lines.append(f"@%p ld.shared.b64 %y, {at};")
        lines += _join_lines("%x", "%y", best)
    return lines + _joined_lines("%x", best)


def _registers(best: int) -> str:
    """What `tell` and `told` begin with; `best` slots, the last ones, hold a token."""
    return _REGISTERS + f" setp.ge.u32 %last, %a, {SLOTS - best};"


_REGISTERS = (
    ".reg .pred %p, %last, %q; .reg .b32 %a, %b, %t, %lane, %warp, %at, %n;"
    " .reg .b64 %x, %y, %z, %w;"
    " mov.u32 %t, %tid.x; and.b32 %lane, %t, 31; shr.u32 %warp, %t, 5;"
    f" and.b32 %a, %lane, {SLOTS - 1};"
)

_tell_p = core.Primitive("ffjax_draw_tell")


@_tell_p.def_effectful_abstract_eval
def _(ref, *args, warps, best):
    return core.ShapedArray(args[0].shape, jnp.int32), {lowered.ORDERED, state.WriteEffect(0)}


def _tell_text(warps: int, best: int) -> str:
    """Operands: a result; the shared address, the board's, where the program's words lie, a tag."""
    lines = [
        f"{{ {_registers(best)} mov.u32 $0, 0; bar.sync 0;",
        "setp.ne.u32 %p, %warp, 0; @%p bra idle;",
        *_of_warps_lines("$1", warps, best),
        f"shl.b64 %x, %x, {TAG_BITS}; cvt.u64.u32 %y, $4; or.b64 %x, %x, %y;",
        f"mad.lo.u32 %a, %lane, {_SLOT_BYTES}, $3; cvt.u64.u32 %y, %a; add.u64 %y, %y, $2;",
        f"setp.lt.u32 %p, %lane, {SLOTS}; @%p st.relaxed.gpu.global.b64 [%y], %x;",
        "idle: }",
    ]
    return " ".join(lines)


def _base(ref: Any, shape: tuple[int, ...]) -> Any:
    return lowered.spread(lowered.pointer(ref), list(shape))


@lowered.rule(_tell_p)
def _(ctx, ref, *args, warps, best):
    shared, place, tag = lowered.values(ctx, args)
    shape = ctx.avals_out[0].shape
    arguments = [shared, _base(ref, shape), place, tag]
    result = lowered.like(shape, lowered.i32())
    # Whole warps jump.
    text = _tell_text(warps, best)
    return lowered.assembly([result], text, "=&r,r,l,r,r", arguments, by_warps=True)[0]


def tell(board: Any, shared: Array, place: Array, tag: Array, warps: int, best: int) -> None:
    """Writes what `look` has found to the board.

    Args:
        board: int32 array.
        shared: from `reserve`.
        place: int32 scalar, bytes from the board's beginning to this program's words.
        tag: int32 scalar, of this meeting; not 0.
        warps: of the program.
        best: slots that hold a token, the last ones.
    """
    one = (jnp.full((1,), x) for x in (place, tag))
    _tell_p.bind(board, shared, *one, warps=warps, best=best)


_told_p = core.Primitive("ffjax_draw_told")
_told_p.multiple_results = True


@_told_p.def_effectful_abstract_eval
def _(ref, *args, warps, parts, best, most):
    return [core.ShapedArray((SLOTS,), jnp.int32)] * 3, {lowered.ORDERED, state.ReadEffect(0)}


def _told_text(warps: int, parts: int, best: int, most: int) -> str:
    """Operands: 3 results; the slot, the shared address, the board's, the row's words, a tag."""
    threads, words = warps * _LANES, parts * SLOTS
    rounds = -(-words // threads)
    first = warps * SLOTS * _SLOT_BYTES
    lines = [
        f"{{ {_registers(best)} .reg .b64 %got<{rounds}>; .reg .f32 %f;",
        "mov.u32 %n, 0; mov.u32 %b, $7;",
        f"mad.lo.u32 %a, %t, {_SLOT_BYTES}, $6; cvt.u64.u32 %w, %a; add.u64 %w, %w, $5;",
        "cvt.u64.u32 %z, $7;",
        *(f"mov.u64 %got{j}, %z;" for j in range(rounds)),
        f"setp.lt.u32 %q, %t, {words};",
        "again:",
        *(
            f"@%q ld.relaxed.gpu.global.b64 %got{j}, [%w+{j * threads * _SLOT_BYTES}];"
            for j in range(rounds)
        ),
        "mov.u64 %y, 0;",
        *(f"xor.b64 %x, %got{j}, %z; or.b64 %y, %y, %x;" for j in range(rounds)),
        f"and.b64 %y, %y, {2**TAG_BITS - 1}; setp.eq.u64 %p, %y, 0; @%p bra come;",
        f"add.u32 %n, %n, 1; setp.gt.u32 %p, %n, {most}; @%p trap; bra again;",
        "come: bar.warp.sync 0xffffffff;",
        f"shr.u64 %x, %got0, {TAG_BITS};",
    ]
    for j in range(1, rounds):
        lines += [f"shr.u64 %w, %got{j}, {TAG_BITS};", *_join_lines("%x", "%w", best)]
    reading = min(warps, -(-words // _LANES))
    lines += [
        *_joined_lines("%x", best),
        f"mad.lo.u32 %at, %t, {_SLOT_BYTES}, $4;",
        f"mul.lo.u32 %a, %warp, {(_LANES - SLOTS) * _SLOT_BYTES};",
        f"sub.u32 %at, %at, %a; setp.lt.u32 %p, %lane, {SLOTS};",
        f"@%p st.shared.b64 [%at+{first}], %x;",
        f"bar.sync 0; add.u32 %b, $4, {first};",
        *_of_warps_lines("%b", reading, best),
        # From the lane that has it to each that asks.
        "mov.b64 {%a, %b}, %x;",
        f"shfl.sync.idx.b32 %a, %a, $3, 31, {_ALL}; shfl.sync.idx.b32 %b, %b, $3, 31, {_ALL};",
        f"and.b32 %n, %a, {2**TOKEN_BITS - 1}; sub.u32 $2, {2**TOKEN_BITS - 1}, %n;",
        f"mov.b64 %x, {{%a, %b}}; shr.u64 %y, %x, {COUNT_AT}; cvt.u32.u64 $0, %y;",
        f"and.b64 %x, %x, {2**COUNT_AT - 1}; cvt.rn.f32.u64 %f, %x; mov.b32 $1, %f;",
        "}",
    ]
    return " ".join(lines)


@lowered.rule(_told_p)
def _(ctx, ref, *args, warps, parts, best, most):
    slot, shared, place, tag = lowered.values(ctx, args)
    text = _told_text(warps, parts, best, most)
    words = lowered.like((SLOTS,), lowered.i32())
    arguments = [slot, shared, _base(ref, (SLOTS,)), place, tag]
    return lowered.assembly([words] * 3, text, "=&r,=&r,=&r,r,r,l,r,r", arguments, by_warps=True)


def told(
    board: Any,
    shared: Array,
    place: Array,
    tag: Array,
    warps: int,
    parts: int,
    best: int,
    most: int,
) -> tuple[Array, Array, Array]:
    """What all programs of the row have told, joined.

    Args:
        board: int32 array.
        shared: from `reserve`.
        place: int32 scalar, bytes from the board's beginning to the row's words of this meeting.
        tag: int32 scalar, of this meeting; not 0.
        warps: of the program.
        parts: of the row.
        best: slots that hold a token, the last ones.
        most: how often to look before the launch ends in an error.

    Returns:
        Counts, int32 `[SLOTS]`; sums of masses, in their units, float32 `[SLOTS]`; tokens, int32
        `[SLOTS]`. Each means something in its own slots.
    """
    shape = (SLOTS,)
    slot = lax.broadcasted_iota(jnp.int32, shape, 0)
    arrays = (jnp.broadcast_to(x, shape) for x in (jnp.sum(shared), place, tag))
    options = {"warps": warps, "parts": parts, "best": best, "most": most}
    counts, masses, token = _told_p.bind(board, slot, *arrays, **options)
    return counts, lax.bitcast_convert_type(masses, jnp.float32), token
