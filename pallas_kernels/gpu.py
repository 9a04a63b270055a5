"""What the plan needs to know of a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["CAPABILITIES", "INTERPRETER", "Gpu"]

# Shared memory one thread block may use, bytes, by compute capability: CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability".
_SHARED_MEMORY = {
    "8.0": 163 * 1024,
    "8.6": 99 * 1024,
    "8.7": 163 * 1024,
    "8.9": 99 * 1024,
    "9.0": 227 * 1024,
    "10.0": 227 * 1024,
    "10.3": 227 * 1024,
    "12.0": 99 * 1024,
}
CAPABILITIES = tuple(_SHARED_MEMORY)
"""Compute capabilities that the kernel knows."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, as far as the plan cares.

    Attributes:
        name: what the device calls itself.
        capability: compute capability, as "9.0".
        cores: streaming multiprocessors.
        shared_memory: bytes one program may use.
    """

    name: str
    capability: str
    cores: int
    shared_memory: int

    @property
    def bulk_copies(self) -> bool:
        """Whether one thread asks for a whole tile (`cp.async.bulk`, capability 9.0 and newer).

        Not where shared memory is small: there the scales of fewer rows have to be copied by
        themselves than bulk copies can, and memory brings a multiprocessor so little that asking
        for it takes no time.
        """
        return float(self.capability) >= 9 and self.shared_memory >= 128 * 1024

    @property
    def copied_bytes(self) -> int:
        """What copies to shared memory are of, and begin at: multiples of so many bytes."""
        return 16 if self.bulk_copies else 8

    @classmethod
    def of(cls, device: Any) -> Gpu | None:
        """Describes a JAX device, or None when it is no NVIDIA GPU the kernel knows."""
        capability = str(getattr(device, "compute_capability", ""))
        if device.platform != "gpu" or capability not in _SHARED_MEMORY:
            return None
        return cls.named(device.device_kind, capability, device.core_count)

    @classmethod
    def named(cls, name: str, capability: str, cores: int) -> Gpu:
        """A GPU by its figures, for compiling without one."""
        return cls(name, capability, cores, _SHARED_MEMORY[capability])


# One program, run on a CPU.
INTERPRETER = Gpu("Pallas interpreter", "9.0", 1, _SHARED_MEMORY["9.0"])
