"""Writes a checkpoint as a Hugging Face model: config.json, safetensors, tokenizer."""

from __future__ import annotations

import argparse
import math

from ffjax.commands.options import number

__all__ = ["HELP", "add_arguments", "run"]

HELP = "write a checkpoint as a Hugging Face model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax export`."""
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint")
    parser.add_argument("out", metavar="OUT_DIR", help="the folder to make")
    parser.add_argument(
        "--shard-gb",
        metavar="GB",
        type=number(0, above=True),
        default=5.0,
        help="size at which a file ends and the next begins; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Prints what was made on stdout, the progress on stderr."""
    import checkpoints
    from ffjax.commands.progress import byte_bar

    with byte_bar("export") as progress:
        made = checkpoints.export_hf(
            args.checkpoint, args.out, shard_bytes=math.ceil(args.shard_gb * 1e9), progress=progress
        )
    files = f"{len(made.files)} file" + "s" * (len(made.files) > 1)
    print(f"{args.out}: {made.architecture}, {made.tensors} tensors in {files}, {made.dtype}")
    return 0
