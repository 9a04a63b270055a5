"""The options that say what drafts of the next tokens come from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from ffjax.commands.folders import load_model
from ffjax.commands.options import whole
from ffjax.quantization import Kind
from ffjax.speculation.choice import SPECULATIONS
from ffjax.speculation.draft import MOST_BY_ITSELF
from pallas_kernels.support import MAX_BATCH

if TYPE_CHECKING:
    from ffjax.model import Transformer
    from ffjax.speculation.choice import Speculation

__all__ = [
    "add_speculation",
    "check_speculation",
    "given_speculation",
    "quantized_by",
]


def add_speculation(parser: argparse.ArgumentParser) -> None:
    """Adds --speculation, --speculation-tokens, --draft and --draft-weights."""
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
        f"{MAX_BATCH} for all texts together, with a draft model up to {MOST_BY_ITSELF} of each",
    )
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


def check_speculation(args: argparse.Namespace) -> str | None:
    """Which option asks for drafts; None: there are none. Loads nothing.

    Raises:
        ValueError: options contradict each other.
    """
    options = {"--draft": args.draft, "--draft-weights": args.draft_weights}
    asking = next((name for name, value in options.items() if value is not None), None)
    if args.speculation != "none":
        if asking is not None:
            raise ValueError(
                f"Drafts come from one place, and --speculation {args.speculation} and a draft "
                "model are two. Leave one out."
            )
        return "--speculation"
    if asking is None and args.speculation_tokens is not None:
        raise ValueError(
            "--speculation-tokens says how many tokens a step of speculation takes, and there is "
            "none. Give --speculation or --draft, too."
        )
    return asking


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
    from ffjax.speculation.lookup import Lookup

    asking = check_speculation(args)
    if asking is None:
        return None
    if asking == "--speculation":
        return Lookup(tokens=args.speculation_tokens)
    return Draft(_draft_model(args, model), args.speculation_tokens)


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
