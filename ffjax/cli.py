"""The command line: picks the subcommand, turns errors into sentences and exit codes."""

from __future__ import annotations

# First: it looks at the clock.
import ffjax.startup  # isort: skip  # noqa: F401

import contextlib
import importlib.metadata
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

from ffjax.arguments import make_parser
from ffjax.failures import sentence
from ffjax.interrupts import ctrl_c_is_kept, interrupts_held_back

__all__ = ["commands", "main"]

_FAILED = 2
_INTERRUPTED = 128 + 2  # as a shell reports a process ended by SIGINT


def commands() -> dict[str, ModuleType]:
    """The subcommands' modules by name; imports JAX, which may refuse its settings."""
    from ffjax.commands import (
        bench,
        chat,
        convert,
        doctor,
        evaluate,
        export,
        fidelity,
        generate,
        inspect,
        quantize,
        serve,
        tune,
    )

    return {
        "generate": generate,
        "chat": chat,
        "serve": serve,
        "convert": convert,
        "export": export,
        "quantize": quantize,
        "inspect": inspect,
        "bench": bench,
        "tune": tune,
        "eval": evaluate,
        "fidelity": fidelity,
        "doctor": doctor,
    }


def _version() -> str:
    try:
        return importlib.metadata.version("ffjax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its sources)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments after the program's name. None: those of this process.

    Returns:
        The exit code: 0; 1 where the command did its work and found something wrong: a gate that
        fails, a step with wrong numbers; 2 after any error, with a sentence on stderr; 130 after
        Ctrl-C.

    Raises:
        SystemExit: argparse has printed help or the version (code 0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if sys.stderr is None:  # closed; print would take stdout in its place
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    name = "ffjax"
    try:
        with interrupts_held_back():  # JAX's modules take it for an error of their own
            modules = commands()
            from ffjax.compiled import compiled_programs_kept
            from ffjax.settings import own_settings

        if argv and argv[0] in modules:
            name = f"ffjax {argv[0]}"
        args = make_parser(modules, _version()).parse_args(argv)
        _prepare_output()
        with contextlib.ExitStack() as around:
            around.enter_context(own_settings())
            around.enter_context(ctrl_c_is_kept())
            around.enter_context(_warnings_as_lines(name))
            if args.compilation_cache:
                around.enter_context(compiled_programs_kept(lambda text: _say(f"{name}: {text}")))
            code = modules[args.command].run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("\nInterrupted.")
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 0  # whoever read our output has left, as `head` does
    except Exception as error:
        if "--traceback" in argv:
            _say("".join(traceback.format_exception(error)))
        _say(f"{name}: {sentence(error)}")
        _drop_output()
        return _FAILED


def _say(text: str) -> None:
    """A line on stderr; where that cannot be written, the exit code says enough."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _warnings_as_lines(name: str) -> Iterator[None]:
    """Within it, a warning of a library is a line, without the place in its code."""

    def show(message: object, *where: object, **more: object) -> None:
        _say(f"{name}: {(str(message).strip().splitlines() or [''])[0]}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _prepare_output() -> None:
    if sys.stdout is None:
        raise OSError(
            "Standard output is closed: there is nowhere to print to. Send it to a file, or to "
            f"{os.devnull}."
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may say any character, a terminal may not know it.
        sys.stdout.reconfigure(errors="replace")
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)


def _drop_output() -> None:
    """Lets what could not be written go; else Python tries again when it ends, and complains."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except AttributeError:  # there is none
        pass


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves the last line of a traceback, which JAX logs where a plugin of its does not start."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
    return True
