"""The command line: picks the subcommand, turns errors into sentences and exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import sys
from collections.abc import Sequence

from ffjax.commands import (
    bench,
    convert,
    doctor,
    evaluate,
    export,
    fidelity,
    generate,
    inspect,
    quantize,
    tune,
)

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "generate": generate,
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

# What the library raises for bad input and for what cannot run here. Anything else is a
# defect of ours and keeps its traceback, but where JAX starts no device to run on.
_USER_ERRORS = (ValueError, TypeError, NotImplementedError, OSError)
_OF_JAX = (RuntimeError, AssertionError)

_BAD_INPUT = 2
_INTERRUPTED = 128 + 2  # as a shell reports a process ended by SIGINT


def _version() -> str:
    try:
        return importlib.metadata.version("ffjax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its sources)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ffjax", description="Text from transformers in JAX, a kernel launch a token."
    )
    parser.add_argument("--version", action="version", version=f"ffjax {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: the arguments after the program's name. None: those of this process.

    Returns:
        The exit code: 0; 1 where the command did its work and found something wrong: a gate that
        fails, a step with wrong numbers; 2 after bad input, or where JAX starts no device, with a
        sentence on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: argparse has printed help, the version, or what is wrong with the
            arguments (code 2).
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may say any character, a terminal may not know it.
        sys.stdout.reconfigure(errors="replace")
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_traceback)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        return 0  # whoever read our output has left, as `head` does
    except (*_USER_ERRORS, *_OF_JAX) as error:
        reason = _no_device(error)
        if reason is None and not isinstance(error, _USER_ERRORS):
            raise
        print(f"ffjax {args.command}: {reason or error}", file=sys.stderr)
        return _BAD_INPUT


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves the last line of a traceback, which JAX logs where a plugin of its does not start."""
    if record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
    return True


def _no_device(error: Exception) -> str | None:
    """Why JAX runs on no device, where that is what an error comes of; else None."""
    # A checkpoint that cannot be read or written says so of whatever is raised meanwhile.
    cause = error.__cause__ or error
    if not isinstance(cause, _OF_JAX) or isinstance(cause, _USER_ERRORS):
        return None
    from ffjax.doctor.environment import why_no_device

    return why_no_device(cause)
