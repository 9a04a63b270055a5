"""NVIDIA's compute-sanitizer: where it is, what it is told, and how it is run."""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

__all__ = ["TOOLS", "Ran", "Sanitizer", "environment", "find", "plain_command", "run"]

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

_NAME = "compute-sanitizer"
_FOLDERS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/cuda*/bin")
# The tools find their program by ports; those of runs side by side must not meet.
_FIRST_PORT, _PORTS = 49_152, 16

# What each tool is told, where this version of it knows the option.
_OPTIONS: dict[str, dict[str, str]] = {
    "": {
        "--target-processes": "application-only",
        "--print-limit": "200",
        "--show-backtrace": "no",
        "--launch-timeout": "300",
        "--check-bulk-copy": "yes",
        "--check-tensor-ops": "yes",
    },
    # Buffers lie apart, so that what is read after one is nobody's. JAX asks the driver for
    # things that it may not have: such calls fail, and are no errors.
    "memcheck": {"--padding": "1024", "--report-api-errors": "no"},
    # The compiler does not know of the barriers in the kernel's own shared memory.
    "racecheck": {"--racecheck-report": "analysis", "--num-cuda-barriers": "64"},
    "initcheck": {},
    "synccheck": {"--num-cuda-barriers": "64"},
}

_ROOT = pathlib.Path(__file__).parents[2]


def find(given: str | None = None) -> str:
    """The path of compute-sanitizer.

    Args:
        given: where to look alone.

    Raises:
        FileNotFoundError: it is not there.
    """
    if given is not None:
        if (found := shutil.which(given)) is None:
            raise FileNotFoundError(
                f"--sanitizer is the path of {_NAME}; {given!r} is no program that can be run."
            )
        return found
    folders = [folder for pattern in _FOLDERS for folder in sorted(glob.glob(pattern))]
    # The wheel nvidia-cuda-sanitizer-api brings it, too.
    nvidia = importlib.util.find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or ()) if nvidia else []
    folders += [folder for root in roots for folder in glob.glob(f"{root}/cu*/{_NAME}")]
    found = shutil.which(_NAME) or shutil.which(_NAME, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(
            f"{_NAME} is neither on the PATH nor in CUDA's usual folders "
            f"({', '.join(_FOLDERS)}). Install the CUDA toolkit, or say where it is: "
            "--sanitizer PATH."
        )
    return found


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run that has ended.

    Attributes:
        code: its exit code; None where it took too long and was ended.
        output: what it said.
    """

    code: int | None
    output: str


@dataclasses.dataclass(frozen=True)
class Sanitizer:
    """The program, and which options it has.

    Attributes:
        path: of the program.
        known: the options that its help names.
        version: of it.
    """

    path: str
    known: frozenset[str]
    version: str

    @classmethod
    def at(cls, path: str) -> Sanitizer:
        """Asks the program for its options and its version.

        Raises:
            OSError: it cannot be started.
        """
        told = subprocess.run([path, "--help"], capture_output=True, text=True, check=False)
        text = told.stdout + told.stderr
        version = re.search(r"Version (\S+)", text)
        return cls(
            path,
            frozenset(re.findall(r"--[a-z][a-z0-9-]*", text)),
            version[1] if version else "of no known version",
        )

    def command(self, tool: str, number: int, *arguments: str) -> list[str]:
        """The command that has a tool watch `python -m sanitize.steps ARGUMENTS`.

        Args:
            tool: its name.
            number: of the run: no two that run side by side have the same.
            arguments: of the steps.
        """
        wanted = {**_OPTIONS[""], **_OPTIONS[tool], "--port": str(_FIRST_PORT + _PORTS * number)}
        options = [
            word for name, value in wanted.items() if name in self.known for word in (name, value)
        ]
        return [self.path, "--tool", tool, *options, *plain_command(*arguments)]


def plain_command(*arguments: str) -> list[str]:
    """The command that takes the steps with nobody watching."""
    return [sys.executable, "-m", "sanitize.steps", *arguments]


def environment(cache: str) -> dict[str, str]:
    """What the steps' process has in its environment.

    Args:
        cache: folder of programs that are compiled already: each tool runs the same ones.
    """
    paths = [str(_ROOT / "tests"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    # No graphs of launches; nothing is tried out on the GPU.
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_autotune_level=0",
    ]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_FLAGS": " ".join(filter(None, flags)),
        # A buffer is an allocation of its own, or nobody could tell where it ends.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run(command: list[str], environment: dict[str, str], seconds: float) -> Ran:
    """Runs a command in a group of its own, which is ended where it takes too long."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return Ran(None, output)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ran(process.returncode, output)
