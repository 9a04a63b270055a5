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
from ffjax.commands.options import DTYPES, whole

__all__ = ["HELP", "add_arguments", "run"]

HELP = "bits per byte and perplexity of a checkpoint on a text"

# The command did its work, and the model's numbers are wrong.
_WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax eval`."""
    parser.add_argument(
        "model",
        metavar="PATH",
        nargs="?",
        help="checkpoint, Hugging Face folder or GGUF file; default: the shipped model",
    )
    parser.add_argument(
        "--text", metavar="FILE", required=True, help="the text; - reads standard input"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to which weights are cast; default: as they were saved",
    )
    parser.add_argument(
        "--context",
        metavar="CONTEXT",
        type=whole(2, even=True),
        help="tokens a window, even; default: the model's positions, at most 2048",
    )
    parser.add_argument(
        "--batch",
        metavar="B",
        type=whole(1),
        default=4,
        help="windows at a time; default: %(default)s",
    )
    add_ignore_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the figures on stdout, the progress on stderr where that is a terminal; or JSON."""
    import jax
    from tqdm import tqdm

    import checkpoints
    from ffjax.evaluate import evaluate
    from ffjax.text.tokenizers import load_tokenizer

    text = _read(args.text)
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
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
    if not math.isfinite(result.bits_per_byte):
        print(
            f"ffjax eval: {model.config.name} gives no finite probabilities: see ffjax doctor "
            f"{args.model or ''}".rstrip()
            + ".",
            file=sys.stderr,
        )
        return _WRONG
    return 0


def _read(name: str) -> bytes:
    if not name:
        raise ValueError("--text is empty. Give a file, or - for standard input.")
    return sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()


def _in_json(figure: float) -> float | None:
    """JSON has no NaN and no infinity, which a broken model may earn."""
    return figure if math.isfinite(figure) else None
