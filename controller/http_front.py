"""The controller over HTTP: the dashboard's page, its data as JSON and as server-sent events.

What is asked and told goes through the methods of ControlService, as over gRPC.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from controller.gate import Caller, Credentials, Gate
from controller.gated_call import GatedCall
from controller.history import History, Plain, plain
from controller.http_guard import (
    Guard,
    StrictHeaders,
    TooLargeError,
    UnsupportedContentError,
    bearer,
)
from controller.json_calls import call
from controller.live_feed import LiveFeed
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.roles import CONTROL
from controller.service import ControlService
from controller.sessions import Sessions
from engine.certificates import Certificates
from engine.errors import (
    CheckpointError,
    InfeasibleError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    StaleEpochError,
    SwitchInProgressError,
    TidewrightError,
    UnauthenticatedError,
    UnavailableError,
    UngatedPolicyError,
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
SWITCHES_TOLD = 20

READS = {  # path -> method of ControlService; its fields are the query's
    "/api/state": "GetState",
    "/api/explain": "Explain",
    "/api/forecast": "GetForecast",
    "/api/policies": "ListPolicies",
}
WRITES = {  # the same; its fields are the JSON body's
    "/api/mode": "SetMode",
    "/api/hold": "Hold",
    "/api/resume": "Resume",
    "/api/cancel": "CancelSwitch",
    "/api/rollback": "Rollback",
    "/api/propose": "ProposeSwitch",
    "/api/load": "LoadPolicy",
    "/api/canary": "SetCanary",
}
WATCHING = "WatchState"  # what the stream of events is to the gate
ROLES = ("read", "operate", "admin")  # that the page asks for
_STATUS: tuple[tuple[type[TidewrightError], int], ...] = (
    (UnsupportedContentError, 415),
    (TooLargeError, 413),
    (InvalidRequestError, 400),
    (InfeasibleError, 400),
    (NotFoundError, 404),
    (StaleEpochError, 409),
    (SwitchInProgressError, 409),
    (CheckpointError, 409),
    (UngatedPolicyError, 409),
    (UnauthenticatedError, 401),
    (PermissionDeniedError, 403),
    (OverloadedError, 429),
    (UnavailableError, 503),
)


def error_json(message: str, code: str, param: str | None = None) -> Plain:
    return {"error": {"message": message, "code": code, "param": param}}


async def on_tidewright_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TidewrightError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    param = error.param if isinstance(error, InvalidRequestError) else None
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_json(str(error), type(error).__name__, param), status, headers)


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
        self,
        loop: ControlLoop,
        service: ControlService,
        history: History,
        guard: Guard,
        gate: Gate,
    ) -> None:
        self._service, self._guard, self._gate = service, guard, gate
        self._feed = LiveFeed(loop, history, self._state)
        files = {p.name: p.read_bytes() for p in sorted(PAGES.iterdir()) if p.suffix in KINDS}
        self._files = {name: (data, KINDS[Path(name).suffix]) for name, data in files.items()}
        routes = [
            Route("/", self._checked(self._file)),
            Route("/api/session", self._checked(self._session)),
            Route("/api/events", self._checked(self._events)),
            *(Route(path, self._checked(self._read)) for path in READS),
            *(Route(path, self._checked(self._write), methods=["POST"]) for path in WRITES),
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

    def _checked(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            self._guard.check_host(request.headers)
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
        who = credentials_of(request)
        may = {role: self._gate.allows(role, who.token or "", who.peer) for role in ROLES}
        return JSONResponse({"may": may, "page_token": self._guard.page_token})

    async def _state(self) -> Plain:
        """Without what switches did to single requests."""
        told = await self._ask("GetState", {})
        told["switches"] = told["switches"][-SWITCHES_TOLD:]
        for ticket in told["switches"]:
            ticket.pop("bindings", None)
        return told

    async def _events(self, request: Request) -> Response:
        who = credentials_of(request)
        caller = self._gate.admit(f"{CONTROL}/{WATCHING}", who)
        self._feed.check_room()
        events = self._feed.events(request.headers.get("last-event-id", ""))
        return EventStream(self._while_allowed(events, caller, who))

    async def _while_allowed(
        self, events: AsyncGenerator[bytes, None], caller: Caller, who: Credentials
    ) -> AsyncGenerator[bytes, None]:
        """Ends with the caller's right to them."""
        async with aclosing(events):
            with self._gate.open_stream(caller):
                async for event in events:
                    try:
                        self._gate.check(f"{CONTROL}/{WATCHING}", who)
                    except (UnauthenticatedError, PermissionDeniedError):
                        return
                    yield event

    async def _read(self, request: Request) -> Response:
        fields = dict(request.query_params)
        method = READS[request.url.path]
        async with self._gated(request, method, fields):
            plainly = method == "GetState" and not fields
            told = await (self._state() if plainly else self._ask(method, fields))
        return JSONResponse(told)

    async def _write(self, request: Request) -> Response:
        method = WRITES[request.url.path]
        async with self._gated(request, method) as gated:
            self._guard.check_same_origin(request.headers)
            gated.request = json_object(await _body(request))
            told = await self._ask(method, gated.request)
        return JSONResponse(told)

    @asynccontextmanager
    async def _gated(
        self, request: Request, method: str, fields: Plain | None = None
    ) -> AsyncGenerator[GatedCall, None]:
        """As over gRPC: admitted before anything is read, counted and audited at the end."""
        path = f"{CONTROL}/{method}"
        gated = GatedCall(self._gate, path, credentials_of(request))
        gated.request = fields
        try:
            gated.caller = self._gate.admit(path, gated.credentials)
            yield gated
        except BaseException as error:
            await gated.ended(error)
            raise
        await gated.ended(None)

    async def _ask(self, method: str, fields: Plain) -> Plain:
        """The one way to the control service."""
        return dict(plain(await call(self._service, method, fields, CALL_S)))


def credentials_of(request: Request) -> Credentials:
    peer = request.client.host if request.client is not None else ""
    given = "authorization" in request.headers
    return Credentials(peer, bearer(request.headers) if given else None)


async def _body(request: Request) -> bytes:
    """Raises TooLargeError."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise TooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes.")
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
    gate: Gate | None = None,
    certificates: Certificates | None = None,
    history: History | None = None,
) -> RunningFront:
    """Serve the dashboard; `names` are host names it answers to, beside addresses, localhost and
    `host`. Without a gate whoever reaches the port may do everything. Raises UnavailableError when
    the port cannot be had."""
    sock = bind_http(host, port, "--http-port")
    service, guard = ControlService(loop, operations, sessions), Guard((host, *names))
    front = HttpFront(loop, service, history or History(loop), guard, gate or Gate())
    server = HttpServer(front.app, None if certificates is None else certificates.context())
    return RunningFront(front, server, sock)
