"""The thread that owns the batch: requests join and leave it between blocks of steps."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from ffjax.failures import sentence
from ffjax.loop import BLOCK
from ffjax.sampling.params import SamplingParams
from ffjax.serve.batch import Batch, Chosen, Fed
from ffjax.serve.errors import ApiError, bad_request, server_error, too_many_texts, unavailable
from ffjax.serve.job import Ended, Job
from ffjax.serve.metrics import Metrics
from ffjax.serve.slots import Slots
from ffjax.settings import own_settings

__all__ = ["Scheduler", "State"]

State = Literal["starting", "ready", "closing", "closed", "failed"]

# Failures of the batch without one answer in between, after which no other is tried.
_MOST_FAILURES = 3
# A short prompt takes about as long as one of so many tokens: the weights are read once.
_LEAST_FED = 4
# How long a client that was turned away is told to wait.
_RETRY_SECONDS = 1

_Steps = Sequence[Mapping[int, Chosen]]


class Scheduler:
    """Runs jobs side by side, up to as many as the batch has rows.

    In each round it takes waiting jobs into free rows, orders a chunk of prefill and a block of
    steps, and only then reads what it had ordered the round before: the device has work meanwhile.
    So a running sequence waits for others no longer than one chunk of prefill.

    Where the batch fails, the jobs in it fail, a new batch is made, and those that wait go on.

    Attributes:
        reason: why it takes no jobs, a sentence; None while it does.
        error: what it failed with.
    """

    def __init__(
        self,
        make: Callable[[], Batch],
        *,
        max_queue: int,
        metrics: Metrics,
        chunk: int = 512,
        keep_caches: bool = True,
        on_change: Callable[[State], None] = lambda state: None,
        say: Callable[[str], None] = lambda text: None,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ):
        """Starts nothing yet.

        Args:
            make: makes the batch; called in the scheduler's thread, and again after a failure.
            max_queue: jobs that may wait for a row.
            metrics: counts what happens.
            chunk: tokens of prompts that are fed at a time, about, with 8 steps between.
            keep_caches: whether a prompt goes on with what a row's cache holds.
            on_change: is told each new state, in the scheduler's thread.
            say: takes lines of a log.
            on_error: is shown what went wrong, for whoever wants to see where.
        """
        self._make = make
        self._max_queue = max_queue
        self._metrics = metrics
        self._chunk = chunk
        self._steps = BLOCK  # that were ordered after the last chunk
        self._keep_caches = keep_caches
        self._on_change = on_change
        self._say = say
        self._on_error = on_error
        self._changed = threading.Condition()
        # Shared, under `_changed`: the state, who waits, and who is in which row.
        self._state: State = "starting"
        self._waiting: deque[Job] = deque()
        self._jobs: list[Job | None] = []
        self._deadline: float | None = None
        self.reason: str | None = "The server is starting: it compiles its programs."
        self.error: BaseException | None = None
        # The scheduler's thread alone:
        self._batch: Batch | None = None
        self._slots = Slots(0)
        self._ordered: list[tuple[dict[int, Job], Callable[[], _Steps]]] = []
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="ffjax-scheduler", daemon=True)
        metrics.watch(waiting=lambda: len(self._waiting), running=lambda: self._running)

    # For other threads

    @property
    def state(self) -> State:
        """Whether it takes jobs ("ready"), not yet, or no more."""
        return self._state

    @property
    def batch(self) -> Batch:
        """The batch, to be looked at and not called.

        Raises:
            ApiError: there is none yet.
        """
        if self._batch is None:
            raise self._refusal()
        return self._batch

    def start(self) -> None:
        """Makes the batch and runs jobs, in a thread of its own."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Has jobs run, all of them or none.

        Raises:
            ApiError: there is no room for them, now or ever; or no jobs are taken.
        """
        with self._changed:
            if self._state != "ready":
                raise self._refusal()
            rows = len(self._jobs)
            if len(jobs) > rows + self._max_queue:
                raise too_many_texts(len(jobs), rows, self._max_queue)
            room = self._max_queue + rows - self._running - len(self._waiting)
            if len(jobs) > room:
                raise ApiError(
                    429,
                    f"The server is busy: {self._running} texts are being written and "
                    f"{len(self._waiting)} wait, of {self._max_queue} that may. Try again in a "
                    "moment.",
                    kind="requests",
                    code="rate_limit_exceeded",
                    retry_after=_RETRY_SECONDS,
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs that nobody waits for; those that are over stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def close(self, grace: float) -> None:
        """Takes no more jobs, ends those that wait, and gives the others some time.

        Args:
            grace: seconds after which those that still run are ended.
        """
        with self._changed:
            deadline = time.monotonic() + grace
            self._deadline = min(self._deadline or deadline, deadline)
            if self._state == "ready":
                self._state = "closing"
            self.reason = "The server is shutting down."
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for its thread; returns whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def _running(self) -> int:
        return sum(job is not None for job in self._jobs)

    def _refusal(self) -> ApiError:
        code = {"starting": "not_ready", "failed": "failed"}.get(self._state, "closing")
        retry = None if self._state == "failed" else _RETRY_SECONDS
        return unavailable(self.reason or "The server takes no requests.", code, retry)

    # The scheduler's thread

    def _run(self) -> None:
        with own_settings():
            try:
                self._renew()
            except Exception as error:
                self._give_up(error)
                return
            self._become("ready")
            while True:
                try:
                    if not self._round():
                        break
                except Exception as error:
                    if not self._recover(error):
                        return
            self._batch, self._ordered = None, []
            self._become("closed")

    def _become(self, state: State) -> None:
        with self._changed:
            if state == "ready" and self._deadline is not None:
                state = "closing"
            self._state = state
            if state == "ready":
                self.reason = None
        self._on_change(state)

    def _renew(self) -> None:
        """A new batch, warm, without jobs."""
        self._batch, self._ordered = None, []  # first: there may be no memory for two
        batch = self._make()
        _run_once(batch)
        self._slots = Slots(batch.rows)
        with self._changed:
            self._jobs = [None] * batch.rows
        self._batch = batch

    def _recover(self, error: Exception) -> bool:
        """After a failure of the batch: its jobs fail, and a new one is made, or it is the end."""
        said = sentence(error)
        self._say(f"The batch failed: {said}")
        self._on_error(error)
        # Its frames hold the old batch, and there may be no memory for two.
        traceback.clear_frames(error.__traceback__)
        self._metrics.batch_failures.inc()
        self._failures += 1
        broken = [job for job in self._jobs if job is not None]
        with self._changed:
            self._jobs = [None] * len(self._jobs)
            self._state = "starting"
            self.reason = "The batch failed, and a new one is being made."
        for job in broken:
            self._fail(job, server_error(f"The batch that ran this failed: {said}", "batch_failed"))
        if self._failures >= _MOST_FAILURES:
            self._give_up(error, f" It did so {self._failures} times in a row.")
            return False
        try:
            self._renew()
        except Exception as again:
            self._on_error(again)
            self._give_up(again)
            return False
        self._say("A new batch was made; the server goes on.")
        self._become("ready")
        return True

    def _give_up(self, error: Exception, more: str = "") -> None:
        self._batch, self._ordered = None, []
        with self._changed:
            self._state = "failed"
            self.error = error
            self.reason = f"The server cannot go on, and must be restarted: {sentence(error)}{more}"
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting:
            self._fail(job, self._refusal())
        self._on_change("failed")

    def _round(self) -> bool:
        """Orders and reads; False: it is closed, and nobody is left."""
        self._wait()
        self._end_the_unwanted()
        if self._deadline is not None and not self._running:
            return False
        self._admit()
        before, self._ordered = self._ordered, self._order()
        for jobs, read in before:
            self._read(jobs, read)
        return True

    def _wait(self) -> None:
        """Waits until there is something to do."""
        with self._changed:
            while not (self._waiting or self._running or self._ordered or self._deadline):
                self._changed.wait()

    def _end_the_unwanted(self) -> None:
        """Ends jobs whose clients have gone; those that wait, where it closes; all, at its end."""
        closing = self._deadline is not None
        ended = closing and time.monotonic() >= (self._deadline or 0)
        with self._changed:
            leaving = [job for job in self._waiting if job.cancelled or closing]
            self._waiting = deque(job for job in self._waiting if job not in leaving)
        for job in leaving:
            self._drop(job)
        for row, job in enumerate(self._jobs):
            if job is not None and (job.cancelled or ended):
                self._drop(job)
                self._leave(row, job)

    def _drop(self, job: Job) -> None:
        if job.cancelled:
            job.leave()
            self._metrics.ended("cancelled")
        else:
            self._fail(job, self._refusal())

    def _fail(self, job: Job, error: ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # its reader's loop has ended
            job.fail(error)
        self._metrics.ended("failed" if error.status == 500 else "refused")

    def _admit(self) -> None:
        """Takes waiting jobs into free rows."""
        assert self._batch is not None
        while free := [row for row, job in enumerate(self._jobs) if job is None]:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                row, keep = self._slots.choose(free, job.prompt)
                self._jobs[row] = job
            keep = keep if self._keep_caches else 0
            if (refusal := self._place(row, job, keep)) is not None:
                with self._changed:
                    self._jobs[row] = None
                self._fail(job, refusal)
                continue
            self._slots.entered(row)
            job.cached = job.fed = keep

    def _place(self, row: int, job: Job, keep: int) -> ApiError | None:
        """Places a job; what goes wrong before the device has an order is its own failure."""
        assert self._batch is not None
        try:
            # Texts that end a sequence are looked for here; the batch knows tokens alone.
            params = dataclasses.replace(job.params, stop=())
            self._batch.check(job.prompt, params)
        except Exception as error:
            return self._own_failure(error)
        try:
            self._batch.place(row, job.prompt, params, eos=job.eos, keep=keep)
        except NotImplementedError as error:
            return self._own_failure(error)
        except (RuntimeError, MemoryError):  # JAX's of a device, which may hold half a request
            raise
        except Exception as error:
            return self._own_failure(error)
        return None

    def _own_failure(self, error: Exception) -> ApiError:
        if isinstance(error, ValueError | TypeError | NotImplementedError):
            return bad_request(sentence(error))
        self._on_error(error)
        return server_error(f"The request cannot be run: {sentence(error)}", "internal_error")

    def _order(self) -> list[tuple[dict[int, Job], Callable[[], _Steps]]]:
        """Orders a chunk of prefill, perhaps of several short prompts, and a block of steps."""
        assert self._batch is not None
        ordered: list[tuple[dict[int, Job], Callable[[], _Steps]]] = []
        # Where blocks are short, those that run have several of them between two chunks.
        left = self._chunk if self._steps >= BLOCK or not self._more_to_run() else 0
        while left > 0 and (fed := self._batch.feed()) is not None:
            self._steps = 0
            left -= max(fed.fed, self._chunk // _LEAST_FED)
            job = self._jobs[fed.row]
            if job is None:
                continue
            job.fed += fed.fed
            if fed.done:
                job.ordered = 1
                ordered.append(({fed.row: job}, _first(fed)))
        if not self._more_to_run():
            return ordered
        block = self._batch.decode()
        if block is not None:
            self._steps += self._batch.block
            mine = {row: job for row in block.rows if (job := self._jobs[row]) is not None}
            for job in mine.values():
                job.ordered += self._batch.block
            ordered.append((mine, block.read))
        return ordered

    def _more_to_run(self) -> bool:
        """Whether a job whose prompt has been fed wants more steps than are ordered."""
        jobs = [job for job in self._jobs if job is not None and job.ordered]
        return not all(job.is_ordered for job in jobs)

    def _read(self, jobs: dict[int, Job], read: Callable[[], _Steps]) -> None:
        """Gives jobs what the device has chosen for them; those that end leave their rows."""
        assert self._batch is not None
        steps = read()
        now = time.perf_counter()
        for row, job in jobs.items():
            if job.over:
                continue
            count, accepted, before = len(job.tokens), job.accepted, job.last
            try:
                events = job.take([step[row] for step in steps if row in step], self._batch, now)
            except Exception as error:  # of its text
                self._on_error(error)
                events = [server_error(f"The answer's text failed: {sentence(error)}")]
                job.end, job.over = events[0], True
            self._metrics.came(job, len(job.tokens) - count, job.accepted - accepted, before)
            if job.over:
                # First: whoever is told may ask for the row at once.
                self._leave(row, job)
                self._count(job)
            try:
                job.tell(events)
            except RuntimeError:  # its reader's loop has ended
                if not job.over:
                    job.leave()
                    self._leave(row, job)
                    self._metrics.ended("cancelled")

    def _count(self, job: Job) -> None:
        if isinstance(job.end, Ended):
            self._failures = 0
            self._metrics.ended(job.end.finish_reason)
        else:
            self._metrics.ended("failed")

    def _leave(self, row: int, job: Job) -> None:
        assert self._batch is not None
        self._batch.release(row)
        self._slots.left(row, job.held)
        with self._changed:
            self._jobs[row] = None


def _first(fed: Fed) -> Callable[[], _Steps]:
    return lambda: [{fed.row: fed.read()}]


def _run_once(batch: Batch) -> None:
    """Has the device run what requests will have it run, so that none of them is the first."""
    batch.place(0, [0], SamplingParams(seed=0, max_tokens=BLOCK))
    fed, block = batch.feed(), batch.decode()
    assert fed is not None and block is not None
    fed.read()
    block.read()
    batch.release(0)
