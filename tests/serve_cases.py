"""Servers for tests: in a thread of this process, or a process of their own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
from fake_batch import FakeBatch

from ffjax.config import ModelConfig, preset
from ffjax.sampling.params import SamplingParams
from ffjax.serve.batch import Batch
from ffjax.serve.server import Options, Server, bound
from ffjax.tokenizer import ByteTokenizer, Tokenizer

__all__ = ["Running", "serving", "until"]

NAME = "tiny"


class Running:
    """A server that runs in a thread.

    Attributes:
        url: without a path.
        server: it.
        batches: those that were made for it.
        lines: of its log.
    """

    def __init__(self, url: str, server: Server, batches: list[Any], lines: list[str]):
        self.url, self.server, self.batches, self.lines = url, server, batches, lines

    @property
    def batch(self) -> Any:
        return self.batches[-1]

    def client(self, **how: Any) -> openai.OpenAI:
        how = {"api_key": "none", "max_retries": 0, "timeout": 60.0} | how
        return openai.OpenAI(base_url=f"{self.url}/v1", **how)


@contextlib.contextmanager
def serving(
    make: Callable[[], Batch] = FakeBatch,
    *,
    config: ModelConfig | None = None,
    tokenizer: Tokenizer | None = None,
    defaults: SamplingParams | None = None,
    wait: bool = True,
    **options: Any,
) -> Iterator[Running]:
    """A server, ready; it ends with the block."""
    batches: list[Any] = []
    lines: list[str] = []

    def kept() -> Batch:
        batches.append(make())
        return batches[-1]

    server = Server(
        kept,
        config or preset("python-bytes-3m"),
        tokenizer or ByteTokenizer(),
        defaults or SamplingParams(),
        Options(**({"name": NAME, "grace": 5.0} | options)),
        say=lines.append,
        log=lines.append,
    )
    with bound("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=server.run, args=(sock,))
        thread.start()
        try:
            if wait:
                until(lambda: server.scheduler.state == "ready", 60)
            yield Running(f"http://127.0.0.1:{port}", server, batches, lines)
        finally:
            server.stop(0)
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def until(happens: Callable[[], object], seconds: float = 10) -> None:
    """Waits for something to happen."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.005)
