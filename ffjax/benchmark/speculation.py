"""Times a generation with speculation and without, and compares the tokens.

`python -m ffjax.benchmark.speculation` takes the shipped model after two prompts: Python source
that it never saw, and half of that said twice. `--model PATH` and `--prompt-file FILE` take others,
`--draft PATH` or `--draft-weights int4` a draft model beside the lookup. Calls take turns, and the
first of each compiles. With `--config NAME` weights are random, and `--replay P` says with which
chances drafts are right; `--draft-config NAME` runs the steps of a draft model as well.

The exit code is 1 where tokens are others than without speculation. In 16 bits that may be right:
two tokens were almost equal, and a step of several tokens rounds otherwise. The first place that
differs is said, and by how much the reference model prefers the token there that is chosen without
speculation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ffjax.arguments import BadArgumentsError
from ffjax.benchmark.inputs import random_model, random_prompts
from ffjax.benchmark.machine import Machine
from ffjax.benchmark.parting import apart, first_difference
from ffjax.benchmark.replay import replay_loop
from ffjax.benchmark.tables import finite, origin_data, origin_text, table
from ffjax.commands.implementations import add_implementations
from ffjax.commands.options import number, seed, whole, wholes
from ffjax.commands.prompts import read_text
from ffjax.commands.speculation_options import quantized_by
from ffjax.config import preset
from ffjax.decode import device_of
from ffjax.failures import sentence
from ffjax.generation import GenerateOutput, generate
from ffjax.model import Transformer
from ffjax.requests import Request
from ffjax.speculation.draft import Draft
from ffjax.speculation.lookup import Lookup
from ffjax.stdlib_text import read_sources
from ffjax.streaming import Stream
from ffjax.text.tokenizers import load_tokenizer
from pallas_kernels.support import MAX_BATCH

__all__ = ["Asked", "Row", "as_data", "as_text", "main", "make_parser", "measure"]

_PROMPT_BYTES = 1400
_RANDOM_PROMPT = 256
_NONE_RIGHT = "p=0"

Run = Callable[[], GenerateOutput]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is timed.

    Attributes:
        model: the model.
        prompts: token ids, by their names.
        draft: a draft model; None: there is none.
        tokens: each T; empty: what speculation takes by itself.
        chances: of drafts to be right, instead of real drafts; empty: drafts are real.
        new: tokens of an answer.
        temperature: of the choice.
        seed: of the draws.
        repetitions: calls of each, after the first.
        how: `implementation` and `prefill`.
    """

    model: Transformer
    prompts: dict[str, Sequence[int]]
    draft: Transformer | None = None
    tokens: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    new: int = 512
    temperature: float = 0.0
    seed: int = 0
    repetitions: int = 5
    how: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, prompt: Sequence[int], speculation: Any) -> Run:
        """A call of `generate`."""
        drawn = {"temperature": self.temperature, "seed": self.seed}
        how = {**drawn, **self.how, "speculation": speculation}
        return lambda: generate(self.model, prompt, self.new, **how)

    def replayed(self, prompt: Sequence[int], truth: list[list[int]], chance: float, t: int) -> Run:
        """The same with drafts of a chance."""
        drawn = self.temperature, self.seed
        request = Request.checked(self.model.config, prompt, self.new, *drawn, None, None)

        def run() -> GenerateOutput:
            how = {"draft": self.draft, **self.how}
            rows = Stream(replay_loop(self.model, request, truth, chance, t, **how), request)
            for _ in rows:
                pass
            return rows.output

        return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one way to generate.

    Attributes:
        prompt: its name.
        speculation: what drafts came from.
        tokens: T; None without speculation, or where nobody said it.
        rates: tokens that decode steps made a second, of each repetition.
        prefill_seconds: of each, until the first token was here.
        tokens_per_step: tokens of a step.
        accepted: tokens beside the first of their step; None without speculation.
        steps: decode steps that ran.
        differs_at: the first token that is another than without speculation; None: none is.
        apart: by how much the reference prefers the other one there; None: as `parting.apart`, or
            drafts are replayed.
    """

    prompt: str
    speculation: str
    tokens: int | None
    rates: list[float]
    prefill_seconds: list[float]
    tokens_per_step: float
    accepted: int | None
    steps: int
    differs_at: int | None
    apart: float | None

    @property
    def rate(self) -> float:
        """Tokens that decode steps made a second, the median."""
        return statistics.median(self.rates)

    @property
    def name(self) -> str:
        """What drafts came from, and T."""
        return _name(self.speculation, self.tokens)


def _name(speculation: str, tokens: int | None) -> str:
    return speculation if tokens is None else f"{speculation} T={tokens}"


def measure(asked: Asked, say: Callable[[str], object] = lambda text: None) -> list[Row]:
    """Times all ways to generate after each prompt, in turn.

    Args:
        asked: what is timed.
        say: told what runs.

    Raises:
        ValueError: as `ffjax.generate`.
        NotImplementedError: likewise.
    """
    rows = []
    for prompt, ids in asked.prompts.items():
        ways = _ways(asked, ids)
        say(f"{prompt}: {', '.join(_name(*key) for key in ways)}")
        outs: dict[Any, list[GenerateOutput]] = {key: [run()] for key, run in ways.items()}
        for _ in range(asked.repetitions):
            for key, run in ways.items():
                outs[key].append(run())
        for key, (first, *others) in outs.items():
            # A replay is to say what steps as wide as its own say: random weights choose narrowly.
            base = outs.get((_NONE_RIGHT, key[1]), outs["none", None])
            answers = first.tokens[0], base[0].tokens[0]
            drawn = asked.temperature, asked.seed
            rows.append(
                Row(
                    prompt=prompt,
                    speculation=key[0],
                    tokens=key[1],
                    rates=[one.tokens_per_second for one in others],
                    prefill_seconds=[one.prefill_seconds for one in others],
                    tokens_per_step=first.tokens_per_step,
                    accepted=None if first.accepted is None else sum(first.accepted),
                    steps=first.steps,
                    differs_at=first_difference(*answers),
                    apart=None if asked.chances else apart(asked.model, ids, *answers, *drawn),
                )
            )
    return rows


def _ways(asked: Asked, prompt: Sequence[int]) -> dict[tuple[str, int | None], Run]:
    """Ways to generate, by what drafts come from and T."""
    ways: dict[tuple[str, int | None], Run] = {("none", None): asked.of(prompt, None)}
    each: tuple[int | None, ...] = asked.tokens or (None,)
    if not asked.chances:
        for t in each:
            ways["lookup", t] = asked.of(prompt, Lookup(tokens=t))
            if asked.draft is not None:
                ways["draft", t] = asked.of(prompt, Draft(asked.draft, t))
        return ways
    for t in asked.tokens or (8 if asked.draft is None else 4,):
        ways[_NONE_RIGHT, t] = asked.replayed(prompt, [[]], 0.0, t)
        answer = ways[_NONE_RIGHT, t]().tokens
        for chance in asked.chances:
            if chance > 0:
                ways[f"p={chance:g}", t] = asked.replayed(prompt, answer, chance, t)
    return ways


def as_data(asked: Asked, machine: Machine, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything in JSON's types."""
    draft = None if asked.draft is None else asked.draft.config
    return {
        **origin_data(machine, asked.model.config),
        "draft": None if draft is None else {"config": draft.name, "weights": str(draft.weights)},
        "max_new_tokens": asked.new,
        "temperature": asked.temperature,
        "seed": asked.seed,
        "prompt_tokens": {name: len(ids) for name, ids in asked.prompts.items()},
        "rows": [
            {
                **dataclasses.asdict(row),
                "rates": [finite(rate) for rate in row.rates],
                "tokens_per_second": finite(row.rate),
                "tokens_per_step": finite(row.tokens_per_step),
                "apart": None if row.apart is None else finite(row.apart),
            }
            for row in rows
        ],
    }


def _compared(row: Row) -> str:
    if row.differs_at is None:
        return "the same"
    said = f"other from {row.differs_at}"
    return said if row.apart is None else f"{said}, {row.apart:.3f} apart"


def as_text(asked: Asked, machine: Machine, rows: Sequence[Row]) -> str:
    """What was measured, and a table in Markdown."""
    plain = {row.prompt: row.rate for row in rows if row.speculation == "none"}
    cells = [
        {
            "prompt": row.prompt,
            "drafts": row.name,
            "tokens/s": f"{row.rate:.0f}",
            "by none": f"{row.rate / plain[row.prompt]:.2f}",
            "tokens a step": f"{row.tokens_per_step:.2f}",
            "accepted": "" if row.accepted is None else str(row.accepted),
            "first token, ms": f"{1e3 * statistics.median(row.prefill_seconds):.2f}",
            "tokens": _compared(row),
        }
        for row in rows
    ]
    lines = [origin_text(machine, asked.model.config)]
    if asked.draft is not None:
        draft = asked.draft.config
        lines.append(f"The draft model: {draft.name}, {draft.weights}.")
    sizes = ", ".join(f"{name} ({len(ids)} tokens)" for name, ids in asked.prompts.items())
    lines.append(
        f"{asked.new} new tokens after {sizes}; temperature {asked.temperature:g}. Medians of "
        f"{asked.repetitions}."
    )
    return "\n".join([*lines, "", *table(cells)])


def make_parser() -> argparse.ArgumentParser:
    """Its command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ffjax.benchmark.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="PATH", help="default: the shipped model")
    what.add_argument("--config", metavar="NAME", help="a preset's sizes, with random weights")
    draft = parser.add_mutually_exclusive_group()
    draft.add_argument("--draft", metavar="PATH", help="a draft model")
    draft.add_argument("--draft-config", metavar="NAME", help="a preset's sizes, random weights")
    parser.add_argument(
        "--draft-weights",
        choices=("int8", "int4"),
        help="quantize the draft model; without one the model itself drafts, quantized",
    )
    parser.add_argument("--weights", choices=("int8", "int4"), help="quantize the model")
    parser.add_argument(
        "--prompt-file", metavar="FILE", action="append", default=[], help="may be given again"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=whole(2), default=Asked.new)
    parser.add_argument("--temperature", metavar="T", type=number(0), default=0.0)
    parser.add_argument("--seed", metavar="N", type=seed, default=0)
    parser.add_argument(
        "--tokens", metavar="T,...", type=wholes(2, MAX_BATCH), default=(), help="each T"
    )
    parser.add_argument(
        "--replay", metavar="P,...", help="chances of drafts to be right, with --config: 0.3,0.7"
    )
    parser.add_argument("--repetitions", metavar="N", type=whole(1), default=Asked.repetitions)
    add_implementations(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _chances(text: str | None) -> tuple[float, ...]:
    try:
        chances = () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        chances = (math.nan,)
    if not all(0 <= chance <= 1 for chance in chances):
        raise ValueError(f"--replay takes chances from 0 to 1, as 0.3,0.7; got {text!r}.")
    return chances


def _prompts(args: argparse.Namespace, encode: Callable[[str], list[int]]) -> dict[str, list[int]]:
    if args.prompt_file:
        return {
            Path(file).name: _not_empty(encode(read_text(file)), file) for file in args.prompt_file
        }
    held_out = read_sources()[1]
    longest = max(held_out, key=lambda source: len(source.text)).text
    text = longest[:_PROMPT_BYTES].decode("utf-8", "ignore")
    half = text[: _PROMPT_BYTES // 2]
    return {"source": encode(text), "twice": encode(half + half)}


def _not_empty(tokens: list[int], file: str) -> list[int]:
    if not tokens:
        raise ValueError(f"A prompt has at least one character; {file} has none. Give another.")
    return tokens


def _asked(args: argparse.Namespace) -> Asked:
    """What the command line asks for, models loaded.

    Raises:
        ValueError: options do not go together, or a model cannot be loaded.
        FileNotFoundError: there is none, or no such prompt.
    """
    import checkpoints

    chances = _chances(args.replay)
    if (args.config is None) != (not chances):
        raise ValueError(
            "Drafts of random weights are never right: --config and --replay go together. Give "
            "both, or neither."
        )
    if args.draft_config is not None and args.config is None:
        raise ValueError("--draft-config is for --config. Give a draft model by --draft.")
    if args.prompt_file and args.config is not None:
        raise ValueError(
            "Random weights continue random tokens: --config takes no --prompt-file. Leave one out."
        )
    if args.config is not None:
        model = random_model(preset(args.config))
        [ids] = random_prompts(model.config, [_RANDOM_PROMPT])
        prompts: dict[str, Any] = {"random": ids.tolist()}
    else:
        path = checkpoints.SHIPPED_MODEL if args.model is None else args.model
        model = checkpoints.load(path)
        prompts = _prompts(args, load_tokenizer(path, model.config).encode)
    draft = None
    if args.draft is not None:
        draft = checkpoints.load(args.draft)
    elif args.draft_config is not None:
        draft = random_model(preset(args.draft_config), seed=1)
    elif args.draft_weights is not None:
        draft = model
    if draft is not None and args.draft_weights is not None:
        draft = quantized_by(draft, "--draft-weights", args.draft_weights)
    if args.weights is not None:
        model = quantized_by(model, "--weights", args.weights)
    jax.block_until_ready(jax.tree.leaves((model, draft)))
    return Asked(
        model=model,
        prompts=prompts,
        draft=draft,
        tokens=args.tokens,
        chances=chances,
        new=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        repetitions=args.repetitions,
        how={"implementation": args.implementation, "prefill": args.prefill},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        asked = _asked(args)
        machine = Machine.of(device_of(asked.model))
        rows = measure(asked, lambda text: print(text, file=sys.stderr, flush=True))
    except (BadArgumentsError, ValueError, NotImplementedError, OSError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_data(asked, machine, rows)))
    else:
        print(as_text(asked, machine, rows))
    return int(any(row.differs_at is not None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
