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
import zlib

import pytest
from as_if import take_device_for
from cpu_seconds import CpuSeconds
from drawn_cases import covering, numbered

# Each takes some gigabytes.
_MOST_PROCESSES = 2
# XLA for CPUs makes an MLIR context for each fusion, which takes most of the time that our
# programs take to compile. Its older emitters make LLVM's code of the same HLO without. An
# option that a version of XLA does not know, or a GPU's, is passed over.
_OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# Nearly all programs of tests run once or twice, so LLVM's optimisations take longer than they
# save. What is compared, to the bit too, is compared among programs of the same level. Processes
# that tests start have XLA's own, as users do: commands, examples, and what compiles for a GPU,
# whose code would be another. `XLA_FLAGS=--xla_backend_optimization_level=3 pytest` has it here.
_QUICK_LLVM = "--xla_backend_optimization_level=0"
# By itself XLA cuts a program into up to 32 modules of LLVM's, to compile them side by side. Where
# every process has a core, that is more work and no less time.
_ONE_MODULE = "--xla_cpu_parallel_codegen_split_count=1"
_FLAGS_OF_CHILDREN = pytest.StashKey[str]()
_WRONG_MARKS = pytest.StashKey[dict[pathlib.Path, str]]()
# Objects more than there were at which Python looks for cycles. Tracing makes and keeps many: at
# Python's 700, a tenth of its time goes to looking; at 20,000, one part in thirty.
_BETWEEN_COLLECTIONS = 100_000
# The files that take longest, the longest ones first. Processes that share the files take them in
# this order: a long one at the end would have the others wait.
_LONGEST = [
    "test_stream_tokens.py",
    "test_pages.py",
    "test_draft.py",
    "test_speculation.py",
    "test_session.py",
    "test_stream.py",
    "test_stream_stages.py",
    "test_ptx_cache.py",
    "test_transforms.py",
    "test_stream_families.py",
    "test_handovers.py",
    "test_serve_chat.py",
    "test_prefill.py",
    "test_doctor.py",
    "test_quantized_step.py",
    "test_bench.py",
    "test_ptx.py",
    "test_hf_goldens.py",
    "test_sampling_stages.py",
    "test_draw_kernel.py",
    "test_generate.py",
    "test_model.py",
    "test_live_draft.py",
    "test_calibration.py",
    "test_live.py",
    "test_x64.py",
    "test_lowering.py",
    "test_stream_plan.py",
]
# The oldest NVIDIA GPUs the fused kernel supports.
_OLDEST = (8, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-if", metavar="GPU", help="take the device for another one: see as_if.py")
    parser.addoption(
        "--whole", action="store_true", help="run every case of the tests marked drawn"
    )


def pytest_configure(config: pytest.Config) -> None:
    take_device_for(config.getoption("--as-if"))
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
    os.environ["XLA_FLAGS"] = config.stash[_FLAGS_OF_CHILDREN] = _with_flag(_OLDER_EMITTERS)
    if os.environ.get("FFJAX_TESTS_CPU"):
        config.pluginmanager.register(CpuSeconds())
    if _runs_tests(config) and not _has_driver():
        os.environ["XLA_FLAGS"] = _with_flag(_QUICK_LLVM)
        os.environ["XLA_FLAGS"] = _with_flag(_ONE_MODULE)


def _with_flag(flag: str) -> str:
    """XLA's flags with one more, unless the shell has a value of it."""
    flags = os.environ.get("XLA_FLAGS", "")
    return flags if flag.split("=")[0] in flags else f"{flags} {flag}".strip()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if not _runs_tests(session.config) or session.config.option.collectonly:
        return
    if os.environ["XLA_FLAGS"] != session.config.stash[_FLAGS_OF_CHILDREN]:
        import jax  # here, so that collecting tests starts no backend

        jax.jit(lambda: 0)()  # XLA reads its flags once, when it is first used
        os.environ["XLA_FLAGS"] = session.config.stash[_FLAGS_OF_CHILDREN]
    # JAX imports it when it first interprets a kernel. It adds a setting that programs depend on,
    # so all that was compiled before would be compiled again.
    import jax.experimental.pallas.fuser

    # What was imported stays; nothing is found by looking through it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_BETWEEN_COLLECTIONS)


def _runs_tests(config: pytest.Config) -> bool:
    """Whether this process runs tests, rather than having others run them."""
    return hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)


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
        config.option.loadscopereorder = False  # the order is ours: `_LONGEST`


def _workers(config: pytest.Config) -> int:
    """Processes that share the files of tests; 0: none but this.

    Two on one GPU would fight for its memory.
    """
    if asked := os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return int(asked)
    markers = config.option.markexpr
    if ("gpu" in markers or _has_driver()) and "not gpu" not in markers:
        return 0
    return min(_MOST_PROCESSES, os.cpu_count() or 1)


def _has_driver() -> bool:
    return pathlib.Path("/proc/driver/nvidia").exists()


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
    if sentence := item.config.stash[_WRONG_MARKS].get(item.path):
        pytest.fail(sentence, pytrace=False)
    if _is_elsewhere(item):
        pytest.skip("FFJAX_TESTS_ONCE=elsewhere: marked once, so another Python has run it")
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()) is not None:
        pytest.skip(reason)


def _is_elsewhere(item: pytest.Item) -> bool:
    """Whether a test is marked `once`, is not of its sample, and another Python runs it."""
    if item.get_closest_marker("once") is None:
        return False
    return os.environ.get("FFJAX_TESTS_ONCE") == "elsewhere" and not _is_sampled(item)


def _is_sampled(item: pytest.Item) -> bool:
    """Whether a test is of a sample that every Python runs, though it is marked `once`."""
    marker = item.get_closest_marker("once")
    return marker is not None and bool(_names_of(item) & set(marker.kwargs.get("sample", ())))


def _names_of(item: pytest.Item) -> set[str]:
    """What a sample may call a test: `test_it`, for all of its cases, or `test_it[case]`."""
    return {item.name, getattr(item, "originalname", item.name)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_WRONG_MARKS] = _wrong_marks(config, items)
    if not config.getoption("--whole") and not any("::" in arg for arg in config.args):
        _leave_the_drawn(config, items)
    if hasattr(config, "workerinput"):
        items.sort(key=_place)  # files, and nothing within them


def _leave_the_drawn(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out the cases of tests marked `drawn` that are not drawn."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("drawn"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    drawn = {one.nodeid for some in cases.values() for one in _drawn(some)}
    others = {one.nodeid for some in cases.values() for one in some} - drawn
    if others:
        config.hook.pytest_deselected(items=[one for one in items if one.nodeid in others])
        items[:] = [one for one in items if one.nodeid not in others]


def _drawn(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of one test that run without `--whole`, those of samples among them."""
    marker = cases[0].get_closest_marker("drawn")
    assert marker is not None
    sample, once = set(marker.kwargs.get("sample", ())), cases[0].iter_markers("once")
    kept = {at for at, item in enumerate(cases) if item.name in sample}
    if not kept:
        values = numbered([getattr(item, "callspec").params for item in cases])  # noqa: B009
        start = zlib.crc32(cases[0].nodeid.encode())  # the same in every process
        kept = covering(values, 2 if marker.kwargs.get("pairs") else 1, start)
    others = {name for mark in once for name in mark.kwargs.get("sample", ())}
    kept |= {at for at, item in enumerate(cases) if item.name in others}
    return [cases[at] for at in sorted(kept)]


def _place(item: pytest.Item) -> int:
    name = item.path.name
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)


def _wrong_marks(config: pytest.Config, items: list[pytest.Item]) -> dict[pathlib.Path, str]:
    """What is wrong with marks of files: a sample that names no test would go unnoticed."""
    there: dict[pathlib.Path, set[str]] = {}
    sampled: dict[pathlib.Path, set[str]] = {}
    wrong: dict[pathlib.Path, str] = {}
    for item in items:
        there.setdefault(item.path, set()).update(_names_of(item))
        for marker in item.iter_markers("once"):
            sampled.setdefault(item.path, set()).update(marker.kwargs.get("sample", ()))
            if list(map(type, marker.args)) != [str] or marker.kwargs.keys() - {"sample"}:
                wrong[item.path] = (
                    "once takes the reason why one Python is enough, and a sample of names: "
                    f"pytest.mark.once('why', sample=['test_it']). Here it has {marker}."
                )
        for marker in item.iter_markers("by_numpy"):
            sampled.setdefault(item.path, set()).update(marker.kwargs.get("but", ()))
            if marker.args or marker.kwargs.keys() - {"but"}:
                wrong[item.path] = (
                    "by_numpy takes the names of tests that Pallas's interpreter runs: "
                    f"pytest.mark.by_numpy(but=['test_it']). Here it has {marker}."
                )
        for marker in item.iter_markers("drawn"):
            sampled.setdefault(item.path, set()).update(marker.kwargs.get("sample", ()))
            if list(map(type, marker.args)) != [str] or marker.kwargs.keys() - {"sample", "pairs"}:
                wrong[item.path] = (
                    "drawn takes the reason why few cases are enough, and pairs=True or a sample: "
                    f"pytest.mark.drawn('why', sample=['test_it[case]']). Here it has {marker}."
                )
    if any("::" in arg for arg in config.args):
        return wrong  # not all tests of a file are here
    for path, names in sampled.items():
        if lacking := sorted(names - there[path]):
            wrong[path] = f"A sample names {lacking}, and {path.name} has no such test."
    return wrong


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


_traced_by_numpy = False


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest):
    """Has numpy run the interpreted kernels of tests marked `by_numpy`, but for those it names.

    These show what a JAX makes of the kernel, with other Pythons as well.
    """
    global _traced_by_numpy
    by_numpy = _is_by_numpy(request.node)
    if by_numpy != _traced_by_numpy:  # what was compiled before is the other one's
        _traced_by_numpy = by_numpy
        _forget_programs()
    if not by_numpy:
        yield
        return
    import numpy_kernel

    with numpy_kernel.by_numpy():
        yield


def _is_by_numpy(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("by_numpy")
    if marker is None:
        return False
    return not _names_of(item) & set(marker.kwargs.get("but", ()))


@pytest.fixture(scope="module", autouse=True)
def _frees_its_programs():
    """Compiled programs of a module are of no use to the next, and there are thousands.

    Each holds mappings of memory, of which Linux lets a process have 65,530: XLA aborts beyond.
    """
    yield
    _forget_programs()
    gc.collect()


def _forget_programs() -> None:
    import jax

    if (kept := sys.modules.get("ffjax.programs")) is not None:
        kept.forget_programs()  # which JAX's caches do not hold
    jax.clear_caches()
