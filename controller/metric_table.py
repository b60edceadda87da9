"""Every Prometheus metric of the controller: name, kind, labels, meaning.

docs/metrics.md is held to it, and so are the dashboard and the alert rules in
configs/observability/.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "tidewright_"
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is as it is scraped; a histogram's has `_bucket`, `_sum` or `_count` behind it."""

    name: str
    kind: str  # counter, gauge or histogram
    meaning: str
    labels: tuple[str, ...] = ()


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"{PREFIX}{name}", "gauge", meaning, labels)


def _histogram(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"{PREFIX}{name}", "histogram", meaning, labels)


METRICS = (
    # what is decided
    _counter(
        "decisions",
        "decisions: `keep` or `switch`, and whose they were: `policy`, `rule` or `safe` (the "
        "breaker is open), `fallback`, `veto` (a guardrail) or `undo`",
        "action",
        "reason",
    ),
    _counter("guardrail_vetoes", "choices of the policy that a guardrail turned into keep", "rule"),
    _counter("guardrail_masked", "candidates that a guardrail took away before the choice", "rule"),
    _counter("policy_fallback", "decisions that the fall-back rule made for a failed policy"),
    _counter("ticks", "ticks of the loop, by how they ended", "status"),
    _counter("ticks_late", "grid points missed because a tick took too long"),
    _histogram("tick_duration_seconds", "length of a tick"),
    _histogram("step_duration_seconds", "length of one step of a tick", "step"),
    _gauge("last_tick_timestamp_seconds", "Unix time at which the last tick ended"),
    _gauge("grid_seconds", "seconds between two decisions"),
    # what is expected and what comes
    _gauge("observed_rate_per_second", "arrivals over the last interval", "type"),
    _gauge("predicted_rate_per_second", "forecast for the next interval", "type", "quantile"),
    _gauge(
        "prediction_error_ratio",
        "running mean of the forecast's absolute error over what came",
        "type",
    ),
    _gauge("headroom_ratio", "the multiple of the forecast that the present deployment carries"),
    _gauge("requests_waiting", "requests that wait in the engine"),
    _gauge("requests_running", "requests in the engine's batches"),
    # switches
    _counter("switches_started", "switches handed to the engine"),
    _counter("switches", "switches that ended: `done`, `rolled_back` or `cancelled`", "outcome"),
    _counter("switches_undone", "switches taken back because goodput fell"),
    _counter("switches_timed_out", "switches cancelled because they took too long"),
    _histogram("switch_duration_seconds", "length of a phase of a switch that ended", "phase"),
    _histogram("switch_pause_seconds", "how long the replicas that a switch changed stood still"),
    _counter("migrated_bytes", "bytes of weights and KV that switches moved between devices"),
    _gauge("switch_in_flight", "1 while a switch runs"),
    # the state
    _gauge("mode", "1 for the mode that the controller is in", "mode"),
    _gauge("epoch", "of the engine's deployment; rises with every switch"),
    _gauge("deployment_info", "1 for the present deployment", "deployment"),
    _gauge(
        "policy_info",
        "1 for the policy in charge, by the digest of its weights",
        *(
            "policy",
            "digest",
        ),
    ),
    _gauge("actor", "1 for whoever decides: `policy`, `rule` or `safe`", "actor"),
    _gauge("breaker", "1 for the circuit breaker's state", "state"),
    _gauge("hold_remaining_seconds", "what is left of a hold, by the rule behind it", "rule"),
    _gauge("canary_evidence_ratio", "e-value against the canary over the bound that ends it"),
    _gauge("retraining_advised", "1 when conditions are not those that the policy was trained for"),
    _gauge("start_timestamp_seconds", "Unix time at which the controller started"),
    # the engine, as it is seen
    _gauge("engine_available", "1 when the engine answered at the last tick"),
    _counter("engine_restarts", "restarts of the engine"),
    _counter("engine_events_lost", "events that the engine no longer had"),
    _counter("engine_drifts", "switches of the engine by somebody else"),
    # the service and its logs
    _counter("control_calls", "calls of the control API", "method", "code"),
    _gauge("control_streams", "streams of the control API that are open"),
    _counter("decision_log_lost", "records that could not be written to the decision log"),
    _counter("audit_log_lost", "records that could not be written to the audit log"),
    _counter("access_reload_failures", "times that the access file had changed and was unusable"),
    _counter("certificate_reloads", "times that a new certificate was read"),
    _counter("certificate_reload_failures", "times that a new certificate was unusable"),
)
METRIC = {metric.name.removeprefix(PREFIX): metric for metric in METRICS}
