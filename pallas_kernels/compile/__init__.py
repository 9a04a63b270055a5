"""Compiles the decode step for a GPU on a machine that need not have one.

A step is given by its sizes alone. `python -m pallas_kernels.compile` takes a model's name, too: it
is `ffjax.commands.compile`.

XLA's CUDA plugin compiles for a GPU that it only knows from a description (`gpus/`), down
to PTX, without a driver; `ptxas` then says what a kernel costs: registers, spills, shared
memory. Both come with the extra `ffjax[compile]`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from pallas_kernels import compile_worker
from pallas_kernels.backends import Backend, default_backend
from pallas_kernels.dims import Dims
from pallas_kernels.launch import KERNEL_NAME
from pallas_kernels.stream import planner
from pallas_kernels.support import why_not
from pallas_kernels.targets import target

__all__ = [
    "CompileError",
    "CompileReport",
    "compile_for",
    "why_no_compiler",
]

_EXTRA = "Install the extra that brings it: pip install 'ffjax[compile]'."
_PLUGINS = {
    "jax_plugins.xla_cuda13": "jax-cuda13-plugin",
    "jax_plugins.xla_cuda12": "jax-cuda12-plugin",
}
# Thunks that only hold others; whatever else is in the list runs on the GPU.
_CONTAINERS = {"kSequential", "kConditional", "kWhile", "kCommandBuffer"}
# Below a folder of XLA's dumps, that of Mosaic GPU's own.
_MOSAIC = "mosaic_gpu"


class CompileError(RuntimeError):
    """A step that did not compile, or a compiler that is not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What a decode step became.

    Attributes:
        gpu: name of the target.
        backend: that of Pallas which compiled the kernel.
        kernels: launches of the step: everything XLA runs on the GPU for it, also
            copies and fills.
        thunks: XLA's kind of each of them.
        registers: registers a thread of the decode kernel uses.
        spill_bytes: bytes a thread of it spills, stores and loads.
        stack_bytes: bytes of its stack frame.
        shared_memory_bytes: bytes of shared memory one program of it uses.
        temp_bytes: device memory the step takes besides its arguments and results.
        programs: P, the grid.
        num_warps: warps of a program.
        num_stages: the plan's stages.
        arch: what the PTX was made for, as "sm_90a".
        versions: of jax, its plugin and ptxas.
    """

    gpu: str
    backend: Backend
    kernels: int
    thunks: list[str]
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_memory_bytes: int
    temp_bytes: int
    programs: int
    num_warps: int
    num_stages: int
    arch: str
    versions: dict[str, str]


def _plugin() -> str | None:
    """The installed CUDA plugin's distribution, or None."""
    if importlib.util.find_spec("jax_plugins") is None:
        return None
    return next((dist for name, dist in _PLUGINS.items() if importlib.util.find_spec(name)), None)


def _ptxas() -> str | None:
    """The path of ptxas: from the nvidia-cuda-nvcc wheel, else on the PATH, else None."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or ()) if nvidia else []
    bins = [str(path) for root in roots for path in sorted(pathlib.Path(root).glob("cu*/bin"))]
    return shutil.which("ptxas", path=os.pathsep.join(bins)) or shutil.which("ptxas")


def why_no_compiler() -> str | None:
    """Why this machine cannot compile for a GPU, as a sentence; None when it can."""
    if _plugin() is None:
        return f"Compiling for a GPU needs XLA's CUDA plugin, which is not installed. {_EXTRA}"
    if _ptxas() is None:
        return f"Compiling for a GPU needs ptxas, which is not installed. {_EXTRA}"
    return None


def compile_for(
    gpu: str,
    dims: Dims,
    *,
    num_warps: int | None = None,
    num_stages: int | None = None,
    tuned: bool = False,
    backend: Backend | None = None,
    hidden_layers: Sequence[int] = (),
    keep: pathlib.Path | None = None,
) -> CompileReport:
    """Compiles the decode step of these sizes and reports what it became.

    Args:
        gpu: name of a target, from `targets.target_names()`.
        dims: the sizes.
        num_warps: overrides the plan's.
        num_stages: overrides the plan's.
        tuned: with the tuning of the table, as on the device itself; else with the defaults.
        backend: that of Pallas which compiles the kernel; None: see `backends.default_backend`.
        hidden_layers: whose hidden states the step returns, as of `stream_step`.
        keep: a folder, made where there is none: the kernel's `step.ptx` and `step.cubin` are left
            there. The CUDA toolkit's `nvdisasm -c` shows the second as SASS.

    Raises:
        ValueError: no target has that name, the fused kernel cannot run these sizes, or the
            backend cannot compile it for this target.
        CompileError: the compiler is not installed, or it failed.
        OSError: nothing can be kept in that folder.
    """
    wanted = target(gpu)
    backend = backend or default_backend()
    tuning = planner.tuned(dims, wanted.gpu) if tuned else None
    tuning = tuning or planner.fitting(dims, wanted.gpu)
    reason = why_not(dims, "bfloat16", wanted.gpu, tuning=tuning, backend=backend)
    there = all(0 <= layer <= dims.num_layers for layer in hidden_layers)
    if reason is None and not (there and len(set(hidden_layers)) == len(hidden_layers)):
        reason = (
            f"Hidden states are those after layers 1 to {dims.num_layers}, or 0, the embedding, "
            f"each named once; got {', '.join(map(str, hidden_layers))}."
        )
    if reason is not None:
        raise ValueError(reason)
    if (reason := why_no_compiler()) is not None:
        raise CompileError(reason)
    options = {"num_warps": num_warps, "num_stages": num_stages, "backend": backend}
    request = {
        "gpu": gpu,
        "dims": dataclasses.asdict(dims),
        "tuned": tuned,
        "hidden_layers": list(hidden_layers),
        "options": {key: value for key, value in options.items() if value is not None},
    }
    with tempfile.TemporaryDirectory(prefix="ffjax_compile_") as name:
        folder = pathlib.Path(name)
        (folder / _MOSAIC).mkdir()
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run_worker(folder)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        thunks, shared_memory = _read_thunks(folder)
        ptx = _dump(folder, "*.ptx")
        if backend == "mosaic_gpu":
            shared_memory = _mosaic_shared_memory(folder)
            ptx = sorted((folder / _MOSAIC).glob("*.ptx"))
        if shared_memory is None:
            raise CompileError(f"The compiled step launches no kernel called {KERNEL_NAME}.")
        return CompileReport(
            gpu=gpu,
            backend=backend,
            kernels=len(thunks),
            thunks=thunks,
            shared_memory_bytes=shared_memory,
            versions=_versions(),
            **_read_ptx(_with_kernel(ptx), keep),
            **result,
        )


def _environment(folder: pathlib.Path) -> dict[str, str]:
    """What a worker's variables are, which leaves its dumps in that folder."""
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_dump_to={folder}",
        # The PTX alone: the dump of every pass of Triton's takes 400 MB and most of a minute.
        "--xla_dump_emitter_re=ptx",
    ]
    # The package is found where this file lies, also in a checkout that is not installed.
    package = str(pathlib.Path(__file__).parent.parent.parent)
    paths = [package, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "MOSAIC_GPU_DUMP_TO": str(folder / _MOSAIC),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        # A step found in the cache of compiled programs would leave no dump.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def _run_worker(folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", compile_worker.__name__, str(folder)]
    done = subprocess.run(
        command, env=_environment(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise CompileError(f"The decode step did not compile. The compiler's last words:\n{tail}")


def _dump(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    return sorted(folder.glob(f"module_*.{compile_worker.MODULE}.{pattern}"))


def _read_thunks(folder: pathlib.Path) -> tuple[list[str], int | None]:
    """The kinds of the step's launches, and the decode kernel's shared memory in bytes, if known.

    XLA knows nothing of a kernel of Mosaic GPU's, a call of what Mosaic GPU has compiled.
    """
    files = _dump(folder, "thunk_sequence.txt")
    if len(files) != 1:
        raise CompileError(
            f"XLA dumps one list of a step's launches, got {len(files)}. This version of JAX "
            "may name it otherwise; ffjax knows 0.10.2 to 0.11."
        )
    thunks, shared_memory = [], None
    for line in files[0].read_text(encoding="utf-8").splitlines():
        # As "001: kCustomKernel [...] name grid: [132, 1, 1] ... shared_memory: 512 bytes".
        if (found := re.match(r"\s*\d+: (k\w+)", line)) and found[1] not in _CONTAINERS:
            thunks.append(found[1])
        if KERNEL_NAME in line and (found := re.search(r"shared_memory: (\d+) bytes", line)):
            shared_memory = int(found[1])
    return thunks, shared_memory


def _mosaic_shared_memory(folder: pathlib.Path) -> int | None:
    """Bytes of shared memory that Mosaic GPU launches the decode kernel with; None: unknown."""
    for path in sorted((folder / _MOSAIC).glob(f"{KERNEL_NAME}*.mlir-passes.log")):
        found = re.search(
            r"dynamic_shared_memory_size %c(\d+)_i32", path.read_text(encoding="utf-8")
        )
        if found:
            return int(found[1])
    return None


def _with_kernel(dumped: list[pathlib.Path]) -> pathlib.Path:
    """The dumped PTX that holds the decode kernel."""
    for path in dumped:
        if f".entry {KERNEL_NAME}" in path.read_text(encoding="utf-8"):
            return path
    raise CompileError(f"The compiler left no PTX of a kernel called {KERNEL_NAME}.")


def _read_ptx(ptx: pathlib.Path, keep: pathlib.Path | None = None) -> dict[str, Any]:
    """What ptxas says of the decode kernel; see `compile_for` for what is kept."""
    cubin = os.devnull
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        ptx, cubin = shutil.copyfile(ptx, keep / "step.ptx"), str(keep / "step.cubin")
    found = re.search(r"^\.target (\w+)", ptx.read_text(encoding="utf-8"), re.MULTILINE)
    arch = found[1] if found else "unknown"
    command = [_ptxas() or "ptxas", "-v", f"-arch={arch}", "-o", cubin, str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise CompileError(f"ptxas refused the step's PTX:\n{tail}")

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, done.stderr)))

    return {
        "arch": arch,
        "registers": total(r"Used (\d+) registers"),
        "spill_bytes": total(r"(\d+) bytes spill (?:stores|loads)"),
        "stack_bytes": total(r"(\d+) bytes stack frame"),
    }


def _versions() -> dict[str, str]:
    plugin = _plugin() or "plugin"
    said = subprocess.run(
        [_ptxas() or "ptxas", "--version"], capture_output=True, text=True, check=False
    ).stdout
    release = re.search(r"V(\d[\d.]*)", said)
    return {
        "jax": importlib.metadata.version("jax"),
        plugin: importlib.metadata.version(plugin),
        "ptxas": release[1] if release else "unknown",
    }
