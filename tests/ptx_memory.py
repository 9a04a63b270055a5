"""PTX instructions that reach memory, or other threads."""

from __future__ import annotations

import numpy as np
from ptx_boxes import copy_box, learn_map
from ptx_numbers import WIDEN
from ptx_table import DTYPES, WARP, Threads, instruction
from ptx_text import SIZES, Address, Branch, Operand, PtxError, Register

_ORDERS = "weak relaxed acquire release volatile gpu cta sys cluster nc"
# Bytes that a thread asks for into the L2 cache at once.
LINE = 128
_REDUCED = {"add": np.add, "min": np.minimum, "max": np.maximum}
_SPACES = {"shared": "shared", "shared::cta": "shared", "global": "global"}


def _space(t: Threads) -> str:
    found = [_SPACES[m] for m in t.instruction.modifiers if m in _SPACES]
    if len(found) != 1:
        raise PtxError("It names no memory that the machine has.")
    return found[0]


def _vector(t: Threads, number: int) -> tuple[Operand, ...]:
    parts = t.parts(number)
    count = next((int(m[1]) for m in t.instruction.modifiers if m in ("v2", "v4")), 1)
    if len(parts) != count or count * SIZES[t.kind] > 16:
        raise PtxError(f"{len(parts)} registers are given for {count}, or there are too many.")
    return parts


@instruction("ld", also=f"{' '.join(_SPACES)} {_ORDERS} v2 v4 L1::no_allocate")
def _(t: Threads) -> None:
    space, parts = _space(t), _vector(t, 0)
    size, some = SIZES[t.kind] * len(parts), t.machine.poisoned
    poisoned = some is not None and all(
        isinstance(x, Register) and some.search(x.name) is not None for x in parts
    )
    raw = t.machine.load(space, t.address(1, space), size, t.threads, poisoned=poisoned)
    for operand, column in zip(parts, raw.view(DTYPES[t.kind]).T, strict=True):
        t.put(operand, t.kind, column, wider=True)


@instruction("st", also=f"{' '.join(_SPACES)} {_ORDERS} v2 v4")
def _(t: Threads) -> None:
    space, parts = _space(t), _vector(t, 1)
    values = np.stack([t.get(x, t.kind, wider=True) for x in parts], axis=1)
    t.machine.store(space, t.address(0, space), values.view(np.uint8), t.threads)


@instruction("atom", also=f"global max {_ORDERS}")
def _(t: Threads) -> None:
    if not t.has("max") or t.kind[0] != "u" or not t.has("relaxed"):
        raise PtxError("The machine has relaxed maxima of unsigned numbers alone.")
    space, size = _space(t), SIZES[t.kind]
    at, values = t.address(1, space), t.get(t.operands[2], t.kind)
    found = np.zeros_like(values)
    for i in range(len(at)):  # one after another
        some, who = at[i : i + 1], t.threads[i : i + 1]
        found[i] = t.machine.load(space, some, size, who).view(DTYPES[t.kind])[0, 0]
        largest = np.maximum(found[i : i + 1], values[i])
        t.machine.store(space, some, largest[:, None].view(np.uint8), who)
    t[0] = found


@instruction("createpolicy", also="fractional L2::evict_first L2::evict_last")
def _(t: Threads) -> None:
    t[0] = np.zeros(len(t.threads), np.uint64)


@instruction("fence", "membar", also="acq_rel sc gpu cta sys gl cluster release acquire "
              "mbarrier_init proxy async shared::cta shared::cluster global alias "
              "tensormap::generic")  # fmt: skip
def _(t: Threads) -> None:
    if t.has("tensormap::generic"):
        learn_map(t)
    elif t.has("proxy"):
        t.machine.races.fence(np.unique(t.threads // WARP))


@instruction("nanosleep")
def _(t: Threads) -> None:
    _ = t[0]


@instruction("prefetch", also="global L2")
def _(t: Threads) -> None:
    for at in t.address(0, "global"):
        t.machine.places("global", np.array([at]), 1, 1)
        t.machine.prefetched.append((int(at), LINE))


def _copy_small(t: Threads) -> None:
    """Copies of a few bytes, or what tells a barrier of a thread's own."""
    if t.has("mbarrier"):
        if not (t.has("arrive") and t.has("noinc")):
            raise PtxError("The machine counts arrivals after copies among the barrier's own.")
        for thread, at in zip(t.threads, t.address(0, "shared"), strict=True):
            t.machine.arrive_behind_copies(int(thread), int(at))
        return
    if t.has("cg") == t.has("ca") or not t.has("L2::cache_hint") or len(t.operands) != 4:
        raise PtxError("The machine copies through the L2 cache, or both caches, with a policy.")
    sizes = t.get(t.operands[2], "u32")
    if not np.isin(sizes, [16] if t.has("cg") else [4, 8, 16]).all():
        raise PtxError("What passes through the L2 cache alone is 16 bytes; else 4, 8 or 16.")
    t.get(t.operands[3], "b64")
    columns = t.address(0, "shared"), t.address(1, "global"), sizes
    for each in zip(t.threads, *columns, strict=True):
        t.machine.copy_small(*(int(x) for x in each))


@instruction("cp", also="async bulk shared::cluster shared::cta shared global prefetch L2 cg ca "
              "mbarrier arrive noinc "
              "mbarrier::complete_tx::bytes L2::cache_hint tensor tile 3d")  # fmt: skip
def _(t: Threads) -> None:
    if not t.has("bulk"):
        _copy_small(t)
        return
    if t.has("tensor"):
        copy_box(t)
        return

    def sizes(number: int) -> np.ndarray:
        return t.get(t.operands[number], "u32").astype(np.int64)

    if t.has("prefetch"):
        for at, size in zip(t.address(0, "global"), sizes(1), strict=True):
            t.machine.places("global", np.array([at]), int(size), 16)
            if size % 16 or not size:
                raise PtxError(f"A prefetch is of some times 16 bytes, not of {size}.")
            t.machine.prefetched.append((int(at), int(size)))
        return
    if not (t.has("bulk") and t.has("mbarrier::complete_tx::bytes")):
        raise PtxError("The machine has bulk copies that an mbarrier waits for alone.")
    if len(t.operands) != 4 + t.has("L2::cache_hint"):
        raise PtxError("A hint needs a policy, and a policy a hint.")
    if t.has("L2::cache_hint"):
        t.get(t.operands[4], "b64")
    columns = t.address(0, "shared"), t.address(1, "global"), sizes(2), t.address(3, "shared")
    for each in zip(t.threads, *columns, strict=True):
        t.machine.copy(*(int(x) for x in each))


@instruction("mbarrier", also="init arrive expect_tx test_wait try_wait parity "
              "shared shared::cta release acquire relaxed cta")  # fmt: skip
def _(t: Threads) -> None:
    waits, arrives = t.has("test_wait", "try_wait"), t.has("arrive")
    if waits and not t.has("parity"):
        raise PtxError("The machine waits for a phase by its parity alone.")
    at = t.address(1 if waits or arrives else 0, "shared")
    last = t.operands[-1]
    numbers = at if isinstance(last, Address) else t.get(last, "u32")
    if t.has("init"):
        for address, count in zip(at, numbers, strict=True):
            t.machine.start_barrier(int(address), int(count))
        return
    warps, races = (t.threads // WARP).tolist(), t.machine.races
    if waits:
        # Threads of a warp mostly ask for the same.
        asked = list(zip(warps, at.tolist(), numbers.tolist(), strict=True))
        passed = {}
        for warp, address, parity in dict.fromkeys(asked):
            barrier = t.machine.barrier(address)
            has = passed[warp, address, parity] = barrier.has_passed(parity)
            if has:
                races.learn(warp, barrier.news)
        t.put(t.operands[0], "pred", np.array([passed[one] for one in asked]))
        return
    barriers = [t.machine.barrier(int(address)) for address in at]
    for warp, barrier, number in zip(warps, barriers, numbers, strict=True):
        if arrives:
            barrier.news = races.tell(warp, barrier.news)
        if t.has("expect_tx"):
            barrier.expect(int(number))
        times = int(number) if numbers is not at and not t.has("expect_tx") else 1
        for _ in range(times if arrives else 0):
            barrier.arrive()
    if arrives and isinstance(t.operands[0], Register) and t.operands[0].name != "_":
        t.put(t.operands[0], "b64", np.zeros(len(at), np.uint64))


# Threads


@instruction("bra", also="uni")
def _(t: Threads) -> None:
    [to] = t.operands
    assert isinstance(to, Branch)
    t.run.at[t.threads] = to.to


@instruction("trap")
def _(t: Threads) -> None:
    raise PtxError(f"Thread {t.threads[0]} has come to a trap.")


@instruction("bar", "barrier", also="sync arrive warp aligned cta")
def _(t: Threads) -> None:
    if t.has("warp"):
        _whole(t, 0)
        return
    number = int(t.get(t.operands[0], "u32")[0])
    count = t.machine.threads
    if len(t.operands) > 1:
        count = int(t.get(t.operands[1], "u32")[0])
    if count % WARP or not 0 <= number < 16:
        raise PtxError(f"There is no barrier {number} of {count} threads.")
    t.run.meet(t.threads, number, count)
    if t.has("arrive"):
        t.run.waiting[t.threads] = False


def _whole(t: Threads, mask: int) -> None:
    if (t.get(t.operands[mask], "b32") != 0xFFFFFFFF).any():
        raise PtxError("The machine has collective instructions of whole warps alone.")


def _warps(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, WARP, *values.shape[1:])


@instruction("shfl", also="sync bfly idx up down")
def _(t: Threads) -> None:
    _whole(t, 4)
    lane = t.threads % WARP
    by, c = (t.get(t.operands[i], "u32").astype(np.int64) for i in (2, 3))
    clamp, segment = c & 31, c >> 8 & 31
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    by &= 31
    if t.has("up"):
        source = lane - by
        there = source >= last
    else:
        if t.has("down"):
            source = lane + by
        elif t.has("bfly"):
            source = lane ^ by
        else:
            source = first | (by & ~segment)
        there = source <= last
    source = np.where(there, source, lane)
    values = _warps(t.get(t.operands[1], "b32"))
    to, *rest = t.parts(0)
    t.put(to, "b32", np.take_along_axis(values, _warps(source), axis=1).ravel())
    for predicate in rest:
        t.put(predicate, "pred", there)


@instruction("vote", also="sync any all ballot")
def _(t: Threads) -> None:
    _whole(t, 2)
    votes = _warps(t.get(t.operands[1], "pred"))
    if t.has("ballot"):
        words = (votes.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(axis=1)
        t.put(t.operands[0], "b32", np.repeat(words.astype(np.uint32), WARP))
    else:
        each = votes.any(axis=1) if t.has("any") else votes.all(axis=1)
        t.put(t.operands[0], "pred", np.repeat(each, WARP))


def _halves(kind: str, words: np.ndarray) -> np.ndarray:
    """The two numbers of each word, float32 `[..., 2]`."""
    return WIDEN[kind](np.ascontiguousarray(words)[..., None].view(np.uint16))


_LANE = np.arange(WARP)
_GROUP, _FOURTH = _LANE[:, None] // 4, 2 * (_LANE[:, None] % 4) + np.arange(2)  # [32, 1], [32, 2]


# Products of float numbers, by the inner size: shapes of A and B, and where in them, as if their
# rows were one, each register's halves lie `[registers, 32, 2]`.
_MATRICES = {
    k: (
        (
            (16, k),
            np.stack([(_GROUP + i % 2 * 8) * k + _FOURTH + i // 2 * 8 for i in range(k // 4)]),
        ),
        ((k, 8), np.stack([(_FOURTH + 8 * i) * 8 + _GROUP for i in range(k // 8)])),
    )
    for k in (8, 16)
}
# And where each result's number lies in the product `[16, 8]`: `[32]`.
_RESULTS = [(_LANE // 4 + i // 2 * 8) * 8 + 2 * (_LANE % 4) + i % 2 for i in range(4)]


def _matrix(t: Threads, number: int, kind: str) -> np.ndarray:
    """The matrix A (1) or B (2) of each warp, float64."""
    shape, places = _MATRICES[16 if t.has("m16n8k16") else 8][number - 1]
    words = np.stack(_registers(t, number, "b32", len(places)), axis=1)
    made = np.empty((len(words), places.size))
    made[:, places.ravel()] = _halves(kind, words).reshape(len(words), -1)
    return made.reshape(-1, *shape)


def _registers(t: Threads, number: int, kind: str, count: int) -> list[np.ndarray]:
    parts = t.parts(number)
    if len(parts) != count:
        raise PtxError(f"{len(parts)} registers are given for {count}.")
    return [_warps(t.get(x, kind)) for x in parts]  # [warps, 32]


def _multiply_bytes(t: Threads, kinds: list[str]) -> None:
    """An m16n8k32 product of whole numbers of 8 bits, added up in 32 bits, which wrap around."""
    if kinds[0] != "s32" or kinds[3] != "s32" or not {kinds[1], kinds[2]} <= {"s8", "u8"}:
        raise PtxError("The machine has no such matrix product.")
    warps, fourth = len(t.threads) // WARP, 4 * (_LANE[:, None] % 4) + np.arange(4)  # [32, 4]
    a, b = np.zeros((warps, 16, 32), np.int64), np.zeros((warps, 32, 8), np.int64)
    for i, words in enumerate(_registers(t, 1, "b32", 4)):
        a[:, _GROUP + 8 * (i % 2), fourth + 16 * (i // 2)] = _bytes(kinds[1], words)
    for i, words in enumerate(_registers(t, 2, "b32", 2)):
        b[:, fourth + 16 * i, _GROUP] = _bytes(kinds[2], words)
    c = np.stack(_registers(t, 3, "s32", 4), axis=-1)  # [warps, 32, 4]
    product = a @ b
    if len(t.parts(0)) != 4:
        raise PtxError(f"{len(t.parts(0))} registers are given for 4.")
    for i, operand in enumerate(t.parts(0)):
        total = product[:, _LANE // 4 + 8 * (i // 2), 2 * (_LANE % 4) + i % 2] + c[..., i]
        t.put(operand, "s32", total.astype(np.int32).ravel())


def _bytes(kind: str, words: np.ndarray) -> np.ndarray:
    """The four numbers of each word, `[..., 4]`."""
    return np.ascontiguousarray(words)[..., None].view(DTYPES[kind])


@instruction("mma", also="sync aligned m16n8k32 m16n8k16 m16n8k8 row col")
def _(t: Threads) -> None:
    shape, row, col, *kinds = [m for m in t.instruction.modifiers if m not in ("sync", "aligned")]
    if shape == "m16n8k32" and (row, col) == ("row", "col"):
        _multiply_bytes(t, kinds)
        return
    if (row, col, kinds[0], kinds[3]) != ("row", "col", "f32", "f32") or kinds[1] != kinds[2]:
        raise PtxError("The machine has no such matrix product.")
    added = _registers(t, 3, "f32", 4)  # [warps, 32] each
    product = _matrix(t, 1, kinds[1]) @ _matrix(t, 2, kinds[1])
    results = t.parts(0)
    if len(results) != 4:
        raise PtxError(f"{len(results)} registers are given for 4.")
    product = product.reshape(len(product), -1)
    for operand, places, more in zip(results, _RESULTS, added, strict=True):
        t.put(operand, "f32", (product[:, places] + more).astype(np.float32).ravel())


@instruction("ldmatrix", also="sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def _(t: Threads) -> None:
    rows = _warps(t.address(1, "shared"))
    for i, operand in enumerate(t.parts(0)):
        some = slice(8 * i, 8 * i + 8)
        threads = _warps(t.threads)[:, some].ravel()
        raw = t.machine.load("shared", rows[:, some].ravel(), 16, threads).view(np.uint16)
        matrix = raw.reshape(len(rows), 8, 8)
        if t.has("trans"):
            matrix = matrix.swapaxes(1, 2)
        words = np.ascontiguousarray(matrix).view(np.uint32)  # [warps, 8, 4]
        t.put(operand, "b32", words.reshape(-1))


@instruction("redux", also="sync add min max")
def _(t: Threads) -> None:
    _whole(t, 2)
    if t.kind not in ("u32", "s32"):
        raise PtxError(f"There is none of .{t.kind}.")
    values = _warps(t[1])
    how = next(f for name, f in _REDUCED.items() if t.has(name))
    t[0] = np.repeat(how.reduce(values, axis=1, dtype=values.dtype), WARP)
