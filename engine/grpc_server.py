"""What every gRPC server here shares: errors by the one table, health, reflection, a port."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engine.error_details import DETAILS_KEY, details_of
from engine.errors import TidewrightError, UnavailableError
from engine.wire import ERROR_KEY, name_of, status_of

MAX_HANDLERS = 256  # that an interceptor remembers; handlers that refuse are made per call
MAX_MESSAGE_BYTES = 64 << 20  # a switch plan lists every tensor slice


class HandlerInterceptor(grpc.aio.ServerInterceptor):
    """Puts another handler in the place of each. It is made once per method and handler: what it
    decides of a call, it decides when it is called."""

    def __init__(self) -> None:
        self._wrapped = lru_cache(MAX_HANDLERS)(self.wrap)

    def wrap(self, path: str, handler: Any) -> Any:
        """The handler to call for the method `/service/Method`."""
        raise NotImplementedError

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        return None if handler is None else self._wrapped(details.method, handler)


class ErrorInterceptor(HandlerInterceptor):
    """Turns a TidewrightError into its status, with its class name in the trailing metadata and in
    the rich status."""

    def wrap(self, path: str, handler: Any) -> Any:
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_unary is None:  # reflection's
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(handler.stream_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )


async def _abort(context: Any, error: TidewrightError) -> None:
    trailing = ((ERROR_KEY, name_of(error)), (DETAILS_KEY, details_of(error)))
    await context.abort(status_of(error), str(error), trailing)


def _guard_unary(method: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except TidewrightError as error:
            return await _abort(context, error)

    return guarded


async def responses_of(method: Any, request: Any, context: Any) -> AsyncGenerator[Any]:
    """Of a stream's handler; one that writes them to the context itself, as health's does, yields
    none here."""
    answer = method(request, context)
    if inspect.isawaitable(answer):
        await answer
        return
    async with aclosing(answer) as responses:
        async for response in responses:
            yield response


def _guard_stream(method: Any) -> Any:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(responses_of(method, request, context)) as responses:
                async for response in responses:
                    yield response
        except TidewrightError as error:
            await _abort(context, error)

    return guarded


async def start_server(
    add_servicer: Callable[[grpc.aio.Server], None],
    service_name: str,
    host: str,
    port: int,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    credentials: grpc.ServerCredentials | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> tuple[grpc.aio.Server, int]:
    """Start one service with health and reflection; returns the server and its port. With
    credentials it speaks TLS only.

    Raises UnavailableError when the port cannot be bound.
    """
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", max_message_bytes)]
    server = grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=options)
    add_servicer(server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set(service_name, health_pb2.HealthCheckResponse.SERVING)
    names = (service_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise UnavailableError(
            f"gRPC port {port} on {host} cannot be bound; it is in use or not allowed. Choose "
            "another with --grpc-port, or 0 for any."
        ) from error
    await server.start()
    return server, bound
