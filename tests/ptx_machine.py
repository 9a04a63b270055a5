"""A machine that runs the kernel's inline PTX on a CPU: one program's threads, in numpy.

Of the threads that can go on, those at the lowest instruction take it together. Beyond running,
it looks for what a GPU does not report: registers and results that nobody wrote, results that
share a register with an operand still to be read, addresses outside of memory or between the
words, shared memory touched while a bulk copy is on its way there, warps that use what others
make without waiting for it, stores that meet, and warps that come to a collective instruction in
part. Memory begins as ones: NaNs, and wild addresses.

    machine = Machine(threads=128, shared_bytes=4096, memory=1 << 16)
    machine.view(machine.shared_base, 4, np.float32)[:] = 1
    [sums] = machine.run("{ ... ld.shared.f32 $0, [$1]; }", "=f,r", [addresses])
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ptx_memory
import ptx_numbers
from ptx_races import Races
from ptx_table import DTYPES, WARP, Threads, function_of, same_size, storage
from ptx_text import Program, PtxError, Register, parse

__all__ = ["Copy", "Machine", "PtxError"]

# These enter what they have into the table.
_INSTRUCTIONS = (ptx_memory, ptx_numbers)
# A run of a warp before another one's turn, on average, where turns are drawn.
_TURN = 16


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy that was asked for; 16 bytes or many, by one thread."""

    to: int
    source: int
    size: int
    barrier: int
    asked: int  # the machine's clock


class _Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes it waits for have come.

    `news` is what those who have arrived tell those who wait: see `Races`.
    """

    def __init__(self, count: int, news: np.ndarray):
        self.phase, self.count, self.pending, self.bytes = 0, count, count, 0
        self.news = news

    def expect(self, size: int) -> None:
        if not 0 <= size < 1 << 20:
            raise PtxError(f"An mbarrier counts up to 2^20 - 1 bytes, not {size}.")
        self.bytes += size

    def arrive(self) -> None:
        if self.pending == 0:
            raise PtxError("An mbarrier was arrived at more often than its phase waits for.")
        self.pending -= 1
        self._look()

    def complete(self, size: int) -> None:
        self.bytes -= size
        self._look()

    def _look(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def has_passed(self, parity: int) -> bool:
        """Whether the current phase is not the one of that parity."""
        if parity not in (0, 1):
            raise PtxError(f"A phase's parity is 0 or 1, not {parity}.")
        return self.phase % 2 != parity


def _conflicts(at: np.ndarray, threads: np.ndarray) -> int:
    """How many turns reads of 16 bytes take beyond the first, by 8 neighbouring threads each."""
    # Each pair of a group and a chunk of 16 bytes once: addresses have 47 bits.
    pairs = np.unique(threads.astype(np.int64) // 8 << 43 | at // 16)
    of_banks = np.bincount(8 * (pairs >> 43) + pairs % 8)
    most = np.pad(of_banks, (0, -len(of_banks) % 8)).reshape(-1, 8).max(axis=1)
    return int(np.maximum(most - 1, 0).sum())


class Machine:
    """One program's threads, its shared memory, and the memory that it shares with others.

    Attributes:
        shared: bytes, uint8; the first one's address is `shared_base`.
        memory: likewise, from `memory_base` on.
        clock: instructions so far; `%clock` is what 32 bits hold of it.
        copies: bulk copies so far, in order.
        flying: those that have not come.
        prefetched: address and size of what was asked for into the L2 cache.
        conflicts: turns that reads of 16 bytes a thread took, beyond one for each 8 threads, since
            different places lie in the same bank.
        is_within_kernel: whether texts follow each other as they do in a kernel: no warp waits for
            the others between two of them.
        spare: addresses of shared memory where threads store what nobody reads, whoever is last.
        poisoned: what the names of registers match that may be loaded from where others write at
            the same time, since nothing that is found there counts. They get `poison` then. None:
            no register may.
        poison: a byte: one of NaNs, or of large numbers where there can be numbers alone.
    """

    shared_base = 0x1400
    memory_base = 0x7F_1234_5600

    def __init__(
        self,
        threads: int,
        shared_bytes: int,
        memory: int | np.ndarray,
        *,
        delay: int | Callable[[], int] = 0,
        order: np.random.Generator | None = None,
        blocks: tuple[int, int] = (0, 1),
    ):
        """Powers it on.

        Args:
            threads: whole warps.
            shared_bytes: of shared memory.
            memory: its bytes, or another machine's to share.
            delay: instructions from a bulk copy's start to its arrival.
            order: draws which warp's turn it is; None: all are in step.
            blocks: this program's number, and how many there are.
        """
        if threads % WARP:
            raise PtxError(f"{threads} threads are not whole warps.")
        self.threads = threads
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        self.memory = np.full(memory, 0xFF, np.uint8) if isinstance(memory, int) else memory
        self.delay, self.order, self.blocks = delay, order, blocks
        self.clock = 0
        self.races = Races(threads // WARP, shared_bytes)
        self.copies: list[Copy] = []
        self.prefetched: list[tuple[int, int]] = []
        self.conflicts = 0
        self.is_within_kernel = False
        self.spare = range(0)
        self.poisoned: re.Pattern[str] | None = None
        self.poison = 0xFF
        # Tensor maps: fields so far, by address; those that are whole; which warps know of which.
        self.drafts: dict[int, dict[tuple[str, int], int]] = {}
        self.maps: dict[int, dict[tuple[str, int], int]] = {}
        self.known_maps: set[tuple[int, int]] = set()
        self._barriers: dict[int, _Barrier] = {}
        self.flying: list[Copy] = []
        # Of each byte of shared memory, copies that are on their way to it.
        self._awaited = np.zeros(shared_bytes, np.int16)
        # Copies of 16 bytes that each thread has asked for and that have not come, by their
        # numbers; the last one that it has asked for; and arrivals that wait for some of them.
        self._asked: dict[int, set[int]] = collections.defaultdict(set)
        self._newest: dict[int, int] = collections.defaultdict(int)
        self._arriving: dict[int, list[tuple[set[int], Callable[[], None]]]] = (
            collections.defaultdict(list)
        )
        self._later: list[tuple[int, int, Callable[[], Any]]] = []
        self._tickets = itertools.count()

    # Memory

    def space(self, name: str) -> tuple[np.ndarray, int]:
        """Bytes, and the first one's address, of "shared" or "global" memory."""
        if name == "shared":
            return self.shared, self.shared_base
        return self.memory, self.memory_base

    def view(self, address: int, count: int, dtype: Any) -> np.ndarray:
        """Part of a memory as an array that can be written."""
        name = "global" if address >= self.memory_base else "shared"
        [at] = self.places(name, np.array([address], np.int64), count * np.dtype(dtype).itemsize, 1)
        return self.space(name)[0][at : at + count * np.dtype(dtype).itemsize].view(dtype)

    def places(
        self, name: str, at: np.ndarray, size: int, alignment: int, *, met: bool = False
    ) -> np.ndarray:
        """Numbers of the first bytes of some accesses, all of them allowed.

        Args:
            name: of the memory.
            at: int64, addresses.
            size: bytes of each access.
            alignment: what divides the addresses.
            met: whether a copy may be on its way there.
        """
        data, base = self.space(name)
        if len(at) and (at.min() < base or at.max() + size > base + len(data)):
            wrong = (at < base) | (at + size > base + len(data))
            lacking = hex(int(at[wrong][0]))
            raise PtxError(f"{size} bytes at {lacking} are not all in the {name} memory.")
        if (wrong := at % alignment != 0).any():
            raise PtxError(f"The address {hex(int(at[wrong][0]))} is no multiple of {alignment}.")
        if name == "shared" and self.flying and not met:
            early = self._awaited[(at - base)[:, None] + np.arange(size)].any(axis=1)
            if early.any():
                there = hex(int(at[early][0]))
                raise PtxError(f"{there} is accessed while a copy is on its way there.")
        return at - base

    def load(
        self,
        name: str,
        at: np.ndarray,
        size: int,
        threads: np.ndarray,
        *,
        poisoned: bool = False,
    ) -> np.ndarray:
        """Bytes `[n, size]` at addresses `[n]`, for threads `[n]`.

        Where others write at the same time, it is an error; or, if poisoned, `poison` is there.
        """
        index = self.places(name, at, size, size, met=poisoned)[:, None] + np.arange(size)
        if self._is_spare(name, at).any():
            raise PtxError("What is read has been stored where it is of no use.")
        if name == "shared":
            if poisoned:
                data = self.shared[index]
                wrong = self.races.unknown_writes(threads // WARP, index)
                wrong |= self._awaited[index] > 0
                data[wrong] = self.poison
                self.races.remember_reads(threads // WARP, index, ~wrong)
                return data
            self.races.load(threads // WARP, index)
            if size == 16:
                self.conflicts += _conflicts(at, threads)
        return self.space(name)[0][index]

    def store(self, name: str, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Stores bytes `[n, size]` at addresses `[n]`, for threads `[n]`."""
        size, data = values.shape[1], self.space(name)[0]
        index = self.places(name, at, size, size)[:, None] + np.arange(size)
        if name == "shared":
            self.races.store(threads // WARP, index, data[index] != values)
        data[index] = values
        unlike = (data[index] != values).any(axis=1)
        if (unlike & ~self._is_spare(name, at)).any():
            raise PtxError("Two threads store different values in the same place at once.")

    def _is_spare(self, name: str, at: np.ndarray) -> np.ndarray:
        return (name == "shared") & (at >= self.spare.start) & (at < self.spare.stop)

    # What comes later

    def later(self, steps: int, action: Callable[[], Any]) -> None:
        """Does something some instructions from now: what others do meanwhile."""
        heapq.heappush(self._later, (self.clock + steps, next(self._tickets), action))

    def pass_time(self, steps: int) -> None:
        """Lets time pass, as if instructions ran that are not looked at."""
        for _ in range(steps):
            self._tick()

    def _tick(self) -> None:
        self.clock += 1
        while self._later and self._later[0][0] <= self.clock:
            heapq.heappop(self._later)[2]()

    def copy(
        self,
        thread: int,
        to: int,
        source: int | np.ndarray,
        size: int,
        barrier: int,
        line: int = 16,
        zeros: int = 0,
    ) -> None:
        """Starts a bulk copy from memory to shared memory.

        Args:
            thread: that asks.
            to: address in shared memory.
            source: address in memory; or those of rows of which `size` bytes each are copied.
            size: bytes.
            barrier: address of the mbarrier that waits for it.
            line: of so many bytes chunk x of 16 comes to place x ^ t, where the line lies in the
                t-th 128 bytes of shared memory.
            zeros: bytes of zeros that come after it.
        """
        sources, row = np.atleast_1d(source), size
        self.places("global", sources, row, 16)
        size = row * len(sources) + zeros
        self.places("shared", np.array([to]), size, 16)
        if size % 16 or not size:
            raise PtxError(f"A bulk copy is of some times 16 bytes, not of {size}.")
        rows = [Copy(to + i * row, int(x), row, barrier, self.clock) for i, x in enumerate(sources)]
        at, place = self.barrier(barrier), np.arange(to, to + size - zeros, 16)
        place ^= place // 128 % (line // 16) * 16
        place = (place - to)[:, None] + np.arange(16)
        number = self.races.copy(thread // WARP, to - self.shared_base + np.arange(size))
        for one in rows:
            self._start(one)

        def land() -> None:
            for one in rows:
                self._land(one)
            here = self.view(to, size, np.uint8)
            here[:] = 0
            found = sources[:, None] - self.memory_base + np.arange(row)
            here[place] = self.memory[found].reshape(-1, 16)
            at.news[self.races.copier] = max(at.news[self.races.copier], number)
            at.complete(size)

        self.later(self._delay(), land)

    def _start(self, copy: Copy) -> None:
        self.copies.append(copy)
        self.flying.append(copy)
        self._awaited[copy.to - self.shared_base :][: copy.size] += 1

    def _land(self, copy: Copy) -> None:
        self.flying.remove(copy)
        self._awaited[copy.to - self.shared_base :][: copy.size] -= 1

    def copy_small(self, thread: int, to: int, source: int, size: int) -> None:
        """Starts a thread's own copy of 4, 8 or 16 bytes, which it can tell a barrier of."""
        for name, address in (("shared", to), ("global", source)):
            self.places(name, np.array([address]), size, size)
        copy = Copy(to, source, size, 0, self.clock)
        place = to - self.shared_base + np.arange(size)
        number = self.races.copy(thread // WARP, place, fenced=False)
        self._start(copy)
        self._asked[thread].add(number)
        self._newest[thread] = number

        def land() -> None:
            self._land(copy)
            self.view(to, size, np.uint8)[:] = self.view(source, size, np.uint8)
            self._asked[thread].remove(number)
            for missing, arrive in [*self._arriving[thread]]:
                missing.discard(number)
                if not missing:
                    self._arriving[thread].remove((missing, arrive))
                    arrive()

        self.later(self._delay(), land)

    def arrive_behind_copies(self, thread: int, barrier: int) -> None:
        """Arrives at an mbarrier when all that the thread has asked for so far has come."""
        at, missing = self.barrier(barrier), set(self._asked[thread])
        newest = self._newest[thread]

        def arrive() -> None:
            at.news[self.races.copier] = max(at.news[self.races.copier], newest)
            at.arrive()

        if missing:
            self._arriving[thread].append((missing, arrive))
        else:
            arrive()

    def _delay(self) -> int:
        return self.delay if isinstance(self.delay, int) else self.delay()

    def barrier(self, address: int) -> _Barrier:
        """The mbarrier at an address."""
        if address not in self._barriers:
            raise PtxError(f"There is no mbarrier at {hex(address)}.")
        return self._barriers[address]

    def start_barrier(self, address: int, count: int) -> None:
        """Makes an mbarrier."""
        self.places("shared", np.array([address]), 8, 8)
        if any(abs(address - other) < 8 for other in self._barriers if other != address):
            raise PtxError(f"The mbarrier at {hex(address)} overlaps another one.")
        self._barriers[address] = _Barrier(count, np.zeros(self.threads // WARP + 1, np.int64))

    # Running

    def run(
        self, text: str, constraints: str, operands: Sequence[Any], limit: int = 200_000
    ) -> list[np.ndarray]:
        """Runs inline PTX as Triton's elementwise operation does.

        Args:
            text: the PTX.
            constraints: of results, then operands, as LLVM wants them: "=&r,r,l".
            operands: `[threads]` or scalars, of any type whose bits fit.
            limit: instructions, beyond which it is not thought to end.

        Returns:
            Results, `[threads]` each: uint32, uint64, or float32 where the constraint is "f".
        """
        program = parse(text, constraints)
        run = Run(self, program, operands)
        if not self.is_within_kernel:
            self.races.meet(np.arange(self.threads // WARP))
        end = self.clock + limit
        with np.errstate(all="ignore"):
            while run.step():
                self._tick()
                if self.clock > end:
                    raise PtxError(f"It does not end within {limit} instructions: {run.standing()}")
        return run.results()


class Run:
    """A text while it runs: each thread's registers, and the instruction it stands at."""

    def __init__(self, machine: Machine, program: Program, operands: Sequence[Any]):
        self.machine, self.program = machine, program
        self.at = np.zeros(machine.threads, np.int64)
        self.waiting = np.zeros(machine.threads, bool)
        self._everyone = np.arange(machine.threads)
        self._functions: dict[int, Callable[[Threads], None]] = {}
        self._values: dict[str, np.ndarray] = {}
        self._written: dict[str, np.ndarray] = {}
        self._meetings: dict[int, list[int]] = collections.defaultdict(list)
        self._warp = 0
        # A result may have the register of any operand, unless it is written early.
        self._clobbers = {
            result.name: [x.name for x in program.inputs if same_size(x, result)]
            for result, early in zip(program.results, program.early, strict=True)
            if not early
        }
        if len(operands) != len(program.inputs):
            raise PtxError(f"{len(program.inputs)} operands are wanted, not {len(operands)}.")
        for register, operand in zip(program.inputs, operands, strict=True):
            self._bind(register, np.asarray(operand))

    def _bind(self, register: Register, operand: np.ndarray) -> None:
        dtype = np.dtype(storage(register.kind))
        if operand.dtype.kind == "f":
            operand = operand.view(f"u{operand.dtype.itemsize}")
        bits = 8 * dtype.itemsize
        wide = operand.astype(np.int64) if operand.dtype.kind == "i" else operand.astype(np.uint64)
        if (wide >= 1 << bits).any() or (wide < -(1 << (bits - 1))).any():
            raise PtxError(f"The operand {register.name} does not fit in {bits} bits.")
        values, written = self._register(register)
        values[:] = wide.astype(dtype)
        written[:] = True

    def _register(self, register: Register) -> tuple[np.ndarray, np.ndarray]:
        name = register.name
        if name not in self._values:
            self._values[name] = np.zeros(self.machine.threads, storage(register.kind))
            self._written[name] = np.zeros(self.machine.threads, bool)
        return self._values[name], self._written[name]

    def read(self, register: Register, threads: np.ndarray) -> np.ndarray:
        """A register's bits, of some threads."""
        values, written = self._register(register)
        if threads is self._everyone and written.all():
            return values.copy()
        if not written[threads].all():
            thread = threads[~written[threads]][0]
            name = register.name.split("/")[0]
            raise PtxError(
                f"Thread {thread} reads {name}, which it has not written"
                + (" or which a result may have taken." if name.startswith("$") else ".")
            )
        return values[threads]

    def write(self, register: Register, threads: np.ndarray, values: np.ndarray) -> None:
        """Sets a register's bits, of some threads."""
        held, written = self._register(register)
        some = slice(None) if threads is self._everyone else threads  # the same, and quicker
        held[some] = values
        written[some] = True
        for name in self._clobbers.get(register.name, ()):
            self._written[name][threads] = False

    def meet(self, threads: np.ndarray, number: int, count: int) -> None:
        """Has threads wait at a barrier until so many have come."""
        here = self._meetings[number]
        here.extend(int(x) for x in threads)
        self.waiting[threads] = True
        if len(here) > count:
            raise PtxError(f"{len(here)} threads have come to barrier {number}, which has {count}.")
        if len(here) == count:
            self.waiting[here] = False
            self.machine.races.meet(np.unique(np.array(here) // WARP))
            here.clear()

    def step(self) -> bool:
        """Has some threads execute an instruction; whether there is one left."""
        found = self._together()
        if found is None:
            if (self.at == len(self.program.instructions)).all() and not self.waiting.any():
                return False
            found = self._next()
        number, standing = found
        instruction = self.program.instructions[number]
        try:
            threads = standing
            if instruction.guard is not None:
                held = self.read(instruction.guard, standing) != instruction.guard.negated
                if not held.all():
                    threads = standing[held]
                if instruction.collective and (held != np.repeat(held[::WARP], WARP)).any():
                    raise PtxError("Not all threads of a warp execute it.")
            self.at[slice(None) if standing is self._everyone else standing] += 1
            if len(threads):
                if number not in self._functions:
                    self._functions[number] = function_of(instruction)
                self._functions[number](Threads(self, instruction, threads))
        except PtxError as error:
            raise PtxError(f"{error} At `{instruction.text}`.") from error
        return True

    def _together(self) -> tuple[int, np.ndarray] | None:
        """The instruction that all threads stand at, and all threads: what `_next` would find."""
        number = int(self.at[0])
        if (
            self.machine.order is not None
            or number == len(self.program.instructions)
            or (self.at != number).any()
            or self.waiting.any()
        ):
            return None
        return number, self._everyone

    def _next(self) -> tuple[int, np.ndarray]:
        ready = (self.at < len(self.program.instructions)) & ~self.waiting
        if self.machine.order is not None:
            draw, warps = self.machine.order, ready.reshape(-1, WARP).any(axis=1)
            if warps.any() and (not warps[self._warp] or draw.random() < 1 / _TURN):
                self._warp = int(draw.choice(np.flatnonzero(warps)))
            mine = np.repeat(np.arange(len(warps)) == self._warp, WARP)
            if (found := self._lowest(ready & mine)) is not None:
                return found
        if (found := self._lowest(ready)) is None:
            raise PtxError(f"Nobody can go on: {self.standing()}")
        return found

    def _lowest(self, ready: np.ndarray) -> tuple[int, np.ndarray] | None:
        while ready.any():
            number = int(self.at[ready].min())
            standing = ready & (self.at == number)
            if not self.program.instructions[number].collective:
                return number, np.flatnonzero(standing)
            whole = np.repeat(standing.reshape(-1, WARP).all(axis=1), WARP)
            if whole.any():
                return number, np.flatnonzero(whole)
            # They wait for the rest of their warps.
            ready = ready & ~standing
        return None

    def standing(self) -> str:
        """Where threads are, as a sentence."""
        parts = []
        at = self.at - self.waiting  # those who wait at a barrier have executed it
        for number in np.unique(at):
            here = np.flatnonzero(at == number)
            ends = number == len(self.program.instructions)
            what = "the end" if ends else f"`{self.program.instructions[number].text}`"
            parts.append(f"{len(here)} threads, of which the first is {here[0]}, at {what}")
        return "; ".join(parts) + "."

    def results(self) -> list[np.ndarray]:
        """What the text made."""
        everyone = np.arange(self.machine.threads)
        return [self.read(x, everyone).view(DTYPES[x.kind]) for x in self.program.results]
