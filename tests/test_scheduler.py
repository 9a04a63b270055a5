"""The scheduler over a batch without a model: who runs where, what is kept, how it ends."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from fake_batch import NAN, FakeBatch, expected
from serve_cases import until

from ffjax.sampling.params import SamplingParams
from ffjax.serve.errors import ApiError
from ffjax.serve.job import Ended, Event, Job, Piece
from ffjax.serve.metrics import Metrics
from ffjax.serve.scheduler import Scheduler
from ffjax.serve.slots import Slots
from ffjax.text.writer import Writer
from ffjax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


class Reader:
    """Asks for a text, and takes what is told of it."""

    def __init__(self, text: str | list[int], **params: Any):
        prompt = TOKENIZER.encode(text) if isinstance(text, str) else text
        given: dict[str, Any] = {"max_tokens": 20, "seed": 0} | params
        self.params = SamplingParams(**given)
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.job = Job(
            prompt,
            self.params,
            eos=(256,),
            writer=Writer(TOKENIZER, prompt, self.params),
            tell=self._tell,
        )

    def _tell(self, event: Event) -> None:
        assert not self.ended.is_set(), "something was told after the end"
        self.events.append(event)
        if not isinstance(event, Piece):
            self.ended.set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    def end(self) -> Event:
        assert self.ended.wait(20), "the job did not end"
        return self.events[-1]

    @property
    def expected(self) -> str:
        return TOKENIZER.decode(expected(self.job.prompt, self.params))


@pytest.fixture
def start():
    """Starts schedulers, and ends them."""
    running: list[Scheduler] = []

    def start(make: Any = FakeBatch, **how: Any) -> Scheduler:
        given: dict[str, Any] = {"max_queue": 100, "metrics": Metrics(), "chunk": 64} | how
        scheduler = Scheduler(make, **given)
        running.append(scheduler)
        scheduler.start()
        until(lambda: scheduler.state != "starting")
        return scheduler

    yield start
    for scheduler in running:
        scheduler.close(0)
        assert scheduler.join(10)


def test_every_text_is_as_alone_whoever_is_beside_it(start):
    scheduler = start()
    readers = [
        Reader(
            "x" * (1 + 7 * i % 150) + str(i), max_tokens=1 + 11 * i % 60, temperature=i % 2, seed=i
        )
        for i in range(60)
    ]
    for reader in readers:
        scheduler.submit([reader.job])
    for reader in readers:
        assert isinstance(reader.end(), Ended)
        assert reader.text == reader.expected
    assert {type(event) for reader in readers for event in reader.events} == {Piece, Ended}


@pytest.mark.parametrize("block", [8, 2])
def test_a_long_prompt_stalls_the_others_no_longer_than_a_chunk(start, block):
    batch = FakeBatch(step_seconds=0.0005, block=block)
    scheduler = start(lambda: batch)
    first = Reader("hello", max_tokens=400, ignore_eos=True)
    scheduler.submit([first.job])
    until(lambda: first.events)
    others = [Reader("y" * 300 + str(i), max_tokens=5) for i in range(5)]
    for one in others:
        scheduler.submit([one.job])
    for one in (first, *others):
        one.end()
        assert one.text == one.expected
    assert 0 < batch.longest <= 64 + 63  # the last chunk may begin just below the budget
    assert 8 <= batch.fewest < math.inf  # who runs has so many steps between two chunks


def test_a_next_turn_feeds_its_new_tokens_alone(start):
    batch = FakeBatch()
    scheduler = start(lambda: batch)
    prompt = TOKENIZER.encode("a conversation")
    other = Reader("a conversion of units", max_tokens=9, ignore_eos=True)
    for _ in range(4):
        reader = Reader(prompt, max_tokens=9, ignore_eos=True)
        scheduler.submit([reader.job])
        reader.end()
        prompt = prompt + reader.job.tokens + TOKENIZER.encode(" and then?")
        if not other.events:  # another one that begins alike
            scheduler.submit([other.job])
            other.end()
    rows, kept = zip(*batch.entered, strict=True)
    assert rows[0] == rows[2] == rows[3] == rows[4] != rows[1]
    # All but the last token of the answer, which nobody has fed, and the new text.
    grown = len(" and then?") + 9
    assert kept[2:] == tuple(len("a conversation") + 9 - 1 + grown * i for i in range(3))
    assert batch.fed == len("a conversation") + len("a conversion of units") + 3 * (grown - 9 + 1)


def test_caches_are_left_alone_where_that_is_asked_for(start):
    batch = FakeBatch()
    scheduler = start(lambda: batch, keep_caches=False)
    for _ in range(2):
        reader = Reader("the same prompt")
        scheduler.submit([reader.job])
        reader.end()
        assert reader.text == reader.expected
    assert [kept for _, kept in batch.entered] == [0, 0]


def test_which_row_is_taken():
    slots = Slots(3)
    assert slots.choose(range(3), [1, 2, 3]) == (0, 0)
    slots.entered(0)
    slots.left(0, [1, 2, 3, 4, 5, 6])
    # It goes on there, and feeds its last token at least.
    assert slots.choose(range(3), [1, 2, 3, 4, 5, 6, 7]) == (0, 6)
    assert slots.choose(range(3), [1, 2, 3, 4, 5, 6]) == (0, 5)
    # A shorter one keeps half of what is there.
    assert slots.choose(range(3), [1, 2, 3, 9]) == (0, 3)
    # Less: another row, which loses nothing.
    assert slots.choose(range(3), [1, 2, 9, 9]) == (1, 0)
    slots.entered(1)
    slots.left(1, [7])
    slots.entered(2)
    slots.left(2, [8])
    # All in use before: the one that was not for longest, with what it happens to share.
    assert slots.choose(range(3), [1, 2, 9, 9]) == (0, 2)
    assert slots.choose((1, 2), [1, 2, 9, 9]) == (1, 0)


@pytest.mark.parametrize("stop", ["x", "gw", "xa s"])
def test_a_stop_string_ends_a_text_and_frees_its_row(start, stop):
    scheduler = start()
    reader = Reader("hello", max_tokens=400, stop=stop, ignore_eos=True)
    whole = reader.expected
    assert stop in whole
    scheduler.submit([reader.job])
    assert reader.end() == Ended("stop", stop)
    assert reader.text == whole[: whole.index(stop)]
    until(lambda: all(row is None for row in scheduler.batch._rows))


def test_stop_tokens_and_lengths_end_a_text(start):
    scheduler = start()
    whole = expected(TOKENIZER.encode("hello"), SamplingParams(max_tokens=20))
    stopped = Reader("hello", stop_token_ids=[whole[3]])
    limited = Reader("hello", max_tokens=7)
    full = Reader("z" * 500, max_tokens=100, ignore_eos=True)
    for one in (stopped, limited, full):
        scheduler.submit([one.job])
    assert stopped.end() == Ended("stop", whole[3])
    assert stopped.job.tokens == whole[: whole.index(whole[3])]
    # Its last token was fed: the stop token was chosen after it.
    assert stopped.job.held == stopped.job.prompt + stopped.job.tokens
    assert limited.end() == Ended("length", None) and len(limited.job.tokens) == 7
    assert limited.job.held == limited.job.prompt + limited.job.tokens[:-1]
    assert full.end() == Ended("length", None) and len(full.job.tokens) == 12


def test_a_cancelled_text_frees_its_row_or_its_place_in_the_queue(start):
    scheduler = start(lambda: FakeBatch(rows=1, step_seconds=0.001))
    running, waiting, last = (Reader(text, max_tokens=400, ignore_eos=True) for text in "abc")
    for one in (running, waiting, last):
        scheduler.submit([one.job])
    until(lambda: running.events)
    scheduler.cancel([waiting.job])
    scheduler.cancel([running.job])
    assert last.end() == Ended("length", None)
    assert last.text == last.expected
    assert running.job.over and waiting.job.over
    assert not waiting.events and not running.ended.is_set()


def test_a_full_queue_refuses_and_takes_none_of_a_request(start):
    scheduler = start(lambda: FakeBatch(rows=1, step_seconds=0.001), max_queue=1)
    first = Reader("a", max_tokens=400, ignore_eos=True)
    scheduler.submit([first.job])
    second, third = Reader("b"), Reader("c")
    with pytest.raises(ApiError, match="is busy: 1 texts are being written") as refused:
        until(lambda: scheduler._running == 1)
        scheduler.submit([second.job, third.job])
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    scheduler.submit([second.job])
    with pytest.raises(ApiError, match="1 wait, of 1 that may"):
        scheduler.submit([third.job])
    with pytest.raises(ApiError, match="up to 2 texts") as never:
        scheduler.submit([Reader("x").job for _ in range(3)])
    assert never.value.status == 400
    assert isinstance(second.end(), Ended)


def test_numbers_that_are_none_end_their_own_text_alone(start):
    batch = FakeBatch()
    scheduler = start(lambda: batch)
    wrong, right = Reader([*b"ab", NAN]), Reader("abc", max_tokens=60)
    scheduler.submit([wrong.job, right.job])
    error = wrong.end()
    assert isinstance(error, ApiError) and error.status == 500 and error.code == "not_finite"
    assert "those of this request were NaN or infinite after 2 new tokens" in error.message
    assert isinstance(right.end(), Ended) and right.text == right.expected
    again = Reader([*b"ab", NAN])
    scheduler.submit([again.job])
    assert isinstance(again.end(), ApiError)
    assert batch.entered[-1][1] == 0  # what the row held is not trusted


def test_a_batch_that_fails_is_made_anew_and_those_that_wait_go_on(start):
    batches: list[FakeBatch] = []

    def make() -> FakeBatch:
        batches.append(FakeBatch(rows=1, step_seconds=0.001))
        return batches[-1]

    said: list[str] = []
    scheduler = start(make, say=said.append)
    running, waiting = Reader("a", max_tokens=400, ignore_eos=True), Reader("b")
    scheduler.submit([running.job])
    until(lambda: running.events)
    scheduler.submit([waiting.job])
    batches[0].fail = RuntimeError("the device has gone")
    error = running.end()
    assert isinstance(error, ApiError) and error.code == "batch_failed"
    assert "the device has gone" in error.message
    assert isinstance(waiting.end(), Ended) and waiting.text == waiting.expected
    assert len(batches) == 2 and scheduler.state == "ready"
    assert "The batch failed" in said[0] and "goes on" in said[1]


@pytest.mark.parametrize("where", ["check", "place"])
@pytest.mark.parametrize(
    ("error", "status"), [(OverflowError("too large"), 500), (ValueError("A bad one."), 400)]
)
def test_a_request_that_cannot_be_placed_fails_alone(start, where, error, status):
    batches: list[FakeBatch] = []

    class Batch(FakeBatch):
        def check(self, tokens, params):
            if where == "check" and params.seed == 13:
                raise error
            super().check(tokens, params)

        def place(self, row, tokens, params, **how):
            if params.seed == 13:
                raise error
            super().place(row, tokens, params, **how)

    def make() -> FakeBatch:
        batches.append(Batch(step_seconds=0.001))
        return batches[-1]

    scheduler = start(make)
    running, broken = Reader("a", max_tokens=300, ignore_eos=True), Reader("b", seed=13)
    scheduler.submit([running.job])
    until(lambda: running.events)
    after = Reader("c")
    scheduler.submit([broken.job, after.job])
    failed = broken.end()
    assert isinstance(failed, ApiError) and failed.status == status
    for reader in (running, after):
        assert isinstance(reader.end(), Ended) and reader.text == reader.expected
    assert len(batches) == 1 and scheduler.state == "ready"
    until(lambda: scheduler._running == 0)


def test_a_device_that_fails_while_a_request_is_placed_is_the_batchs_failure(start):
    batches: list[FakeBatch] = []

    class Batch(FakeBatch):
        def place(self, row, tokens, params, **how):
            super().place(row, tokens, params, **how)
            if params.seed == 13:
                raise RuntimeError("the device has gone")

    def make() -> FakeBatch:
        batches.append(Batch())
        return batches[-1]

    scheduler = start(make)
    broken = Reader("b", seed=13)
    scheduler.submit([broken.job])
    failed = broken.end()
    assert isinstance(failed, ApiError) and failed.code == "batch_failed"
    until(lambda: scheduler.state == "ready")
    assert len(batches) == 2


def test_a_batch_that_fails_again_and_again_is_the_end_and_says_so(start):
    def make() -> FakeBatch:
        batch = FakeBatch()
        batch.fail = RuntimeError("the device has gone")
        return batch

    scheduler = start(make)
    for i in range(3):
        until(lambda: scheduler.state == "ready")
        reader = Reader(str(i))
        scheduler.submit([reader.job])
        assert isinstance(reader.end(), ApiError)
        until(lambda: scheduler.reason is None or scheduler.state == "failed")
    until(lambda: scheduler.state == "failed")
    with pytest.raises(ApiError, match=r"must be restarted.*gone.* 3 times in a row") as refused:
        scheduler.submit([Reader("x").job])
    assert refused.value.status == 503


def test_a_batch_that_cannot_be_made_is_the_end_at_once(start):
    def make() -> FakeBatch:
        raise ValueError("A capacity of 3 is too small.")

    scheduler = start(make)
    assert scheduler.state == "failed" and isinstance(scheduler.error, ValueError)
    with pytest.raises(ApiError, match="A capacity of 3 is too small"):
        scheduler.submit([Reader("x").job])


def test_a_reader_that_fails_harms_nobody_else(start):
    scheduler = start()
    broken, fine = Reader("a"), Reader("b", max_tokens=60)

    def tell(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    broken.job._tell = tell
    scheduler.submit([broken.job, fine.job])
    assert isinstance(fine.end(), Ended) and fine.text == fine.expected
    assert scheduler.state == "ready"
    until(lambda: scheduler._running == 0)


@pytest.mark.parametrize(("grace", "ends"), [(20, Ended), (0.05, ApiError)])
def test_closing_gives_running_texts_a_bounded_time_and_the_others_none(start, grace, ends):
    scheduler = start(lambda: FakeBatch(rows=1, step_seconds=0.001))
    running, waiting = (Reader(x, max_tokens=400, ignore_eos=True) for x in "ab")
    scheduler.submit([running.job])
    scheduler.submit([waiting.job])
    until(lambda: running.events)
    scheduler.close(grace)
    refused = waiting.end()
    assert isinstance(refused, ApiError) and refused.status == 503
    assert refused.message == "The server is shutting down."
    assert isinstance(running.end(), ends)
    assert scheduler.join(10) and scheduler.state == "closed"
    with pytest.raises(ApiError, match="shutting down"):
        scheduler.submit([Reader("x").job])
