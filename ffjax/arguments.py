"""The command line's parser: what is wrong with the arguments is a sentence, as all errors are."""

from __future__ import annotations

import argparse
import difflib
from types import ModuleType
from typing import Any, NoReturn

__all__ = ["BadArgumentsError", "make_parser"]

_UNKNOWN = "unrecognized arguments: "


class BadArgumentsError(ValueError):
    """Arguments that cannot be parsed; its message is a sentence in the options' words."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        # --over is no --overwrite: what replaces something is written out.
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print and end the process for."""
        message = message.removeprefix("argument ").rstrip(".")
        end = "" if message.endswith("?") else "."
        raise BadArgumentsError(
            f"{message[0].upper()}{message[1:]}{end} {self.prog} --help says more."
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses what is none of an option's choices, in the words of all refusals."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise argparse.ArgumentError(
            action,
            f"one of {', '.join(choices)} is needed, got {value!r}"
            f"{f'. Is {near[0]} meant?' if near else ''}",
        )

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Lets the parser of a command complain of options that it does not know."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(_UNKNOWN + " ".join(rest) + self._meant(rest))
        return namespace, rest

    def _meant(self, rest: list[str]) -> str:
        """A question for a misspelt option; empty where nothing is like it."""
        known = [name for name in self._option_string_actions if name != "--help"]
        places = {f"--{one.dest}": one.dest for one in self._actions if not one.option_strings}
        for word in rest:
            name = word.partition("=")[0]
            if name in places:
                return f". The {places[name]} is given by itself, without {name}"
            if name.startswith("--"):
                near = difflib.get_close_matches(name, known, n=1)
                return f". Is {near[0]} meant?" if near else ""
        return ""


def make_parser(modules: dict[str, ModuleType], version: str) -> argparse.ArgumentParser:
    """The parser of all subcommands.

    Args:
        modules: of `ffjax.commands`, by the names of the subcommands.
        version: what `--version` prints.
    """
    parser = _Parser(
        prog="ffjax", description="Text from transformers in JAX, a kernel launch a token."
    )
    parser.add_argument("--version", action="version", version=f"ffjax {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in modules.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.add_argument(
            "--traceback",
            action="store_true",
            help="where something fails, print Python's traceback before the sentence",
        )
        sub.add_argument(
            "--no-compilation-cache",
            dest="compilation_cache",
            action="store_false",
            help="compile every program anew, and keep none for the next command; as "
            "JAX_ENABLE_COMPILATION_CACHE=0 does",
        )
    return parser
