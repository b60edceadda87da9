"""Handlers are made once; who may call is asked at each call."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from engine.errors import UnauthenticatedError
from engine.grpc_server import HandlerInterceptor


class Password(HandlerInterceptor):
    """The request is the password."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def wrap(self, path: str, handler: Any) -> Any:
        self.made.append(path)

        async def asked(request: str, context: Any) -> Any:
            if request != "swordfish":
                raise UnauthenticatedError("no")
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(asked)


async def _answer(request: str, context: Any) -> str:
    return "welcome"


async def _other(request: str, context: Any) -> str:
    return "other"


def test_a_handler_is_made_once_per_method_and_handler_and_decides_at_each_call() -> None:
    door, handler = Password(), grpc.unary_unary_rpc_method_handler(_answer)

    async def call(path: str, found: Any, request: str) -> Any:
        async def continuation(details: Any) -> Any:
            return found

        wrapped = await door.intercept_service(continuation, SimpleNamespace(method=path))
        return None if wrapped is None else await wrapped.unary_unary(request, None)

    async def calls() -> None:
        assert await call("/s/A", handler, "swordfish") == "welcome"
        with pytest.raises(UnauthenticatedError):
            await call("/s/A", handler, "guess")
        assert await call("/s/A", handler, "swordfish") == "welcome"
        assert door.made == ["/s/A"]
        other = grpc.unary_unary_rpc_method_handler(_other)
        assert await call("/s/A", other, "swordfish") == "other"
        assert await call("/s/B", handler, "swordfish") == "welcome"
        assert door.made == ["/s/A", "/s/A", "/s/B"]
        assert await call("/s/C", None, "swordfish") is None  # nobody answers that

    asyncio.run(calls())
