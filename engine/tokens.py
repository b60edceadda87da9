"""Bearer tokens that the ports of an engine ask for, over gRPC and HTTP.

A file has one token a line; lines that begin with # are comments. It is read again when it changes,
so that a token is exchanged by having both in it for a while.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc

from engine.errors import InvalidRequestError, UnauthenticatedError
from engine.private_files import RereadFile, check_private

LEAST = 16  # characters of a token
OPEN = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")


def write_token(path: Path) -> str:
    """A file with a new token, its owner's alone: what a server asks for and a client sends."""
    token = secrets.token_hex(32)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(f"{token}\n")
    return token


class TokenFile:
    """What cannot be read leaves the tokens read before in force; a file that is gone admits
    nobody. Raises InvalidRequestError at the start; `flag` is the option that names the file."""

    def __init__(self, path: Path, flag: str) -> None:
        self._flag = flag
        self._file: RereadFile[tuple[bytes, ...]] = RereadFile(
            path, "token file", lambda p: _read(p, flag), ()
        )

    def check(self, authorization: str | None) -> None:
        """Of a header or metadata `Bearer TOKEN`. Raises UnauthenticatedError."""
        kind, _, token = (authorization or "").partition(" ")
        given = token.strip().encode(errors="surrogateescape") if kind.lower() == "bearer" else b""
        fits = [hmac.compare_digest(known, given) for known in self._file.present()]
        if not any(fits):
            raise UnauthenticatedError(
                "the call has no token that is known here; send `authorization: Bearer TOKEN` with "
                f"one of the engine's {self._flag}."
            )


def _read(path: Path, flag: str) -> tuple[bytes, ...]:
    check_private(path, "token file", flag)
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"token file {path} cannot be read: {error}.") from error
    tokens = tuple(line.encode() for line in lines if line and not line.startswith("#"))
    if not tokens or any(len(t) < LEAST or b" " in t for t in tokens):
        raise InvalidRequestError(
            f"token file {path} must have a token on each line, of {LEAST} characters or more and "
            "without spaces, such as `openssl rand -hex 32` prints."
        )
    return tokens


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """For every method but health's. The message of a call without a token is not even parsed."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method in OPEN:
            return handler
        try:
            self._tokens.check(_authorization(details.invocation_metadata))
        except UnauthenticatedError as error:
            return _refusing(handler, error)
        return handler


def _authorization(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    given = [value for key, value in metadata or () if key == "authorization"]
    return given[0] if len(given) == 1 and isinstance(given[0], str) else None


def _refusing(handler: Any, error: UnauthenticatedError) -> Any:
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
