"""Binds the address, runs the scheduler and the routes, and ends both."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from ffjax.config import ModelConfig
from ffjax.sampling.params import SamplingParams
from ffjax.serve.app import make_app
from ffjax.serve.asked import Limits
from ffjax.serve.batch import Batch
from ffjax.serve.handlers import Endpoint
from ffjax.serve.metrics import Metrics
from ffjax.serve.scheduler import Scheduler, State
from ffjax.serve.token_text import TokenTexts
from ffjax.shortened import shortened
from ffjax.tokenizer import Tokenizer

__all__ = ["Options", "Server", "bound", "is_local"]

_BACKLOG = 512
# Requests that are read, refused or answered while as many as may wait do: each has a body.
_BESIDE_QUEUE = 256
# Connections may be idle, too.
_CONNECTIONS = 1024
# Of a line that quotes a request.
_LONGEST_LINE = 1500
_ANOTHER_PORT = "Give another --port, or 0 for any that is free; or see what else uses it."
_ADVICE = {
    errno.EADDRNOTAVAIL: (
        "That is no address of this machine. Give --host one of its own, 127.0.0.1 for this "
        "machine alone, or 0.0.0.0 for all of its addresses."
    ),
    errno.EACCES: "Ports below 1024 are the administrator's. Give another --port, from 1024.",
}
# Beyond what running answers are given: the last of them is written, connections are closed.
_LAST_SECONDS = 2.0
# How long a thread may hold Python while another waits for it. By Python's 5 ms the device would
# wait for blocks of steps that take less.
_SWITCH_SECONDS = 0.0005
# Beside Ctrl-C: what `kill`, a container or a closing terminal sends. Windows has no SIGHUP.
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a server works.

    Attributes:
        name: of the model, as requests have it.
        max_queue: texts that may wait for a row.
        max_logprobs: most alternatives told at a token.
        chunk: tokens of prompts fed between two blocks of steps, about.
        keep_caches: whether a prompt goes on with what a row's cache holds.
        api_key: what requests must show; None: nothing.
        grace: seconds that running answers are given when the server ends.
    """

    name: str
    max_queue: int = 64
    max_logprobs: int = 20
    chunk: int = 512
    keep_caches: bool = True
    api_key: str | None = None
    grace: float = 10.0


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, before a model is read for nothing.

    Args:
        host: a name, or an address of IPv4 or IPv6.
        port: 0: any that is free.

    Raises:
        OSError: the address is not this machine's, or taken; says which.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ValueError(
            f"--host is a name or an address of this machine, got {host!r}: {error.strerror}."
        ) from None
    if sys.platform != "win32":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        advice = _ADVICE.get(error.errno or 0, _ANOTHER_PORT)
        raise ValueError(
            f"A server cannot be bound to {host}, port {port}: {(error.strerror or '').lower()}. "
            f"{advice}"
        ) from None
    return sock


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server:
    """A server, from its warm-up to its end.

    Attributes:
        scheduler: the thread that owns the batch.
        metrics: what it counts.
    """

    def __init__(
        self,
        make: Callable[[], Batch],
        config: ModelConfig,
        tokenizer: Tokenizer,
        defaults: SamplingParams,
        options: Options,
        *,
        say: Callable[[str], None] = lambda text: None,
        log: Callable[[str], None] = lambda text: None,
        on_ready: Callable[[Batch], None] = lambda batch: None,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ):
        """Starts nothing yet.

        Args:
            make: makes the batch, in the scheduler's thread.
            config: the model's.
            tokenizer: the model's.
            defaults: how tokens are chosen where a request does not say.
            options: how it works.
            say: takes lines about the server.
            log: takes a line for each answer.
            on_ready: is told once, in the scheduler's thread, when requests are taken.
            on_error: is shown what went wrong, for whoever wants to see where.
        """
        say, log = _printable(say), _printable(log)
        self.metrics = Metrics()
        self._options = options
        self._on_ready = on_ready
        self.scheduler = Scheduler(
            make,
            max_queue=options.max_queue,
            metrics=self.metrics,
            chunk=options.chunk,
            keep_caches=options.keep_caches,
            on_change=self._changed,
            say=say,
            on_error=on_error,
        )

        def limits() -> Limits:
            return Limits(
                name=options.name,
                config=config,
                tokenizer=tokenizer,
                defaults=defaults,
                capacity=self.scheduler.batch.capacity,
                rows=self.scheduler.batch.rows,
                max_queue=options.max_queue,
                max_logprobs=options.max_logprobs,
            )

        endpoint = Endpoint(
            limits=limits,
            scheduler=self.scheduler,
            texts=TokenTexts(tokenizer),
            fingerprint=self._fingerprint,
            log=log,
        )
        app = make_app(
            endpoint,
            self.metrics,
            name=options.name,
            api_key=options.api_key,
            most=_BESIDE_QUEUE + options.max_queue,
            say=say,
            on_error=on_error,
        )
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                # Longer than clients keep idle connections, so that it is they who close them.
                timeout_keep_alive=75,
                # The routes turn requests away before this, in OpenAI's form.
                limit_concurrency=_CONNECTIONS + options.max_queue,
                timeout_graceful_shutdown=int(options.grace + _LAST_SECONDS + 1),
            )
        )

    def run(self, sock: socket.socket) -> bool:
        """Serves until it is told to stop: by `stop`, or a signal where this is the main thread.

        The first signal lets running answers end, for as long as the options say; a second one
        ends them.

        Args:
            sock: bound and listening.

        Returns:
            Whether its threads have ended too. One that compiles, or waits for a device that
            hangs, goes on: then the process should end without looking back.

        Raises:
            Exception: what the scheduler failed with before it had served anything.
        """
        self.scheduler.start()
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._signals():
                self._server.run([sock])
        finally:
            sys.setswitchinterval(before)
            self.scheduler.close(0)
            ended = self.scheduler.join(_LAST_SECONDS)
        if self._failed_at_start and self.scheduler.error is not None:
            raise self.scheduler.error
        return ended

    def stop(self, grace: float | None = None) -> None:
        """Takes no more requests, and ends when those that run are answered; from any thread.

        Args:
            grace: seconds that they are given. None: what the options say.
        """
        self.scheduler.close(self._options.grace if grace is None else grace)
        self._server.should_exit = True

    def _changed(self, state: State) -> None:
        if state == "ready" and not self._was_ready:
            self._was_ready = True
            self._on_ready(self.scheduler.batch)
        elif state == "failed" and not self._was_ready:
            self._failed_at_start = True
            self._server.should_exit = True

    _was_ready = False
    _failed_at_start = False

    def _fingerprint(self) -> str:
        how = getattr(self.scheduler.batch, "implementation", None)
        return f"ffjax-{_version()}" + ("" if how is None else f"-{how}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        came: list[int] = []

        def stop(number: int, frame: object) -> None:
            came.append(number)
            # Not here: the thread that is interrupted may hold what `close` waits for.
            grace = self._options.grace if len(came) == 1 else 0.0
            threading.Thread(target=self.stop, args=(grace,), daemon=True).start()
            if len(came) > 2:
                self._server.force_exit = True

        # What is ignored stays so, as `nohup` wants it.
        taken: Sequence[int] = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        found = {number: signal.signal(number, stop) for number in taken}
        try:
            yield
        finally:
            for number, handler in found.items():
                signal.signal(number, handler)


@functools.cache  # it takes a millisecond
def _version() -> str:
    try:
        return importlib.metadata.version("ffjax")
    except importlib.metadata.PackageNotFoundError:
        return "sources"


def _printable(say: Callable[[str], None]) -> Callable[[str], None]:
    """For lines that quote a request: what it says stays in its line, which has an end."""

    def printable(text: str) -> None:
        text = shortened(text, _LONGEST_LINE)
        say("".join(x if x.isprintable() else "\ufffd" for x in text))

    return printable


class _Uvicorn(uvicorn.Server):
    """Without handlers of signals: they are set above, and do not end the process a second time."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield
