"""A call without a deadline is refused: nobody would notice a controller that does not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from engine.errors import InvalidRequestError
from engine.grpc_server import HandlerInterceptor


class DeadlineInterceptor(HandlerInterceptor):
    """For the methods of one service; health and reflection are left alone."""

    def __init__(self, service_name: str) -> None:
        super().__init__()
        self._prefix = f"/{service_name}/"

    def wrap(self, path: str, handler: Any) -> Any:
        if not path.startswith(self._prefix):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _checked_stream(handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _checked_unary(handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _check(context: Any) -> None:
    if context.time_remaining() is None:
        raise InvalidRequestError(
            "the call has no deadline; set one, such as timeout=5 in Python or -max-time 5 with "
            "grpcurl. A stream that ends at it goes on with its last resume token."
        )


def _checked_unary(method: Any) -> Any:
    async def checked(request: Any, context: Any) -> Any:
        _check(context)
        return await method(request, context)

    return checked


def _checked_stream(method: Any) -> Any:
    async def checked(request: Any, context: Any) -> AsyncIterator[Any]:
        _check(context)
        async with aclosing(method(request, context)) as responses:
            async for response in responses:
                yield response

    return checked
