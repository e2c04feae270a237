"""HTTP -> requests of the engine -> HTTP: an OpenAI-compatible server as a Starlette application.

```
Gate          host, token                                    401, 403
Completions   a place among the open requests                429, 503
              body, read within its limits                   408, 413, 415
              JSON -> Ask (api.py)                           400, 404
              images fetched, decoded; prompt made           400, 504    in threads of their own (service.py)
              Worker -> Engine; Reply (replies.py)           400
              JSON, or a stream of events                    500, 503, 504
```

A client that goes away ends what is done for it, wherever it is in this list. A slow one waits for itself alone.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovlm.infer.api import ApiError, Ask, parse_json, read_chat, read_completion, read_look
from nanovlm.infer.metrics import exposition
from nanovlm.infer.reply_json import ReplyJson, event, to_json
from nanovlm.infer.service import ClientGone, Service

SENDING_SECONDS = 10  # beyond the time-out of a request, to tell a client of it
MANY_TOKENS = 256  # that a client has not read yet: they are written in a thread of their own
T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# What the page shows and runs comes from this server alone; pictures are those that were dropped on it.
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def build_app(service: Service, host: str) -> ASGIApp:
    """Return the application; `host` is the address that it is bound to."""
    endpoints = Endpoints(service)
    pages = read_pages(PAGE)
    routes = [
        Route("/v1/chat/completions", Completions(service, read_chat), methods=["POST"]),
        Route("/v1/completions", Completions(service, read_completion), methods=["POST"]),
        Route("/v1/look", Looking(service), methods=["POST"]),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        *(Route(path, page, methods=["GET"]) for path, page in pages.items()),
    ]
    is_open = {"/health", *pages}
    hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else None
    handlers = {ApiError: tell_error, HTTPException: tell_http, Exception: tell_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    # Around all of it: what Starlette itself answers to a bug is counted, too.
    return Gate(app, service, hosts, is_open, {route.path for route in routes})


class Gate:
    """Lets in who names the right host and knows the token; counts responses."""

    def __init__(self, app: ASGIApp, service: Service, hosts: set[str] | None, is_open: set[str], paths: set[str]):
        """`hosts` are the names by which the server may be called, None for any; `is_open` are paths without token."""
        self.app, self.service, self.hosts, self.is_open, self.paths = app, service, hosts, is_open, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message):
            if message["type"] == "http.response.start":
                self.service.statuses.add(1, path, str(message["status"]))
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            return await error_response(error)(scope, receive, counted)
        await self.app(scope, receive, counted)

    def check(self, scope: Scope):
        """Raise ApiError for a request that may not come in."""
        headers = dict(scope["headers"])
        # A page of another site can have its own name lead to this machine, and then read what it asks of it.
        if self.hosts is not None and host_of(headers.get(b"host", b"")) not in self.hosts:
            raise ApiError(403, "this server is for this machine: ask it as localhost or 127.0.0.1")
        token = self.service.limits.token
        if token is not None and scope["path"] not in self.is_open:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
                message = "this server needs its token: send the header Authorization: Bearer TOKEN"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def host_of(value: bytes) -> str:
    """Return the host of a Host header, without its port."""
    text = value.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Completions:
    """The application of /v1/chat/completions and /v1/completions."""

    def __init__(self, service: Service, read: Callable[[dict], Ask]):
        self.service, self.read = service, read

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        is_started = False

        async def tell(message):
            nonlocal is_started
            is_started = True
            await send(message)

        with self.service.place():
            try:
                await self._answer(scope, receive, tell)
            except ClientGone:
                self.service.gone.add()
            except ApiError:
                if not is_started:
                    raise
                self.service.gone.add()  # it does not read what it is sent

    async def _answer(self, scope: Scope, receive: Receive, send: Send):
        service, start = self.service, time.monotonic()
        async with service.time_limit(service.limits.timeout):
            ask, prompt = await take_in(service, scope, receive, self.read, service.make_prompt)
        left = max(start + service.limits.timeout - time.monotonic(), 0.001)
        request = service.make_request(ask, prompt, left)
        # The images and their tiles are in memory no longer than needed.
        ask, prompt = replace(ask, messages=(), pictures=()), None
        async with while_connected(receive), service.time_limit(left + SENDING_SECONDS, is_reply=True):
            async with service.open_reply(ask, request) as reply:
                request = None
                form = ReplyJson(reply, reply.ask.model, service.token_bytes)
                await (self._stream if ask.is_streamed else self._whole)(form, scope, receive, send)

    async def _whole(self, form: ReplyJson, scope: Scope, receive: Receive, send: Send):
        while not form.reply.is_over:
            await form.reply.wait()
        # In a thread, as the event loop would stand still for seconds if there are many log-probabilities.
        body = await asyncio.to_thread(form.whole)
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, form: ReplyJson, scope: Scope, receive: Receive, send: Send):
        """Send Server-Sent Events; what comes while a client does not read is one event an answer."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        data = form.opening()
        try:
            while True:
                is_over = form.reply.is_over  # what comes during `send` is for the next round
                pieces = form.reply.take()
                if sum(len(piece.tokens) for piece in pieces) > MANY_TOKENS:
                    data += await asyncio.to_thread(form.events, pieces)
                else:
                    data += form.events(pieces)
                await send_part(send, data)
                if is_over:
                    break
                await form.reply.wait()
                data = b""
            await send_part(send, form.closing())
        except ApiError as error:
            await send_part(send, event(error.body()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


class Looking:
    """The application of /v1/look: what led to each token of an answer, for the page."""

    def __init__(self, service: Service):
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        service = self.service
        with service.place():
            try:
                async with service.time_limit(service.limits.timeout):
                    ask, made = await take_in(service, scope, receive, read_look, service.make_prompt_to_look)
                    async with while_connected(receive):
                        found = await service.look(ask, *made)
                await json_response(found)(scope, receive, send)
            except ClientGone:
                service.gone.add()


async def take_in(
    service: Service,
    scope: Scope,
    receive: Receive,
    read: Callable[[dict], Ask],
    make: Callable[[Ask, list[Image.Image]], T],
) -> tuple[Ask, T]:
    """Return a checked request and what is made of it and its images. Raises ApiError, or ClientGone."""
    size = service.check_head(scope)
    with service.budget.share() as hold:
        body = await service.read_body(receive, size, hold)
        async with while_connected(receive):
            ask = read(parse_json(body))
            service.check_model(ask.model)
            service.check_size(ask)
            return ask, await service.with_images(ask, make)


async def send_part(send: Send, data: bytes):
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


@contextlib.asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Raise ClientGone in what runs within as soon as the client has gone. Its request must have been read."""
    task, is_gone = asyncio.current_task(), False
    assert task is not None

    async def watch():
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone or task.uncancel() > 0:
            raise
        raise ClientGone from None
    finally:
        watcher.cancel()


class Endpoints:
    """What is answered without the engine."""

    def __init__(self, service: Service):
        self.service = service

    async def models(self, _request: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model(name) for name in self.service.models]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        self.service.check_model(name)
        return json_response(self._model(name))

    def _model(self, name: str) -> dict:
        service = self.service
        model = {"id": name, "object": "model", "created": service.created, "owned_by": "nanovlm"}
        return model if name == service.model else {**model, "parent": service.model}  # as vLLM has it

    async def health(self, _request: HttpRequest) -> Response:
        is_well = not self.service.is_closing and self.service.worker.failure is None
        return json_response({"status": "ok" if is_well else "shutting down"}, 200 if is_well else 503)

    async def metrics(self, _request: HttpRequest) -> Response:
        return Response(exposition(self.service.metrics), media_type="text/plain; version=0.0.4")


def read_pages(folder: Path) -> dict[str, Callable]:
    """Return endpoints of the page and its files, by path: those that are there now, and no others."""

    def page(data: bytes, kind: str):
        async def endpoint(_request: HttpRequest) -> Response:
            return Response(data, media_type=kind, headers=SECURITY)

        return endpoint

    pages = {}
    for file in sorted(folder.glob("*")):
        if kind := TYPES.get(file.suffix):
            pages["/" if file.name == "index.html" else f"/page/{file.name}"] = page(file.read_bytes(), kind)
    return pages


def json_response(data: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(data), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


async def tell_error(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def tell_http(request: HttpRequest, error: Exception) -> Response:
    """Refuse a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    sentence = {404: "there is nothing at {path}", 405: "{path} does not take {method}"}.get(error.status_code)
    message = (sentence or error.detail).format(path=request.url.path, method=request.method)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def tell_bug(_request: HttpRequest, _error: Exception) -> Response:
    return error_response(ApiError(500, "the server has failed; its log says why"))
