"""Terms: which controller may act. One whose lease has gone to another is refused by the engine.

A controller that holds a lease sends the lease's epoch, its term, as the metadata `tidewright-term`
with every call, looking included. The engine remembers the highest it has heard of and refuses
what would change something from a lower one, so a controller that was stopped and wakes up late
can't act beside its successor. Calls without a term are by hand, and pass. Every answer to a unary
call tells the highest term in its trailing metadata: a new leader begins above it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from engine.errors import InvalidRequestError, StaleEpochError

TERM_KEY = "tidewright-term"
ACTING = ("ApplySwitch", "CancelSwitch", "SetRouting")
MAX_TERM = 2**62


class Terms:
    """The highest term heard of. An engine that is started again has heard of none."""

    def __init__(self) -> None:
        self.highest = 0

    def hear(self, told: str | None, is_acting: bool) -> None:
        """Raises StaleEpochError when it may not act, InvalidRequestError for what is no term."""
        if told is None:
            return
        if not told.isdecimal() or not 0 < (term := int(told)) <= MAX_TERM:
            raise InvalidRequestError(
                f"metadata {TERM_KEY} is {told!r}; expected a positive whole number."
            )
        if is_acting and term < self.highest:
            raise StaleEpochError(
                f"the call is of a controller of term {term}, one of term {self.highest} has taken "
                "over since; it is refused."
            )
        self.highest = max(self.highest, term)


class TermInterceptor(grpc.aio.ServerInterceptor):
    """Hears the terms of all calls to one service."""

    def __init__(self, terms: Terms, service_name: str) -> None:
        self._terms, self._prefix = terms, f"/{service_name}/"

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        is_acting = details.method.removeprefix(self._prefix) in ACTING
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._heard_stream(handler.unary_stream, is_acting),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._heard_unary(handler.unary_unary, is_acting),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _hear(self, context: Any, is_acting: bool) -> None:
        self._terms.hear(dict(context.invocation_metadata() or ()).get(TERM_KEY), is_acting)

    def _heard_unary(self, method: Any, is_acting: bool) -> Any:
        async def heard(request: Any, context: Any) -> Any:
            self._hear(context, is_acting)
            context.set_trailing_metadata(((TERM_KEY, str(self._terms.highest)),))
            return await method(request, context)

        return heard

    def _heard_stream(self, method: Any, is_acting: bool) -> Any:
        async def heard(request: Any, context: Any) -> AsyncIterator[Any]:
            self._hear(context, is_acting)
            async with aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

        return heard
