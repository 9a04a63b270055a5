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

__all__ = ["add_speculation", "given_speculation"]


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
        "--draft",
        metavar="PATH",
        help="a draft model, which writes the drafts: a small one with the model's vocabulary",
    )
    parser.add_argument(
        "--draft-weights",
        choices=get_args(Kind),
        help="quantize the draft model; without --draft the model itself drafts, quantized",
    )
    parser.add_argument(
        "--speculation-tokens",
        metavar="T",
        type=whole(2, MAX_BATCH),
        help="tokens that a step takes of each text, drafts and the one that is certain; default: "
        "8 for all texts together, with a draft model up to 4 of each",
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
    from ffjax.speculation.lookup import Lookup

    drafts = args.draft is not None or args.draft_weights is not None
    if drafts and args.speculation != "none":
        raise ValueError(
            f"Drafts come from one place, and --speculation {args.speculation} and a draft model "
            "are two. Leave one out."
        )
    if drafts:
        return Draft(_draft_model(args, model), args.speculation_tokens)
    if args.speculation == "none":
        if args.speculation_tokens is not None:
            raise ValueError(
                "--speculation-tokens says how many tokens a step of speculation takes, and there "
                "is none. Give --speculation or --draft, too."
            )
        return None
    return dataclasses.replace(Lookup(), tokens=args.speculation_tokens)


def _draft_model(args: argparse.Namespace, model: Transformer) -> Transformer:
    from checkpoints.hf_import import is_hf_folder
    from checkpoints.places import real_path
    from ffjax.quantization import quantize

    if args.draft is not None:
        # Fields to be ignored are those of folders; a checkpoint has none.
        ignored = args.ignore_field if is_hf_folder(real_path(args.draft)) else []
        how = argparse.Namespace(**{**vars(args), "ignore_field": ignored})
        model = load_model(how, args.draft)
    return model if args.draft_weights is None else quantize(model, args.draft_weights)
