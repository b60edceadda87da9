"""The gate on gRPC: callers are admitted before their message is even parsed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from controller.gate import Credentials, Gate, method_of
from controller.gated_call import GatedCall
from engine.errors import InvalidRequestError
from engine.grpc_server import HandlerInterceptor, responses_of

BEARER = "bearer "


def credentials_of(context: Any, secure: bool) -> Credentials:
    """From metadata and, on a `secure` port, the client's verified certificate."""
    given = [v for k, v in context.invocation_metadata() or () if k == "authorization"]
    token = given[0] if len(given) == 1 and isinstance(given[0], str) else None
    known = token is not None and token[: len(BEARER)].lower() == BEARER
    auth = (context.auth_context() if secure else None) or {}
    names = [
        *auth.get("x509_common_name", ()),
        *auth.get("x509_subject_alternative_name", ()),
    ]
    return Credentials(
        peer=_host_of(context.peer()),
        token=token[len(BEARER) :] if known and token else ("" if given else None),
        certificates=tuple(dict.fromkeys([n.decode(errors="replace") for n in names])),
    )


def _host_of(peer: str) -> str:
    """'ipv4:127.0.0.1:5000' without its port; the host of an IPv6 address is in brackets."""
    kind, _, address = peer.partition(":")
    return address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind


class GateInterceptor(HandlerInterceptor):
    """For every method of every service of a server; `secure`: its port speaks TLS."""

    def __init__(self, gate: Gate, secure: bool) -> None:
        super().__init__()
        self._gate, self._secure = gate, secure

    def wrap(self, path: str, handler: Any) -> Any:
        path = path.lstrip("/")
        serializer = handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(path, handler), response_serializer=serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(path, handler, self._parsed), response_serializer=serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(path, handler, self._all_parsed), response_serializer=serializer
        )

    def _parsed(self, path: str, handler: Any, raw: bytes) -> Any:
        limit = method_of(path).max_bytes
        if len(raw) > limit:
            raise InvalidRequestError(
                f"the request has {len(raw)} bytes; {path.rpartition('/')[2]} takes at most "
                f"{limit}."
            )
        try:
            return handler.request_deserializer(raw)
        except DecodeError as error:
            raise InvalidRequestError(
                f"the request is no message of {path.rpartition('/')[2]}; look at "
                "docs/control-api.md."
            ) from error

    async def _all_parsed(self, path: str, handler: Any, sent: Any) -> AsyncIterator[Any]:
        async for raw in sent:
            yield self._parsed(path, handler, raw)

    def _unary(self, path: str, handler: Any) -> Any:
        async def gated(raw: bytes, context: Any) -> Any:
            call = GatedCall(self._gate, path, credentials_of(context, self._secure))
            try:
                call.caller = self._gate.admit(path, call.credentials)
                call.request = self._parsed(path, handler, raw)
                response = await handler.unary_unary(call.request, context)
            except BaseException as error:
                await call.ended(error)
                raise
            await call.ended(None)
            return response

        return gated

    def _stream(self, path: str, handler: Any, parsed: Any) -> Any:
        method = handler.unary_stream or handler.stream_stream

        async def gated(raw: Any, context: Any) -> AsyncIterator[Any]:
            call = GatedCall(self._gate, path, credentials_of(context, self._secure))
            try:
                call.caller = self._gate.admit(path, call.credentials)
                request = parsed(path, handler, raw)
                with self._gate.open_stream(call.caller):
                    async with aclosing(responses_of(method, request, context)) as responses:
                        async for response in responses:
                            self._gate.check(path, call.credentials)
                            yield response
            except BaseException as error:
                await call.ended(error)
                raise
            await call.ended(None)

        return gated
