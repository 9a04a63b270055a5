"""Instructions that reach memory: loads, stores, copies, and the barriers that wait for copies."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.asm.registers import Address, AsmError, Register, Value
from pallas_kernels.asm.writer import Writer

__all__ = ["Memory", "Place"]

Place = Register | Address
"""An address: a register that holds it, or `register + bytes`."""

# How a copy of so many bytes is made: what passes through the L1 cache may be smaller.
_CACHES = {16: "cg", 8: "ca", 4: "ca"}
_SHARED, _GLOBAL = 4, 8  # bytes of an address


class Memory(Writer):
    """What a thread does with shared and with global memory."""

    # Loads and stores

    def ld_shared(self, to: Register | Sequence[Register], place: Place) -> None:
        """`ld.shared`: a register, or two or four neighbouring ones at once."""
        self._load("ld.shared", to, self.address(place, _SHARED))

    def ld_shared_u16(self, to: Register, place: Place) -> None:
        """`ld.shared.u16`: 16 bits into a register of 32, zeros above."""
        self.emit("ld.shared.u16", self.read(to, "u32"), self.address(place, _SHARED))

    def st_shared(self, place: Place, values: Value | Sequence[Value]) -> None:
        """`st.shared`: a register, or two or four neighbouring ones at once."""
        self._store("st.shared", self.address(place, _SHARED), values)

    def ld_relaxed(self, to: Register | Sequence[Register], place: Place) -> None:
        """`ld.relaxed.gpu.global`: what other programs store meanwhile, each word whole."""
        self._load("ld.relaxed.gpu.global", to, self.address(place, _GLOBAL))

    def st_relaxed(self, place: Place, value: Value) -> None:
        """`st.relaxed.gpu.global`: to be read by other programs at any time, whole."""
        self._store("st.relaxed.gpu.global", self.address(place, _GLOBAL), value)

    def ld_global(self, to: Register | Sequence[Register], place: Place) -> None:
        """`ld.global`: what the program, or nobody, writes meanwhile."""
        self._load("ld.global", to, self.address(place, _GLOBAL))

    def ld_global_s8(self, to: Register, place: Place) -> None:
        """`ld.global.s8`: a byte into a register of 16 bits, with its sign."""
        self.emit("ld.global.s8", self.read(to, "u16"), self.address(place, _GLOBAL))

    def st_global(self, place: Place, values: Value | Sequence[Value]) -> None:
        """`st.global`: to be read by this program, or when the kernel has ended."""
        self._store("st.global", self.address(place, _GLOBAL), values)

    def st_global_b8(self, place: Place, value: Register) -> None:
        """`st.global.b8`: the lower byte of a register of 16 bits."""
        self.emit("st.global.b8", self.address(place, _GLOBAL), self.read(value, "u16"))

    def ld_global_nc(self, to: Register | Sequence[Register], place: Place) -> None:
        """`ld.global.nc`: what nobody writes while the kernel runs."""
        self._load("ld.global.nc", to, self.address(place, _GLOBAL))

    def atom_max(self, to: Register, place: Place, value: Value) -> None:
        """`atom.relaxed.gpu.global.max`: the larger one stays; what was there before is got."""
        at, given = self.address(place, _GLOBAL), self.read(value, to.kind)
        self.emit(f"atom.relaxed.gpu.global.max.{to.kind}", to.name, at, given)

    def _load(self, name: str, to: Register | Sequence[Register], at: str) -> None:
        vector, kind, registers = self._vector([to] if isinstance(to, Register) else to)
        self.emit(f"{name}{vector}.{kind}", registers, at)

    def _store(self, name: str, at: str, values: Value | Sequence[Value]) -> None:
        vector, kind, registers = self._vector(values if isinstance(values, Sequence) else [values])
        self.emit(f"{name}{vector}.{kind}", at, registers)

    def _vector(self, values: Sequence[Value]) -> tuple[str, str, str]:
        """Of what a vector instruction is given: ".v4", a type, and "{a, b, c, d}"."""
        registers = [x for x in values if isinstance(x, Register)]
        kind = "b32"
        if registers:
            kind = "f32" if registers[0].kind == "f32" else registers[0].bits
        names = [self.read(x, kind) for x in values]
        if len(names) == 1:
            return "", kind, names[0]
        if len(names) not in (2, 4) or len(names) * int(kind[1:]) > 128:
            raise AsmError(
                f"{len(names)} numbers of type {kind} are no vector of 16 bytes at most."
            )
        return f".v{len(names)}", kind, f"{{{', '.join(names)}}}"

    # Copies of few bytes, by the thread itself

    def createpolicy_evict_first(self, policy: Register) -> None:
        """`createpolicy`: of lines that are the first to leave the L2 cache."""
        name = self.read(policy, "b64")
        self.emit("createpolicy.fractional.L2::evict_first.b64", name, "1.0")

    def cp_async(self, to: Place, source: Place, size: int, policy: Register) -> None:
        """`cp.async`: 16, 8 or 4 bytes come to shared memory while the thread goes on."""
        self.emit(
            f"cp.async.{_CACHES[size]}.shared.global.L2::cache_hint",
            self.address(to, _SHARED),
            self.address(source, _GLOBAL),
            str(size),
            self.read(policy, "b64"),
        )

    def cp_async_arrive(self, barrier: Place) -> None:
        """`cp.async.mbarrier.arrive.noinc`: arrives when all the thread has asked for has come."""
        at = self.address(barrier, _SHARED)
        self.emit("cp.async.mbarrier.arrive.noinc.shared::cta.b64", at)

    def prefetch_l2(self, place: Place) -> None:
        """`prefetch.global.L2`: asks for a line of 128 bytes into the L2 cache."""
        self.emit("prefetch.global.L2", self.address(place, _GLOBAL))

    # Bulk copies, by hardware of their own

    def cp_bulk(
        self, to: Place, source: Place, size: Value, barrier: Place, policy: Register | None = None
    ) -> None:
        """`cp.async.bulk`: many bytes come to shared memory, and complete a barrier's phase.

        Args:
            to: in shared memory, a multiple of 16.
            source: in global memory, likewise.
            size: bytes, likewise.
            barrier: the mbarrier that counts them.
            policy: of the L2 cache; None: its own.
        """
        hint = ".L2::cache_hint" if policy else ""
        self.emit(
            f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{hint}",
            self.address(to, _SHARED),
            self.address(source, _GLOBAL),
            self.read(size, "u32"),
            self.address(barrier, _SHARED),
            *([self.read(policy, "b64")] if policy else []),
        )

    def cp_bulk_box(
        self, to: Place, box: Register, corner: Sequence[Value], barrier: Place, policy: Register
    ) -> None:
        """`cp.async.bulk.tensor.3d`: a box of a tensor map's matrix comes to shared memory.

        Args:
            to: in shared memory.
            box: register with the map's address.
            corner: where the box begins: element, piece and row.
            barrier: the mbarrier that counts the bytes.
            policy: of the L2 cache.
        """
        where = ", ".join(self.read(x, "s32") for x in corner)
        self.emit(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".L2::cache_hint",
            self.address(to, _SHARED),
            f"[{self.read(box, 'b64')}, {{{where}}}]",
            self.address(barrier, _SHARED),
            self.read(policy, "b64"),
        )

    def prefetch_bulk(self, source: Place, size: Value) -> None:
        """`cp.async.bulk.prefetch.L2`: asks for many bytes into the L2 cache."""
        at = self.address(source, _GLOBAL)
        self.emit("cp.async.bulk.prefetch.L2.global", at, self.read(size, "u32"))

    # Barriers that wait for copies

    def mbarrier_init(self, barrier: Place, arrivals: Value) -> None:
        """`mbarrier.init`: makes one; a phase ends after so many arrivals, and all bytes."""
        at = self.address(barrier, _SHARED)
        self.emit("mbarrier.init.shared::cta.b64", at, self.read(arrivals, "u32"))

    def mbarrier_expect(self, barrier: Place, size: Value) -> None:
        """`mbarrier.arrive.expect_tx`: arrives, and has the phase wait for so many bytes."""
        at = self.address(barrier, _SHARED)
        self.emit("mbarrier.arrive.expect_tx.shared::cta.b64", "_", at, self.read(size, "u32"))

    def mbarrier_test(self, to: Register, barrier: Place, parity: Value) -> None:
        """`mbarrier.test_wait.parity`: whether the phase of that parity has ended, at once."""
        self._wait("test_wait", to, barrier, parity)

    def mbarrier_try(self, to: Register, barrier: Place, parity: Value) -> None:
        """`mbarrier.try_wait.parity`: the same, after some microseconds if it has not."""
        self._wait("try_wait", to, barrier, parity)

    def _wait(self, how: str, to: Register, barrier: Place, parity: Value) -> None:
        at, phase = self.address(barrier, _SHARED), self.read(parity, "u32")
        self.emit(f"mbarrier.{how}.parity.shared::cta.b64", self.read(to, "pred"), at, phase)

    # Fences

    def fence_mbarrier_init(self) -> None:
        """`fence.mbarrier_init`: what brings bulk copies sees the barriers that were made."""
        self.emit("fence.mbarrier_init.release.cluster")

    def fence_proxy_async(self) -> None:
        """`fence.proxy.async`: bulk copies come after the thread's own loads and stores."""
        self.emit("fence.proxy.async.shared::cta")

    # Tensor maps

    def tensormap_replace(self, field: str, kind: str, place: Place, *values: Value) -> None:
        """`tensormap.replace.tile`: sets a field of a tensor map in shared memory.

        Args:
            field: its name.
            kind: "b32" or "b64".
            place: register with the map's address, in 64 bits.
            values: the number, after the dimension's if the field has one for each.
        """
        *dimension, value = values
        numbers = [*(self.read(x, "u32") for x in dimension), self.read(value, kind)]
        at = self.address(place, 8)
        self.emit(f"tensormap.replace.tile.{field}.shared::cta.b1024.{kind}", at, *numbers)

    def tensormap_publish(self, to: Place, source: Place, size: int) -> None:
        """`tensormap.cp_fenceproxy`: copies a map to global memory; whole warps."""
        at, here = self.address(to, _GLOBAL), self.address(source, _SHARED)
        self.emit(
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned",
            at,
            here,
            str(size),
        )

    def fence_tensormap(self, place: Place, size: int) -> None:
        """`fence.proxy.tensormap::generic.acquire`: copies see the map that was published."""
        at = self.address(place, _GLOBAL)
        self.emit("fence.proxy.tensormap::generic.acquire.gpu", at, str(size))
