"""The options that say in which format random weights are made."""

from __future__ import annotations

import argparse
from typing import get_args

from ffjax.config import ModelConfig, preset
from ffjax.formats import FLOATING, WeightFormats
from ffjax.quantization import Kind, named_format, quantized_config

__all__ = ["KINDS", "PLAIN", "add_format_arguments", "chosen_config"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PLAIN = "bfloat16"


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights and --head, of a preset's random weights."""
    parser.add_argument(
        "--weights",
        choices=(PLAIN, *KINDS),
        default=PLAIN,
        help="format of the layers' random matrices; default: %(default)s",
    )
    parser.add_argument(
        "--head",
        choices=KINDS,
        help="format of the head, which a tied model then has beside its embedding; default: "
        f"{PLAIN}, as the embedding is",
    )


def chosen_config(args: argparse.Namespace) -> ModelConfig:
    """The preset that --config names, its matrices in the formats that were asked for.

    Raises:
        ValueError: there is no such preset, or its matrices cannot have that format.
    """
    config = preset(args.config)
    layers = None if args.weights == PLAIN else named_format(args.weights)
    head = None if args.head is None else named_format(args.head)
    formats = WeightFormats.of_layers(layers, head)
    return config if formats == FLOATING else quantized_config(config, formats)
