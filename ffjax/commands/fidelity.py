"""The fidelity gate: is the fused kernel at least as close to float32 as the bfloat16 model is?

The reference is the model in float32, with the same weights: bfloat16 ones, or what integers and
scales stand for. For the KL divergence of
the logits and for the absolute difference of the next token's negative log-likelihood, the mean
over prompts of kernel minus bfloat16 model, and the upper 95% bound of a paired bootstrap over
prompts, may not be above zero. Prompts are held-out text of the shipped model's kind, in the
checkpoint's own tokens; with --config, weights and prompts are random, and --weights and --head say
how the weights are stored. Exit code 0: the gate
passes; 1: it fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from ffjax.commands.folders import add_ignore_field, check_nothing_ignored, load_model
from ffjax.commands.formats import add_format_arguments, chosen_config
from ffjax.commands.implementations import add_implementation
from ffjax.commands.options import seed, whole
from ffjax.config import PRESETS
from ffjax.failures import without_advice

if TYPE_CHECKING:
    from ffjax.fidelity import Comparison, Estimate, Fidelity

__all__ = ["HELP", "add_arguments", "run"]

HELP = "the gate: the kernel is no further from float32 than the bfloat16 model"

# Steps of a prompt when nobody says: several tiles of attention's keys; or what an interpreted
# kernel does in a minute.
_TOKENS, _TOKENS_INTERPRETED = 256, 16
_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax fidelity`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint, Hugging Face folder or GGUF file, or org/name of the Hugging Face cache; "
        "default: the shipped model",
    )
    what.add_argument("--config", metavar="NAME", help=f"random weights: {', '.join(PRESETS)}")
    add_format_arguments(parser)
    parser.add_argument(
        "--prompts", metavar="N", type=whole(2), default=16, help="default: %(default)s"
    )
    parser.add_argument(
        "--tokens",
        metavar="T",
        type=whole(1),
        help=f"decode steps a prompt; default: {_TOKENS}, interpreted {_TOKENS_INTERPRETED}",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        default=0,
        help="of the choice of prompts, and of random weights; default: %(default)s",
    )
    parser.add_argument(
        "--batch",
        metavar="B",
        type=whole(1),
        default=8,
        help="prompts side by side; default: %(default)s",
    )
    add_implementation(
        parser,
        "to be judged; default: the fused kernel, its body interpreted for a small model "
        "where it cannot be launched",
    )
    add_ignore_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints a table on stdout, or JSON; returns 1 where the gate fails."""
    import jax
    import jax.numpy as jnp
    from tqdm import tqdm

    import checkpoints
    from ffjax import fidelity
    from ffjax.text.tokenizers import load_tokenizer

    if args.config is None and (args.weights is not None or args.head is not None):
        raise ValueError(
            "--weights and --head say how the random weights of --config are made; a checkpoint "
            "is in the format that it was saved in. Give --config, or quantize the checkpoint "
            "first, with ffjax quantize."
        )
    if args.config is not None:
        check_nothing_ignored(args, f"--config {args.config}")
    start = time.perf_counter()
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
    if args.config is None:
        model = load_model(args, path, jnp.bfloat16)
        config = model.config
    else:
        # Made later: what cannot run here is refused before gigabytes are filled.
        model, config = None, chosen_config(args)
    batch = min(args.batch, args.prompts)
    longest = _TOKENS if args.tokens is None else args.tokens
    candidate = fidelity.choose_candidate(config, batch, longest, args.implementation)
    tokens = args.tokens
    if tokens is None:
        default = _TOKENS if candidate.why_interpreted is None else _TOKENS_INTERPRETED
        tokens = min(default, config.max_context)
    if model is None:
        prompts = fidelity.random_prompts(config, args.prompts, tokens, args.seed)
        model = fidelity.random_model(config, args.seed)
    else:
        tokenizer = load_tokenizer(path, config)
        prompts = fidelity.held_out_prompts(args.prompts, tokens, args.seed, tokenizer=tokenizer)
    if not args.json and candidate.why_interpreted is not None:
        print(
            f"The candidate is the kernel's body, interpreted: "
            f"{without_advice(candidate.why_interpreted)}",
            file=sys.stderr,
        )
    # disable=None: where stderr is no terminal.
    bar = functools.partial(
        tqdm,
        desc="fidelity",
        unit="step",
        file=sys.stderr,
        leave=False,
        disable=True if args.json else None,
    )
    result = fidelity.measure(model, prompts, candidate.step, batch=batch, progress=bar)
    facts = {
        "model": config.name,
        "weights": "random" if args.config else "trained",
        "quantized": str(config.weights) or None,
        "implementation": candidate.implementation,
        "interpreted": candidate.why_interpreted is not None,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "prompts": args.prompts,
        "tokens": tokens,
        "batch": batch,
        "seed": args.seed,
    }
    if args.json:
        facts["seconds"] = time.perf_counter() - start
        print(json.dumps(_report(facts, result), allow_nan=False))
    else:
        print(_table(facts, result))
    return 0 if result.passed else _FAILED


def _in_json(figure: float) -> float | None:
    """JSON has no NaN and no infinity, which a broken kernel may earn."""
    return figure if math.isfinite(figure) else None


def _report(facts: dict[str, Any], result: Fidelity) -> dict[str, Any]:
    report = {"passed": result.passed, **facts, "reference_nll": _in_json(result.reference_nll)}
    for name, comparison in (("kl", result.kl), ("nll", result.nll)):
        report[name] = {"passed": comparison.passed} | {
            who: {what: _in_json(figure) for what, figure in estimate._asdict().items()}
            for who, estimate in _estimates(comparison)
        }
    return report


def _estimates(comparison: Comparison) -> list[tuple[str, Estimate]]:
    return [
        ("candidate", comparison.candidate),
        ("baseline", comparison.baseline),
        ("difference", comparison.difference),
    ]


def _table(facts: dict[str, Any], result: Fidelity) -> str:
    kernel = {
        "pallas": "fused kernel",
        "pallas_mosaic_gpu": "fused kernel by Mosaic GPU",
        "xla": "bfloat16 again",
    }[facts["implementation"]]
    if facts["interpreted"]:
        kernel += ", interpreted"
    stored = f" ({facts['quantized']})" if facts["quantized"] else ""
    names = {"candidate": kernel, "baseline": "bfloat16 model", "difference": "difference"}
    lines = [
        f"{facts['model']}, {facts['weights']} weights{stored}: {facts['prompts']} prompts of "
        f"{facts['tokens']} tokens, {facts['batch']} side by side, on {facts['device']}",
        f"Distance from the model in float32, of which a token's NLL is "
        f"{result.reference_nll:.4f} nats",
        "",
        f"{'nats a position':28}{'mean':>12}{'upper 95% bound':>18}",
    ]
    for title, comparison in (("KL divergence", result.kl), ("|NLL difference|", result.nll)):
        lines.append(title)
        for who, estimate in _estimates(comparison):
            lines.append(f"  {names[who]:26}{estimate.mean:12.3e}{estimate.upper:18.3e}")
        lines[-1] += "  passes" if comparison.passed else "  FAILS"
    lines += ["", f"The gate {'passes' if result.passed else 'FAILS'}."]
    return "\n".join(lines)
