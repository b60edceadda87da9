"""The gRPC server that engine and controller share."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.grpc_server import start_server

TIMEOUT_S = 20.0


class Asked(grpc.aio.ServerInterceptor):
    """Remembers which methods it was asked about, and counts the calls that it sees."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        self.calls = 0

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.methods.append(details.method)
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        async def counted(request: Any, context: Any) -> Any:
            self.calls += 1
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            counted, handler.request_deserializer, handler.response_serializer
        )


def test_interceptors_are_asked_once_per_method_and_see_every_call() -> None:
    async def run() -> None:
        asked = Asked()
        server, port = await start_server(lambda server: None, "a.Service", "127.0.0.1", 0, [asked])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="a.Service")
            for _ in range(3):
                answer = await stub.Check(request, timeout=TIMEOUT_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(request, timeout=TIMEOUT_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        await server.stop(0)
        assert asked.methods == ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"]
        assert asked.calls == 3

    asyncio.run(run())


def test_methods_that_a_server_does_not_have_are_not_remembered() -> None:
    async def run() -> None:
        asked = Asked()
        server, port = await start_server(lambda server: None, "a.Service", "127.0.0.1", 0, [asked])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            unknown = channel.unary_unary("/a.Service/Unknown")
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(unknown(b"", timeout=TIMEOUT_S), TIMEOUT_S)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await server.stop(0)
        assert asked.methods == ["/a.Service/Unknown"] * 2
        assert asked.calls == 0

    asyncio.run(run())
