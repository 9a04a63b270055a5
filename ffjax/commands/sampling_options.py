"""Options that say how tokens are chosen, of all commands that write texts."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from typing import Any

from ffjax.commands.options import number, seed, share, whole
from ffjax.sampling.params import MAX_LOGPROBS, SamplingParams

__all__ = ["add_sampling", "given_sampling", "in_options", "say_defaults"]

# Options by the field that they set, as far as they are not called alike.
_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
# What draws, and so has no effect where nothing is drawn.
_OF_DRAWS = ("top_k", "top_p", "min_p")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def add_sampling(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, in_json: bool = True
) -> None:
    """Adds the options.

    Args:
        parser: of the command.
        max_new_tokens: its own default, for the help.
        in_json: whether it writes JSON, with log-probabilities, and draws the same each time.
    """
    group = parser.add_argument_group(
        "how tokens are chosen",
        "What is not given is as the model's generation_config.json says, else as it stands here.",
    )
    group.add_argument(
        "--max-new-tokens", metavar="N", type=whole(1), help=f"default: {max_new_tokens}"
    )
    group.add_argument(
        "--min-new-tokens",
        metavar="N",
        type=whole(0),
        help="so many tokens come before one that ends the text may; default: 0",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=number(0),
        help="0, the default, takes the likeliest token; above, tokens are drawn",
    )
    group.add_argument(
        "--greedy",
        action="store_true",
        help="take the likeliest token, whatever generation_config.json says",
    )
    group.add_argument(
        "--top-k", metavar="K", type=whole(0), help="draw among the K likeliest; default: 0, all"
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=share(above=True),
        help="draw among the likeliest whose probabilities sum up to P; default: 1, all",
    )
    group.add_argument(
        "--min-p",
        metavar="P",
        type=share(),
        help="draw among those at least P times as likely as the likeliest; default: 0, all",
    )
    group.add_argument(
        "--repetition-penalty",
        metavar="R",
        type=number(0, above=True),
        help="makes less likely what the prompt or the text holds already; default: 1, off",
    )
    group.add_argument(
        "--presence-penalty",
        metavar="X",
        type=number(),
        help="subtracted from logits of tokens that the new text holds; default: 0, off",
    )
    group.add_argument(
        "--frequency-penalty",
        metavar="X",
        type=number(),
        help="the same, times how often it holds them; default: 0, off",
    )
    group.add_argument(
        "--logit-bias",
        metavar="ID=X",
        action="append",
        type=_bias,
        help="added to the logit of a token, by its id; may be given several times",
    )
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        type=_stop,
        help="ends the text, and is not shown; \\n in it stands for the end of a line, \\t for a "
        "tab; may be given several times",
    )
    usual = "0" if in_json else "another one for each answer"
    group.add_argument(
        "--seed", metavar="S", type=seed, help=f"of the draws, 0 to 2^64 - 1; default: {usual}"
    )
    if in_json:
        group.add_argument(
            "--logprobs",
            metavar="K",
            type=whole(0, MAX_LOGPROBS),
            help="in JSON, the log-probability of each token, and the K likeliest with theirs",
        )


def given_sampling(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """What the command line asks for, on top of what the model's file does.

    Args:
        args: the command line.
        defaults: as the model's file says.

    Raises:
        ValueError: options do not go together.
    """
    given = _given(args)
    if args.greedy and given.get("temperature"):
        raise ValueError(
            "--greedy takes the likeliest token, and --temperature above 0 draws one. Give one of "
            "them."
        )
    if args.greedy:
        plain = SamplingParams()
        given = {name: getattr(plain, name) for name in ("temperature", *_OF_DRAWS)} | given
    for name in ("max_tokens", "min_tokens"):
        # What the file says of the one must not contradict what is asked of the other.
        other = "min_tokens" if name == "max_tokens" else "max_tokens"
        if name in given and other not in given:
            most, least = (given.get(one, getattr(defaults, one)) for one in _NAMES)
            if most is not None and least > most:
                given[other] = given[name]
    params = _replaced(defaults, given)
    unused = [_option(name) for name in _OF_DRAWS if getattr(args, name) is not None]
    if unused and params.greedy:
        print(
            f"ffjax {args.command}: {', '.join(unused)} change{'s' * (len(unused) == 1)} nothing "
            "where no token is drawn: give --temperature, too.",
            file=sys.stderr,
        )
    return params


def say_defaults(args: argparse.Namespace, defaults: SamplingParams) -> None:
    """Says on stderr what comes of the model's file, in a line; nothing where that is nothing."""
    plain = SamplingParams()
    given = {*_given(args), *(("temperature", *_OF_DRAWS) if args.greedy else ())}
    said = [
        f"{_option(name)} {_shown(value)}"
        for name in _FIELDS
        if (value := getattr(defaults, name)) != getattr(plain, name) and name not in given
    ]
    if said:
        print(
            f"ffjax {args.command}: As the model's generation_config.json says, {' '.join(said)}.",
            file=sys.stderr,
        )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that options set."""
    values = {name: getattr(args, _NAMES.get(name, name), None) for name in _FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def _replaced(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    try:
        return dataclasses.replace(defaults, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(in_options(str(error))) from error


def in_options(text: str) -> str:
    """A sentence on `SamplingParams` in the words of the command line."""
    for name in _FIELDS:
        if "_" in name:  # the others are words of English, too
            text = re.sub(rf"\b{name}\b", _option(name), text)
    return text


def _option(field: str) -> str:
    return f"--{_NAMES.get(field, field).replace('_', '-')}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stop(text: str) -> str:
    """A stop string, its escapes read."""
    if not text:
        raise argparse.ArgumentTypeError("a text of at least one character is needed, got ''")
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[0]), text)


def _bias(text: str) -> tuple[int, float]:
    token, equals, value = text.partition("=")
    try:
        if equals:
            return whole(0)(token), number()(value)
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(
        f"a token id and a number are needed, as in 13=-2.5; got {text!r}"
    )
