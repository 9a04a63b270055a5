"""A conversation whose cache is kept from one reply to the next."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from ffjax.broken import NotFiniteError
from ffjax.decode import Implementation
from ffjax.interrupts import interrupts_held_back
from ffjax.live.batch import LiveBatch
from ffjax.loop import BLOCK, NOT_FINITE
from ffjax.model import Transformer
from ffjax.prefill.choice import Prefill
from ffjax.requests import check_params
from ffjax.sampling.params import MAX_LOGPROBS, SamplingParams
from ffjax.speculation.choice import Speculation, live_speculation
from ffjax.speculation.draft import shortest_context
from ffjax.text.asked import Asked, completed, with_overrides
from ffjax.text.conversation import conversation_tokens
from ffjax.text.reply import Reply
from ffjax.text.stream import TextStream
from ffjax.tokenizer import Tokenizer, check_known
from pallas_kernels.dims import ceil_div

__all__ = ["ChatSession"]

# A live batch has room for a block beyond its capacity, and rounds up.
_LEAST_CAPACITY = 1024 - BLOCK
_GROWTH = 4
_ROW = 0


class ChatSession:
    """A conversation's cache of its own.

    Each reply is given the whole conversation. What its tokens have in common with those in the
    cache, from the beginning on, is not fed again: of a conversation that goes on, that is all
    but the newest message; of one whose history was edited, what stands before the edit.

    The cache grows with the conversation, up to the positions that the model was made for. A draft
    model has a cache of its own beside it, which is kept and grows alike. A reply
    that is broken off, by `TextStream.close`, Ctrl-C, an error or the next reply, leaves the
    session as usable as before. One thread at a time may use it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: SamplingParams | None = None,
        capacity: int | None = None,
        implementation: Implementation | None = None,
        prefill: Prefill | None = None,
        speculation: Speculation | None = None,
    ):
        """Allocates nothing yet.

        Args:
            model: the model.
            tokenizer: its tokenizer, one with a chat template.
            sampling: how tokens are chosen where a reply does not say.
            capacity: positions of the cache to begin with. None: what the first reply needs.
            implementation: of the decode steps; see `ffjax.generate`.
            prefill: of the prefill; see `ffjax.generate`.
            speculation: see `ffjax.generate`. With a draft model, a conversation goes as far as
                the shorter one of both contexts.

        Raises:
            ValueError: the capacity is no whole number from 2, there is no such speculation, or the
                draft model does not fit.
            TypeError: the speculation is no such thing.
        """
        asked = live_speculation(speculation, 1, model)
        self._speculates = asked is not None
        self._shortest = shortest_context(model, asked)
        whole = isinstance(capacity, int) and not isinstance(capacity, bool)
        if capacity is not None and not (whole and capacity >= 2):
            raise ValueError(f"The capacity of a session is a number from 2, got {capacity!r}.")
        self._model, self._tokenizer = model, tokenizer
        self._sampling = SamplingParams() if sampling is None else sampling
        self._least = _LEAST_CAPACITY if capacity is None else capacity
        self._how: dict[str, Any] = {
            "implementation": implementation,
            "prefill": prefill,
            "speculation": speculation,
        }
        self._batch: LiveBatch | None = None
        self._max_logprobs: int | None = None
        self._held: list[int] = []  # what the cache holds for certain, from its beginning on
        self._running: weakref.ref[TextStream] | None = None

    @property
    def context(self) -> int:
        """Positions that the conversation may have, of the model and of a draft model."""
        return self._shortest.max_context

    @property
    def capacity(self) -> int:
        """Positions that the cache has now; 0 before the first reply."""
        return 0 if self._batch is None else self._batch.capacity

    def reply(
        self,
        messages: Sequence[Any],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool | str = False,
        **overrides: Any,
    ) -> TextStream:
        """Writes the next message of a conversation.

        A reply that is still running is broken off.

        Args:
            messages: the whole conversation, each message with "role" and "content".
            sampling: how tokens are chosen, and what ends the reply. None: as the session says.
                Without `max_tokens`, up to 1024 tokens, as far as there is room.
            tools: as in `HFTokenizer.chat`.
            template: as in `HFTokenizer.chat`.
            documents: as in `HFTokenizer.chat`.
            variables: as in `HFTokenizer.chat`.
            continue_final_message: as in `HFTokenizer.chat`.
            overrides: fields of `SamplingParams` that replace those.

        Returns:
            The reply, piece by piece. Its completion's `cached_tokens` were not fed again.

        Raises:
            ValueError: there is no chat template, or it refuses the messages; the conversation
                is as long as the model's context; or an option is out of range. The session stays
                as it was.
            TypeError: an argument is of the wrong kind.
            NotFiniteError: the stream does.
        """
        given = with_overrides(self._sampling if sampling is None else sampling, overrides)
        tokens = conversation_tokens(
            self._tokenizer,
            messages,
            tools=tools,
            template=template,
            documents=documents,
            variables=variables,
            continue_final_message=continue_final_message,
        )
        return self.continued(tokens, given)

    def continued(self, tokens: list[int], sampling: SamplingParams) -> TextStream:
        """Goes on from token ids, as `reply` does from messages.

        Args:
            tokens: all of them, not only new ones.
            sampling: how tokens are chosen.

        Raises:
            ValueError: as `reply`.
        """
        config = self._model.config
        room = self.context - len(tokens)
        if room < 1:
            whose = "" if self._shortest is config else "the draft model "
            raise ValueError(
                f"The conversation has {len(tokens)} tokens, and {whose}{self._shortest.name} was "
                f"made for {self.context}: there is no room for a reply. Leave out its oldest "
                "messages, shorten them, or begin a new one."
            )
        check_known("the conversation", tokens, config)
        check_params(sampling, config, texts=True)
        params = completed(sampling, tokens, config)
        if (params.max_tokens or 1) > room:
            params = with_overrides(
                params, {"max_tokens": room, "min_tokens": min(params.min_tokens, room)}
            )
        self._break_off()
        batch, before = self._batch_for(len(tokens) + (params.max_tokens or 1), params)
        keep = min(_common(self._held, tokens), len(tokens) - 1)
        batch.check(tokens, params)
        batch.prepare(len(tokens) - keep, params)
        with self._ordered():
            batch.place(_ROW, tokens, params, eos=self._tokenizer.eot_ids, keep=keep)
            self._held = tokens[:keep]
        reply = Reply(
            self._tokenizer,
            Asked(tokens, params),
            cached_tokens=keep,
            implementation=batch.implementation,
            prefill=batch.prefill_implementation,
            compile_seconds=batch.compile_seconds - before,
            speculates=self._speculates,
        )
        stream = TextStream(self._pieces(batch, reply), reply.completion)
        self._running = weakref.ref(stream)
        return stream

    def close(self) -> None:
        """Breaks off a running reply and frees the cache; the next reply makes another."""
        self._break_off()
        self._drop()

    def _break_off(self) -> None:
        """Ends a reply that is running, or was never begun."""
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()
        self._running = None
        if self._batch is not None:
            with self._ordered():
                self._batch.release(_ROW)

    def _drop(self) -> None:
        self._batch, self._held = None, []

    def _batch_for(self, need: int, params: SamplingParams) -> tuple[LiveBatch, float]:
        """A batch with room for so many positions, and the seconds it had compiled before."""
        tells = params.logprobs is not None
        if (
            self._batch is not None
            and self._batch.capacity >= need
            and (self._max_logprobs is not None or not tells)
        ):
            return self._batch, self._batch.compile_seconds
        capacity = max(self._least, self.capacity)
        while capacity < need:
            # Each size is a set of programs of its own.
            capacity = (capacity + BLOCK) * _GROWTH - BLOCK
        capacity = min(capacity, self.context)
        logprobs = MAX_LOGPROBS if tells else self._max_logprobs
        self._drop()  # before the next one is made: there may be no room for both
        batch = LiveBatch(
            self._model,
            rows=1,
            capacity=capacity,
            max_logprobs=logprobs,
            ahead=False,  # a conversation needs few of the programs
            **self._how,
        )
        self._batch, self._max_logprobs = batch, logprobs
        return batch, 0.0

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """Around an order for the device: one that is cut in two would leave no cache.

        Ctrl-C waits for its end. After any error, the next reply makes a new cache.
        """
        with interrupts_held_back():
            try:
                yield
            except BaseException:
                self._drop()
                raise

    def _pieces(self, batch: LiveBatch, reply: Reply) -> Generator[str, None, None]:
        """Runs a reply."""
        prompt, params = reply.asked
        reply.started(time.perf_counter())
        try:
            while True:
                with self._ordered():
                    fed = batch.feed()
                    assert fed is not None, "the prompt has not ended"
                    self._held = prompt[: len(self._held) + fed.fed]
                if fed.done:
                    break
            blocks = ceil_div((params.max_tokens or 1) - 1, batch.block)
            ahead = self._order(batch, min(blocks, 1))
            rows = [fed.read()]
            while True:
                for chosen in rows:
                    if chosen.token == NOT_FINITE:
                        raise NotFiniteError(_ROW, len(reply.tokens), batch.fault())
                    if piece := reply.take(chosen, time.perf_counter()):
                        yield piece
                    if reply.finish_reason is not None:
                        return
                blocks -= 1
                current, ahead = ahead, self._order(batch, min(blocks, 1))
                assert current is not None, "a reply ends with its last block"
                rows = [step[_ROW] for step in current.read()]
        except Exception as error:
            self._drop()  # what the device has left of the cache is anybody's guess
            if isinstance(error, NotFiniteError):
                reply.broken_off()
                error.completions = [reply.completion()]
            raise
        finally:
            reply.broken_off()
            if self._batch is batch:
                if reply.read:  # the last one has been chosen, and maybe not fed
                    self._held = prompt + reply.read[:-1]
                with self._ordered():
                    batch.release(_ROW)

    def _order(self, batch: LiveBatch, count: int) -> Any:
        if count < 1:
            return None
        with self._ordered():
            return batch.decode()


def _common(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens two lists have in common, from the beginning on."""
    count = 0
    for mine, theirs in zip(held, tokens, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
