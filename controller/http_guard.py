"""Which pages may ask the HTTP front: host names and origins; and headers on every answer. Who may
do what is the gate's to say."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InvalidRequestError, PermissionDeniedError

MAX_TOLD = 100  # characters of a page's address
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class ForeignPageError(PermissionDeniedError):
    """A change was asked for by a web page from elsewhere, or by one that was loaded before this
    controller started."""


class UnsupportedContentError(InvalidRequestError):
    """The body is said to be of another kind than JSON, as that of a plain form."""


class TooLargeError(InvalidRequestError):
    """The body has more bytes than any change takes."""


def name_of(host_header: str) -> str:
    """The host without its port."""
    if host_header.startswith("["):
        return host_header.partition("]")[0].strip("[]")
    return host_header.rpartition(":")[0] if ":" in host_header else host_header


class Guard:
    """`names` are the host names that the front answers to, beside addresses and localhost: a
    name of somebody else's that leads here must not let their page in (DNS rebinding)."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {"localhost", *(name.lower() for name in names if name)}
        self.page_token = secrets.token_urlsafe(24)  # what only a page from here can know

    def check_host(self, headers: Headers) -> None:
        """Raises HTTPException 421."""
        name = name_of(headers.get("host", "")).lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if name not in self._names:
                raise HTTPException(
                    421,
                    f"this controller does not answer to the host name {name!r}; use its address, "
                    "or start it with the name among --http-names.",
                ) from None

    def check_same_origin(self, headers: Headers) -> None:
        """That a page from here asks, and no other that the user has open. Raises ForeignPageError,
        and UnsupportedContentError for what a plain form could send."""
        origin, host = headers.get("origin"), headers.get("host", "")
        foreign = origin is not None and origin not in (f"http://{host}", f"https://{host}")
        if foreign or headers.get("sec-fetch-site", "same-origin") != "same-origin":
            where = f" ({origin[:MAX_TOLD]})" if origin is not None else ""
            raise ForeignPageError(f"another web page{where} asked for this; only this one may.")
        given = headers.get("x-tidewright-token", "").encode()
        if not hmac.compare_digest(given, self.page_token.encode()):
            raise ForeignPageError(
                "x-tidewright-token is not the page_token of /api/session; load that again."
            )
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise UnsupportedContentError("content-type must be application/json.")


def bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


class StrictHeaders:
    """ASGI middleware: HEADERS on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)
