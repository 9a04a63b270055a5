"""Clients of an OpenAI-compatible server, in a process of their own, timed.

`python -m ffjax.benchmark.serving_clients` reads a list of jobs from stdin, and writes what came of
each to stdout, in JSON; see `Job` and `Answer`. It uses the openai client where it is installed, as
programs do, and Python's own HTTP otherwise.
"""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Answer", "Job", "answers"]

_TIMEOUT = 300.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What the clients do: each sends its next request when the last one is answered.

    Attributes:
        url: of the server, without a path.
        clients: how many there are.
        requests: bodies for `/v1/completions`, without `stream`.
    """

    url: str
    clients: int
    requests: list[dict[str, Any]]


@dataclasses.dataclass
class Answer:
    """One answer, as its client saw it.

    Attributes:
        text: all of it.
        tokens: how many the server counts; None: it never came so far.
        first: seconds from the request to the first piece of text.
        arrivals: seconds from the request to each piece.
        error: what went wrong; None: nothing.
    """

    text: str = ""
    tokens: int | None = None
    first: float | None = None
    arrivals: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None


_Chunks = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


def answers(job: Job) -> tuple[list[Answer], float, str]:
    """Runs the clients.

    Returns:
        An answer for each request, in their order; the seconds that all of it took; and which
        client was used.
    """
    found: list[Answer] = [Answer() for _ in job.requests]
    following = itertools.count()
    name, connect = _client(job.url)

    def work() -> None:
        chunks = connect()
        while (i := next(following)) < len(job.requests):
            try:
                _take(chunks(job.requests[i]), found[i], time.perf_counter())
            except Exception as error:  # counted as lost, and said
                found[i].error = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=work) for _ in range(job.clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - start, name


def _take(chunks: Iterator[dict[str, Any]], answer: Answer, began: float) -> None:
    for chunk in chunks:
        now = time.perf_counter() - began
        for choice in chunk["choices"]:
            if choice["text"]:
                answer.text += choice["text"]
                answer.arrivals.append(now)
        if chunk.get("usage"):
            answer.tokens = chunk["usage"]["completion_tokens"]
    answer.first = answer.arrivals[0] if answer.arrivals else None


def _client(url: str) -> tuple[str, Callable[[], _Chunks]]:
    try:
        import openai
    except ImportError:
        return "http.client", lambda: _plain(url)

    def connect() -> _Chunks:
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=_TIMEOUT
        )

        def chunks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
            known = {"model", "prompt", "max_tokens", "temperature", "seed", "top_p"}
            given: dict[str, Any] = {name: body[name] for name in body.keys() & known}
            given["extra_body"] = {name: body[name] for name in body.keys() - known}
            with client.completions.create(
                **given, stream=True, stream_options={"include_usage": True}
            ) as stream:
                for chunk in stream:
                    usage = chunk.usage
                    yield {
                        "choices": [{"text": choice.text} for choice in chunk.choices],
                        "usage": usage and {"completion_tokens": usage.completion_tokens},
                    }

        return chunks

    return f"openai {openai.__version__}", connect


def _plain(url: str) -> _Chunks:
    """Server-sent events by Python's own HTTP, over one connection."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT)

    def chunks(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(response.read().decode())
        done = False
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                done = True
            elif data:
                chunk = json.loads(data)
                if "error" in chunk:
                    raise OSError(chunk["error"]["message"])
                yield chunk
        if not done:
            raise OSError("the stream broke off")

    return chunks


def main() -> None:
    """Reads jobs from stdin, does one after the other, and writes their answers."""
    reports = []
    for job in json.load(sys.stdin):
        found, seconds, name = answers(Job(**job))
        told = [dataclasses.asdict(answer) for answer in found]
        reports.append({"client": name, "seconds": seconds, "answers": told})
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
