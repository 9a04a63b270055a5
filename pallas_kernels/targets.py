"""GPUs the decode step can be compiled for on a machine that has none.

A target is a text file in `gpus/`: XLA's own description of a device
(`GpuTargetConfigProto`). What the plan needs is read off the same file, so that the
step is planned and compiled for one and the same GPU.
"""

from __future__ import annotations

import dataclasses
import re
from importlib import resources

from pallas_kernels.gpu import Gpu

__all__ = ["Target", "target", "target_names"]

_FILES = resources.files("pallas_kernels") / "gpus"
_SUFFIX = ".pbtxt"
# JAX 0.11 lowers for a GPU that is not there by its name, and knows few of them: one of the same
# compute capability stands in for those it does not know. With a GPU it asks the device.
_STANDS_IN = {"8.6": "NVIDIA A10", "12.0": "NVIDIA RTX PRO 6000"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: its file's name, as "h200".
        gpu: what the plan needs to know of it.
        config: the whole description, as XLA takes it; the device's name in it is one that JAX
            knows.
    """

    name: str
    gpu: Gpu
    config: str


def target_names() -> list[str]:
    """The names of all targets."""
    files = (file.name for file in _FILES.iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX))


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in target_names():
        raise ValueError(f"No target is called {name!r}; there are {', '.join(target_names())}.")
    config = (_FILES / f"{name}{_SUFFIX}").read_text(encoding="utf-8")

    def field(key: str) -> str:
        found = re.search(rf'\b{key}:\s*(?:"([^"]*)"|(\S+))', config)
        if found is None:
            raise ValueError(f"The description of {name!r} lacks the field {key}.")
        return found[1] or found[2]

    capability = f"{field('major')}.{field('minor')}"
    gpu = Gpu.named(field("device_description_str"), capability, int(field("core_count")))
    known = _STANDS_IN.get(capability, gpu.name)
    return Target(name, gpu, config.replace(f'"{gpu.name}"', f'"{known}"'))
