"""What each module of the packages imports: read from its syntax, wherever in a file it stands."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "PACKAGES",
    "ROOT",
    "Import",
    "cycles",
    "folders",
    "graph",
    "imports_of",
    "modules",
    "neighbours",
    "reached",
]

ROOT = Path(__file__).parent.parent
PACKAGES = ("ffjax", "checkpoints", "pallas_kernels")
# Calls that import what their first argument names, and those that only look whether it is there.
_IMPORTERS = {"import_module", "__import__", "run_module", "resolve_name"}
_FINDERS = {"find_spec", "find_loader"}


@dataclasses.dataclass(frozen=True)
class Import:
    """An import of a module, or of a name in one.

    Attributes:
        name: the whole of it: "jax._src.core" of `from jax._src import core`; "" if it is computed.
        line: where it stands.
        for_types: whether type checkers alone see it.
    """

    name: str
    line: int
    for_types: bool = False


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of the packages, by the names of their modules."""
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    return {module_of(file.relative_to(root)): file for file in files}


def module_of(file: Path) -> str:
    """A module's name, from its path: "ffjax" of `ffjax/__init__.py`."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str) -> list[Import]:
    """Every import of a file: at its top, within functions, by importlib, by attributes of jax.

    Args:
        source: the file's.
        module: its name, from which relative imports go.
    """
    tree = ast.parse(source)
    checked = [x for x in ast.walk(tree) if isinstance(x, ast.If) and "TYPE_CHECKING" in _dump(x)]
    for_types = {node for x in checked for body in x.body for node in ast.walk(body)}
    return [
        Import(name, getattr(node, "lineno", 0), node in for_types)
        for node in ast.walk(tree)
        for name in _named(node, module)
    ]


def _dump(x: ast.If) -> str:
    return ast.dump(x.test)


def _named(node: ast.AST, module: str) -> Iterator[str]:
    """What a piece of syntax imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            outer = module.split(".")[: -node.level]
            base = ".".join([*outer, base] if base else outer)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call):
        function = node.func
        called = getattr(function, "attr", getattr(function, "id", ""))
        first = node.args[0] if node.args else None
        if called in _IMPORTERS | _FINDERS and first is not None:
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value
            elif called in _IMPORTERS:
                yield ""
    elif isinstance(node, ast.Attribute):
        # `jax._src.core` needs no import but that of jax.
        dotted = ast.unparse(node)
        if dotted.startswith("jax._src"):
            yield dotted


@functools.cache
def graph() -> dict[str, set[str]]:
    """Of each module, which modules of the packages it imports, at whatever time.

    A package's `__init__` is a module; that importing `a.b` runs `a` too is left out.
    """
    known = modules()
    found: dict[str, set[str]] = {}
    for module, file in known.items():
        names = [x.name for x in imports_of(file.read_text("utf-8"), module) if not x.for_types]
        inner = (name if name in known else name.rpartition(".")[0] for name in names)
        found[module] = {name for name in inner if name in known and name != module}
    return found


def reached(begin: set[str], edges: dict[str, set[str]]) -> set[str]:
    """What some modules import, and what that imports, and so on."""
    found: set[str] = set()
    left = set(begin)
    while left:
        new = edges[left.pop()] - found
        found |= new
        left |= new
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, by whatever way round."""
    of = {module: reached({module}, edges) for module in edges}
    circles = {tuple(sorted(x for x in of[m] if m in of[x])) for m in edges if m in of[m]}
    return [list(x) for x in sorted(circles)]


def folders(edges: dict[str, set[str]]) -> list[str]:
    """The packages, and the folders within them, by their names."""
    return sorted({name.rpartition(".")[0] for name in edges} - {""})


def neighbours(folder: str, edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which files and folders that lie side by side in a folder import each other.

    What a folder among them imports is what all that lies in it does. A folder's own `__init__` is
    one of the files in it.
    """

    def inside(module: str) -> str:
        name = module.removeprefix(folder).lstrip(".").partition(".")[0]
        return f"{folder}.{name or '__init__'}"

    def lies_in(module: str) -> bool:
        return module == folder or module.startswith(f"{folder}.")

    found: dict[str, set[str]] = {inside(module): set() for module in edges if lies_in(module)}
    for module, names in edges.items():
        if lies_in(module):
            found[inside(module)] |= {inside(name) for name in names if lies_in(name)}
    return {one: others - {one} for one, others in found.items()}
