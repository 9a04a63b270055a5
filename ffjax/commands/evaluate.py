"""Measures how well a checkpoint predicts a text: bits per byte and perplexity.

Every token of the text is predicted once, in windows of CONTEXT tokens that advance by half a
window: from the tokens before it in its window, which are at least half a window or all there
are. The bits of all tokens are divided by the text's bytes, so that models of different tokens
can be compared. A model of bytes reads end-of-text, the bytes, end-of-text, and its last
prediction counts too. A model with a tokenizer of its own reads text in UTF-8: BOS, or
end-of-text where its tokenizer knows no BOS, then the text's tokens; every window begins with
BOS, and the text's end is not predicted.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path

from ffjax.commands.folders import add_ignore_field, load_model

__all__ = ["HELP", "add_arguments", "run"]

HELP = "bits per byte and perplexity of a checkpoint on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax eval`."""
    parser.add_argument(
        "model",
        metavar="PATH",
        nargs="?",
        help="checkpoint, or Hugging Face folder; default: the shipped model",
    )
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="the text")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16 or float32, to which weights are cast; default: as they were saved",
    )
    parser.add_argument(
        "--context",
        metavar="CONTEXT",
        type=int,
        help="tokens a window, even; default: the model's positions, at most 2048",
    )
    parser.add_argument(
        "--batch", metavar="B", type=int, default=4, help="windows at a time; default: %(default)s"
    )
    add_ignore_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the figures on stdout, the progress on stderr where that is a terminal; or JSON."""
    import jax
    from tqdm import tqdm

    import checkpoints
    from ffjax.evaluate import evaluate
    from ffjax.tokenizer import load_tokenizer

    text = args.text.read_bytes()
    path = args.model or checkpoints.SHIPPED_MODEL
    model = load_model(args, path, args.dtype)
    tokenizer = load_tokenizer(path, model.config)
    # disable=None: where stderr is no terminal.
    bar = functools.partial(
        tqdm,
        desc="eval",
        unit="batch",
        file=sys.stderr,
        leave=False,
        disable=True if args.json else None,
    )
    start = time.perf_counter()
    result = evaluate(
        model,
        [text],
        tokenizer=tokenizer,
        context=args.context,
        batch=args.batch,
        progress=bar,
    )
    seconds = time.perf_counter() - start
    device, dtype = jax.devices()[0].device_kind, str(model.dtype)
    stored = [dtype, *filter(None, [str(model.config.weights)])]
    if args.json:
        report = {
            "bits_per_byte": _in_json(result.bits_per_byte),
            "perplexity": _in_json(result.perplexity),
            "bytes": result.bytes,
            "tokens": result.tokens,
            "context": result.context,
            "model": model.config.name,
            "dtype": dtype,
            "quantized": str(model.config.weights) or None,
            "device": device,
            "seconds": seconds,
        }
        print(json.dumps(report))
    else:
        print(
            f"{model.config.name}: {result.bits_per_byte:.4f} bits per byte, perplexity "
            f"{result.perplexity:.4f} a token, over {result.bytes} bytes of {args.text} "
            f"({', '.join(stored)}, windows of {result.context} on {device}, {seconds:.1f} s)"
        )
    return 0


def _in_json(figure: float) -> float | None:
    """JSON has no NaN and no infinity, which a broken model may earn."""
    return figure if math.isfinite(figure) else None
