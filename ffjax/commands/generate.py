"""Continues a text with a model, printing it as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from typing import get_args

from ffjax.decode import Implementation

__all__ = ["HELP", "add_arguments", "run"]

HELP = "continue a text with a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax generate`."""
    parser.add_argument("--model", metavar="PATH", help="checkpoint; default: the shipped model")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=200, help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0, the default, takes the likeliest token; above, tokens are drawn",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="of the draws; default: %(default)s"
    )
    parser.add_argument(
        "--implementation",
        choices=get_args(Implementation),
        help="of the decode steps; default: the fused kernel where it can run",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )


def run(args: argparse.Namespace) -> int:
    """Prints prompt and completion on stdout, a line of figures on stderr; or JSON."""
    import jax

    import checkpoints
    from ffjax.streaming import stream
    from ffjax.tokenizer import ByteTokenizer

    path = args.model or checkpoints.SHIPPED_MODEL
    model = checkpoints.load(path)
    tokenizer = ByteTokenizer()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"The command line speaks bytes: it needs a vocabulary of {tokenizer.vocab_size}; "
            f"{model.config.name} has {model.config.vocab_size}. Use ffjax.generate with the "
            "model's own tokenizer."
        )
    prompt = tokenizer.encode(args.prompt)
    steps = stream(
        model,
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        stop_token=tokenizer.eot_id,
        implementation=args.implementation,
    )
    decoder = tokenizer.stream()
    show = (lambda text: None) if args.json else _show
    show(tokenizer.decode(prompt))
    for (token,) in steps:
        if token is not None:
            show(decoder.push(token))
    show(decoder.finish())
    out = steps.output
    device = jax.devices()[0].device_kind
    if args.json:
        report = {
            "text": tokenizer.decode(out.tokens[0]),
            "tokens": out.tokens[0],
            "prompt_tokens": len(prompt),
            "finish_reason": out.finish_reasons[0],
            "tokens_per_second": out.tokens_per_second,
            "implementation": out.implementation,
            "device": device,
            "model": model.config.name,
            "seconds": out.prefill_seconds + out.decode_seconds,
            "prefill_seconds": out.prefill_seconds,
            "decode_seconds": out.decode_seconds,
            "compile_seconds": out.compile_seconds,
        }
        print(json.dumps(report))
    else:
        show("\n")
        print(
            f"{model.config.name}: {len(out.tokens[0])} tokens, {out.tokens_per_second:.1f} "
            f"tokens/s with {out.implementation!r} on {device} "
            f"(compiling took {out.compile_seconds:.1f} s, not counted)",
            file=sys.stderr,
        )
    return 0


def _show(text: str) -> None:
    if text:
        print(text, end="", flush=True)
