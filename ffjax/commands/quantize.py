"""Makes a checkpoint whose matrices are integers with scales: half or a quarter of the bytes.

int8 has a scale a row, int4 one for every GROUP inputs of a row. Embedding, norms and biases stay
as they are; so does the head, unless --head says otherwise.

Rounding needs no text. With --calibrate it takes one: the reference reads it layer by layer, and
weights are rounded such that what each layer computes of it changes least (GPTQ). Take a text like
those that the model is for, and another one to measure it with.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffjax.commands.folders import add_ignore_field, load_model, notes_on_stderr
from ffjax.commands.formats import KINDS, OFFSETS
from ffjax.commands.options import share, whole
from ffjax.formats import DEFAULT_GROUP, GROUP_SIZES

if TYPE_CHECKING:
    from ffjax.calibration import Calibration
    from ffjax.config import ModelConfig

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
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        action="append",
        help="round for what the layers compute of this text; may be given several times",
    )
    parser.add_argument(
        "--sequences",
        metavar="N",
        type=whole(1),
        help="sequences of tokens that are cut from the texts, at most; default: 128",
    )
    parser.add_argument(
        "--length",
        metavar="T",
        type=whole(1),
        help="tokens of each; default: 512, or as many as the model has positions",
    )
    parser.add_argument(
        "--calibrate-batch",
        metavar="B",
        type=whole(1),
        help="sequences at a time, for the memory; default: 4",
    )
    parser.add_argument(
        "--dampening",
        metavar="PART",
        type=share(),
        help="part of the mean of its diagonal that is added to the diagonal of the sums of "
        "products of inputs; default: 0.01",
    )
    parser.add_argument(
        "--in-stored-order",
        action="store_true",
        help="round a matrix's inputs one after the other; default: those with the largest sums of "
        "squares first",
    )
    parser.add_argument(
        "--no-catching-up",
        action="store_true",
        help="do not make up for what the layers before are off by; takes half the time",
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
    texts = _read(args)
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
        made_from: dict[str, Any] = {"format": "quantized", "of": {"name": name, "source": source}}
        calibration = None
        if texts:
            calibration = _calibration(args, texts, model.config)
            files = [{"name": Path(n).name, "sha256": _digest(text)} for n, text in texts.items()]
            made_from = {**made_from, "calibration": {**calibration.to_dict(), "texts": files}}
        with byte_bar("quantize") as progress:
            how = {"head": args.head, "offset": args.offset, "progress": progress}
            model = quantize(model, args.weights, group, calibration=calibration, **how)
        checkpoints.save(
            model,
            out,
            source=made_from,
            tokenizer_from=tokenizer,
            overwrite=args.overwrite,
        )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.out}: {name}, {model.config.weights}; {size:,} bytes")
    print(f"quantize took {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


# What is said of a calibration, by the options' names.
_OF_CALIBRATION = (
    *("sequences", "length", "calibrate_batch", "dampening"),
    *("in_stored_order", "no_catching_up"),
)


def _read(args: argparse.Namespace) -> dict[str, bytes]:
    """The calibration texts, by the files' names.

    Raises:
        ValueError: what only calibration has was asked for without any.
        OSError: a file cannot be read.
    """
    if not args.calibrate:
        for name in _OF_CALIBRATION:
            value = getattr(args, name)
            if value is not None and value is not False:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{option} is of calibration. Give --calibrate FILE, or leave it out."
                )
        return {}
    if "" in args.calibrate:
        raise ValueError("--calibrate is empty. Give a file.")
    return {name: Path(name).expanduser().read_bytes() for name in args.calibrate}


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _calibration(
    args: argparse.Namespace, texts: dict[str, bytes], config: ModelConfig
) -> Calibration:
    """What was asked for."""
    from ffjax.calibration import DAMPENING, Calibration
    from ffjax.calibration_text import LENGTH, SEQUENCES, calibration_tokens
    from ffjax.text.tokenizers import load_tokenizer

    tokens = calibration_tokens(
        list(texts.values()),
        load_tokenizer(args.model, config),
        sequences=args.sequences or SEQUENCES,
        length=args.length or min(LENGTH, config.max_context),
    )
    # A text may be too short for as many; inputs of a matrix want several times as many tokens.
    most = max(config.model_dim, config.num_heads * config.head_dim, config.ffw_dim)
    few = f", fewer than the {most} inputs of a matrix: a longer text rounds better"
    print(
        f"calibrating with {tokens.shape[0]} sequences of {tokens.shape[1]} tokens"
        f"{few if tokens.size < most else ''}",
        file=sys.stderr,
    )
    return Calibration(
        tokens=tokens,
        batch=args.calibrate_batch or 4,
        dampening=DAMPENING if args.dampening is None else args.dampening,
        order="stored" if args.in_stored_order else "largest",
        catch_up=not args.no_catching_up,
    )
