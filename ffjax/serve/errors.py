"""What goes wrong with a request, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from ffjax.shortened import shortened

__all__ = ["ApiError", "bad_request", "server_error", "too_many_texts", "unavailable"]


# Of a message: it may quote a request, which may be long.
_LONGEST = 1000


class ApiError(Exception):
    """An error that is sent to a client.

    Attributes:
        status: of HTTP.
        message: sentences: what is wrong, and what to do.
        kind: OpenAI's `type`.
        param: the field that is wrong, if it is one.
        code: a word that programs may look at.
        retry_after: seconds after which the same request may succeed; None: it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        """Of its parts; see the attributes."""
        message = shortened(message, _LONGEST)
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong, and stays so."""
    return ApiError(400, message, param=param, code=code)


def too_many_texts(asked: int, rows: int, max_queue: int) -> ApiError:
    """More texts than can run and wait, however little there is to do."""
    return bad_request(
        f"A request asks for up to {rows + max_queue} texts: {rows} run side by side, and "
        f"{max_queue} more may wait. This one asks for {asked} (prompts times n). Send it in "
        "parts.",
        "n",
    )


def server_error(message: str, code: str | None = None) -> ApiError:
    """The server's own fault, or the model's."""
    return ApiError(500, message, kind="server_error", code=code)


def unavailable(message: str, code: str, retry_after: int | None = None) -> ApiError:
    """The server takes no requests: not yet, or no more."""
    return ApiError(503, message, kind="server_error", code=code, retry_after=retry_after)
