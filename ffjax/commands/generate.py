"""Continues a text with a model, printing it as it comes."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from typing import Any, get_args

from ffjax.commands.folders import add_ignore_field, load_model
from ffjax.commands.options import number, seed, whole
from ffjax.decode import Implementation
from ffjax.prefill.choice import Prefill
from ffjax.startup import StartUp
from ffjax.tokenizer import Tokenizer

__all__ = ["HELP", "add_arguments", "run"]

HELP = "continue a text with a model"

# The command did its work, and the model's numbers are wrong.
_WRONG = 1
# What ended a text, in JSON, beside "stop" and "length".
_NOT_FINITE = "not_finite"
_INTERRUPTED = "interrupted"
# Python's words, and JSON's.
_JSON_OF = {"True": "true", "False": "false", "None": "null"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax generate`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint, or Hugging Face folder; default: the shipped model",
    )
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="take the prompt as a user's message, written by the model's chat template",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="which of the model's chat templates --chat takes; default: the one named default",
    )
    parser.add_argument(
        "--template-var",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable of the chat template, as in enable_thinking=false; the value is JSON, "
        "or a text as it stands; may be given several times",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=whole(1), default=200, help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=number(0),
        default=0.0,
        help="0, the default, takes the likeliest token; above, tokens are drawn",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=seed,
        default=0,
        help="of the draws, 0 to 2^64 - 1; default: %(default)s",
    )
    parser.add_argument(
        "--implementation",
        choices=get_args(Implementation),
        help="of the decode steps; default: the fused kernel where it can run",
    )
    parser.add_argument(
        "--prefill",
        choices=get_args(Prefill),
        help="implementation of the prefill: pallas, the fast one, or xla, the reference model; "
        "default: the fast one where it can run, but xla with --implementation xla",
    )
    add_ignore_field(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )


def run(args: argparse.Namespace) -> int:
    """Prints prompt and completion on stdout, a line of figures on stderr; or JSON.

    Where the logits become NaN or infinite, what came before is printed, and 1 returned. JSON has
    what came before Ctrl-C, too.
    """
    import checkpoints
    from ffjax.broken import NotFiniteError
    from ffjax.decode import device_of
    from ffjax.streaming import stream
    from ffjax.tokenizer import load_tokenizer

    start_up = StartUp()
    start_up.ended("imports")
    variables = _variables(args.template_var)
    if not args.chat and (args.chat_template is not None or variables):
        raise ValueError(
            "--chat-template and --template-var say how --chat writes the prompt, and it was not "
            "given. Give --chat, or leave them out."
        )
    _check_text(args.prompt)
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
    model = load_model(args, path)
    tokenizer = load_tokenizer(path, model.config)
    start_up.ended("model")
    if args.chat:
        prompt = _chat(tokenizer, args.prompt, args.chat_template, variables)
    else:
        prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise ValueError(
            "--prompt is empty, and this model's tokenizer puts nothing before a text. Give at "
            "least one character."
        )
    steps = stream(
        model,
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        stop_token=tokenizer.eot_ids,
        implementation=args.implementation,
        prefill=args.prefill,
    )
    start_up.ended("programs")
    show = (lambda text: None) if args.json else _show
    # The prompt goes through the same decoder: what a token says may depend on those before.
    decoder = tokenizer.stream()
    said = "".join([decoder.push(token) for token in prompt])
    show("" if args.chat else said)
    text: list[str] = []
    broken: NotFiniteError | KeyboardInterrupt | None = None
    try:
        for (token,) in steps:
            if "first_token" not in start_up.seconds:
                start_up.ended("first_token")
            if token is not None:
                text.append(decoder.push(token))
                show(text[-1])
    except (NotFiniteError, KeyboardInterrupt) as error:
        steps.close()
        broken = error
    if isinstance(broken, KeyboardInterrupt) and not args.json:
        raise broken
    text.append(decoder.finish())
    show(text[-1])
    out = steps.output
    [tokens], [finish_reason] = out.tokens, out.finish_reasons
    device = device_of(model).device_kind
    rate = out.tokens_per_second
    timed = math.isfinite(rate)
    if args.json:
        report = {
            "text": "".join(text),
            "tokens": tokens,
            "prompt_tokens": len(prompt),
            "finish_reason": finish_reason if broken is None else _ended_by(broken),
            # JSON has no NaN, which a text without decode steps has.
            "tokens_per_second": rate if timed else None,
            "implementation": out.implementation,
            "prefill": out.prefill,
            "device": device,
            "model": model.config.name,
            "seconds": out.prefill_seconds + out.decode_seconds,
            "prefill_seconds": out.prefill_seconds,
            "decode_seconds": out.decode_seconds,
            "compile_seconds": out.compile_seconds,
            "start_up_seconds": start_up.seconds,
        }
        print(json.dumps(report))
    else:
        show("\n")
    if isinstance(broken, KeyboardInterrupt):
        raise broken
    if broken is not None:
        print(f"ffjax generate: {broken}", file=sys.stderr)
        return _WRONG
    if not args.json:
        print(
            f"{model.config.name}: {len(tokens)} token{'' if len(tokens) == 1 else 's'}, "
            f"prefill {out.prefill_seconds:.3f} s, "
            f"{f'{rate:.1f} tokens/s' if timed else 'no decode steps'} "
            f"with {out.implementation!r} on {device} "
            f"(compiling took {out.compile_seconds:.1f} s, not counted)",
            file=sys.stderr,
        )
    return 0


def _ended_by(broken: BaseException) -> str:
    return _INTERRUPTED if isinstance(broken, KeyboardInterrupt) else _NOT_FINITE


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "--prompt is text in this terminal's encoding, and some of its bytes are not. Set "
            "PYTHONUTF8=1 or LC_ALL=C.UTF-8, or correct the text."
        ) from None


def _variables(given: list[str]) -> dict[str, Any]:
    """The variables of a chat template, from NAME=VALUE."""
    variables: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"--template-var takes NAME=VALUE, as in enable_thinking=false; got {one!r}."
            )
        if value in ("True", "False", "None"):
            raise ValueError(
                f"--template-var takes JSON, which writes {name}={_JSON_OF[value]}; got {one!r}. "
                f"For the text itself, give '{name}=\"{value}\"'."
            )
        try:
            variables[name] = json.loads(value)
        except (ValueError, RecursionError):
            variables[name] = value
    return variables


def _chat(
    tokenizer: Tokenizer, text: str, template: str | None, variables: dict[str, Any]
) -> list[int]:
    """The tokens of a conversation that the user opens with a text."""
    from ffjax.hf_tokenizer import HFTokenizer

    if not isinstance(tokenizer, HFTokenizer):
        raise ValueError(
            "--chat needs a chat template, and this model's tokens are bytes: it was not trained "
            "on conversations. Leave --chat out."
        )
    message = {"role": "user", "content": text}
    tokens = tokenizer.chat([message], template=template, variables=variables)
    source = tokenizer.chat_templates.get(template or "default")
    for name in variables:
        if source is not None and not re.search(rf"\b{name}\b", source.text):
            print(f"ffjax generate: The chat template reads no variable {name}.", file=sys.stderr)
    return tokens


def _show(text: str) -> None:
    if text:
        print(text, end="", flush=True)
