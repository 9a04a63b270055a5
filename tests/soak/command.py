"""The command: takes the same walk under every disturbance, and compares all digests."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

# Before JAX starts: several processes share the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

from ffjax.decode import Implementation
from ffjax.formats import DEFAULT_GROUP, GROUP_SIZES, Offset
from ffjax.quantization import Kind
from soak.together import in_processes, in_threads
from soak.walk import NOT_FINITE, Walk, Walker

__all__ = ["Outcome", "main"]

_SIDE = 1024  # of the matrices that XLA multiplies between blocks


class Outcome(NamedTuple):
    """One way of taking the walk.

    Attributes:
        batch: B.
        way: how it was taken.
        walks: how many were compared.
        differ: a sentence for each that differs from the first walk of all.
        seconds: it took.
    """

    batch: int
    way: str
    walks: int
    differ: list[str]
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a digest differs."""
    asked = _parser().parse_args(arguments)
    start, outcomes, implementation = time.monotonic(), [], None
    try:
        for batch in asked.batch:
            walk = Walk(
                asked.config,
                asked.weights,
                batch,
                asked.tokens,
                asked.implementation,
                asked.together,
                asked.group_size,
                asked.offset,
            )
            walker = Walker(walk, walk.model())
            implementation = walker.implementation
            until = time.monotonic() + asked.seconds / len(asked.batch)
            outcomes += _soak(walk, walker, asked.threads, asked.processes, until)
    except (ValueError, NotImplementedError) as error:
        print(f"tests.soak: {error}", file=sys.stderr)
        return 2
    _print(outcomes, asked, implementation, time.monotonic() - start)
    return 1 if any(outcome.differ for outcome in outcomes) else 0


def _soak(walk: Walk, walker: Walker, threads: int, processes: int, until: float) -> list[Outcome]:
    """All ways, over and over until a time, but once at least."""
    ways: list[tuple[str, Callable[[], list[list[str]]]]] = [
        ("again", lambda: [walker.take()]),
        ("with XLA's work between", lambda: [walker.take(_other_work())]),
    ]
    if threads > 1:
        ways.append((f"{threads} threads at once", lambda: in_threads(walker, threads)))
    if processes > 1:
        ways.append((f"{processes} processes at once", lambda: in_processes(walk, processes)))
    start = time.monotonic()
    first = walker.take()
    bad = [f"block {first.index(NOT_FINITE)} is not finite"] if NOT_FINITE in first else []
    outcomes = [_said(Outcome(walk.batch, "first", 1, bad, time.monotonic() - start))]
    for turn in itertools.count():
        for way, take in ways:
            if turn and time.monotonic() >= until:
                return outcomes
            start = time.monotonic()
            made = take()
            differ = [text for one in made if (text := _difference(first, one, walker.block))]
            seconds = time.monotonic() - start
            outcomes.append(_said(Outcome(walk.batch, way, len(made), differ, seconds)))
        if time.monotonic() >= until:
            return outcomes
    raise AssertionError("Counting has no end.")


def _difference(first: list[str], one: list[str], block: int) -> str | None:
    """Where a walk leaves the first one; None if nowhere."""
    for number, (a, b) in enumerate(zip(first, one, strict=True)):
        if a != b:
            return f"differs from token {number * block} on"
    return None


def _other_work() -> Callable[[], None]:
    """Something for XLA to do on the same device, which nobody waits for."""
    multiply = jax.jit(lambda x: jnp.tanh(x @ x))
    kept: list[Any] = [jnp.full((_SIDE, _SIDE), 1 / _SIDE, jnp.float32)]

    def work() -> None:
        kept[0] = multiply(kept[0])

    return work


def _said(outcome: Outcome) -> Outcome:
    verdict = "; ".join(outcome.differ) or "the same bits"
    print(
        f"batch {outcome.batch}, {outcome.way}: {verdict}, {outcome.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return outcome


def _print(outcomes: list[Outcome], asked: argparse.Namespace, implementation, seconds) -> None:
    ways = dict.fromkeys(outcome.way for outcome in outcomes)
    head = ["sequences", "way", "walks", "tokens", "differ", "seconds"]
    rows = [head]
    for batch, way in itertools.product(asked.batch, ways):
        some = [one for one in outcomes if (one.batch, one.way) == (batch, way)]
        walks = sum(one.walks for one in some)
        differ = sum(len(one.differ) for one in some)
        took = sum(one.seconds for one in some)
        cells = batch, way, walks, walks * asked.tokens * batch, differ or "none", f"{took:.1f}"
        rows.append([str(cell) for cell in cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    model = asked.config or "the shipped model"
    print(
        f"\n{model}, {asked.weights}, {implementation!r} on {jax.devices()[0].device_kind}, "
        f"JAX {jax.__version__}, {seconds:.0f} s"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is a number of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description="Takes the same decode steps over and over: with fresh caches, XLA's work "
        "between, threads and processes at once. Exit code 1: some bits differ.",
    )
    parser.add_argument("--config", metavar="NAME", help="a preset; default: the shipped model")
    parser.add_argument(
        "--weights",
        choices=("bfloat16", *get_args(Kind)),
        default="bfloat16",
        help="format of the layers' matrices; default: %(default)s",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=DEFAULT_GROUP,
        help="inputs that share a scale in int4; default: %(default)s",
    )
    parser.add_argument(
        "--offset", choices=get_args(Offset), help="second number of a group of int4; default: none"
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=_count,
        default=20_000,
        help="of each sequence, a walk; default: %(default)s",
    )
    parser.add_argument(
        "--together",
        metavar="T",
        type=_count,
        default=1,
        help="before each step, take one of T tokens of each sequence, and keep the first; "
        "default: 1: none",
    )
    parser.add_argument(
        "--batch", metavar="B,..", type=_counts, default=(1, 2, 8), help="default: 1,2,8"
    )
    parser.add_argument(
        "--processes", metavar="N", type=_count, default=2, help="default: %(default)s; 1: none"
    )
    parser.add_argument(
        "--threads", metavar="N", type=_count, default=2, help="default: %(default)s; 1: none"
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=_count,
        default=0,
        help="goes on so long with the same ways; default: once through all of them",
    )
    parser.add_argument(
        "--implementation", choices=get_args(Implementation), help="default: the best that can run"
    )
    return parser
