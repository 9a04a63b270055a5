"""What imports what: which packages may come first, and who knows of whom.

The rules are read from the syntax of every file, so that imports within functions count, and those
by importlib.
"""

import os
import subprocess
import sys

import pytest
from import_graph import (
    ROOT,
    Import,
    cycles,
    folders,
    graph,
    imports_of,
    module_of,
    modules,
    neighbours,
    reached,
)

import ffjax


@pytest.mark.parametrize("package", ["ffjax", "pallas_kernels", "checkpoints"])
def test_each_package_can_come_first(package):
    done = subprocess.run(
        [sys.executable, "-c", f"import {package}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_importing_ffjax_imports_no_jax():
    """Its settings are read from the environment then, which a program may still change."""
    done = subprocess.run(
        [sys.executable, "-c", "import ffjax, sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ffjax" in done.stdout.split()
    assert not {"jax", "flax", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "names",
    [
        "ffjax.cache",
        "pallas_kernels.stream.planner, pallas_kernels.stream.exchange_layout",
        "pallas_kernels.support, pallas_kernels.backends, pallas_kernels.targets",
        "pallas_kernels.spec.step, pallas_kernels.spec.made",
    ],
)
def test_no_pallas_is_needed_to(names):
    """Make a cache, plan a step, size its exchange, say why there is none, or what it computes."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {names}, sys; print(*sys.modules)"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert set(names.split(", ")) <= set(found)
    assert not [name for name in found if "pallas" in name and name.startswith("jax")]


@pytest.mark.parametrize("name", ffjax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ffjax, name) is not None
    assert name in dir(ffjax)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ffjax.nothing  # pyright: ignore[reportAttributeAccessIssue]


# Who knows a backend

_BACKENDS = (
    "jax._src.pallas.triton",
    "jax._src.pallas.mosaic_gpu",
    "jax.experimental.mosaic",
    "jax.experimental.pallas.mosaic_gpu",
    "jax.experimental.pallas.triton",
)
_PRIVATE = ("jax._src", "jaxlib", "jax.interpreters")
# Both rooms that know a backend, and the one that has what they share.
_ROOMS = ("pallas_kernels.triton", "pallas_kernels.mosaic_gpu")
_SHARED = "pallas_kernels.primitives"
# Who sends a kernel to a room, and who asks whether its backend is there.
_SENDERS = {"pallas_kernels.stream.launch", "pallas_kernels.calls", "pallas_kernels.backends"}


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def against_the_rooms(module: str, source: str) -> list[Import]:
    """Imports of a backend, of JAX's private modules, or of a room, where they do not belong."""
    found = []
    for one in imports_of(source, module):
        private = _within(one.name, *_PRIVATE)
        own_room = private and _within(module, _SHARED)
        backend = _within(one.name, *_BACKENDS)
        room = _within(one.name, *_ROOMS) and module not in _SENDERS
        if not _within(module, *_ROOMS) and (backend or room or (private and not own_room)):
            found.append(one)
    return found


def test_backends_and_private_modules_are_known_in_their_rooms_alone():
    files = {**modules(), **{module_of(x): x for x in (ROOT / "examples").glob("*.py")}}
    known = {}
    for module, file in files.items():
        if found := against_the_rooms(module, file.read_text("utf-8")):
            known[module] = found
    assert known == {}
    # The rule sees what is there.
    for room in (*_ROOMS, _SHARED):
        inside = [file for module, file in files.items() if _within(module, room)]
        names = [x.name for file in inside for x in imports_of(file.read_text("utf-8"), room)]
        assert any(_within(name, "jax._src") for name in names), room


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.draw.kernel", "from jax._src import core"),
        ("pallas_kernels.draw.kernel", "def f():\n    from jax.experimental.pallas import triton"),
        ("pallas_kernels.stream.launch", "import jax.experimental.pallas.mosaic_gpu as plgpu"),
        ("pallas_kernels.stream.ptx.feed", "import jax\nordered = jax._src.effects.Effect"),
        ("pallas_kernels.stream.ptx.feed", "from ...triton import backend"),
        ("pallas_kernels.primitives.access", "from jax._src.pallas.triton import lowering"),
        ("pallas_kernels.stream.kernel", "from pallas_kernels.mosaic_gpu import body"),
        ("ffjax.decode", "import importlib\nx = importlib.import_module('jax._src.core')"),
        ("ffjax.decode", "x = __import__('pallas_kernels.triton.launch')"),
        ("ffjax.decode", "from importlib.util import find_spec\nx = find_spec('jax._src.pallas')"),
    ],
)
def test_a_backend_that_is_known_elsewhere_is_noticed(module, source):
    assert against_the_rooms(module, source)


# Who lies below whom

# What a model is made of. `checkpoints` makes and describes models, and imports nothing else of
# `ffjax`; what loads and serves them comes above it.
_MODEL = {
    f"ffjax.{name}"
    for name in (
        *("cache", "config", "dims", "formats", "inputs", "interrupts", "model", "packing"),
        *("presets", "rope", "rounding", "settings"),
    )
}
# The parts of `ffjax` that load models, by `checkpoints`.
_LOADERS = ("ffjax.text", "ffjax.commands", "ffjax.benchmark")
# The commands that know models by their names: see `ffjax.commands.compile`.
_SHIMS = {
    "pallas_kernels.compile.__main__": {"ffjax.commands.compile"},
    "pallas_kernels.compile_table.__main__": {"ffjax.commands.compile_table"},
    "pallas_kernels.spec.__main__": {"ffjax.commands.spec"},
}


def upwards(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports that go up: who imports, and whom."""

    def allowed(module: str, name: str) -> bool:
        if name in _SHIMS or name == "ffjax":  # `ffjax` itself has names of all of it
            return False
        if _within(module, "pallas_kernels"):
            return _within(name, "pallas_kernels") or name in _SHIMS.get(module, ())
        if module in _MODEL:
            return name in _MODEL or _within(name, "pallas_kernels")
        if _within(module, "checkpoints"):
            return name in _MODEL or _within(name, "checkpoints", "pallas_kernels")
        return not _within(name, "checkpoints") or _within(module, *_LOADERS)

    return [(m, name) for m, names in edges.items() for name in names if not allowed(m, name)]


@pytest.mark.once("It reads the source.")
def test_imports_go_one_way():
    edges = graph()
    # Type checkers alone see what `ffjax` imports; names are looked up when they are asked for.
    assert edges["ffjax"] == set()
    assert upwards(edges) == []
    # No more than `checkpoints` needs.
    made_of = reached({x for x in edges if _within(x, "checkpoints")}, edges)
    assert {name for name in made_of if _within(name, "ffjax")} == _MODEL


@pytest.mark.once("It reads the source.")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pallas_kernels.targets", "ffjax.presets"),
        ("pallas_kernels.compile", "ffjax.commands.compile"),
        ("pallas_kernels.dims", "checkpoints.integers"),
        ("checkpoints.store", "ffjax.tokenizer"),
        ("checkpoints.store", "ffjax"),
        ("ffjax.formats", "checkpoints.integers"),
        ("ffjax.formats", "ffjax.quantization"),
        ("ffjax.tokenizer", "checkpoints.store"),
        ("ffjax.commands.bench", "pallas_kernels.compile.__main__"),
    ],
)
def test_an_import_that_goes_up_is_noticed(module, name):
    assert upwards({**graph(), module: graph()[module] | {name}}) == [(module, name)]


@pytest.mark.once("It reads the source.")
def test_no_modules_import_each_other():
    assert cycles(graph()) == []
    assert graph()["ffjax.text.tokenizers"] >= {"checkpoints", "ffjax.hf_tokenizer"}
    around = {**graph(), "ffjax.config": graph()["ffjax.config"] | {"ffjax.model"}}
    assert cycles(around)


# Commands that are run by `python -m`. They lie with what they measure, and parse as `commands` do.
_COMMANDS = {f"ffjax.benchmark.{name}" for name in ("sampling", "serving", "speculation")}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Files and folders that lie side by side and import each other, by whatever way round."""
    below = {module: names for module, names in edges.items() if module not in _COMMANDS}
    return [circle for folder in folders(below) for circle in cycles(neighbours(folder, below))]


@pytest.mark.once("It reads the source.")
def test_no_folders_import_each_other():
    edges = graph()
    assert circles(edges) == []
    # Nobody imports the commands that are left out.
    assert not _COMMANDS & {name for names in edges.values() for name in names}


@pytest.mark.once("It reads the source.")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        # As the rooms of the backends did while `lowered` lay with the step's texts.
        ("triton.backend", "stream.ptx.feed"),
        ("stream.ptx.words", "stream.segments.head"),
        ("stream.planner", "support"),
    ],
)
def test_folders_that_import_each_other_are_noticed(module, name):
    module, name = f"pallas_kernels.{module}", f"pallas_kernels.{name}"
    [circle] = circles({**graph(), module: graph()[module] | {name}})
    assert any(module == x or module.startswith(f"{x}.") for x in circle)
    assert any(name == x or name.startswith(f"{x}.") for x in circle)


def test_what_is_imported_by_a_name_that_is_computed():
    """One place alone: that of the library's names."""
    computed = {
        module
        for module, file in modules().items()
        if any(not x.name for x in imports_of(file.read_text("utf-8"), module))
    }
    assert computed == {"ffjax"}
