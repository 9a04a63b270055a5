"""Counts what XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax

__all__ = ["compilations"]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows with each program that is compiled meanwhile."""
    names: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
