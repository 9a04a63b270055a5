"""Serves a model to programs that speak OpenAI's protocol, and a chat page to a browser.

Requests join and leave a batch between blocks of decode steps; a conversation's next turn goes on
in its cache. Ctrl-C or SIGTERM lets running answers end, for the seconds of --grace. /health says
whether requests are taken, /metrics has figures for Prometheus. Needs the extra serve: pip install
'ffjax[serve]'.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from typing import TYPE_CHECKING

from ffjax.commands.folders import add_ignore_field, load_model
from ffjax.commands.implementations import add_implementations
from ffjax.commands.options import number, whole
from ffjax.commands.speculation_options import (
    add_speculation,
    check_speculation,
    given_speculation,
)
from ffjax.config import LongRopeScaling, ModelConfig
from ffjax.sampling.params import MAX_LOGPROBS
from ffjax.speculation.choice import MAX_SEQUENCES, live_speculation
from pallas_kernels.support import MAX_BATCH

if TYPE_CHECKING:
    from ffjax.serve.batch import Batch

__all__ = ["HELP", "add_arguments", "default_capacity", "run"]

HELP = "serve a model by OpenAI's protocol"

_KEY = "FFJAX_API_KEY"
_CAPACITY = 4096
_CHUNK = 512


def default_capacity(config: ModelConfig, most: int) -> int:
    """Positions for a prompt and its answer, where nobody says how many.

    LongRoPE has other frequencies for a cache of more slots than the original context, with which
    short texts are computed less well: the default stays below.

    Args:
        config: the model's.
        most: positions that the models were made for.
    """
    from ffjax.loop import capacity_within

    capacity, scaling = min(_CAPACITY, most), config.rope_scaling
    if isinstance(scaling, LongRopeScaling):
        capacity = min(capacity, capacity_within(scaling.original_context) or capacity)
    return capacity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax serve`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="checkpoint, Hugging Face folder or GGUF file; default: the shipped model",
    )
    parser.add_argument(
        "--name", metavar="NAME", help="of the model, as requests have it; default: its own"
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="0.0.0.0 or :: for all of this machine's; default: %(default)s, for it alone",
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=whole(0, 65535),
        default=8000,
        help="0: any that is free; default: %(default)s",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what requests must show; default: what the environment variable {_KEY} holds, "
        "which other users of this machine do not see, or none",
    )
    parser.add_argument(
        "--batch",
        metavar="B",
        type=whole(1, MAX_BATCH),
        help=f"texts that are written side by side, 1 to {MAX_BATCH}; default: {MAX_BATCH}, with "
        f"speculation {MAX_SEQUENCES}, which is the most then",
    )
    parser.add_argument(
        "--capacity",
        metavar="N",
        type=whole(2),
        help=f"positions for a prompt and its answer; default: {_CAPACITY}, or as many as the "
        "model, and a draft model, was made for, or has short factors for (LongRoPE)",
    )
    parser.add_argument(
        "--max-queue",
        metavar="N",
        type=whole(0),
        default=64,
        help="texts that may wait for a place; others are refused; default: %(default)s",
    )
    parser.add_argument(
        "--max-logprobs",
        metavar="K",
        type=whole(0, MAX_LOGPROBS),
        default=MAX_LOGPROBS,
        help="most alternatives that are told at a token; default: %(default)s",
    )
    parser.add_argument(
        "--no-cache-reuse",
        dest="cache_reuse",
        action="store_false",
        help="feed every prompt as a whole, whatever a cache holds of it",
    )
    parser.add_argument(
        "--grace",
        metavar="S",
        type=number(0),
        default=10.0,
        help="seconds that running answers are given at the end; default: %(default)g",
    )
    parser.add_argument("--quiet", action="store_true", help="write no line for each answer")
    add_speculation(parser)
    add_implementations(parser)
    add_ignore_field(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes; what it does is said on stderr."""
    try:
        from ffjax.serve.server import Options, Server, bound, is_local
    except ImportError as error:
        raise NotImplementedError(
            f"A server needs the package {(error.name or '').partition('.')[0]}. Install it with: "
            "pip install 'ffjax[serve]'."
        ) from error
    import checkpoints
    from ffjax.decode import device_of
    from ffjax.live import LiveBatch
    from ffjax.speculation.draft import Draft, shortest_context
    from ffjax.text.defaults import default_sampling, described
    from ffjax.text.tokenizers import load_tokenizer

    key = _key(args)
    asking = check_speculation(args)
    rows = args.batch or (MAX_BATCH if asking is None else MAX_SEQUENCES)
    if asking is not None and rows > MAX_SEQUENCES:
        raise ValueError(
            f"{asking} takes --batch 1 to {MAX_SEQUENCES}, since a step has room for "
            f"{MAX_BATCH} tokens; got --batch {rows}. Give fewer, or leave {asking} out."
        )
    each = args.speculation_tokens or 1
    if rows * each > MAX_BATCH:
        raise ValueError(
            f"A step has room for {MAX_BATCH} tokens, of all texts together; --speculation-tokens "
            f"{each} takes so many of each, and --batch is {rows}. Give --speculation-tokens "
            f"{MAX_BATCH // rows}, or --batch {MAX_BATCH // each}."
        )
    with bound(args.host, args.port) as sock:
        path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
        model = load_model(args, path)
        config = model.config
        tokenizer = load_tokenizer(path, config)
        defaults = default_sampling(path)
        name = args.name or config.name
        speculation = given_speculation(args, model)
        shortest = shortest_context(model, speculation)
        capacity = args.capacity or default_capacity(config, shortest.max_context)
        if capacity > shortest.max_context:
            whose = "the model" if shortest is config else f"the draft model {shortest.name}"
            raise ValueError(
                f"--capacity is at most what {whose} was made for, {shortest.max_context}; got "
                f"{capacity}."
            )
        # Here, where it ends the command: the batch is made while the server runs.
        drafts = live_speculation(speculation, rows, model, capacity)
        if isinstance(drafts, Draft):
            writes = drafts.model.config
            kind = f" in {args.draft_weights}" if args.draft_weights else ""
            _say(
                f"{writes.name}{kind} writes drafts: a step of {config.name} takes "
                f"{drafts.tokens} tokens of each text."
            )

        def make() -> Batch:
            return LiveBatch(
                model,
                rows=rows,
                capacity=capacity,
                implementation=args.implementation,
                prefill=args.prefill,
                max_logprobs=args.max_logprobs,
                chunk=_CHUNK,
                speculation=speculation,
                say=lambda text: _say(f"{text[0].upper()}{text[1:]}."),
            )

        host, port = sock.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        page = f", the chat page {url}/"
        if not getattr(tokenizer, "chat_templates", None):
            page = f"; a chat page needs a model with a chat template, and {name} has none"

        def ready(batch: Batch) -> None:
            how = getattr(batch, "implementation", "")
            seconds = getattr(batch, "compile_seconds", 0.0)
            _say(
                f"Ready: {name}, {batch.rows} texts at a time of {batch.capacity} positions, with "
                f"{how!r} on {device_of(model).device_kind} (compiling took {seconds:.1f} s). The "
                f"endpoint is {url}/v1{page}."
            )

        _say(f"Where a request does not say how tokens are chosen: {described(defaults)}.")
        if key is None and not is_local(args.host):
            _say(
                f"Whoever reaches {args.host} can use this server: there is no API key. Set "
                f"{_KEY}, or leave --host out."
            )
        server = Server(
            make,
            config,
            tokenizer,
            defaults,
            Options(
                name=name,
                max_queue=args.max_queue,
                max_logprobs=args.max_logprobs,
                chunk=_CHUNK,
                keep_caches=args.cache_reuse,
                api_key=key,
                grace=args.grace,
            ),
            say=_say,
            log=(lambda text: None) if args.quiet else _say,
            on_ready=ready,
            on_error=_show if args.traceback else lambda error: None,
        )
        _say(f"Starting at {url}; Ctrl-C ends it.")
        ended = server.run(sock)
    _say("Ended.")
    if not ended:  # a thread that runs XLA while Python ends would crash the process
        sys.stdout.flush()
        os._exit(0)
    return 0


def _key(args: argparse.Namespace) -> str | None:
    key = args.api_key if args.api_key is not None else os.environ.get(_KEY)
    if key is None:
        return None
    which = "--api-key" if args.api_key is not None else _KEY
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{which} goes into a header: it has letters, digits and signs of ASCII, without "
            "spaces, and at least one. Give another, or none."
        )
    return key


def _show(error: BaseException) -> None:
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it has left: the server goes on
        print(f"ffjax serve: {text}", file=sys.stderr, flush=True)
