"""Plants errors in functions, for tests to find."""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest import mock

__all__ = ["edited"]


@contextlib.contextmanager
def edited(owner: Any, name: str, old: str, new: str) -> Iterator[None]:
    """Has a function of a class or of a module, which may have imported it, another text."""
    function = getattr(owner, name)
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times in\n{text}"
    made: dict[str, Any] = {}
    flags = "from __future__ import annotations\n"
    exec(flags + text.replace(old, new), vars(sys.modules[function.__module__]), made)
    with mock.patch.object(owner, name, made[name]):
        yield
