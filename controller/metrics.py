"""The controller's Prometheus metrics: counted as ticks end, read from the loop when scraped."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from controller.breaker import Actor
from controller.guardrails import KEEP, NO_SUCH_CANDIDATE, RULES
from controller.loop import NUM_SWITCHES_KEPT, ControlLoop
from controller.metric_table import METRIC, METRICS, SECONDS
from controller.records import Mode, TickRecord, TickStatus
from controller.security import Security
from engine.cluster import SwitchPhase, SwitchTicket
from engine.errors import UnavailableError

HOST = "127.0.0.1"
REASONS = ("policy", "rule", "safe", "fallback", "veto", "undo")
BREAKER_STATES = ("closed", "open", "half_open")
VETO_RULES = (*(rule.name for rule in RULES), NO_SUCH_CANDIDATE)
Row = tuple[tuple[str, ...], float]  # values of the labels, value


class ControlMetrics(Collector):
    """Of one loop and what guards it; `text` is what is served at /metrics."""

    def __init__(self, loop: ControlLoop, security: Security | None = None) -> None:
        self._loop, self._security = loop, security or Security()
        self._lock, self._seq = threading.Lock(), 0
        self._seen: deque[str] = deque(maxlen=2 * NUM_SWITCHES_KEPT)  # ids of ended switches
        self._last_tick_s, self._start_s = 0.0, time.time()
        self._moved_bytes = 0
        self._decisions: Counter[tuple[str, str]] = Counter(
            {(action, reason): 0 for action in ("keep", "switch") for reason in REASONS}
        )
        self._vetoes = Counter(dict.fromkeys(VETO_RULES, 0))
        self._masked = Counter(dict.fromkeys((rule.name for rule in RULES), 0))
        self._ticks = Counter(dict.fromkeys(TickStatus, 0))
        self._outcomes = Counter(dict.fromkeys((p for p in SwitchPhase if p.is_terminal), 0))
        self.registry = CollectorRegistry()
        histograms = [m for m in METRICS if m.kind == "histogram"]
        self._histograms = {
            m.name: Histogram(m.name, m.meaning, m.labels, registry=self.registry, buckets=SECONDS)
            for m in histograms
        }
        self.registry.register(self)
        loop.listeners.append(self._observe)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    # ---------------------------------------------------------------- as ticks end

    def _observe(self) -> None:
        """Called by the loop whenever something changed, in the thread that changed it."""
        with self._lock:
            with self._loop.lock:
                steps, switches = self._loop.steps, list(self._loop.switches)
                record = self._loop.records[-1] if self._loop.records else None
            if record is not None and record.seq > self._seq:
                self._seq = record.seq
                self._take(record, steps)
            for ticket in switches:
                if ticket.ticket_id not in self._seen:
                    self._seen.append(ticket.ticket_id)
                    self._end(ticket)

    def _take(self, record: TickRecord, steps: tuple[tuple[str, float, float], ...]) -> None:
        self._last_tick_s = time.time()
        self._ticks[record.status] += 1
        self._histogram("tick_duration_seconds").observe(record.tick_s)
        for name, from_s, to_s in steps:
            self._histogram("step_duration_seconds", name).observe(to_s - from_s)
        for candidate in record.candidates:
            if candidate.mask_reason:
                self._masked[_rule(candidate.mask_reason)] += 1
        if record.status is TickStatus.DECIDED:
            is_keep = record.executed_key == record.candidates[KEEP].key
            self._decisions["keep" if is_keep else "switch", reason_of(record)] += 1
            self._vetoes.update(map(_rule, record.vetoes))

    def _end(self, ticket: SwitchTicket) -> None:
        self._outcomes[ticket.phase] += 1
        self._moved_bytes += ticket.moved_bytes
        self._histogram("switch_pause_seconds").observe(ticket.pause_s)
        for phase, duration_s in ticket.phase_s:
            self._histogram("switch_duration_seconds", phase).observe(duration_s)

    def _histogram(self, name: str, *labels: str) -> Histogram:
        found = self._histograms[METRIC[name].name]
        return found.labels(*labels) if labels else found

    # ---------------------------------------------------------------- at a scrape

    def collect(self) -> Iterable[Any]:
        """All families but the histograms (prometheus_client calls this)."""
        with self._lock:
            rows = dict(self._rows())
        for metric in METRICS:
            if metric.kind == "histogram":
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.meaning, labels=metric.labels)
            for labels, value in rows[metric.name]:
                family.add_metric(labels, value)
            yield family

    def _rows(self) -> Iterator[tuple[str, list[Row]]]:
        found = self._counted() | self._served()
        with self._loop.lock:
            found |= self._state() | self._traffic()
        for name, told in found.items():
            single: list[Row] = [] if isinstance(told, list) else [((), float(told))]
            yield METRIC[name].name, told if isinstance(told, list) else single

    def _counted(self) -> dict[str, list[Row] | float]:
        counters = self._loop.counters
        return {
            "decisions_total": [(labels, n) for labels, n in self._decisions.items()],
            "guardrail_vetoes_total": _by(self._vetoes),
            "guardrail_masked_total": _by(self._masked),
            "policy_fallback_total": counters.num_fallbacks,
            "ticks_total": _by(self._ticks),
            "ticks_late_total": counters.num_late,
            "last_tick_timestamp_seconds": self._last_tick_s,
            "start_timestamp_seconds": self._start_s,
            "switches_started_total": counters.num_switches_started,
            "switches_total": _by(self._outcomes),
            "switches_undone_total": counters.num_undone,
            "switches_timed_out_total": counters.num_timeouts,
            "migrated_bytes_total": self._moved_bytes,
            "engine_restarts_total": counters.num_restarts,
            "engine_events_lost_total": counters.num_events_lost,
            "engine_drifts_total": counters.num_drifts,
            "decision_log_lost_total": self._loop.log.num_lost,
        }

    def _served(self) -> dict[str, list[Row] | float]:
        gate, certificates = self._security.gate, self._security.certificates
        return {
            "control_calls_total": [(labels, n) for labels, n in gate.counted().items()],
            "control_streams": gate.num_streams,
            "audit_log_lost_total": gate.audit.num_lost,
            "access_reload_failures_total": gate.access.num_failed_reloads if gate.access else 0,
            "certificate_reloads_total": certificates.num_reloads if certificates else 0,
            "certificate_reload_failures_total": (
                certificates.num_failed_reloads if certificates else 0
            ),
        }

    def _state(self) -> dict[str, list[Row] | float]:
        loop, oversight = self._loop, self._loop.oversight
        at_s, snapshot, canary = loop.clock(), loop.snapshot, loop.trials.canary
        in_flight = snapshot is not None and snapshot.switch_in_flight
        return {
            "grid_seconds": loop.pipeline.config.grid_s,
            "switch_in_flight": in_flight,
            "mode": _one_of(loop.mode, Mode),
            "epoch": [] if snapshot is None else snapshot.epoch,
            "deployment_info": [] if snapshot is None else [((snapshot.deployment.key,), 1.0)],
            "policy_info": [((loop.active.name, loop.active.digest), 1.0)],
            "actor": _one_of(oversight.breaker.actor, Actor),
            "breaker": _one_of(oversight.breaker.state, BREAKER_STATES),
            "hold_remaining_seconds": [
                ((hold.rule,), hold.until_s - at_s) for hold in oversight.holds(at_s)
            ],
            "canary_evidence_ratio": (
                [] if canary is None else canary.evidence / canary.config.threshold
            ),
            "retraining_advised": loop.retraining.state.is_advised,
            "engine_available": loop.available,
        }

    def _traffic(self) -> dict[str, list[Row] | float]:
        """As the last tick saw it; nothing of a tick that saw nothing, so that an outage is a gap
        and no zero."""
        loop = self._loop
        record = loop.records[-1] if loop.records else None
        is_seen = record is not None and bool(record.candidates)
        rates = record.rates if record is not None else ()
        prepared = loop.prepared if is_seen else None
        errors = () if prepared is None else prepared.forecast.relative_error
        return {
            "observed_rate_per_second": [
                ((r.type,), r.actual_per_s) for r in rates if r.actual_per_s is not None
            ],
            "predicted_rate_per_second": [
                row
                for r in rates
                for row in (
                    ((r.type, "0.5"), r.forecast_p50_per_s),
                    ((r.type, "0.9"), r.forecast_p90_per_s),
                )
            ],
            "prediction_error_ratio": [
                ((r.type,), error) for r, error in zip(rates, errors, strict=False)
            ],
            "headroom_ratio": record.candidates[KEEP].headroom if record and is_seen else [],
            "requests_waiting": record.num_waiting if record and is_seen else [],
            "requests_running": record.num_running if record and is_seen else [],
        }


def reason_of(record: TickRecord) -> str:
    """Of `REASONS`: whose the decision was."""
    for prefix, reason in (
        ("undo:", "undo"),
        ("fallback:", "fallback"),
        ("breaker: rule", "rule"),
        ("breaker: safe", "safe"),
    ):
        if record.reason.startswith(prefix):
            return reason
    return "veto" if record.vetoes else "policy"


def _rule(reason: str) -> str:
    """A veto without its details, so that the number of series is bounded."""
    return reason.partition(":")[0]


def _by(counts: Counter[Any]) -> list[Row]:
    return [((str(name),), number) for name, number in counts.items()]


def _one_of(present: str, every: Iterable[str]) -> list[Row]:
    return [((str(name),), float(name == present)) for name in every]


def start_metrics_server(metrics: ControlMetrics, port: int) -> tuple[Any, int]:
    """Serves them over HTTP on loopback; returns the server, whose `shutdown` and `server_close`
    end it, and its port. Raises UnavailableError when the port cannot be bound."""
    try:
        server, _ = start_http_server(port, HOST, metrics.registry)
    except OSError as error:
        raise UnavailableError(
            f"port {port} on {HOST} cannot be bound: {error.strerror}; choose another with "
            "--metrics-port, or 0 for any."
        ) from error
    return server, server.server_port
