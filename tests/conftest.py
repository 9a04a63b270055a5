"""What every test runs under, and the skipping of those that need a GPU."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile

import pytest

# Each takes some gigabytes.
_MOST_PROCESSES = 2
# XLA for CPUs makes an MLIR context for each fusion, which takes half and more of the time that
# our programs take to compile, and these run once or twice. Its older emitters make the same
# fusions without. It is LLVM IR of the same HLO: no optimisation is left out, and no tolerance
# is wider for it. Processes that tests start have it from the environment; `.ci/run` tries the
# examples without. Versions of XLA that do not know it, and GPUs, pass over an extra option.
_COMPILE_SOONER = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# Objects more than there were at which Python looks for cycles. Tracing makes and keeps many: at
# Python's 700, a tenth of its time goes to looking.
_BETWEEN_COLLECTIONS = 20_000
# The oldest NVIDIA GPUs the fused kernel supports.
_OLDEST = (8, 0)


def pytest_configure(config: pytest.Config) -> None:
    # Tests run as users do: in float32, whatever the shell says. With x64 on, a constant that
    # should have a dtype of its own would go unnoticed.
    os.environ["JAX_ENABLE_X64"] = "0"
    # A shell that starts a command in the background has it ignore Ctrl-C; some tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The command line keeps compiled programs in the user's folder, which is none of ours. A run
    # of the tests has one of its own, new and empty, which its processes share.
    if not hasattr(config, "workerinput"):
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ffjax-tests-")
    # Some tests start a process that needs the same GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # XLA takes the last of several values, and whoever gives some is to have theirs.
    if "xla_backend_extra_options" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {_COMPILE_SOONER}".strip()


def pytest_collection_finish() -> None:
    # What was imported stays; nothing is found by looking through it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_BETWEEN_COLLECTIONS)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Has processes share the files of tests, where pytest-xdist is there and nobody says how many.

    Not by `addopts`: without pytest-xdist, pytest would not know the option.
    """
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if config.option.numprocesses is None and (workers := _workers(config)):
        config.option.numprocesses, config.option.dist = workers, "loadfile"


def _workers(config: pytest.Config) -> int:
    """Processes that share the files of tests; 0: none but this.

    Two on one GPU would fight for its memory.
    """
    if asked := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return int(asked)
    markers = config.option.markexpr
    has_driver = pathlib.Path("/proc/driver/nvidia").exists()
    if ("gpu" in markers or has_driver) and "not gpu" not in markers:
        return 0
    return min(_MOST_PROCESSES, os.cpu_count() or 1)


@functools.cache
def _why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here; None if they can."""
    import jax  # here, so that collecting tests starts no backend

    device = jax.devices()[0]
    found = f"JAX's default device is {device.device_kind} ({device.platform})"
    rule = f"needs an NVIDIA GPU of compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer"
    # GPUs of other makers have names there, or nothing.
    capability = str(getattr(device, "compute_capability", ""))
    number = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if device.platform != "gpu" or number is None:
        return f"{rule}; {found}"
    if (int(number[1]), int(number[2])) < _OLDEST:
        return f"{rule}; {found} of capability {capability}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()) is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _leaves_jax_as_it_was():
    """A test that changes JAX's global numerics would change those that follow."""
    import jax

    def precision():
        return jax.config.values["jax_default_matmul_precision"]

    before = precision()
    yield
    assert not jax.config.values["jax_enable_x64"], "A test left 64-bit types enabled."
    assert precision() == before, f"A test left the matmul precision at {precision()}."


@pytest.fixture(scope="module", autouse=True)
def _frees_its_programs():
    """Compiled programs of a module are of no use to the next, and there are thousands.

    Each holds mappings of memory, of which Linux lets a process have 65,530: XLA aborts beyond.
    """
    import jax

    yield
    if (kept := sys.modules.get("ffjax.programs")) is not None:
        kept.forget_programs()  # which JAX's caches do not hold
    jax.clear_caches()
    gc.collect()
