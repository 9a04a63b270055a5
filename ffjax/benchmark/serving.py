"""Times a server under several clients, beside the bare decode step of the same model.

`python -m ffjax.benchmark.serving --model PATH`, or `--config NAME` for random weights of a
preset's sizes. The server runs in this process, its clients in another, over HTTP. Each client
sends its next request when the last one is answered; all answers are streamed, of as many tokens
as were asked for. The exit code is 1 where an answer was lost, or was another than the same request
gets alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ffjax.arguments import BadArgumentsError
from ffjax.benchmark.contenders import implementation
from ffjax.benchmark.inputs import random_model
from ffjax.benchmark.machine import Machine
from ffjax.benchmark.serving_clients import Answer, Job
from ffjax.benchmark.tables import origin_data, origin_text, table
from ffjax.benchmark.timing import DecodeLoop, take_turns
from ffjax.commands.implementations import add_implementation
from ffjax.commands.options import whole
from ffjax.config import preset
from ffjax.decode import Implementation, default_device
from ffjax.failures import sentence
from ffjax.live import LiveBatch
from ffjax.loop import BLOCK, Loop
from ffjax.model import Transformer
from ffjax.requests import Request
from ffjax.sampling.params import SamplingParams
from ffjax.serve.server import Options, Server, bound
from ffjax.settings import own_settings
from ffjax.text.tokenizers import load_tokenizer
from ffjax.tokenizer import Tokenizer

__all__ = ["Load", "Report", "as_data", "as_text", "main", "measure"]

_NAME = "model"
_STEPS = 64
_REPETITIONS = 7
# Requests that are sent once more, alone, and compared.
_AGAIN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What the clients ask for.

    Attributes:
        clients: how many there are.
        requests: of all of them together.
        prompt: fewest and most tokens of a prompt, evenly drawn.
        new: tokens of an answer.
        temperature: of every second request; the others are greedy.
        rows: texts that the server writes side by side.
        capacity: positions of each.
        max_logprobs: what the server is ready to tell.
    """

    clients: int = 8
    requests: int = 200
    prompt: tuple[int, int] = (16, 256)
    new: int = 128
    temperature: float = 0.8
    rows: int = 8
    capacity: int = 1024
    max_logprobs: int = 20

    def bodies(self, vocabulary: int) -> list[dict[str, Any]]:
        """The requests; the same each time."""
        rng = np.random.default_rng(0)
        bodies = []
        for i in range(self.requests):
            length = int(rng.integers(self.prompt[0], self.prompt[1] + 1))
            bodies.append(
                {
                    "model": _NAME,
                    "prompt": rng.integers(vocabulary, size=length).tolist(),
                    "max_tokens": self.new,
                    "ignore_eos": True,
                    "temperature": self.temperature * (i % 2),
                    "seed": i,
                }
            )
        return bodies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured.

    Attributes:
        load: what was asked for.
        machine: what it ran on.
        config: of the model.
        implementation: of the decode steps.
        client: who asked.
        step_seconds: of a bare step of as many rows, in the middle of the average answer.
        answers: in the order of the requests.
        seconds: from the first request to the last answer.
        other: answers that differ from those that the same requests got alone.
        compared: how many were looked at.
        compile_seconds: of the server's warm-up.
    """

    load: Load
    machine: Machine
    config: Any
    implementation: str
    client: str
    step_seconds: float
    answers: Sequence[Answer]
    seconds: float
    other: int
    compared: int
    compile_seconds: float

    @property
    def lost(self) -> int:
        """Requests without a complete answer."""
        return sum(a.error is not None or a.tokens != self.load.new for a in self.answers)

    @property
    def first(self) -> list[float]:
        """Seconds to the first token, of each answer."""
        return [a.first for a in self.answers if a.first is not None]

    @property
    def between(self) -> list[float]:
        """Seconds a token after the first, of each answer as a whole."""
        return [
            (a.arrivals[-1] - a.arrivals[0]) / (a.tokens - 1)
            for a in self.answers
            if a.tokens is not None and a.tokens > 1 and len(a.arrivals) > 1
        ]

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces of all answers; a piece has up to a block's tokens."""
        return [
            after - before
            for a in self.answers
            for before, after in zip(a.arrivals, a.arrivals[1:], strict=False)
        ]


def measure(
    model: Transformer, tokenizer: Tokenizer, load: Load, named: Implementation | None = None
) -> Report:
    """Runs a server under the load, then bare steps.

    Args:
        model: the model.
        tokenizer: its tokenizer; prompts are random token ids.
        load: what the clients ask for.
        named: implementation of the decode steps; None: the best that can run.
    """
    config = model.config

    def make() -> LiveBatch:
        return LiveBatch(
            model,
            rows=load.rows,
            capacity=load.capacity,
            implementation=named,
            max_logprobs=load.max_logprobs,
        )

    server = Server(
        make,
        config,
        tokenizer,
        SamplingParams(),
        Options(name=_NAME, max_queue=load.clients, grace=0.0),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    with bound("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=(sock,))
        thread.start()
        try:
            while server.scheduler.state == "starting":
                time.sleep(0.01)
            if server.scheduler.error is not None:
                raise server.scheduler.error
            bodies = load.bodies(min(config.vocab_size, tokenizer.vocab_size))
            _, found, alone = _asked(
                Job(url, load.clients, bodies[: load.clients]),  # what is there the first time
                Job(url, load.clients, bodies),
                Job(url, 1, bodies[:_AGAIN]),
            )
            batch: Any = server.scheduler.batch
            name, compiled = batch.implementation, batch.compile_seconds
            del batch
        finally:
            server.stop(0)
            thread.join()
    got = [Answer(**one) for one in found["answers"]]
    again = [Answer(**one) for one in alone["answers"]]
    return Report(
        load=load,
        machine=Machine.of(default_device()),
        config=config,
        implementation=name,
        client=found["client"],
        step_seconds=_bare_step(model, load, name),
        answers=got,
        seconds=found["seconds"],
        other=sum(a.text != b.text for a, b in zip(got, again, strict=False)),
        compared=len(again),
        compile_seconds=compiled,
    )


def _asked(*jobs: Job) -> list[dict[str, Any]]:
    """Has a process do jobs, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "ffjax.benchmark.serving_clients"],
        input=json.dumps([*map(dataclasses.asdict, jobs)]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The clients failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def _bare_step(model: Transformer, load: Load, named: Implementation) -> float:
    """Seconds of a step of all rows, in the middle of the average answer."""
    length = sum(load.prompt) // 2 + max(0, (load.new - _STEPS) // 2)
    length = max(1, min(length, load.capacity - _STEPS - BLOCK - 1))
    rng = np.random.default_rng(0)
    prompts = rng.integers(model.config.vocab_size, size=(load.rows, length)).tolist()
    with own_settings():
        request = Request.checked(
            model.config, prompts, _STEPS + 1, 0.0, 0, None, load.capacity, None, ()
        )
        loop = Loop(model, request, named)
        first = loop.prefill().tokens
        contender = implementation(model, loop.implementation)
        steps = DecodeLoop(contender.step, contender.weights, loop.cache, length, first, _STEPS)
        steps.run()
        [seconds] = take_turns([steps.run], _REPETITIONS)
        steps.close()
    return statistics.median(seconds) / _STEPS


def _share(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


_FIGURES: dict[str, Callable[[Report], list[float]]] = {
    "to the first token": lambda report: report.first,
    "a token after it": lambda report: report.between,
    "between pieces": lambda report: report.gaps,
}


def as_data(report: Report) -> dict[str, Any]:
    """Everything in JSON's types."""
    tokens = sum(a.tokens or 0 for a in report.answers)
    return {
        **origin_data(report.machine, report.config),
        **dataclasses.asdict(report.load),
        "implementation": report.implementation,
        "client": report.client,
        "bare_step_ms": 1e3 * report.step_seconds,
        "seconds": report.seconds,
        "tokens_per_second": tokens / report.seconds,
        "lost": report.lost,
        "errors": sorted({a.error for a in report.answers if a.error is not None}),
        "compared_with_alone": report.compared,
        "other_than_alone": report.other,
        "compile_seconds": report.compile_seconds,
        "latency_ms": {
            name: {
                "median": 1e3 * _share(values, 0.5),
                "p90": 1e3 * _share(values, 0.9),
                "p99": 1e3 * _share(values, 0.99),
                "over_bare_step": _share(values, 0.5) / report.step_seconds,
            }
            for name, read in _FIGURES.items()
            if (values := read(report))
        },
    }


def as_text(report: Report) -> str:
    """What was measured, and a table in Markdown."""
    load, data = report.load, as_data(report)
    rows = [
        {
            "time": name,
            "median ms": f"{one['median']:.3f}",
            "90% ms": f"{one['p90']:.3f}",
            "99% ms": f"{one['p99']:.3f}",
            "median / bare step": f"{one['over_bare_step']:.2f}",
        }
        for name, one in data["latency_ms"].items()
    ]
    lines = [
        origin_text(report.machine, report.config),
        f"{load.clients} clients ({report.client}) send {load.requests} requests with prompts of "
        f"{load.prompt[0]} to {load.prompt[1]} tokens for {load.new} new ones each, to {load.rows} "
        f"rows of {load.capacity} positions, with {report.implementation!r}.",
        f"All of it took {report.seconds:.2f} s: {data['tokens_per_second']:.0f} tokens/s. "
        f"{report.lost} answers were lost; {report.other} of {report.compared} differ from what "
        "the same request gets alone.",
        f"A bare step of {load.rows} sequences takes {data['bare_step_ms']:.3f} ms. Tokens come in "
        f"pieces of up to {BLOCK}.",
    ]
    return "\n".join([*lines, *data["errors"], "", *table(rows)])


class _Letters:
    """A tokenizer for random weights: any token is a letter."""

    eot_id = 0
    eot_ids = (0,)

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.vocab_size for letter in text]

    def split(self, text: str) -> tuple[list[int], list[int]]:
        return [], self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.push_all(tokens)

    def stream(self) -> _Letters:
        return self

    def push(self, token: int) -> str:
        return chr(97 + token % 26)

    def push_all(self, tokens: Sequence[int]) -> str:
        return "".join(map(self.push, tokens))

    def finish(self) -> str:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ffjax.benchmark.serving", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="PATH", help="default: the shipped model")
    what.add_argument("--config", metavar="NAME", help="a preset's sizes, with random weights")
    for name, text in (
        ("clients", "that send requests side by side"),
        ("requests", "of all clients together"),
        ("new", "tokens of an answer"),
        ("rows", "texts that are written side by side"),
        ("capacity", "positions of each"),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="N",
            type=whole(1),
            default=getattr(Load, name),
            help=f"{text}; default: %(default)s",
        )
    parser.add_argument(
        "--prompt", metavar="N", type=whole(1), nargs=2, default=Load.prompt, help="tokens, from to"
    )
    parser.add_argument("--max-logprobs", metavar="K", type=whole(0, 20), default=20)
    add_implementation(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    load = Load(
        clients=args.clients,
        requests=args.requests,
        prompt=tuple(args.prompt),
        new=args.new,
        rows=args.rows,
        capacity=args.capacity,
        max_logprobs=args.max_logprobs,
    )
    try:
        model, tokenizer = _loaded(args)
        report = measure(model, tokenizer, load, args.implementation)
    except (BadArgumentsError, ValueError, NotImplementedError, OSError, RuntimeError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
        return 2
    print(json.dumps(as_data(report)) if args.json else as_text(report))
    return int(bool(report.lost or report.other))


def _loaded(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    import checkpoints

    if args.config is not None:
        config = preset(args.config)
        model = random_model(config)
        jax.block_until_ready(jax.tree.leaves(model))
        return model, _Letters(config.vocab_size)
    path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
    model = checkpoints.load(path)
    return model, load_tokenizer(path, model.config)


if __name__ == "__main__":
    raise SystemExit(main())
