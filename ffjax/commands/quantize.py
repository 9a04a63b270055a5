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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ffjax.commands.folders import (
    add_ignore_field,
    check_nothing_ignored,
    load_model,
    notes_on_stderr,
)
from ffjax.commands.formats import KINDS, OFFSETS
from ffjax.commands.options import share, whole
from ffjax.formats import DEFAULT_GROUP, GROUP_SIZES

if TYPE_CHECKING:
    import numpy as np

    from checkpoints.blocks import Block
    from ffjax.calibration import Calibration
    from ffjax.config import ModelConfig
    from ffjax.formats import WeightFormats

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
    from checkpoints.places import check_apart, check_free, model_path, real_path
    from ffjax.commands.progress import byte_bar, peak_host_memory

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
    given = _open(args, path)
    made_from = {"format": "quantized", "of": {"name": given.config.name, "source": given.source}}
    with checkpoints.tokenizer_at(path) as tokenizer, byte_bar("quantize") as progress:
        if texts:
            formats = _calibrated(args, given, texts, made_from, tokenizer, progress)
        else:
            formats = _streamed(args, given, made_from, tokenizer, progress)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.out}: {given.config.name}, {formats}; {size:,} bytes")
    peak = peak_host_memory()
    took = f"{time.perf_counter() - start:.1f} s"
    print(
        f"quantize took {took}" + (f" and {peak / 1e9:.2f} GB of host memory" if peak else ""),
        file=sys.stderr,
    )
    return 0


class _Given(NamedTuple):
    """The model that there is, its numbers not yet read.

    Attributes:
        config: its configuration, of whole numbers.
        dtype: of its weights.
        source: where they come from, for the manifest.
        blocks: of its arrays.
    """

    config: ModelConfig
    dtype: np.dtype
    source: dict[str, Any] | None
    blocks: Iterator[Block]


def _open(args: argparse.Namespace, path: Path) -> _Given:
    """Opens the model; what there is to say of a folder is on stderr.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: it is damaged or not supported; or fields are to be ignored, and it is a
            checkpoint.
        NotImplementedError: a package that it needs is not installed.
    """
    import jax.numpy as jnp
    import numpy as np

    from checkpoints.incoming import say_rounded
    from checkpoints.opening import comes_in, open_incoming
    from checkpoints.store import read_checkpoint

    if not comes_in(path):
        if path.exists():
            check_nothing_ignored(args, str(path))
        manifest, blocks = read_checkpoint(path)
        return _Given(manifest.config, np.dtype(manifest.dtype), manifest.source, blocks)
    dtype = np.dtype(jnp.bfloat16)
    with notes_on_stderr("quantize"):
        incoming = open_incoming(path, ignore_fields=args.ignore_field, integers=False)
        say_rounded(incoming, dtype)
    source = incoming.source(dtype, args.ignore_field)
    return _Given(incoming.config, dtype, source, incoming.blocks(dtype))


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The formats that were asked for, as `ffjax.quantize` takes them."""
    group = DEFAULT_GROUP if args.group_size is None else args.group_size
    how = {"group_size": group, "head": args.head, "offset": args.offset}
    return {"weights": args.weights, **how}


def _streamed(
    args: argparse.Namespace,
    given: _Given,
    made_from: dict[str, Any],
    tokenizer: Path | None,
    progress: Callable[[int, int], None],
) -> WeightFormats:
    """Makes the checkpoint block by block, without a model in memory; returns its formats."""
    from checkpoints.manifest import Manifest
    from checkpoints.places import real_path
    from checkpoints.quantizing import quantized_blocks
    from checkpoints.skeleton import array_shapes
    from checkpoints.store import write_checkpoint
    from ffjax.quantization import named_formats, quantized_config
    from ffjax.settings import own_settings

    config = quantized_config(given.config, named_formats(**_asked(args)))
    with own_settings():
        write_checkpoint(
            Manifest(config=config, dtype=given.dtype.name, source=made_from, files={}),
            array_shapes(config, given.dtype),
            quantized_blocks(given.config, config, given.blocks, given.dtype, progress),
            real_path(args.out),
            tokenizer,
            overwrite=args.overwrite,
        )
    return config.weights


def _calibrated(
    args: argparse.Namespace,
    given: _Given,
    texts: dict[str, bytes],
    made_from: dict[str, Any],
    tokenizer: Path | None,
    progress: Callable[[int, int], None],
) -> WeightFormats:
    """Makes the checkpoint of a model that reads the texts, on the device; returns its formats."""
    import checkpoints
    from checkpoints.places import model_path, real_path
    from ffjax.quantization import quantize

    model = load_model(args, model_path(args.model), said=True, integers=False)
    calibration = _calibration(args, texts, given.config)
    files = [{"name": Path(name).name, "sha256": _digest(text)} for name, text in texts.items()]
    made_from = {**made_from, "calibration": {**calibration.to_dict(), "texts": files}}
    model = quantize(model, **_asked(args), calibration=calibration, progress=progress)
    checkpoints.save(
        model,
        real_path(args.out),
        source=made_from,
        tokenizer_from=tokenizer,
        overwrite=args.overwrite,
    )
    return model.config.weights


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
