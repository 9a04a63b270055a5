"""The options that say in which format random weights are made."""

from __future__ import annotations

import argparse
from typing import get_args

from ffjax.config import ModelConfig, preset
from ffjax.formats import (
    DEFAULT_GROUP,
    FLOATING,
    GROUP_SIZES,
    INT8_GROUP,
    Offset,
    WeightFormat,
    WeightFormats,
)
from ffjax.quantization import Kind, named_format, quantized_config

__all__ = ["KINDS", "OFFSETS", "PLAIN", "add_format_arguments", "chosen_config", "in_formats"]

KINDS: tuple[Kind, ...] = get_args(Kind)
OFFSETS: tuple[Offset, ...] = get_args(Offset)
PLAIN = "bfloat16"
# int8 with a scale for every 32 inputs, as some files have it.
_INT8_GROUPS = "int8-groups"


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights and --head, of random weights, and what int4 may be; None if not given."""
    parser.add_argument(
        "--weights",
        choices=(PLAIN, *KINDS, _INT8_GROUPS),
        help=f"format of the layers' random matrices; {_INT8_GROUPS} has groups of {INT8_GROUP}; "
        f"default: {PLAIN}, or as a model is stored that is quantized",
    )
    parser.add_argument(
        "--head",
        choices=(*KINDS, _INT8_GROUPS),
        help="format of the head, which a tied model then has beside its embedding; default: "
        f"{PLAIN}, as the embedding is",
    )
    parser.add_argument(
        "--group-size",
        metavar="GROUP",
        type=int,
        choices=GROUP_SIZES,
        help=f"inputs that share a scale in int4: 32, 64 or 128; default: {DEFAULT_GROUP}",
    )
    parser.add_argument(
        "--scales",
        choices=("bfloat16", "float16"),
        help=f"dtype of int4's scales, and of those of {_INT8_GROUPS}; default: bfloat16",
    )
    parser.add_argument(
        "--offset",
        choices=OFFSETS,
        help="second number of a group of int4: an integer that stands for 0, or the least weight; "
        "default: none",
    )


def chosen_config(args: argparse.Namespace) -> ModelConfig:
    """The preset that --config names, its matrices in the formats that were asked for.

    Raises:
        ValueError: there is no such preset, or its matrices cannot have that format; an option of
            int4 is given where there is none.
    """
    return in_formats(preset(args.config), args)


def in_formats(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """A configuration, its matrices in the formats that --weights and --head ask for.

    Raises:
        ValueError: its matrices cannot have that format, or are quantized already; an option of
            int4 is given where there is none.
    """
    kinds = args.weights, args.head
    if config.weights.quantized and kinds != (None, None):
        raise ValueError(
            f"--weights and --head say how the random weights of a model are made that is not "
            f"quantized; {config.name} is ({config.weights}), and its random weights are made so. "
            "Leave them out."
        )
    for name, of in (("group_size", KINDS[1:]), ("offset", KINDS[1:]), ("scales", None)):
        of = of or (*KINDS[1:], _INT8_GROUPS)
        if getattr(args, name) is not None and not set(kinds) & set(of):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is of {' and '.join(of)}; --weights and --head ask for none. Leave it "
                "out."
            )
    layers = None if args.weights in (None, PLAIN) else _format(args, args.weights)
    head = None if args.head is None else _format(args, args.head)
    formats = WeightFormats.of_layers(layers, head)
    return config if formats == FLOATING else quantized_config(config, formats)


def _format(args: argparse.Namespace, kind: str) -> WeightFormat:
    scales = args.scales or "bfloat16"
    if kind == _INT8_GROUPS:
        return WeightFormat(bits=8, group_size=INT8_GROUP, scale_dtype=scales)
    return named_format(kind, args.group_size or DEFAULT_GROUP, scales, args.offset)
