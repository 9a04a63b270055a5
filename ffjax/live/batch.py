"""A batch whose sequences come and go, as its owner sees it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ffjax.blocks import block_steps
from ffjax.decode import (
    Implementation,
    device_of,
    is_fused,
    resolve_implementation,
)
from ffjax.live.feeder import Feeder
from ffjax.live.made import Block, Fed, Repeats
from ffjax.live.programs import live_programs
from ffjax.live.state import Newcomer
from ffjax.loop import fault_in, slots_for
from ffjax.model import Transformer
from ffjax.parcel import as_words
from ffjax.prefill.choice import Prefill, resolve_prefill
from ffjax.prefill.packing import SMALLEST
from ffjax.requests import check_params, checked_prompt
from ffjax.sampling.draw import sequence_words
from ffjax.sampling.params import SamplingParams
from ffjax.sampling.rows import Stages, drawing_gpu, row_of
from ffjax.settings import program_settings
from ffjax.speculation.choice import Speculation, live_speculation
from ffjax.speculation.draft import Draft
from ffjax.speculation.drafting import ModelSource, draft_implementation
from ffjax.speculation.fused import check_fused
from ffjax.speculation.source import Source
from pallas_kernels.support import MAX_BATCH

__all__ = ["MAX_EDITS", "LiveBatch"]

MAX_EDITS = 512
"""Most logits of a sequence that `logit_bias` and forbidden tokens may change."""
# Sizes of chunks are this many times apart: a program each.
_CHUNK_STEP = 4


class _Waiting(NamedTuple):
    """A prompt that is not yet fed to its end: tokens, and how many the cache holds."""

    tokens: np.ndarray
    held: int


class LiveBatch:
    """A batch whose sequences come and go, with few programs whatever they ask for.

    Its owner places a request in a free row, orders chunks of prompts and blocks of steps, and
    reads them: calls return when the device has its orders, `read` waits. Order the next block
    before reading the last, and the device never waits. It is the owner who looks for a sequence's
    end (a stop token, enough tokens, a full cache), and then releases its row: what the sequence
    said after that is for nobody.

    A row's cache holds, when n new tokens have been read, the prompt and n - 1 of them. The next
    request in the row may keep as much of that as its own prompt begins with.

    What a sequence draws hangs on its own prompt, parameters and seed, not on those beside it. In a
    batch of another size, or after a cache that was filled in other pieces, its logits may differ
    in their last bits, and a draw that is as good as even may fall otherwise.
    One thread owns it.

    Attributes:
        rows: B, how many sequences there may be at a time.
        capacity: tokens that a sequence may have, prompt and answer together.
        block: decode steps that are ordered at a time; see `ffjax.blocks`.
        implementation: of the steps; see `ffjax.decode_step`.
        prefill_implementation: see `ffjax.generate`.
        compile_seconds: that compiling took.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int = MAX_BATCH,
        capacity: int = 4096,
        *,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        max_logprobs: int | None = None,
        chunk: int = 512,
        speculation: Speculation | None = None,
        ahead: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ):
        """Makes an empty batch.

        Args:
            model: the model.
            rows: B.
            capacity: tokens that a sequence may have.
            implementation: of the steps, or None for the best that can run.
            prefill: of the prefill, likewise.
            max_logprobs: most alternatives whose log-probabilities may be asked for, 0 to 20;
                None: no request may ask for log-probabilities.
            chunk: most tokens that are fed at a time; for so long the sequences that run wait.
            speculation: "lookup", a `ffjax.Lookup` or a `ffjax.Draft`, of up to 4 rows: steps take
                drafts of the next tokens, as in `ffjax.generate`. A draft model has a cache of its
                own of as many positions, and is fed each chunk after the model. Its weights may be
                replaced, too.
            ahead: compile all that any request may need now. False: what a request needs, when it
                is placed.
            say: is told what is being compiled, in a line.

        Raises:
            ValueError: a number is out of its range; the fused kernel is named for more than 8
                rows; the model, or a draft model, has fewer positions than the capacity; there are
                too many rows for speculation, or no such speculation; a draft model does not fit.
            TypeError: the speculation is no such thing.
            NotImplementedError: a named implementation cannot run here, or speculation cannot.
        """
        if rows < 1 or chunk < 1:
            raise ValueError(f"A batch has rows and chunks of 1 and more, got {rows}, {chunk}.")
        if not 2 <= capacity <= model.config.max_context:
            raise ValueError(
                f"{model.config.name} takes up to {model.config.max_context} tokens; a batch needs "
                f"a capacity of 2 to that, got {capacity}."
            )
        if is_fused(implementation) and rows > MAX_BATCH:
            raise ValueError(
                f"The fused kernel takes 1 to {MAX_BATCH} sequences; got {rows}. "
                "Ask for fewer, or use implementation='xla'."
            )
        asked = live_speculation(speculation, rows, model, capacity)
        self._tokens = 1 if asked is None else asked.tokens or 1
        self.rows, self.capacity = rows, capacity
        self._model, self._config, self._device = model, model.config, device_of(model)
        self._programs = live_programs(self._device)
        self._slots = slots_for(capacity)
        how = implementation, prefill
        self._feeder = self._feeder_of(model, *how)
        self._draft = self._feeder_of(asked.model, *how) if isinstance(asked, Draft) else None
        self.prefill_implementation: Prefill = self._feeder.prefill
        self._source = self._source_of(asked, implementation)
        self._all = Stages(
            draws=True,
            filters=True,
            penalizes=True,
            edits=min(MAX_EDITS, 1 << (self._config.vocab_size - 1).bit_length()),
            forbids_stops=True,
            logprobs=max_logprobs,
            gpu=drawing_gpu(self._device, implementation),
        )
        self._sizes = _sizes(chunk)
        self.reset()
        self.implementation: Implementation = resolve_implementation(
            model, self._state.cache, implementation
        )
        self.block = block_steps(self._config, rows, self._device, self.implementation)
        if self._tokens > 1 and is_fused(self.implementation):
            check_fused(model, rows, self._slots, self._tokens)
        self._say = say
        self._decoders: dict[tuple[Stages, bool], Any] = {}
        self._first: Any = None
        self.compile_seconds = 0.0
        if ahead:
            self._compile(self._kinds(), self._sizes)
            with self._settings():
                self._enter(0, np.zeros(1, np.int32), 0, SamplingParams(), ())

    def _feeder_of(
        self, model: Transformer, implementation: Implementation | None, prefill: Prefill | None
    ) -> Feeder:
        name = resolve_prefill(model.dtype, self._device, implementation, prefill)
        return Feeder(model, name, self.rows, self._slots)

    def _source_of(self, asked: Any, implementation: Implementation | None) -> Source | None:
        """Where drafts come from; None: there are none."""
        if self._draft is None:
            return asked
        parts = self._draft.parts
        with self._settings():
            chosen = draft_implementation(parts, self.rows, self._slots, implementation)
        return ModelSource(graphdef=parts.graphdef, tokens=self._tokens, implementation=chosen)

    def reset(self) -> None:
        """Empties the batch: no sequence, and a cache that holds nothing."""
        size, draft = (self.rows, self._slots), None
        if self._draft is not None:
            draft = self._draft.parts.config, self._draft.parts.dtype
        with self._settings():
            how = self._feeder.parts.dtype, self._all, self._tokens, draft
            self._state = self._programs.start(self._config, *size, *how)
        self._repeats = None if self._source is None else Repeats()
        self._waiting: dict[int, _Waiting] = {}
        self._order: deque[int] = deque()  # of those that wait, the longest first
        self._running: dict[int, None] = {}
        self._params: dict[int, SamplingParams] = {}

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """JAX's settings while programs are called."""
        with jax.default_device(self._device), program_settings():
            yield

    def _compile(self, kinds: Sequence[Stages], sizes: Sequence[int]) -> None:
        """Compiles steps of these kinds and chunks of these sizes, where they are not yet."""
        start = time.perf_counter()
        with self._settings():
            for stages, drafts in itertools.product(kinds, self._with_drafts()):
                if (stages, drafts) not in self._decoders:
                    told = f"{_told(stages)}{self._of_drafts() if drafts else ''}"
                    self._say(f"compiling a block of steps{told}")
                    how: dict[str, Any] = {"steps": self.block, "stages": stages}
                    how |= {"implementation": self.implementation}
                    programs = self._programs.decode
                    if self._source is not None:
                        programs = self._programs.speculate
                        how |= {"source": self._source, "drafts": drafts}
                    args = self._feeder.parts.graphdef, *self._decode_args()
                    self._decoders[stages, drafts] = programs.get(*args, **how)
            for size in sizes:
                self._feeder.compile(
                    size,
                    self._state,
                    lambda size=size: self._say(f"compiling the prefill of {size} tokens"),
                )
                if self._draft is not None:
                    self._draft.compile(
                        size,
                        self._state.draft,
                        lambda size=size: self._say(
                            f"compiling the draft model's prefill of {size} tokens"
                        ),
                    )
            if self._first is None:
                self._say("compiling the choice of the first token")
                args = self._feeder.parts.graphdef, self._feeder.weights, self._state, np.int32(0)
                how = {"stages": self._all, "normed": self.prefill_implementation != "pallas"}
                self._first = self._programs.choose_first.get(*args, **how)
        self.compile_seconds += time.perf_counter() - start

    def prepare(self, left: int, params: SamplingParams) -> None:
        """Compiles what a request needs, where it is not compiled yet.

        Args:
            left: how many tokens of its prompt are to be fed.
            params: its parameters.
        """
        self._compile([self._kind_for([params])], sorted(self._sizes_for(left)))

    def _kind_for(self, params: Sequence[SamplingParams]) -> Stages:
        """The quickest kind of steps that has all stages which some requests need."""
        needed = Stages.of(params)
        return next(kind for kind in self._kinds() if _covers(kind, needed))

    def _size_for(self, left: int) -> int:
        """The size of the next chunk of so many tokens."""
        return next((size for size in self._sizes if size >= left), self._sizes[-1])

    def _sizes_for(self, left: int) -> set[int]:
        """The sizes of all of them."""
        full, rest = divmod(left, self._sizes[-1])
        return ({self._sizes[-1]} if full else set()) | ({self._size_for(rest)} if rest else set())

    def _kinds(self) -> tuple[Stages, ...]:
        """The kinds of steps, the quickest first: each for all that it has the stages for."""
        drawn = Stages(draws=True, filters=True, gpu=self._all.gpu)
        return Stages(gpu=self._all.gpu), drawn, self._all

    def _with_drafts(self) -> tuple[bool, ...]:
        """Of which blocks there are programs: whose steps take drafts, and plain ones."""
        if self._source is None:
            return (False,)
        return (True,) if self._source.always else (True, False)

    def _of_drafts(self) -> str:
        whose = "" if self._draft is None else f" of {self._draft.parts.config.name}"
        return f", with drafts{whose}"

    def _decode_args(self) -> tuple[Any, ...]:
        running = np.zeros(self.rows, bool)
        running[[*self._running]] = True
        args = self._feeder.weights, self._state, running
        return args if self._source is None else (*args, self._draft_weights)

    @property
    def _draft_weights(self) -> Any:
        """The draft model's arrays as they are now; None without one."""
        return None if self._draft is None else self._draft.weights

    def _enter(
        self,
        row: int,
        tokens: np.ndarray,
        kept: int,
        params: SamplingParams,
        stops: Sequence[int],
    ) -> None:
        seed = 0 if params.seed is None else params.seed
        own = row_of(params, stops, self._all)._replace(seeds=sequence_words(seed))
        new = Newcomer.of(row, kept, own, tokens, self._config.vocab_size)
        if self._source is not None:
            most = self.capacity - len(tokens)
            limit = most if params.max_tokens is None else min(params.max_tokens, most)
            new = new.with_text(tokens, self._slots, limit)
        words, layout = as_words(new._replace(prompt=None))
        self._state = self._programs.enter(self._state, words, new.prompt, layout=layout)

    @property
    def free(self) -> tuple[int, ...]:
        """Rows without a request."""
        return tuple(row for row in range(self.rows) if row not in self._params)

    def check(self, tokens: Any, params: SamplingParams) -> np.ndarray:
        """Checks a request that is yet to be placed.

        Args:
            tokens: ids of its prompt.
            params: its parameters.

        Returns:
            The prompt, int32 `[n]`.

        Raises:
            ValueError: it is empty, leaves no room for an answer, or a token id is outside the
                vocabulary; more log-probabilities or edits of logits are asked for than this
                batch has.
            TypeError: it is no list of integers.
        """
        prompt = checked_prompt(tokens, self._config)
        if len(prompt) >= self.capacity:
            raise ValueError(
                f"Prompt and answer have room for {self.capacity} tokens together; the prompt has "
                f"{len(prompt)}. Shorten it."
            )
        check_params(params, self._config, texts=True)
        most = self._all.logprobs
        if params.logprobs is not None and (most is None or params.logprobs > most):
            which = "none" if most is None else f"those of up to {most} alternatives"
            raise ValueError(f"This batch tells log-probabilities of {which}; asked for others.")
        edits = len(dict(params.logit_bias).keys() | set(params.bad_token_ids))
        if edits > self._all.edits:
            raise ValueError(
                f"logit_bias and bad_token_ids may name up to {self._all.edits} tokens together; "
                f"got {edits}."
            )
        return prompt

    def place(
        self,
        row: int,
        tokens: Any,
        params: SamplingParams | None = None,
        *,
        eos: Sequence[int] = (),
        keep: int = 0,
    ) -> None:
        """Gives a free row to a request.

        Args:
            row: which.
            tokens: ids of the prompt, all of it.
            params: its parameters; None: the defaults, greedy. Without a seed it is 0.
            eos: what ends a text of the model, forbidden before `min_tokens`.
            keep: how many of the tokens the row's cache holds already, in front; fewer than all.

        Raises:
            ValueError: the row is not free, or there is none of that number; `keep` is out of its
                range; or as `check` says.
            TypeError: likewise.
        """
        params = SamplingParams() if params is None else params
        if not 0 <= row < self.rows:
            raise ValueError(f"Rows are 0 to {self.rows - 1}, got {row}.")
        if row in self._params:
            raise ValueError(f"Row {row} has a request. Release it first.")
        prompt = self.check(tokens, params)
        if not 0 <= keep < len(prompt):
            raise ValueError(
                f"Of {len(prompt)} tokens, 0 to {len(prompt) - 1} may be kept, got {keep}."
            )
        self.prepare(len(prompt) - keep, params)
        with self._settings():
            self._enter(row, prompt, keep, params, params.ends(eos))
        if self._repeats is not None:
            self._repeats.seen = True  # what is new may repeat
        self._params[row] = params
        self._waiting[row] = _Waiting(prompt, keep)
        self._order.append(row)

    def feed(self) -> Fed | None:
        """Orders one chunk of the prompt that waits longest; None where none waits."""
        if not self._order:
            return None
        row = self._order[0]
        prompt, held = self._waiting[row]
        left = len(prompt) - held
        size = self._size_for(left)
        count = min(left, size)
        ends, made = count == left, None
        with self._settings():
            # Of both models, before anything is ordered: they may be none for this batch.
            weights, drafts = self._feeder.weights, self._draft_weights
            tokens = prompt[held : held + count]
            self._state = self._feeder.fed(weights, self._state, row, tokens, held, ends, size)
            if ends:
                self._state, made = self._first(weights, self._state, np.int32(row))
                made = made.sent()
            # After the choice of the first token, which so does not wait for it.
            self._feed_draft(drafts, row, prompt, held, held + count, size)
        if ends:
            self._order.popleft()
            del self._waiting[row]
            self._running[row] = None
        else:
            self._waiting[row] = _Waiting(prompt, held + count)
        return Fed(row, count, ends, made, self._params[row])

    def _feed_draft(
        self, weights: Any, row: int, prompt: np.ndarray, start: int, stop: int, size: int
    ) -> None:
        """Feeds a chunk of a prompt to the draft model, which stays a token behind the model.

        What its cache holds at the last token of a row is of no use, if a request was there before:
        so that one is fed once more. The last token of a prompt is fed by the first step.
        """
        first, end = max(start - 1, 0), stop - 1
        if self._draft is None or first == end:
            return
        tokens = prompt[first:end]
        draft = self._draft.fed(weights, self._state.draft, row, tokens, first, False, size)
        self._state = self._state._replace(draft=draft)

    def decode(self) -> Block | None:
        """Orders a block of steps for all whose prompt has been fed; None where there are none."""
        if not self._running:
            return None
        rows = tuple(self._running)
        params = tuple(self._params[row] for row in rows)
        stages = self._kind_for(params)
        drafts = self._repeats is not None and self._repeats.seen
        with self._settings():
            self._state, made = self._decoders[stages, drafts](*self._decode_args())
        return Block(rows, made.sent(), params, self._repeats)

    def release(self, row: int) -> None:
        """Frees a row. Its cache keeps what it holds."""
        if self._params.pop(row, None) is None:
            return
        self._running.pop(row, None)
        if self._waiting.pop(row, None) is not None:
            self._order.remove(row)

    def fault(self) -> str | None:
        """What a step that gave up waiting has said, a sentence; None if none did."""
        if not is_fused(self.implementation):
            return None
        return fault_in(self._model, self._state.cache, self._tokens)


def _sizes(chunk: int) -> tuple[int, ...]:
    """Sizes of chunks, rising to the largest."""
    sizes = [chunk]
    while sizes[0] // _CHUNK_STEP >= SMALLEST:
        sizes.insert(0, sizes[0] // _CHUNK_STEP)
    return tuple(sizes)


def _covers(kind: Stages, needed: Stages) -> bool:
    """Whether steps of a kind have all stages that are needed."""
    return (
        kind.draws >= needed.draws
        and kind.filters >= needed.filters
        and kind.penalizes >= needed.penalizes
        and kind.edits >= needed.edits
        and kind.forbids_stops >= needed.forbids_stops
        and (needed.logprobs is None or kind.logprobs is not None)
    )


def _told(stages: Stages) -> str:
    if stages.plain:
        return ", greedy"
    return ", with all stages" if stages.penalizes else ", drawn"
