"""The controller over HTTP: the dashboard's page, its data as JSON and as server-sent events.

What is asked and told goes through the methods of ControlService, as over gRPC.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from controller.history import History, Plain, plain
from controller.http_guard import OPERATE, READ, Authorise, Guard, StrictHeaders, bearer, open_to
from controller.json_calls import call
from controller.live_feed import LiveFeed
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.service import ControlService
from controller.sessions import Sessions
from engine.errors import (
    CheckpointError,
    InfeasibleError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    StaleEpochError,
    SwitchInProgressError,
    TidewrightError,
    UnavailableError,
)
from engine.http_server import HttpServer, bind_http

PAGES = Path(__file__).parent / "dashboard"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
MAX_BODY_BYTES = 64 << 10
CALL_S = 20.0  # for what may wait for a tick
GRACE_S = 2
SWITCHES_TOLD = 20

READS = {  # path -> method of ControlService; its fields are the query's
    "/api/state": "GetState",
    "/api/explain": "Explain",
    "/api/forecast": "GetForecast",
    "/api/policies": "ListPolicies",
}
WRITES = {  # path -> method and the role that it takes; its fields are the JSON body's
    "/api/mode": ("SetMode", OPERATE),
    "/api/hold": ("Hold", OPERATE),
    "/api/resume": ("Resume", OPERATE),
    "/api/cancel": ("CancelSwitch", OPERATE),
    "/api/rollback": ("Rollback", OPERATE),
}
_STATUS: tuple[tuple[type[TidewrightError], int], ...] = (
    (InvalidRequestError, 400),
    (InfeasibleError, 400),
    (NotFoundError, 404),
    (StaleEpochError, 409),
    (SwitchInProgressError, 409),
    (CheckpointError, 409),
    (OverloadedError, 429),
    (UnavailableError, 503),
)


def error_json(message: str, code: str, param: str | None = None) -> Plain:
    return {"error": {"message": message, "code": code, "param": param}}


async def on_tidewright_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TidewrightError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    param = error.param if isinstance(error, InvalidRequestError) else None
    return JSONResponse(error_json(str(error), type(error).__name__, param), status)


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where, message = f"{request.method} {request.url.path}", error.detail
    if error.status_code == 404:
        message = f"there is no {where}; see docs/dashboard.md for what there is."
    elif error.status_code == 405:
        message = f"{where} is not allowed; use {(error.headers or {}).get('Allow', 'another')}."
    shown = error_json(message, f"http_{error.status_code}")
    return JSONResponse(shown, error.status_code, error.headers)


async def on_bug(request: Request, error: Exception) -> Response:
    """Starlette logs it."""
    return JSONResponse(error_json("internal error; see the controller's log.", "internal"), 500)


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed however the response ends."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


Handler = Callable[[Request], Awaitable[Response]]


class HttpFront:
    """Handlers over one control service. `app` is the ASGI application; close it before its
    server."""

    def __init__(
        self, loop: ControlLoop, service: ControlService, history: History, guard: Guard
    ) -> None:
        self._service, self._guard = service, guard
        self._feed = LiveFeed(loop, history, self._state)
        files = {p.name: p.read_bytes() for p in sorted(PAGES.iterdir()) if p.suffix in KINDS}
        self._files = {name: (data, KINDS[Path(name).suffix]) for name, data in files.items()}
        routes = [
            Route("/", self._checked(self._file)),
            Route("/api/session", self._checked(self._session)),
            Route("/api/events", self._checked(self._events, READ)),
            *(Route(path, self._checked(self._read, READ)) for path in READS),
            *(
                Route(path, self._checked(self._write, role), methods=["POST"])
                for path, (_, role) in WRITES.items()
            ),
            Route("/{name}", self._checked(self._file)),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(StrictHeaders)],
            exception_handlers={
                TidewrightError: on_tidewright_error,
                HTTPException: on_http_error,
                Exception: on_bug,
            },
        )

    async def close(self) -> None:
        await self._feed.close()

    def _checked(self, handler: Handler, role: str = "") -> Handler:
        async def checked(request: Request) -> Response:
            self._guard.check_host(request.headers)
            if role:
                self._guard.check_role(request.headers, role)
            return await handler(request)

        return checked

    # ---------------------------------------------------------------- pages and data

    async def _file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            raise HTTPException(404)
        data, kind = self._files[name]
        return Response(data, media_type=kind)

    async def _session(self, request: Request) -> Response:
        """What whoever asks may do, and what its changes must carry."""
        token = bearer(request.headers)
        may = {role: self._guard.authorise(role, token) for role in (READ, OPERATE)}
        return JSONResponse({"may": may, "page_token": self._guard.page_token})

    async def _state(self) -> Plain:
        """Without what switches did to single requests."""
        told = await self._call("GetState", {})
        told["switches"] = told["switches"][-SWITCHES_TOLD:]
        for ticket in told["switches"]:
            ticket.pop("bindings", None)
        return told

    async def _events(self, request: Request) -> Response:
        self._feed.check_room()
        return EventStream(self._feed.events(request.headers.get("last-event-id", "")))

    async def _read(self, request: Request) -> Response:
        fields = dict(request.query_params)
        if READS[request.url.path] == "GetState" and not fields:
            return JSONResponse(await self._state())
        return JSONResponse(await self._call(READS[request.url.path], fields))

    async def _write(self, request: Request) -> Response:
        self._guard.check_same_origin(request.headers)
        method, _ = WRITES[request.url.path]
        fields = json_object(await _body(request))
        return JSONResponse(await self._call(method, fields))

    async def _call(self, method: str, fields: Plain) -> Plain:
        """The one way to the control service."""
        return dict(plain(await call(self._service, method, fields, CALL_S)))


async def _body(request: Request) -> bytes:
    """Raises HTTPException 413."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes.")
    return data


def json_object(data: bytes) -> Plain:
    """Raises InvalidRequestError."""
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no JSON ({error}); send an object.") from error
    if not isinstance(found, dict):
        raise InvalidRequestError(f"the body is {type(found).__name__}; send a JSON object.")
    return found


class RunningFront:
    """A front with its server, on the event loop that started it."""

    def __init__(self, front: HttpFront, server: HttpServer, sock: socket.socket) -> None:
        self._front, self._server, self._sock = front, server, sock
        self.port: int = sock.getsockname()[1]
        self._task = asyncio.create_task(server.serve(sockets=[sock]), name="http")

    async def close(self) -> None:
        """Ends streams, then the server."""
        await self._front.close()
        self._server.should_exit = True
        await self._task
        self._sock.close()


async def start_http(
    loop: ControlLoop,
    operations: Operations,
    sessions: Sessions,
    host: str,
    port: int,
    names: tuple[str, ...] = (),
    authorise: Authorise | None = None,
    history: History | None = None,
) -> RunningFront:
    """Serve the dashboard; `names` are host names it answers to, beside addresses, localhost and
    `host`. Raises UnavailableError when the port cannot be had."""
    sock = bind_http(host, port, "--http-port")
    guard = Guard((host, *names), authorise or open_to(host))
    service = ControlService(loop, operations, sessions)
    front = HttpFront(loop, service, history or History(loop), guard)
    server = HttpServer(
        uvicorn.Config(
            front.app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    return RunningFront(front, server, sock)
