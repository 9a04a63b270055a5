"""Talks with a model in a terminal, or answers each line of a pipe.

/help lists what can be done between messages; Ctrl-C stops an answer, Ctrl-D leaves. The cache is
kept from turn to turn, so that only new text is read. How tokens are chosen is as options say,
else as the model's generation_config.json does, else greedy.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ffjax.commands.chat_options import add_chat_template, say_unread, template_variables
from ffjax.commands.folders import add_ignore_field, load_model
from ffjax.commands.implementations import add_implementations
from ffjax.commands.sampling_options import add_sampling, given_sampling, say_defaults
from ffjax.commands.speculation_options import add_speculation, given_speculation

if TYPE_CHECKING:
    from ffjax.tokenizer import Tokenizer

__all__ = ["HELP", "add_arguments", "run"]

HELP = "talk with a model"

# The command did its work, and the model's numbers are wrong.
_WRONG = 1
_MAX_NEW_TOKENS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax chat`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint, Hugging Face folder or GGUF file of a model with a chat template",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="the system message; default: the template's own, or none"
    )
    parser.add_argument(
        "--load", metavar="FILE", help="messages that /save has written, to go on with"
    )
    add_chat_template(parser)
    parser.add_argument(
        "--no-figures",
        dest="figures",
        action="store_false",
        help="print no line of figures after each answer",
    )
    parser.add_argument(
        "--no-history",
        dest="history",
        action="store_false",
        help="neither read nor keep the lines of earlier chats",
    )
    add_sampling(parser, max_new_tokens=_MAX_NEW_TOKENS, in_json=False)
    add_speculation(parser)
    add_implementations(parser)
    add_ignore_field(parser)


def run(args: argparse.Namespace) -> int:
    """Prints answers on stdout, all else on stderr."""
    import checkpoints
    from ffjax.broken import NotFiniteError
    from ffjax.decode import device_of
    from ffjax.speculation.draft import shortest_context
    from ffjax.terminal.chat import Chat
    from ffjax.terminal.commands import complete
    from ffjax.terminal.history import default_file
    from ffjax.terminal.lines import lines_for
    from ffjax.terminal.saved import read_messages
    from ffjax.terminal.screen import Screen
    from ffjax.terminal.settings import names
    from ffjax.text.defaults import default_sampling
    from ffjax.text.generator import Generator
    from ffjax.text.tokenizers import load_tokenizer

    variables = template_variables(args.template_var)
    messages = [] if args.load is None else read_messages(Path(args.load))
    screen = Screen(os.environ)
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
    if screen.interactive:
        screen.note(f"Loading {path} ...")
    model = load_model(args, path)
    tokenizer = load_tokenizer(path, model.config)
    _check_template(tokenizer, args.chat_template, given=args.model is not None)
    say_unread(args.command, tokenizer, args.chat_template, variables)
    defaults = default_sampling(path)
    say_defaults(args, defaults)
    sampling = given_sampling(args, defaults)
    if sampling.max_tokens is None:
        most = max(_MAX_NEW_TOKENS, sampling.min_tokens)
        sampling = dataclasses.replace(sampling, max_tokens=most)
    speculation = given_speculation(args, model)
    generator = Generator(
        model,
        tokenizer,
        implementation=args.implementation,
        prefill=args.prefill,
        speculation=speculation,
    )
    chat = Chat(
        generator.session,
        sampling,
        screen,
        lines_for(
            screen,
            lambda line: complete(line, names(sampling)),
            default_file() if args.history else None,
        ),
        context=shortest_context(model, speculation).max_context,
        shows_figures=args.figures,
        shows_traceback=args.traceback,
        how={"template": args.chat_template, "variables": variables},
    )
    chat.conversation.messages = messages
    if args.load is not None:
        chat.files.add(Path(os.path.abspath(args.load)))
    if args.system is not None:
        chat.conversation.system = args.system
    if screen.interactive:
        screen.note(
            f"{model.config.name} on {device_of(model).device_kind}. /help lists the commands, "
            "Ctrl-D leaves."
        )
    try:
        chat.run()
    except NotFiniteError as error:  # in a pipe
        print(f"ffjax chat: {error}", file=sys.stderr)
        return _WRONG
    return 0


def _check_template(tokenizer: Tokenizer, name: str | None, *, given: bool) -> None:
    """Refuses a model that was not trained on conversations.

    Args:
        tokenizer: the model's.
        name: which template is asked for.
        given: whether --model was.

    Raises:
        ValueError: the tokenizer has no chat template, or none of that name.
    """
    from ffjax.chat_files import choose_template

    templates = getattr(tokenizer, "chat_templates", {})
    if not templates:
        whose = "this model" if given else "the shipped model"
        raise ValueError(
            f"A chat needs a model with a chat template, and {whose} has none: it was probably not "
            "trained on conversations. Give --model the folder of one that was, such as "
            "SmolLM2-135M-Instruct; or have ffjax generate --prompt continue a text."
        )
    choose_template(templates, name, tools=False)
