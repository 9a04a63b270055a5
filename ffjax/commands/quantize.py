"""Makes a checkpoint whose matrices are integers with scales: half or a quarter of the bytes.

int8 has a scale a row, int4 one for every GROUP inputs of a row. Embedding, norms and biases stay
as they are; so does the head, unless --head says otherwise. Rounding needs no text.
"""

from __future__ import annotations

import argparse
import sys
import time

from ffjax.commands.folders import add_ignore_field, load_model, notes_on_stderr
from ffjax.commands.formats import KINDS, OFFSETS
from ffjax.formats import DEFAULT_GROUP, GROUP_SIZES

__all__ = ["HELP", "add_arguments", "run"]

HELP = "make a checkpoint of int8 or int4 weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax quantize`."""
    parser.add_argument("model", metavar="IN", help="checkpoint, Hugging Face folder or GGUF file")
    parser.add_argument("out", metavar="OUT", help="the checkpoint to make")
    parser.add_argument("--weights", choices=KINDS, required=True, help="of the layers' matrices")
    parser.add_argument(
        "--group-size",
        metavar="GROUP",
        type=int,
        choices=GROUP_SIZES,
        help=f"inputs that share a scale in int4: 32, 64 or 128; default: {DEFAULT_GROUP}",
    )
    parser.add_argument(
        "--offset",
        choices=OFFSETS,
        help="store a second number of each group of int4, from which its integers count: the "
        "integer that stands for 0, or the group's least weight; default: none",
    )
    parser.add_argument(
        "--head",
        choices=KINDS,
        help="of the head, which a tied model then has beside its embedding; default: as it is",
    )
    add_ignore_field(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is at OUT"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what was made on stdout; the progress and the time on stderr."""
    import checkpoints
    from checkpoints.opening import comes_in, open_incoming
    from checkpoints.places import check_apart, check_free, model_path, real_path
    from ffjax.commands.progress import byte_bar
    from ffjax.quantization import quantize

    start = time.perf_counter()
    path, out = model_path(args.model), real_path(args.out)
    # Before minutes are spent.
    for option, value in (("--group-size", args.group_size), ("--offset", args.offset)):
        if value is not None and "int4" not in (args.weights, args.head):
            raise ValueError(
                f"{option} is of int4, which has groups; --weights and --head ask for none. Leave "
                "it out."
            )
    check_apart(out, path)
    check_free(out, args.overwrite)
    if comes_in(path):
        with notes_on_stderr("quantize", said=True):  # loading says them
            incoming = open_incoming(path, ignore_fields=args.ignore_field, integers=False)
        source = incoming.source("bfloat16", args.ignore_field)
    else:
        source = checkpoints.Manifest.read(path).source
    with checkpoints.tokenizer_at(path) as tokenizer:
        model = load_model(args, path, integers=False)  # to be rounded anew
        name = model.config.name
        group = DEFAULT_GROUP if args.group_size is None else args.group_size
        with byte_bar("quantize") as progress:
            how = {"head": args.head, "offset": args.offset, "progress": progress}
            model = quantize(model, args.weights, group, **how)
        checkpoints.save(
            model,
            out,
            source={"format": "quantized", "of": {"name": name, "source": source}},
            tokenizer_from=tokenizer,
            overwrite=args.overwrite,
        )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.out}: {name}, {model.config.weights}; {size:,} bytes")
    print(f"quantize took {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0
