"""EngineService over gRPC: every handler checks, calls the runtime, converts back; no logic."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from engine.cluster import KvCostParams, Routing, SwitchPlan, parse_deployment_key
from engine.errors import InvalidRequestError
from engine.grpc_server import start_server
from engine.request import SamplingParams, TokenLogprobs
from engine.runtime import EngineRuntime
from engine.terms import TermInterceptor, Terms
from engine.text_choice import TextChoice, TextChunk, TextOptions, text_chunks
from engine.tokenizer import Tokenizer
from engine.wire import from_proto, to_proto
from protos import engine_pb2, engine_pb2_grpc

SERVICE_NAME = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
WATCH_POLL_S = 1.0


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """The servicer; `tokenizer` serves text prompts, token ids need none."""

    def __init__(self, runtime: EngineRuntime, tokenizer: Tokenizer, model_name: str) -> None:
        self._runtime, self._tokenizer, self._model_name = runtime, tokenizer, model_name

    async def Describe(self, request: Any, context: Any) -> Any:
        response = engine_pb2.DescribeResponse(served_model_name=self._model_name)
        to_proto(self._runtime.spec, response.spec)
        if self._runtime.profile_json is not None:
            response.profile_json = json.dumps(self._runtime.profile_json)
        return response

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Cancelling the call, or its deadline, ends the request."""
        token_ids = self._prompt(request)
        wake = asyncio.Event()
        stream = self._runtime.generate(
            request.request_id if request.HasField("request_id") else uuid.uuid4().hex,
            token_ids,
            sampling_of(request.sampling),
            request.request_class,
            request.client_id,
            trace_headers=_trace_headers(context),
            wake=wake,
        )
        choice = TextChoice(stream, self._tokenizer, text_options_of(request.text_options))
        try:
            async for chunk in text_chunks([choice], wake):
                yield _response(stream.request_id, len(token_ids), chunk)
        finally:
            stream.cancel()

    def _prompt(self, request: Any) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return self._tokenizer.encode(request.text)
            case "token_ids":
                return list(request.token_ids.ids)
        raise InvalidRequestError("the request has no prompt; give text or token_ids.")

    async def Snapshot(self, request: Any, context: Any) -> Any:
        response = engine_pb2.SnapshotResponse()
        to_proto(self._runtime.snapshot(), response.snapshot)
        return response

    async def ListEvents(self, request: Any, context: Any) -> Any:
        response = engine_pb2.ListEventsResponse()
        to_proto(self._runtime.events(request.cursor), response.batch)
        return response

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        cursor = request.cursor
        while True:
            batch = await self._runtime.wait_for_events(cursor, WATCH_POLL_S)
            if batch.events or batch.num_lost:
                yield to_proto_response(engine_pb2.WatchEventsResponse(), "batch", batch)
            cursor = batch.next_cursor

    async def ApplySwitch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        plan = self._plan_of(request)
        if request.dry_run:
            self._runtime.check(plan)
            yield to_proto_response(engine_pb2.ApplySwitchResponse(), "plan", plan)
            return
        ticket = self._runtime.apply(plan)
        async for state in self._runtime.watch_ticket(ticket.ticket_id):
            yield to_proto_response(engine_pb2.ApplySwitchResponse(), "ticket", state)

    def _plan_of(self, request: Any) -> SwitchPlan:
        if request.HasField("plan") == bool(request.target_key):
            raise InvalidRequestError("give either a plan or a target_key, not both or neither.")
        if request.HasField("plan"):
            return from_proto(SwitchPlan, request.plan)
        kv = from_proto(KvCostParams, request.kv) if request.HasField("kv") else None
        return self._runtime.plan(parse_deployment_key(request.target_key), kv)

    async def GetTicket(self, request: Any, context: Any) -> Any:
        ticket = self._runtime.ticket(request.ticket_id)
        return to_proto_response(engine_pb2.GetTicketResponse(), "ticket", ticket)

    async def CancelSwitch(self, request: Any, context: Any) -> Any:
        ticket = self._runtime.cancel(request.ticket_id)
        return to_proto_response(engine_pb2.CancelSwitchResponse(), "ticket", ticket)

    async def SetRouting(self, request: Any, context: Any) -> Any:
        self._runtime.set_routing(from_proto(Routing, request.routing))
        return engine_pb2.SetRoutingResponse()


def to_proto_response(response: Any, field: str, value: Any) -> Any:
    to_proto(value, getattr(response, field))
    return response


def sampling_of(message: Any) -> SamplingParams:
    """Unset fields take the defaults of `SamplingParams`."""
    given = {
        field.name: value for field, value in message.ListFields() if field.name != "stop_token_ids"
    }
    return SamplingParams(**given, stop_token_ids=tuple(message.stop_token_ids))


def text_options_of(message: Any) -> TextOptions:
    """Raises InvalidRequestError for an empty stop string."""
    if "" in message.stop:
        raise InvalidRequestError("a stop string is empty; leave it out or give a text.", "stop")
    skip = not message.HasField("skip_special_tokens") or message.skip_special_tokens
    return TextOptions(tuple(message.stop), message.include_stop_str_in_output, skip)


def _response(request_id: str, prompt_tokens: int, chunk: TextChunk) -> Any:
    is_last = chunk.finish_reason is not None
    return engine_pb2.GenerateResponse(
        request_id=request_id,
        token_ids=chunk.token_ids,
        text=chunk.text,
        finish_reason=chunk.finish_reason,
        prompt_tokens=prompt_tokens,
        logprobs=[_logprobs(given) for given in chunk.logprobs],
        prompt_logprobs=[_logprobs(given) for given in chunk.prompt_logprobs],
        cached_tokens=chunk.num_cached_tokens if is_last else None,
    )


def _logprobs(given: TokenLogprobs) -> Any:
    named = [engine_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in given.top]
    token = engine_pb2.TokenLogprob(token_id=given.token_id, logprob=given.logprob)
    return engine_pb2.TokenLogprobs(token=token, top=named)


def _trace_headers(context: Any) -> dict[str, str]:
    return {
        key: value
        for key, value in context.invocation_metadata() or ()
        if key in ("traceparent", "tracestate")
    }


async def start_grpc(
    runtime: EngineRuntime,
    tokenizer: Tokenizer,
    model_name: str,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> tuple[grpc.aio.Server, int]:
    """Start the service; returns the server and its port. Raises UnavailableError: port in use."""
    servicer = EngineService(runtime, tokenizer, model_name)

    def add(server: grpc.aio.Server) -> None:
        engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server)

    terms = TermInterceptor(Terms(), SERVICE_NAME)
    guards = [*interceptors, terms]
    return await start_server(add, SERVICE_NAME, host, port, guards, credentials)
