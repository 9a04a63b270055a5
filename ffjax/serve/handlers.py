"""Between a request and the scheduler: jobs made, what comes of them sent, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ffjax.serve.answers import Answer, as_json
from ffjax.serve.asked import Asked, Limits, asked_chat, asked_completion
from ffjax.serve.errors import ApiError, bad_request
from ffjax.serve.fields import json_body
from ffjax.serve.job import Event, Job
from ffjax.serve.scheduler import Scheduler
from ffjax.serve.token_text import TokenTexts
from ffjax.shortened import shortened
from ffjax.text.writer import Writer

__all__ = ["Endpoint", "error_response"]

_MOST_BYTES = 8 << 20
_GONE = 499  # what nginx calls a request whose client has gone; nobody sees it but our own figures


class _Gone(Exception):
    """The client has gone away."""


_Told = tuple[int, Event | _Gone]


def error_response(error: ApiError) -> Response:
    """An error as it is sent."""
    return Response(
        as_json(error.body()),
        status_code=error.status,
        headers=error.headers(),
        media_type="application/json",
    )


@dataclasses.dataclass
class Endpoint:
    """Answers requests for texts.

    Attributes:
        limits: what the server can do; a function, since it is not known before it is warm.
        scheduler: runs the jobs.
        texts: of single tokens.
        fingerprint: see `Answer`.
        log: takes a line for each answer.
    """

    limits: Callable[[], Limits]
    scheduler: Scheduler
    texts: TokenTexts
    fingerprint: Callable[[], str]
    log: Callable[[str], None]

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, asked_completion)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, asked_chat)

    async def _answer(self, request: Request, read: Callable[..., Asked]) -> Response:
        began = time.perf_counter()
        _check_type(request)
        body = json_body(await _body(request))
        limits = self.limits()
        loop, told = asyncio.get_running_loop(), asyncio.Queue[_Told]()

        def teller(index: int) -> Callable[[Event], object]:
            return lambda event: loop.call_soon_threadsafe(told.put_nowait, (index, event))

        def prepare() -> tuple[Asked, list[Job]]:
            asked = read(body, limits)
            return asked, [
                Job(
                    prompt := asked.prompts[i // asked.n],
                    params,
                    eos=limits.tokenizer.eot_ids,
                    writer=Writer(limits.tokenizer, prompt, params),
                    tell=teller(i),
                )
                for i, params in enumerate(asked.params)
            ]

        # A long text takes a while to be split into tokens, and others are not to wait for it.
        asked, jobs = await run_in_threadpool(prepare)
        for job in jobs:
            job.began = began
        answer = Answer(asked, limits.name, self.texts, self.fingerprint())
        run = _Run(request, asked, jobs, told, answer, self)
        self.scheduler.submit(jobs)  # what comes after it is tried: it ends them where it fails
        try:
            with _watched(request.receive, told):
                if asked.stream:  # what fails before its first token has a status of its own
                    return _EventStream(run, await run.next())
                while not answer.is_complete:
                    await run.next()
        except BaseException as error:
            run.end(error)
            if isinstance(error, _Gone):
                return Response(status_code=_GONE)
            raise
        run.end(None)
        return Response(as_json(answer.whole(jobs)), media_type="application/json")


@dataclasses.dataclass
class _Run:
    """A request whose jobs run."""

    request: Request
    asked: Asked
    jobs: list[Job]
    told: asyncio.Queue[_Told]
    answer: Answer
    endpoint: Endpoint

    async def next(self) -> list[int]:
        """Takes what has come; returns the indices of the texts it is of.

        Raises:
            ApiError: a job has failed.
            _Gone: the client has gone away.
        """
        came: dict[int, None] = {}
        one: _Told | None = await self.told.get()
        while one is not None:
            index, event = one
            if isinstance(event, ApiError | _Gone):
                raise event
            self.answer.add(index, event)
            came[index] = None
            one = None if self.told.empty() else self.told.get_nowait()
        return list(came)

    def end(self, error: BaseException | None) -> None:
        """Ends what still runs, and writes the line of the log."""
        left = [job for job in self.jobs if not job.over]
        if left:
            self.endpoint.scheduler.cancel(left)
        self.endpoint.log(self._line(error))

    def _line(self, error: BaseException | None) -> str:
        now, jobs = time.perf_counter(), self.jobs
        usage = self.answer.usage(jobs)
        firsts = [job.first - job.began for job in jobs if job.first is not None]
        how = f"{usage['prompt_tokens']} prompt tokens"
        if cached := usage["prompt_tokens_details"]["cached_tokens"]:
            how += f" ({cached} of them from the cache)"
        how += f", {usage['completion_tokens']} new"
        if accepted := usage["completion_tokens_details"]["accepted_prediction_tokens"]:
            how += f" ({accepted} of them drafts)"
        if firsts:
            how += f", the first after {min(firsts):.3f} s"
        how += f", {now - jobs[0].began:.3f} s in all"
        if isinstance(error, ApiError):
            how += "; failed"
        elif isinstance(error, _Gone | asyncio.CancelledError | OSError):
            how += "; the client went away"
        elif error is not None:
            how += "; failed"
        return f"{self.request.url.path}: {how}"


class _EventStream(Response):
    """A response of server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, run: _Run, first: list[int]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._run, self._first = run, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run, came = self._run, self._first
        error: BaseException | None = None
        try:
            with _watched(receive, run.told):
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                while True:
                    await _send(send, *map(as_json, run.answer.chunks(came)))
                    if run.answer.is_complete:
                        break
                    came = await run.next()
                last = [as_json(run.answer.usage_chunk(run.jobs))] if run.asked.usage else []
                await _send(send, *last, b"[DONE]")
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ApiError as failed:
            error = failed
            run.endpoint.log(f"{run.request.url.path}: {failed.message}")
            with contextlib.suppress(OSError):
                await _send(send, as_json(failed.body()))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (_Gone, OSError) as left:
            error = left
        except BaseException as other:
            error = other
            raise
        finally:
            run.end(error)


async def _send(send: Send, *data: bytes) -> None:
    if data:
        body = b"".join(b"data: " + one + b"\n\n" for one in data)
        await send({"type": "http.response.body", "body": body, "more_body": True})


@contextlib.contextmanager
def _watched(receive: Receive, told: asyncio.Queue[_Told]) -> Iterator[None]:
    """Within it, a client that goes away is told of as a job's end is; its body has been read."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        told.put_nowait((0, _Gone()))

    task = asyncio.create_task(wait())
    try:
        yield
    finally:
        task.cancel()


def _check_type(request: Request) -> None:
    """A page of another site can have a browser send a form or a text, but no JSON unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415,
            "A request's body is JSON, and says so: send the header Content-Type: "
            f"application/json. Got {shortened(kind)!r}.",
        )


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > _MOST_BYTES:
                raise ApiError(
                    413, f"A request has up to {_MOST_BYTES} bytes. Send a shorter prompt."
                )
            parts.append(part)
    except ApiError:
        raise
    except Exception as error:  # starlette's ClientDisconnect among them
        raise bad_request("The request broke off before its end.") from error
    return b"".join(parts)
