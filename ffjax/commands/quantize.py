"""Makes a checkpoint whose matrices are integers with scales: half or a quarter of the bytes.

int8 has a scale a row, int4 one for every GROUP inputs of a row. Embedding, norms and biases stay
as they are; so does the head, unless --head says otherwise. Rounding needs no text.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ffjax.commands.folders import add_ignore_field, load_model
from ffjax.commands.formats import KINDS
from ffjax.formats import DEFAULT_GROUP, GROUP_SIZES

__all__ = ["HELP", "add_arguments", "run"]

HELP = "make a checkpoint of int8 or int4 weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax quantize`."""
    parser.add_argument("model", metavar="IN", help="checkpoint, or Hugging Face folder")
    parser.add_argument("out", metavar="OUT", help="the checkpoint to make")
    parser.add_argument("--weights", choices=KINDS, required=True, help="of the layers' matrices")
    parser.add_argument(
        "--group-size",
        metavar="GROUP",
        type=int,
        choices=GROUP_SIZES,
        default=DEFAULT_GROUP,
        help="inputs that share a scale in int4: 32, 64 or 128; default: %(default)s",
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
    from checkpoints.hf_import import is_hf_folder
    from checkpoints.manifest import check_free
    from ffjax.commands.progress import byte_bar
    from ffjax.quantize import quantize

    start = time.perf_counter()
    path, out = (Path(name).expanduser().resolve() for name in (args.model, args.out))
    check_free(out, args.overwrite)  # before minutes are spent
    source: dict[str, Any] | None = None
    if not is_hf_folder(path):
        source = checkpoints.Manifest.read(path).source
    model = load_model(args, path)
    name = model.config.name
    with byte_bar("quantize") as progress:
        model = quantize(model, args.weights, args.group_size, head=args.head, progress=progress)
    checkpoints.save(
        model,
        out,
        source={"format": "quantized", "of": {"name": name, "source": source}},
        tokenizer_from=path if checkpoints.tokenizer_directory(path) else None,
        overwrite=args.overwrite,
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.out}: {name}, {model.config.weights}; {size:,} bytes")
    print(f"quantize took {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0
