"""Continues many texts, several at a time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffjax.commands.asking import asked_of
from ffjax.commands.completions import as_json, count_of, ended_by
from ffjax.commands.prompts import Prompt

if TYPE_CHECKING:
    from ffjax.speculation.choice import Speculation
    from ffjax.text.completion import Completion
    from ffjax.text.generator import Generator

__all__ = ["write_many"]

# The command did its work, and the model's numbers are wrong.
_WRONG = 1


def write_many(
    args: argparse.Namespace,
    generator: Generator,
    prompts: Sequence[Prompt],
    variables: Mapping[str, Any],
    max_new_tokens: int,
    *,
    speculation: Speculation | None = None,
) -> int:
    """Writes texts of all prompts; prints each as soon as those before it are there.

    What was broken off by Ctrl-C, or by NaN, is printed as far as it came.

    Args:
        args: the command line of `ffjax generate`.
        generator: the model, its tokenizer, and how tokens are chosen.
        prompts: the prompts.
        variables: of the chat template.
        max_new_tokens: as many new tokens, where nobody says how many.
        speculation: where drafts come from; None: there are none.

    Returns:
        The exit code.
    """
    from tqdm import tqdm

    from ffjax.broken import NotFiniteError
    from ffjax.text.asked import samples
    from ffjax.text.batches import texts

    wanted = [
        (prompt, i, one)
        for prompt in prompts
        for i, one in enumerate(
            samples(asked_of(args, generator, prompt, variables, max_new_tokens), args.samples)
        )
    ]
    asked = [one for _, _, one in wanted]
    show = _Show(args, generator, [(prompt, i) for prompt, i, _ in wanted])
    broken: BaseException | None = None
    unfinished: list[Completion] = []
    start = time.perf_counter()
    # disable=None: where stderr is no terminal.
    with tqdm(total=len(asked), unit="text", file=sys.stderr, leave=False, disable=None) as bar:
        try:
            for completion in texts(
                generator.model,
                generator.tokenizer,
                asked,
                implementation=args.implementation,
                prefill=args.prefill,
                speculation=speculation,
                ended=bar.update,
                broken=unfinished.extend,
            ):
                if sys.stdout.isatty():
                    bar.clear()  # the text takes its line
                show(completion, completion.finish_reason)
        except (NotFiniteError, KeyboardInterrupt) as error:
            broken = error
    seconds = time.perf_counter() - start
    for row, completion in enumerate(unfinished):
        # Of texts side by side, one alone has no numbers; the others end with it.
        mine = not isinstance(broken, NotFiniteError) or row == broken.sequence
        show(completion, ended_by(broken if mine else None, completion))
    if isinstance(broken, KeyboardInterrupt):
        raise broken
    if broken is not None:
        print(f"ffjax generate: {broken}", file=sys.stderr)
        return _WRONG
    if not args.json:
        show.say_figures(seconds)
    return 0


class _Show:
    """Prints texts in the order of their prompts."""

    def __init__(
        self, args: argparse.Namespace, generator: Generator, of: Sequence[tuple[Prompt, int]]
    ):
        self._args, self._generator, self._of = args, generator, of
        self._as_json = args.json or args.prompts is not None
        self._shown: list[Completion] = []

    def __call__(self, completion: Completion, finish_reason: str | None) -> None:
        prompt, sample = self._of[len(self._shown)]
        self._shown.append(completion)
        if not self._as_json:
            print(f"=== {sample + 1} of {self._args.samples}, seed {completion.seed} ===")
            # The prompt as the tokenizer reads it, as a single text begins.
            print("" if self._args.chat else prompt.text, end="")
            print(completion.text, flush=True)
            return
        named = {"line": prompt.line, "id": prompt.id}
        report: dict[str, Any] = {key: one for key, one in named.items() if one is not None}
        if self._args.samples > 1:
            report["sample"] = sample
        print(json.dumps(report | as_json(completion, finish_reason)), flush=True)

    def say_figures(self, seconds: float) -> None:
        """Says on stderr how long all took."""
        from ffjax.decode import device_of

        model = self._generator.model
        tokens = sum(len(one.tokens) for one in self._shown)
        # Texts of a batch have their times in common.
        batches = {(one.prefill_seconds, one.compile_seconds) for one in self._shown}
        compiled = sum(compiled for _, compiled in batches)
        made = sum(one.made for one in self._shown)
        accepted = sum(one.accepted or 0 for one in self._shown)
        spoken = made > accepted and self._shown[0].accepted is not None
        each = f"{made / (made - accepted):.2f} tokens a step, " if spoken else ""
        print(
            f"{model.config.name}: {count_of(len(self._shown), 'text')}, "
            f"{count_of(tokens, 'token')} in {seconds - compiled:.1f} s, "
            f"{each}{tokens / max(seconds - compiled, 1e-9):.1f} tokens/s together, "
            f"with {self._shown[0].implementation!r} on {device_of(model).device_kind} "
            f"(compiling took {compiled:.1f} s, not counted)",
            file=sys.stderr,
        )
