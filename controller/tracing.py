"""OpenTelemetry: one trace per tick, from the metrics that it reads to the switch's last phase.

A span per step of the tick, under one for the decision; when the switch that it started has ended,
a span for it with one per phase, in the same trace. The packages are optional (extra `otel`) and
imported only when an endpoint is given.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

from controller.records import TickRecord, TickStatus
from engine.cluster import SwitchPhase, SwitchTicket
from engine.otlp import open_exporter

if TYPE_CHECKING:
    from controller.loop import ControlLoop, Step

FLUSH_TIMEOUT_MS = 2000
MAX_OPEN = 200  # decisions whose switch has not ended, and ended switches that are known


class DecisionTracing:
    """Owns the exporter's thread. Spans are made when a tick has ended, with their true times."""

    def __init__(self, loop: ControlLoop, provider: Any) -> None:
        self._loop, self._provider = loop, provider
        self._tracer = provider.get_tracer("tidewright.controller")
        self._lock, self._seq = threading.Lock(), 0
        self._open: OrderedDict[str, Any] = OrderedDict()  # contexts by decision id
        self._seen: deque[str] = deque(maxlen=MAX_OPEN)
        loop.listeners.append(self._observe)

    def _observe(self) -> None:
        """Called by the loop whenever something changed."""
        with self._lock:
            with self._loop.lock:
                record = self._loop.records[-1] if self._loop.records else None
                steps, switches = self._loop.steps, list(self._loop.switches)
                snapshot = self._loop.snapshot
            if record is not None and record.seq > self._seq:
                self._seq = record.seq
                self._tick(record, steps)
            ended = [t for t in switches if t.ticket_id not in self._seen]
            for ticket in ended:
                self._seen.append(ticket.ticket_id)
                assert snapshot is not None
                self._switch(ticket, _cluster_zero_ns(steps, snapshot.now_s))

    def _tick(self, record: TickRecord, steps: tuple[Step, ...]) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        zero_ns, now_s = _perf_zero_ns(), time.perf_counter()
        from_s, to_s = (steps[0][1], steps[-1][2]) if steps else (now_s - record.tick_s, now_s)
        is_decided = record.status is TickStatus.DECIDED
        root = self._tracer.start_span(
            "decision" if is_decided else "tick",
            attributes=_attributes(record),
            start_time=zero_ns + round(from_s * 1e9),
        )
        context = set_span_in_context(root)
        for name, *span_s in steps:
            start_ns, end_ns = (zero_ns + round(s * 1e9) for s in span_s)
            self._tracer.start_span(name, context, start_time=start_ns).end(end_ns)
        if record.status in (TickStatus.FAILED, TickStatus.UNAVAILABLE):
            root.set_status(Status(StatusCode.ERROR, record.reason))
        root.end(zero_ns + round(to_s * 1e9))
        if record.ticket is not None:
            self._open[record.decision_id] = context
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)

    def _switch(self, ticket: SwitchTicket, zero_ns: int) -> None:
        """In its decision's trace; a switch by hand has a trace of its own."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        start_ns = zero_ns + round(ticket.started_s * 1e9)
        root = self._tracer.start_span(
            "switch",
            self._open.pop(ticket.decision_id, None),
            attributes={
                "tidewright.ticket": ticket.ticket_id,
                "tidewright.decision": ticket.decision_id,
                "tidewright.from": ticket.from_key,
                "tidewright.to": ticket.to_key,
                "tidewright.mode": ticket.mode.value,
                "tidewright.outcome": ticket.phase.value,
                "tidewright.moved_bytes": ticket.moved_bytes,
                "tidewright.pause_s": ticket.pause_s,
            },
            start_time=start_ns,
        )
        context = set_span_in_context(root)
        for phase, duration_s in ticket.phase_s:
            end_ns = start_ns + round(duration_s * 1e9)
            self._tracer.start_span(phase, context, start_time=start_ns).end(end_ns)
            start_ns = end_ns
        if ticket.phase is not SwitchPhase.DONE:
            root.set_status(Status(StatusCode.ERROR, ticket.reason))
        root.end(max(start_ns, zero_ns + round(ticket.updated_s * 1e9)))

    def close(self) -> None:
        """Send what is left, for a moment. Blocks."""
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def _perf_zero_ns() -> int:
    """Wall-clock time at which time.perf_counter was 0."""
    return time.time_ns() - round(time.perf_counter() * 1e9)


def _cluster_zero_ns(steps: tuple[Step, ...], now_s: float) -> int:
    """Wall-clock time at which the cluster's clock was 0: its snapshot was taken as the step of
    that name ended."""
    taken_s = next((to_s for name, _, to_s in steps if name == "snapshot"), time.perf_counter())
    return _perf_zero_ns() + round((taken_s - now_s) * 1e9)


def _attributes(record: TickRecord) -> dict[str, Any]:
    return {
        "tidewright.seq": record.seq,
        "tidewright.status": record.status.value,
        "tidewright.mode": record.mode.value,
        "tidewright.decision": record.decision_id,
        "tidewright.policy": record.policy,
        "tidewright.reason": record.reason,
        "tidewright.deployment": record.deployment_key,
        "tidewright.chosen": record.chosen_key,
        "tidewright.executed": record.executed_key,
        "tidewright.propensity": record.propensity,
        "tidewright.vetoes": record.vetoes,
        "tidewright.candidates": len(record.candidates),
        "tidewright.epoch": record.epoch,
        "tidewright.ticket": record.ticket.ticket_id if record.ticket else "",
    }


def start_tracing(loop: ControlLoop, endpoint: str) -> DecisionTracing:
    """Export spans to an OTLP gRPC endpoint such as http://localhost:4317.

    Raises InvalidRequestError when the packages are missing.
    """
    return DecisionTracing(loop, open_exporter(endpoint, "tidewright-controller"))
