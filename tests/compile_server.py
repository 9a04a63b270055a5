"""Compiles many steps for GPUs without an import of JAX for each: `compile_for` has forked workers.

A step is compiled by a process of its own, as for a user, since XLA reads once where it leaves its
dumps. The import of JAX, which takes most of a small step's time, is done by one process:

    python tests/compile_server.py

It reads a line of JSON a worker, forks, and answers with how the worker ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels import compile as compile_module

__all__ = ["forking"]

_SAID = "worker.txt"


def _serve() -> None:
    """Forks a worker for each line, and waits for it."""
    import jax

    from pallas_kernels import compile_worker

    for line in sys.stdin:
        folder, environment = json.loads(line)
        if (worker := os.fork()) == 0:
            os.environ.clear()
            os.environ.update(environment)
            # JAX has read its variables; these two are other ones for a worker.
            jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])
            jax.config.update("jax_enable_compilation_cache", False)
            status = 1
            with pathlib.Path(folder, _SAID).open("w", encoding="utf-8") as said:
                os.dup2(said.fileno(), 2)
                try:
                    compile_worker.main(folder)
                    status = 0
                except BaseException:
                    traceback.print_exc(file=said)
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)


@contextlib.contextmanager
def forking() -> Iterator[Callable[[pathlib.Path], None]]:
    """What runs a worker in place of `compile._run_worker`."""
    server: list[subprocess.Popen[str]] = []

    def run_worker(folder: pathlib.Path) -> None:
        environment = compile_module._environment(folder)
        assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"
        if not server:
            server.append(_started(environment))
        stdin, stdout = server[0].stdin, server[0].stdout
        assert stdin is not None and stdout is not None
        print(json.dumps([str(folder), environment]), file=stdin, flush=True)
        if (status := stdout.readline().strip()) != "0":
            said = (folder / _SAID).read_text(encoding="utf-8")
            raise compile_module.CompileError(f"A worker ended with {status}. It said:\n{said}")

    try:
        yield run_worker
    finally:
        for one in server:
            one.communicate()  # it ends where its lines end


def _started(environment: dict[str, str]) -> subprocess.Popen[Any]:
    pipe = subprocess.PIPE
    command = [sys.executable, __file__]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


if __name__ == "__main__":
    _serve()
