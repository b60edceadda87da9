"""RemoteControl: a controller over gRPC. Every call has a deadline and raises engine.errors."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from controller.control_channel import ClientAccess, open_channel
from controller.json_messages import Told
from controller.json_messages import told as _told
from controller.records import Mode, TickRecord
from engine.errors import UnavailableError
from engine.grpc_server import MAX_MESSAGE_BYTES
from engine.wire import error_of, from_proto
from protos import control_pb2 as pb
from protos import control_pb2_grpc

KEPT_TICKS = 1000
STREAM_S = 600.0  # deadline of a stream; it goes on with its resume token


class RemoteControl:
    """Owns one channel to a controller and the thread that follows its decisions; close it."""

    def __init__(
        self,
        target: str,
        timeout_s: float = 5.0,
        stream_s: float = STREAM_S,
        access: ClientAccess | None = None,
    ) -> None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        access = access or ClientAccess()
        self._metadata = access.metadata(target)
        self._channel = open_channel(target, access, options)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._timeout_s, self._stream_s = timeout_s, stream_s
        self._ticks: deque[TickRecord] = deque(maxlen=KEPT_TICKS)
        self._reader: threading.Thread | None = None
        self._stream: Any = None
        self._is_closed = False

    # ---------------------------------------------------------------- following decisions

    def ticks(self, from_seq: int) -> list[TickRecord]:
        """Ticks with seq >= from_seq received so far; the first call starts to follow them."""
        if self._reader is None:
            request = pb.WatchDecisionsRequest(from_seq=max(1, from_seq))
            self._reader = threading.Thread(target=self._read, args=(request,), daemon=True)
            self._reader.start()
        return [tick for tick in tuple(self._ticks) if tick.seq >= from_seq]

    def _read(self, request: Any) -> None:
        try:
            for response in self._follow(self._stub.WatchDecisions, request):
                self._ticks.append(from_proto(TickRecord, response.record))
        except (grpc.RpcError, ValueError):  # closed, or the controller went away
            return

    def _follow(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """A stream that outlives its deadline. Raises grpc.RpcError for any other end."""
        while not self._is_closed:
            self._stream = method(request, timeout=self._stream_s, metadata=self._metadata)
            try:
                for response in self._stream:
                    yield response
                    request = type(request)(resume_token=response.resume_token)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise

    def watch_state(self) -> Iterator[Told]:
        """The state now and whenever something changes. Raises engine.errors."""
        return self._watch(self._stub.WatchState, pb.WatchStateRequest())

    def watch_decisions(self, from_seq: int = 0) -> Iterator[Told]:
        """Every tick from that one on; 0: those to come. Raises engine.errors."""
        return self._watch(self._stub.WatchDecisions, pb.WatchDecisionsRequest(from_seq=from_seq))

    def _watch(self, method: Callable[..., Any], request: Any) -> Iterator[Told]:
        try:
            yield from map(_told, self._follow(method, request))
        except grpc.RpcError as error:
            raise error_of(error) from error

    # ---------------------------------------------------------------- asking and telling

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from error
        except ValueError as error:  # what grpc says of a channel that was closed
            raise UnavailableError("this RemoteControl is closed; open another one.") from error

    def grid_s(self) -> float:
        """Seconds between two decisions. Raises UnavailableError."""
        return float(self._call(self._stub.GetState, pb.GetStateRequest()).grid_s)

    def state(self) -> Told:
        return _told(self._call(self._stub.GetState, pb.GetStateRequest()))

    def explain(self, seq: int = 0, decision_id: str = "", candidate_key: str = "") -> Told:
        """Of the last decision by default. Raises NotFoundError."""
        request = pb.ExplainRequest(seq=seq, decision_id=decision_id, candidate_key=candidate_key)
        return _told(self._call(self._stub.Explain, request))

    def forecast(self) -> Told:
        return _told(self._call(self._stub.GetForecast, pb.GetForecastRequest()))

    def plan(self, demand: Mapping[str, float]) -> Told:
        """Requests per second by type; empty: the present forecast. Raises InvalidRequestError."""
        rates = [pb.TypeDemand(type=name, rate_per_s=rate) for name, rate in demand.items()]
        return _told(self._call(self._stub.GetPlan, pb.GetPlanRequest(demand=rates)))

    def policies(self) -> Told:
        return _told(self._call(self._stub.ListPolicies, pb.ListPoliciesRequest()))

    def set_mode(self, mode: Mode) -> Told:
        request = pb.SetModeRequest(mode=f"MODE_{mode.name}", idempotency_key=_new_key())
        return _told(self._call(self._stub.SetMode, request))

    def hold(self, duration_s: float, reason: str) -> Told:
        """Raises InvalidRequestError for more than a week."""
        request = pb.HoldRequest(duration_s=duration_s, reason=reason, idempotency_key=_new_key())
        return _told(self._call(self._stub.Hold, request))

    def resume(self) -> Told:
        request = pb.ResumeRequest(idempotency_key=_new_key())
        return _told(self._call(self._stub.Resume, request))

    def propose(self, target_key: str) -> Told:
        """What a switch would take, and what is against it; nothing is done."""
        request = pb.ProposeSwitchRequest(target_key=target_key, dry_run=True)
        return _told(self._call(self._stub.ProposeSwitch, request))

    def apply(self, target_key: str, expected_epoch: int, idempotency_key: str = "") -> Told:
        """Raises StaleEpochError when the engine is at another epoch."""
        request = pb.ApplySwitchRequest(
            target_key=target_key,
            expected_epoch=expected_epoch,
            idempotency_key=idempotency_key or _new_key(),
        )
        return _told(self._call(self._stub.ApplySwitch, request))

    def cancel(self, ticket_id: str = "") -> Told:
        """The switch in flight by default. Raises NotFoundError."""
        request = pb.CancelSwitchRequest(ticket_id=ticket_id, idempotency_key=_new_key())
        return _told(self._call(self._stub.CancelSwitch, request))

    def load_policy(self, name: str) -> Told:
        """Raises NotFoundError, and CheckpointError for other features."""
        request = pb.LoadPolicyRequest(name=name, idempotency_key=_new_key())
        return _told(self._call(self._stub.LoadPolicy, request))

    def rollback(self) -> Told:
        """Raises NotFoundError when no policy was loaded."""
        request = pb.RollbackRequest(idempotency_key=_new_key())
        return _told(self._call(self._stub.Rollback, request))

    def set_canary(self, name: str, fraction: float) -> Told:
        """No name ends it. Raises NotFoundError, CheckpointError and InvalidRequestError."""
        request = pb.SetCanaryRequest(name=name, fraction=fraction, idempotency_key=_new_key())
        return _told(self._call(self._stub.SetCanary, request))

    def close(self) -> None:
        self._is_closed = True
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        if self._reader is not None:
            self._reader.join(timeout=self._timeout_s)

    def __enter__(self) -> RemoteControl:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _new_key() -> str:
    return uuid.uuid4().hex
