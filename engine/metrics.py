"""Prometheus metrics under vLLM's names, so that its dashboards and autoscalers work unchanged."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.cluster import ClusterEvent, RequestOutcome, RequestStatus
from engine.runtime import EngineRuntime

LATENCY_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
)  # fmt: skip


class EngineMetrics:
    """Counters from request outcomes as they come, gauges from a snapshot at each scrape."""

    def __init__(self, runtime: EngineRuntime, model_name: str) -> None:
        self._runtime, self._model_name = runtime, model_name
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._output_tokens = self._counter("generation_tokens", "Tokens of ended requests.")
        self._ended = Counter(
            "vllm:request_success",
            "Requests by how they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Time to first token.")
        self._tpot = self._histogram("request_time_per_output_token_seconds", "Time per token.")
        self._latency = self._histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self.registry.register(self)
        runtime.requests.on_end.append(lambda ended: self._observe(ended.outcome))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name"], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"vllm:{name}",
            text,
            ["model_name"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def _on_event(self, event: ClusterEvent) -> None:
        if event.outcome is not None:
            self._observe(event.outcome)

    def _observe(self, outcome: RequestOutcome) -> None:
        name = self._model_name
        self._ended.labels(name, outcome.status.value).inc()
        self._prompt_tokens.labels(name).inc(outcome.prompt_tokens)
        self._output_tokens.labels(name).inc(outcome.output_tokens)
        if outcome.status is not RequestStatus.FINISHED:
            return
        self._latency.labels(name).observe(outcome.finish_s - outcome.arrival_s)
        if outcome.ttft_s is not None:
            self._ttft.labels(name).observe(outcome.ttft_s)
        if outcome.tpot_s is not None:
            self._tpot.labels(name).observe(outcome.tpot_s)

    def collect(self) -> Iterable[Metric]:
        """Per-replica gauges of the present deployment (prometheus_client calls this)."""
        labels = ["model_name", "replica"]
        running = GaugeMetricFamily("vllm:num_requests_running", "Running requests.", labels=labels)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Waiting requests.", labels=labels)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Used share of KV.", labels=labels)
        preempted = CounterMetricFamily("vllm:num_preemptions", "Preemptions.", labels=labels)
        for stats in self._runtime.snapshot().replicas:
            key = [self._model_name, str(stats.replica_id)]
            running.add_metric(key, stats.num_running)
            waiting.add_metric(key, stats.num_waiting)
            usage.add_metric(key, stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
            preempted.add_metric(key, stats.num_preemptions_total)
        return [running, waiting, usage, preempted]

    def text(self) -> bytes:
        """The exposition format of `/metrics`."""
        return generate_latest(self.registry)
