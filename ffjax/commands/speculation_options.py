"""The options that say what drafts of the next tokens come from."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, get_args

from ffjax.commands.folders import load_model
from ffjax.commands.options import whole
from ffjax.quantization import Kind
from ffjax.speculation.choice import SPECULATIONS
from pallas_kernels.support import MAX_BATCH

if TYPE_CHECKING:
    from ffjax.model import Transformer
    from ffjax.speculation.choice import Speculation
    from ffjax.speculation.lookup import Lookup

__all__ = [
    "add_lookup",
    "add_speculation",
    "given_lookup",
    "given_speculation",
    "quantized_by",
]


def add_lookup(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds --speculation and --speculation-tokens.

    Args:
        parser: the command's.
        more: about the second one's default.
    """
    parser.add_argument(
        "--speculation",
        choices=SPECULATIONS,
        default="none",
        help="lookup: steps take drafts, found in the prompt and the text itself, and keep those "
        "that are right; faster where a text repeats, with the same tokens; default: %(default)s",
    )
    parser.add_argument(
        "--speculation-tokens",
        metavar="T",
        type=whole(2, MAX_BATCH),
        help="tokens that a step takes of each text, drafts and the one that is certain; default: "
        f"8 for all texts together{more}",
    )


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Adds those, --draft and --draft-weights."""
    add_lookup(parser, ", with a draft model up to 4 of each")
    parser.add_argument(
        "--draft",
        metavar="PATH",
        help="a draft model, which writes the drafts: a small one with the model's vocabulary",
    )
    parser.add_argument(
        "--draft-weights",
        choices=get_args(Kind),
        help="quantize the draft model; without --draft the model itself drafts, quantized",
    )


def given_speculation(args: argparse.Namespace, model: Transformer) -> Speculation | None:
    """What the options ask for, a draft model loaded.

    Args:
        args: the command line, with `command` and `ignore_field`.
        model: that is to write.

    Raises:
        ValueError: options contradict each other, or the draft model cannot be loaded.
        FileNotFoundError: there is no draft model.
    """
    from ffjax.speculation.draft import Draft

    drafts = args.draft is not None or args.draft_weights is not None
    if drafts and args.speculation != "none":
        raise ValueError(
            f"Drafts come from one place, and --speculation {args.speculation} and a draft model "
            "are two. Leave one out."
        )
    if drafts:
        return Draft(_draft_model(args, model), args.speculation_tokens)
    return given_lookup(args)


def given_lookup(args: argparse.Namespace) -> Lookup | None:
    """What the options of `add_lookup` ask for.

    Raises:
        ValueError: options contradict each other.
    """
    from ffjax.speculation.lookup import Lookup

    if args.speculation == "none":
        if args.speculation_tokens is not None:
            drafts = "--speculation or --draft" if hasattr(args, "draft") else "--speculation"
            raise ValueError(
                "--speculation-tokens says how many tokens a step of speculation takes, and there "
                f"is none. Give {drafts}, too."
            )
        return None
    return dataclasses.replace(Lookup(), tokens=args.speculation_tokens)


def _draft_model(args: argparse.Namespace, model: Transformer) -> Transformer:
    from checkpoints.hf_import import is_hf_folder
    from checkpoints.places import model_path

    if args.draft is not None:
        # Fields to be ignored are those of folders; a checkpoint has none.
        ignored = args.ignore_field if is_hf_folder(model_path(args.draft)) else []
        how = argparse.Namespace(**{**vars(args), "ignore_field": ignored})
        model = load_model(how, args.draft)
    if args.draft_weights is None:
        return model
    return quantized_by(model, "--draft-weights", args.draft_weights)


def quantized_by(model: Transformer, option: str, weights: Kind) -> Transformer:
    """A model quantized because an option says so, in a command without a size of groups.

    Args:
        model: the model.
        option: its name.
        weights: the format.

    Raises:
        ValueError: it is quantized already, or its inputs are no whole groups.
    """
    from ffjax.quantization import quantize

    if model.config.weights.quantized:
        raise ValueError(
            f"{option} rounds weights, once, and those of {model.config.name} are quantized "
            f"already ({model.config.weights}). Leave it out, or give a model that is not "
            "quantized."
        )
    try:
        return quantize(model, weights)
    except ValueError as error:
        # What it advises may be groups of another size.
        rule, advice, _ = str(error).partition(" Choose ")
        if not advice:
            raise
        raise ValueError(f"{rule} Give {option} int8, which has no groups.") from None
