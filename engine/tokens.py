"""Bearer tokens that the ports of an engine ask for, over gRPC and HTTP.

A file has one token a line; lines that begin with # are comments. It is read again when it
changes, so that a token is exchanged by having both in it for a while. One of gRPC may be followed
by `read`: whoever has it may look, and neither switch, route nor generate.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc

from engine.errors import (
    InvalidRequestError,
    PermissionDeniedError,
    TidewrightError,
    UnauthenticatedError,
)
from engine.private_files import RereadFile, check_private

LEAST = 16  # characters of a token
READ = "read"  # behind a token
OPEN = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
_SERVICE = "/tidewright.engine.v1.EngineService/"
READING = frozenset(
    (
        *(_SERVICE + name for name in ("Describe", "Snapshot", "WatchEvents", "ListEvents")),
        _SERVICE + "GetTicket",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    )
)


def write_token(path: Path) -> str:
    """A file with a new token, its owner's alone: what a server asks for and a client sends."""
    token = secrets.token_hex(32)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(f"{token}\n")
    return token


class TokenFile:
    """What cannot be read leaves the tokens read before in force; a file that is gone admits
    nobody. Raises InvalidRequestError at the start; `flag` is the option that names the file, and
    `marks` are the words that may stand behind a token."""

    def __init__(self, path: Path, flag: str, marks: tuple[str, ...] = ()) -> None:
        self._flag = flag
        self._file: RereadFile[tuple[tuple[bytes, str], ...]] = RereadFile(
            path, "token file", lambda p: _read(p, flag, marks), ()
        )

    def check(self, authorization: str | None) -> str:
        """The mark of the token in a header or metadata `Bearer TOKEN`, "" without one. Raises
        UnauthenticatedError."""
        kind, _, token = (authorization or "").partition(" ")
        given = token.strip().encode(errors="surrogateescape") if kind.lower() == "bearer" else b""
        known = self._file.present()
        found = [mark for token, mark in known if hmac.compare_digest(token, given)]
        if not found:
            raise UnauthenticatedError(
                "the call has no token that is known here; send `authorization: Bearer TOKEN` with "
                f"one of the engine's {self._flag}."
            )
        return min(found)  # a token that stands there twice may do what it may without a mark


def _read(path: Path, flag: str, marks: tuple[str, ...]) -> tuple[tuple[bytes, str], ...]:
    check_private(path, "token file", flag)
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"token file {path} cannot be read: {error}.") from error
    lines = [line for line in lines if line and not line[0].startswith("#")]
    known = {(), *((mark,) for mark in marks)}
    if not lines or any(len(token) < LEAST or tuple(rest) not in known for token, *rest in lines):
        behind = "".join(f", or `{mark}` behind it" for mark in marks)
        raise InvalidRequestError(
            f"token file {path} must have a token on each line, of {LEAST} characters or more and "
            f"without spaces, such as `openssl rand -hex 32` prints{behind}."
        )
    return tuple((token.encode(), "".join(rest)) for token, *rest in lines)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """For every method but health's. The message of a call without a token that may make it is not
    even parsed."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method in OPEN:
            return handler
        try:
            mark = self._tokens.check(_authorization(details.invocation_metadata))
        except UnauthenticatedError as error:
            return _refusing(handler, error)
        if mark == READ and details.method not in READING:
            name = details.method.rpartition("/")[2]
            why = f"this token may only read, and {name} does more; send one without `{READ}`."
            return _refusing(handler, PermissionDeniedError(why))
        return handler


def _authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    given = [value for key, value in metadata or () if key == "authorization"]
    return given[0] if len(given) == 1 and isinstance(given[0], str) else None


def _refusing(handler: Any, error: TidewrightError) -> Any:
    """A handler of the same kind."""

    async def refuse(request: Any, context: Any) -> Any:
        raise error

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        raise error
        yield

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(refuse)
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.stream_stream_rpc_method_handler(refuse_stream)
