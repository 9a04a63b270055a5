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
    """Has a function, of a class or of a module, another text."""
    text = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times in\n{text}"
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    made: dict[str, Any] = {}
    flags = "from __future__ import annotations\n"
    exec(flags + text.replace(old, new), vars(module), made)
    with mock.patch.object(owner, name, made[name]):
        yield
