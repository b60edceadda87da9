"""RemoteCluster: a `Cluster` over gRPC. Every call has a deadline and raises engine.errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from controller.control_channel import NO_ACCESS, ClientAccess, open_channel
from engine.cluster import (
    ClusterSnapshot,
    ClusterSpec,
    EventBatch,
    Routing,
    SwitchPlan,
    SwitchTicket,
)
from engine.errors import UnavailableError
from engine.grpc_server import MAX_MESSAGE_BYTES
from engine.terms import TERM_KEY
from engine.wire import error_of, from_proto, to_proto
from protos import engine_pb2, engine_pb2_grpc


class Leader(Protocol):
    """What a lease says of the one who holds it; see `controller.lease`."""

    @property
    def term(self) -> int:
        """0: none, as without a lease."""
        ...

    def check(self) -> None:
        """Raises StaleEpochError when another may have taken over."""
        ...


class RemoteCluster:
    """Owns one channel to an engine; close it. With a `leader` every call bears its term, and none
    that changes something is made once its lease is over. Raises InvalidRequestError for files of
    `access` that cannot be used."""

    def __init__(
        self,
        target: str,
        timeout_s: float = 5.0,
        access: ClientAccess = NO_ACCESS,
        leader: Leader | None = None,
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted engine is found in a second
        ]
        self._access_metadata = access.metadata(target)
        self._channel = open_channel(target, access, options)
        self._stub = engine_pb2_grpc.EngineServiceStub(self._channel)
        self._timeout_s, self.leader = timeout_s, leader
        self._description: Any = None

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        term = self.leader.term if self.leader is not None else 0
        metadata = (*self._access_metadata, *(((TERM_KEY, str(term)),) if term else ()))
        try:
            return method(request, timeout=self._timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        except ValueError as error:  # what grpc says of a channel that was closed
            raise UnavailableError("this RemoteCluster is closed; open another one.") from error

    def _act(self, method: Callable[..., Any], request: Any) -> Any:
        if self.leader is not None:
            self.leader.check()
        return self._call(method, request)

    def highest_term(self) -> int:
        """Of the controllers that this engine has heard of."""
        method, request = self._stub.Describe.with_call, engine_pb2.DescribeRequest()
        _, call = self._call(method, request)
        return int(dict(call.trailing_metadata() or ()).get(TERM_KEY, 0))

    def _describe(self) -> Any:
        if self._description is None:
            self._description = self._call(self._stub.Describe, engine_pb2.DescribeRequest())
        return self._description

    @property
    def spec(self) -> ClusterSpec:
        """Static facts; asked for once."""
        return from_proto(ClusterSpec, self._describe().spec)

    @property
    def served_model_name(self) -> str:
        return str(self._describe().served_model_name)

    @property
    def profile_json(self) -> dict[str, Any] | None:
        """The engine's measured profile, if it was given one."""
        described = self._describe()
        if not described.HasField("profile_json"):
            return None
        data: dict[str, Any] = json.loads(described.profile_json)
        return data

    def snapshot(self) -> ClusterSnapshot:
        response = self._call(self._stub.Snapshot, engine_pb2.SnapshotRequest())
        return from_proto(ClusterSnapshot, response.snapshot)

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        """Start the switch and return its first state; it goes on without this call."""
        request = engine_pb2.ApplySwitchRequest()
        to_proto(plan, request.plan)
        states = self._act(self._stub.ApplySwitch, request)
        try:
            return from_proto(SwitchTicket, next(states).ticket)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            states.cancel()

    def ticket(self, ticket_id: str) -> SwitchTicket:
        request = engine_pb2.GetTicketRequest(ticket_id=ticket_id)
        return from_proto(SwitchTicket, self._call(self._stub.GetTicket, request).ticket)

    def cancel(self, ticket_id: str) -> SwitchTicket:
        request = engine_pb2.CancelSwitchRequest(ticket_id=ticket_id)
        return from_proto(SwitchTicket, self._act(self._stub.CancelSwitch, request).ticket)

    def set_routing(self, routing: Routing) -> None:
        request = engine_pb2.SetRoutingRequest()
        to_proto(routing, request.routing)
        self._act(self._stub.SetRouting, request)

    def events(self, cursor: int) -> EventBatch:
        request = engine_pb2.ListEventsRequest(cursor=cursor)
        return from_proto(EventBatch, self._call(self._stub.ListEvents, request).batch)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> RemoteCluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
