"""Continues a text with a model, printing it as it comes; or many texts.

How tokens are chosen is as options say, else as the model's generation_config.json does, else
greedy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ffjax.commands.asking import asked_of
from ffjax.commands.chat_options import add_chat_template, say_unread, template_variables
from ffjax.commands.completions import as_json, count_of, ended_by
from ffjax.commands.folders import add_ignore_field, load_model
from ffjax.commands.generate_many import write_many
from ffjax.commands.implementations import add_implementations
from ffjax.commands.options import whole
from ffjax.commands.prompts import Prompt, add_prompts, read_prompts
from ffjax.commands.sampling_options import add_sampling, given_sampling, say_defaults
from ffjax.commands.speculation_options import add_speculation, given_speculation
from ffjax.startup import StartUp

if TYPE_CHECKING:
    from ffjax.text.generator import Generator

__all__ = ["HELP", "add_arguments", "run"]

HELP = "continue a text with a model"

# The command did its work, and the model's numbers are wrong.
_WRONG = 1
_MAX_NEW_TOKENS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax generate`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint, Hugging Face folder or GGUF file; default: the shipped model",
    )
    add_prompts(parser)
    parser.add_argument(
        "-n",
        dest="samples",
        metavar="N",
        type=whole(1),
        default=1,
        help="texts of each prompt, each with a seed one higher; default: %(default)s",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="take each prompt as a user's message, written by the model's chat template",
    )
    add_chat_template(parser)
    add_sampling(parser, max_new_tokens=_MAX_NEW_TOKENS)
    add_implementations(parser)
    add_speculation(parser)
    add_ignore_field(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of the text; with -n, one a line for each",
    )


def run(args: argparse.Namespace) -> int:
    """Prints prompt and completion on stdout, a line of figures on stderr; or JSON.

    Where the logits become NaN or infinite, what came before is printed, and 1 returned. JSON has
    what came before Ctrl-C, too.
    """
    import checkpoints
    from ffjax.text.defaults import default_sampling
    from ffjax.text.generator import Generator
    from ffjax.text.tokenizers import load_tokenizer

    start_up = StartUp()
    start_up.ended("imports")
    variables = template_variables(args.template_var)
    prompts = read_prompts(args)
    chats = args.chat or any(prompt.messages is not None for prompt in prompts)
    if not chats and (args.chat_template is not None or variables):
        raise ValueError(
            "--chat-template and --template-var say how --chat writes the prompt, and it was not "
            "given. Give --chat, or leave them out."
        )
    if args.logprobs is not None and not args.json and args.prompts is None:
        raise ValueError("--logprobs is for JSON, which has room for them. Give --json, too.")
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
    model = load_model(args, path)
    tokenizer = load_tokenizer(path, model.config)
    defaults = default_sampling(path)
    say_defaults(args, defaults)
    speculation = given_speculation(args, model)
    generator = Generator(
        model,
        tokenizer,
        sampling=given_sampling(args, defaults),
        implementation=args.implementation,
        prefill=args.prefill,
        speculation=speculation,
    )
    start_up.ended("model")
    if chats:
        say_unread(args.command, tokenizer, args.chat_template, variables)
    if args.prompts is not None or args.samples > 1:
        many = args, generator, prompts, variables, _MAX_NEW_TOKENS
        return write_many(*many, speculation=speculation)
    return _write(args, generator, prompts[0], variables, start_up)


def _write(
    args: argparse.Namespace,
    generator: Generator,
    prompt: Prompt,
    variables: Mapping[str, Any],
    start_up: StartUp,
) -> int:
    """Writes one text, as it comes."""
    from ffjax.broken import NotFiniteError
    from ffjax.decode import device_of

    asked = asked_of(args, generator, prompt, variables, _MAX_NEW_TOKENS)
    stream = generator.stream_asked(asked)
    start_up.ended("programs")
    show = (lambda text: None) if args.json else _show
    # The prompt as the tokenizer reads it.
    show("" if args.chat else generator.tokenizer.decode(asked.prompt))
    shown = 0
    broken: NotFiniteError | KeyboardInterrupt | None = None
    try:
        for piece in stream:
            if "first_token" not in start_up.seconds:
                start_up.ended("first_token")
            show(piece)
            shown += len(piece)
    except (NotFiniteError, KeyboardInterrupt) as error:
        stream.close()
        broken = error
    if isinstance(broken, KeyboardInterrupt) and not args.json:
        raise broken
    out = stream.completion
    show(out.text[shown:])
    model = generator.model
    device = device_of(model).device_kind
    if args.json:
        report = {
            **as_json(out, ended_by(broken, out)),
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
        rate = out.tokens_per_second
        each = "" if out.accepted is None else f"{out.tokens_per_step:.2f} tokens a step, "
        print(
            f"{model.config.name}: {count_of(len(out.tokens), 'token')}, "
            f"prefill {out.prefill_seconds:.3f} s, {each if math.isfinite(rate) else ''}"
            f"{f'{rate:.1f} tokens/s' if math.isfinite(rate) else 'no decode steps'} "
            f"with {out.implementation!r} on {device} "
            f"(compiling took {out.compile_seconds:.1f} s, not counted)",
            file=sys.stderr,
        )
    return 0


def _show(text: str) -> None:
    if text:
        print(text, end="", flush=True)
