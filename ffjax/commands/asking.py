"""What a prompt of the command line asks of the model, checked before anything runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ffjax.commands.completions import count_of
from ffjax.commands.prompts import Prompt
from ffjax.commands.sampling_options import in_options

if TYPE_CHECKING:
    from ffjax.text.asked import Asked
    from ffjax.text.generator import Generator

__all__ = ["asked_of"]


def asked_of(
    args: argparse.Namespace,
    generator: Generator,
    prompt: Prompt,
    variables: Mapping[str, Any],
    max_new_tokens: int,
) -> Asked:
    """A prompt's token ids, and how to go on from them.

    Args:
        args: the command line, with `chat`, `chat_template` and `samples`.
        generator: the model, its tokenizer, and how tokens are chosen.
        prompt: the prompt.
        variables: of the chat template.
        max_new_tokens: as many new tokens, as far as there is room, where nobody says how many.

    Raises:
        ValueError: the model cannot do that; the message says which prompt it is.
    """
    from ffjax.requests import check_params
    from ffjax.text.asked import Asked, with_overrides
    from ffjax.tokenizer import check_known

    config = generator.model.config
    with _named(prompt):
        params = with_overrides(generator.sampling, prompt.options)
        check_params(dataclasses.replace(params, stop=()), config)
    tokens = _tokens(args, generator, prompt, variables)
    with _named(prompt):
        check_known("the prompt", tokens, config)
        room = config.max_context - len(tokens)
        most = params.max_tokens
        if most is None:
            most = max(min(max(max_new_tokens, params.min_tokens), room), 1)
        if most > room:
            raise ValueError(
                f"A prompt of {count_of(len(tokens), 'token')} and {most} new ones need "
                f"{len(tokens) + most} positions; {config.name} was made for "
                f"{config.max_context}. Shorten the prompt or ask for fewer tokens."
            )
        params = with_overrides(
            params,
            {
                "max_tokens": most,
                "min_tokens": min(params.min_tokens, most),
                "seed": params.seed or 0,
            },
        )
        if args.samples > 1 and params.greedy:
            raise ValueError(
                f"-n asks for {args.samples} texts of a prompt, and the likeliest tokens make the "
                "same one each time. Give --temperature, too."
            )
    return Asked(tokens, params)


def _tokens(
    args: argparse.Namespace, generator: Generator, prompt: Prompt, variables: Mapping[str, Any]
) -> list[int]:
    from ffjax.hf_tokenizer import HFTokenizer
    from ffjax.text.conversation import conversation_tokens

    tokenizer = generator.tokenizer
    messages = prompt.messages
    if messages is None and args.chat:
        messages = [{"role": "user", "content": prompt.text}]
    if messages is not None and not isinstance(tokenizer, HFTokenizer):
        what = "--chat" if prompt.messages is None else f"{prompt.where} has messages: that"
        raise ValueError(
            f"{what} needs a chat template, and this model's tokens are bytes: it was not trained "
            f"on conversations. {'Leave --chat out' if prompt.messages is None else 'Give texts'}."
        )
    with _named(prompt):
        if messages is not None:
            how = {"tools": prompt.tools, "template": args.chat_template, "variables": variables}
            return conversation_tokens(tokenizer, messages, **how)
        tokens = tokenizer.encode(prompt.text or "")
    if not tokens:
        raise ValueError(
            f"{prompt.where} is empty, and this model's tokenizer puts nothing before a text. "
            "Give at least one character."
        )
    return tokens


@contextlib.contextmanager
def _named(prompt: Prompt) -> Iterator[None]:
    """Within it, errors begin with the line that a prompt comes from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if prompt.line is None:
            raise ValueError(in_options(str(error))) from error
        raise ValueError(f"{prompt.where}: {error}") from error
