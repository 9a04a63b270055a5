"""The routes of the server."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ffjax.failures import sentence
from ffjax.serve.answers import as_json
from ffjax.serve.errors import ApiError, server_error, unavailable
from ffjax.serve.handlers import Endpoint, error_response
from ffjax.serve.metrics import CONTENT_TYPE, Metrics
from ffjax.shortened import shortened

__all__ = ["make_app"]

_PAGE = "page/index.html"
# The page holds its script and style, and asks this server alone.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NO_STORE = {"Cache-Control": "no-store"}


def make_app(
    endpoint: Endpoint,
    metrics: Metrics,
    *,
    name: str,
    api_key: str | None,
    most: int,
    say: Callable[[str], None],
    on_error: Callable[[BaseException], None],
) -> ASGIApp:
    """The application.

    Args:
        endpoint: answers requests for texts.
        metrics: counts.
        name: of the model.
        api_key: what requests to `/v1` must show. None: nothing.
        most: requests to `/v1` that are answered at the same time; others are turned away.
        say: takes lines about the server.
        on_error: is shown what went wrong.
    """
    created = int(time.time())
    scheduler = endpoint.scheduler

    def model() -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": created, "owned_by": "ffjax"}
        with contextlib.suppress(ApiError):  # not known before it is warm
            card["max_model_len"] = endpoint.limits().capacity
        return card

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [model()]})

    async def one_model(request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != name:
            raise ApiError(
                404,
                f"The model {shortened(asked)!r} does not exist. This server has {name!r}.",
                param="model",
                code="model_not_found",
            )
        return _json(model())

    async def health(request: Request) -> Response:
        if scheduler.state == "ready":
            return _json({"status": "ok"}, headers=_NO_STORE)
        said = {"status": scheduler.state, "message": scheduler.reason}
        return _json(said, status_code=503, headers=_NO_STORE)

    async def figures(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def page(request: Request) -> Response:
        file = resources.files("ffjax.serve") / _PAGE
        if not file.is_file():
            raise ApiError(404, "This server has no page. Its endpoint is /v1.")
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(file.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", figures),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
    ]
    paths = [route.path for route in routes]
    known = [path.replace("{name:path}", "NAME") for path in paths]

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        endpoint.log(f"{request.url.path}: {error.status}. {error.message}")
        return error_response(error)

    async def defect(request: Request, error: Exception) -> Response:
        on_error(error)
        return error_response(server_error(sentence(error), "internal_error"))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, status = shortened(request.url.path), error.status_code
        if status == 404:
            message = f"There is no {path} here. There are {', '.join(known)}."
        elif status == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{path} takes {allowed}; got {shortened(request.method)}."
        else:
            message = str(error.detail)
        response = error_response(ApiError(status, message))
        response.headers.update(error.headers or {})
        return response

    handlers = {ApiError: refused, HTTPException: of_http, Exception: defect}
    app = Starlette(routes=routes, exception_handlers=handlers)
    counted = {path for path in paths if "{" not in path}
    return _Front(app, metrics, api_key, counted, most, say)


def _json(value: Any, **how: Any) -> Response:
    return Response(as_json(value), media_type="application/json", **how)


class _Front:
    """What every request passes: the key is looked at, answers are counted, nothing is lost."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        api_key: str | None,
        paths: set[str],
        most: int,
        say: Callable[[str], None],
    ):
        self._app, self._metrics, self._paths, self._say = app, metrics, paths, say
        self._most, self._answering = most, 0
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: list[int] = []

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
            await send(message)

        is_v1 = scope["path"].startswith("/v1")
        self._answering += is_v1
        try:
            if (refusal := self._refusal(scope)) is not None:
                await error_response(refusal)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except Exception as error:  # a defect of ours, which was answered: the others go on
            self._say(f"{scope['path']}: {sentence(error)}")
        finally:
            self._answering -= is_v1
            path = scope["path"] if scope["path"] in self._paths else "other"
            if status:
                self._metrics.answered(path, status[0])

    def _refusal(self, scope: Scope) -> ApiError | None:
        if not scope["path"].startswith("/v1"):
            return None
        if self._answering > self._most:
            return unavailable(
                f"The server answers up to {self._most} requests at the same time. Try again in a "
                "moment.",
                "overloaded",
                1,
            )
        if self._key is None:
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        what = "The API key is wrong" if given else "There is no API key"
        return ApiError(
            401,
            f"{what}. Send the header Authorization: Bearer KEY, with the key that the server was "
            "started with.",
            code="invalid_api_key",
        )
