"""A chat server whose answers a test scripts: what the page does is seen, whatever a model says."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from ffjax.serve.app import PAGE_POLICY

__all__ = ["ScriptedServer", "scripted"]

MODEL = "a-model"


class ScriptedServer:
    """What the next requests get, and what they were.

    Attributes:
        url: of the page.
        pieces: of the next answers.
        hold: after so many pieces, an answer waits for `go`; None: it does not.
        go: lets an answer that waits go on.
        status: of the next answers; an error's `message` goes with it.
        message: of an error.
        breaks: whether the connection ends after the last piece.
        late_error: an error in place of the stream's end.
        finish_reason: of the answers.
        api_key: what requests must show; None: nothing.
        bodies: of the requests that came.
        left: whether a client went away before its answer's end.
        connections: all that there have been.
    """

    def __init__(self, url: str):
        self.url = url
        self.pieces = ["Hello", " there", "."]
        self.hold: int | None = None
        self.go = threading.Event()
        self.status, self.message = 200, ""
        self.breaks = False
        self.late_error: str | None = None
        self.finish_reason = "stop"
        self.api_key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.connections: list[socket.socket] = []

    @property
    def messages(self) -> list[tuple[str, str]]:
        """Roles and texts of the last request's messages."""
        return [(one["role"], one["content"]) for one in self.bodies[-1]["messages"]]


@contextlib.contextmanager
def scripted() -> Iterator[ScriptedServer]:
    """The server, as long as the block takes."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    script = ScriptedServer(f"http://127.0.0.1:{http.server_address[1]}/")
    http.script = script  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield script
    finally:
        script.go.set()
        http.shutdown()
        http.server_close()
        thread.join()
        # A browser may have opened a connection for later.
        for connection in script.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    @property
    def script(self) -> ScriptedServer:
        return self.server.script  # pyright: ignore[reportAttributeAccessIssue]

    def setup(self) -> None:
        super().setup()
        self.script.connections.append(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            page = resources.files("ffjax.serve") / "page/index.html"
            self._send(200, page.read_bytes(), "text/html", Content_Security_Policy=PAGE_POLICY)
        elif self._may():
            data = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            self._send(200, json.dumps(data).encode(), "application/json")

    def do_POST(self) -> None:
        script = self.script
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        script.bodies.append(body)
        if script.status != 200:
            self._fail(script.status, script.message)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream()
        except OSError:
            script.left.set()

    def _stream(self) -> None:
        script = self.script
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(script.pieces):
            if number == script.hold:
                while not script.go.wait(0.05):
                    self._write(b": still here\n\n")  # fails once the client has left
            self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if script.breaks:
            return
        if script.late_error is not None:
            self._event({"error": {"message": script.late_error}})
            return
        self._event({"choices": [{"delta": {}, "finish_reason": script.finish_reason}]})
        count = len(script.pieces)
        details = {"cached_tokens": 3}
        usage = {"completion_tokens": count, "prompt_tokens": 7, "prompt_tokens_details": details}
        self._event({"choices": [], "usage": usage})
        self._write(b"data: [DONE]\n\n")

    def _may(self) -> bool:
        key = self.script.api_key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._fail(401, "The API key is wrong.")
        return False

    def _fail(self, status: int, message: str) -> None:
        data = json.dumps({"error": {"message": message}}).encode()
        self._send(status, data, "application/json", Retry_After="3")

    def _event(self, data: Any) -> None:
        # A character may be cut in two on its way.
        whole = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        half = len(whole) // 2
        self._write(whole[:half])
        self._write(whole[half:])

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            if status in (429, 503) or name != "Retry_After":
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
