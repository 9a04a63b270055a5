"""What choosing tokens costs: blocks of steps, as `ffjax.generate` runs them, by how they choose.

    python -m ffjax.benchmark.sampling --config llama3.2-1b --batches 1,8

Each way to choose has a program of its own; all take turns, on random weights. Those are far less
sure of the next token than trained ones, and filters have more to do: of 128256 tokens top-p 0.9
keeps half. `--logit-scale 4.5` makes logits so many times as large: the entropy is then that of
SmolLM2-135M-Instruct reading English, 2.2 nats at temperature 0.8.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ffjax.benchmark.inputs import first_tokens, random_model, scale_logits, started_cache
from ffjax.benchmark.timing import rewind
from ffjax.blocks import BLOCK, block_steps
from ffjax.commands.options import number, whole, wholes
from ffjax.commands.sizes import add_size_arguments, chosen_sizes
from ffjax.decode import resolve_implementation_config
from ffjax.failures import sentence
from ffjax.loop import decode_block, slots_for
from ffjax.model import Transformer
from ffjax.parts import Parts
from ffjax.reproducible import compiler_options
from ffjax.sampling.draw import words_of
from ffjax.sampling.history import History
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, drawing_gpu, rows_of
from ffjax.settings import program_settings

__all__ = ["SAMPLERS", "Blocks", "microseconds"]

_DRAWN = SamplingParams(temperature=0.8)
_FILTERED = replace(_DRAWN, top_k=50, top_p=0.9)
_ALL = replace(_FILTERED, min_p=0.02)
SAMPLERS = {
    "greedy": SamplingParams(),
    "temperature 0.8": _DRAWN,
    "and top-p 0.9": replace(_DRAWN, top_p=0.9),
    "and top-k 50": replace(_DRAWN, top_k=50),
    "and top-k 50, top-p 0.9, min-p 0.02": _ALL,
    "all that, and a repetition penalty": replace(_ALL, repetition_penalty=1.1),
    "a repetition penalty, greedy": SamplingParams(repetition_penalty=1.1),
    "5 log-probabilities, greedy": SamplingParams(logprobs=5),
    "20 log-probabilities, greedy": SamplingParams(logprobs=20),
    "top-k 50, top-p 0.9, 5 log-probabilities": replace(_FILTERED, logprobs=5),
}
"""How tokens are chosen, by name; the first is what the others are compared with."""


class Blocks:
    """Blocks of steps that choose in one way: lowered when it is made, then compiled, then run.

    Attributes:
        steps: of a run.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        params: SamplingParams,
        *,
        position: int = 128,
        blocks: int = 12,
        implementation: Any = None,
    ):
        """Lowers the block.

        Args:
            model: the model.
            batch: B; all sequences choose alike.
            params: how.
            position: tokens in the cache when a run begins.
            blocks: of a run.
            implementation: of the steps, as `ffjax.generate` takes it.
        """
        self._position, self._blocks = position, blocks
        config = model.config
        parts = Parts.of(model)
        capacity = slots_for(position + BLOCK * blocks)
        with program_settings():
            stages = Stages.of([params] * batch, (), drawing_gpu(parts.device, implementation))
            rows = rows_of([params] * batch, [[]] * batch, words_of(0, batch), stages)
            history = History.empty(batch, config.vocab_size) if stages.remembers else None
            self._state, self._rows = parts.state, jax.device_put(rows)
            cache = started_cache(config, batch, position, capacity)
            index = jnp.ones((batch,), jnp.int32)
            self._going = cache, first_tokens(config, batch), index, history
            resolved = resolve_implementation_config(
                config, model.dtype, batch, capacity, implementation
            )
            block = block_steps(config, batch, parts.device, resolved)
            self.steps = block * blocks
            how = {"steps": block, "stages": stages, "implementation": resolved}
            step = jax.jit(
                functools.partial(decode_block, parts.graphdef, **how),
                donate_argnums=(1, 5),
                compiler_options=compiler_options(parts.device),
            )
            self._lowered = step.lower(*self._args())
        self._compiled: Any = None

    def _args(self) -> tuple[Any, ...]:
        cache, token, index, history = self._going
        return self._state, cache, token, index, self._rows, history

    def compile(self) -> None:
        """Compiles the block; may be called beside other threads' calls."""
        self._compiled = self._lowered.compile()

    def run(self) -> float:
        """Runs all blocks from the first position on; returns seconds."""
        cache, *rest = self._going
        self._going = rewind(cache, self._position), *rest
        jax.block_until_ready(self._going)
        start = time.perf_counter()
        for _ in range(self._blocks):
            cache, token, index, history, _ = self._compiled(*self._args())
            self._going = cache, token, index, history
        jax.block_until_ready(self._going[1])
        return time.perf_counter() - start


def microseconds(ways: Mapping[str, Blocks], repetitions: int = 5) -> dict[str, list[float]]:
    """Times of a step, repetition by repetition; the ways take turns, and run once untimed.

    Args:
        ways: compiled.
        repetitions: of each.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repetitions + 1):
        for name, way in ways.items():
            seconds = way.run()
            if turn:
                times[name].append(seconds / way.steps * 1e6)
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each batch; returns the exit code.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog="python -m ffjax.benchmark.sampling", description=__doc__)
    add_size_arguments(parser)
    parser.add_argument(
        "--batches", metavar="B,..", type=wholes(1), default=(1, 8), help="default: 1,8"
    )
    for name, value in (("--position", 128), ("--repetitions", 5)):
        parser.add_argument(
            name, metavar="N", type=whole(1), default=value, help="default: %(default)s"
        )
    parser.add_argument(
        "--logit-scale",
        metavar="F",
        type=number(0, above=True),
        default=1.0,
        help="multiplies the logits; 4.5 makes a vocabulary of 128256 as sure of its next token as "
        "a trained model; default: 1",
    )
    asked = parser.parse_args(arguments)
    try:
        config = chosen_sizes(asked, parser.prog)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
        return 2
    model = random_model(config)
    scale_logits(model, asked.logit_scale)
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, {config.name}, logits times {asked.logit_scale:g}")
    for batch in asked.batches:
        ways = {
            name: Blocks(model, batch, params, position=asked.position)
            for name, params in SAMPLERS.items()
        }
        with ThreadPoolExecutor() as pool:
            list(pool.map(Blocks.compile, ways.values()))
        times = microseconds(ways, asked.repetitions)
        base = statistics.median(times.pop("greedy"))
        print(f"\n| batch {batch}, greedy step {base:.1f} us | more, us | |\n| --- | ---: | ---: |")
        for name, each in times.items():
            more = statistics.median(each) - base
            print(f"| {name} | {more:.1f} | {more / base:.1%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
