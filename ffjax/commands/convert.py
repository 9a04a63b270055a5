"""Makes a checkpoint of a Hugging Face model, or of a GGUF file."""

from __future__ import annotations

import argparse
import sys
import time

from ffjax.commands.folders import add_ignore_field, notes_on_stderr
from ffjax.commands.options import DTYPES
from ffjax.config import ModelConfig

__all__ = ["HELP", "add_arguments", "run"]

HELP = "make a checkpoint of a Hugging Face model or a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax convert`."""
    parser.add_argument(
        "model",
        metavar="IN",
        help="GGUF file, or folder with config.json, safetensors, tokenizer.json",
    )
    parser.add_argument("out", metavar="OUT_DIR", help="the checkpoint to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="of the weights; default: %(default)s",
    )
    add_ignore_field(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="merge a LoRA adapter of the model: a folder that peft wrote",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="make whole numbers of quantized matrices, also where their integers could be kept",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is at OUT_DIR"
    )


def _unusable(path: str, config: ModelConfig) -> str | None:
    """Why a checkpoint's tokenizer cannot be used, a sentence; None where it can."""
    from ffjax.text.tokenizers import load_tokenizer

    try:
        load_tokenizer(path, config)
    except NotImplementedError:  # the extra that reads it is not installed
        return None
    except ValueError as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> int:
    """Prints what was made on stdout; the progress and what it took on stderr."""
    import checkpoints
    from checkpoints.gguf import is_gguf
    from checkpoints.incoming import rounding_note
    from checkpoints.places import model_path
    from ffjax.commands.progress import byte_bar, peak_host_memory
    from ffjax.tokenizer import ByteTokenizer

    start = time.perf_counter()
    convert = checkpoints.convert_hf
    if is_gguf(model_path(args.model)):
        convert = checkpoints.convert_gguf
    with byte_bar("convert") as progress, notes_on_stderr("convert"):
        made = convert(
            args.model,
            args.out,
            dtype=args.dtype,
            overwrite=args.overwrite,
            ignore_fields=args.ignore_field,
            adapter=args.adapter,
            integers=not args.whole,
            progress=progress,
        )
    config = made.config
    print(
        f"{args.out}: {config.name}, {config.family}, {config.num_params:,} weights, {made.dtype}"
    )
    if (adapter := made.adapter) is not None:
        print(f"Merged the adapter {adapter.name} into {adapter.tensors} tensors.")
    if config.weights.quantized:
        print(f"Kept the integers of {config.weights}.")
    if made.rounded:
        note = rounding_note(made.rounded, made.dtype)
        print(f"{note[0].upper()}{note[1:]}.")
    if made.left_out:
        print(
            f"Left out {len(made.left_out)} tensors that the model has no use for, "
            f"{made.left_out[0]} the first."
        )
    is_bytes = config.vocab_size == ByteTokenizer.vocab_size
    if "tokenizer.json" not in made.companions and not is_bytes:
        print(
            f"There is no tokenizer.json in {args.model}: `ffjax generate` will have no "
            "tokenizer for this checkpoint.",
            file=sys.stderr,
        )
    elif (why := _unusable(args.out, config)) is not None:
        print(
            f"The tokenizer was copied as it is, and `ffjax generate` will refuse it: {why}",
            file=sys.stderr,
        )
    peak = peak_host_memory()
    took = f"{time.perf_counter() - start:.1f} s"
    print(
        f"convert took {took}" + (f" and {peak / 1e9:.2f} GB of host memory" if peak else ""),
        file=sys.stderr,
    )
    return 0
