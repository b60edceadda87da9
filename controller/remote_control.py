"""RemoteControl: a controller over gRPC. Every call has a deadline and raises engine.errors."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import grpc

from controller.records import TickRecord
from engine.wire import error_of, from_proto
from protos import control_pb2, control_pb2_grpc

KEPT_TICKS = 1000


class RemoteControl:
    """Owns one channel to a controller and the thread that follows its decisions; close it."""

    def __init__(self, target: str, timeout_s: float = 5.0) -> None:
        self._channel = grpc.insecure_channel(target)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._ticks: deque[TickRecord] = deque(maxlen=KEPT_TICKS)
        self._stream: Any = None
        self._reader: threading.Thread | None = None

    def ticks(self, from_seq: int) -> list[TickRecord]:
        """Ticks with seq >= from_seq received so far; the first call starts to follow them."""
        if self._reader is None:
            request = control_pb2.WatchDecisionsRequest(from_seq=max(1, from_seq))
            self._stream = self._stub.WatchDecisions(request)
            self._reader = threading.Thread(target=self._read, args=(self._stream,), daemon=True)
            self._reader.start()
        return [tick for tick in tuple(self._ticks) if tick.seq >= from_seq]

    def _read(self, stream: Iterator[Any]) -> None:
        try:
            for response in stream:
                self._ticks.append(from_proto(TickRecord, response.record))
        except grpc.RpcError:  # cancelled by close, or the controller went away
            return

    def grid_s(self) -> float:
        """Seconds between two decisions. Raises UnavailableError."""
        try:
            state = self._stub.GetState(control_pb2.GetStateRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise error_of(error) from error
        return float(state.grid_s)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        if self._reader is not None:
            self._reader.join(timeout=self._timeout_s)

    def __enter__(self) -> RemoteControl:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
