"""Prometheus metrics under vLLM's names, so that its dashboards and autoscalers work unchanged.

Everything is computed when it is scraped: from the runtime's counters, from the requests that have
ended, and, per replica, from the present snapshot. Totals carry no replica label, so that replacing
a replica never resets them; what a replica does now carries its id and its configuration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from engine.cluster import RequestStatus
from engine.counters import LATENCY_BOUNDS_S, LENGTH_BOUNDS_TOKENS, TOKEN_BOUNDS_S, Histogram
from engine.live_request import EndedRequest
from engine.runtime import EngineRuntime

# As in vLLM, a request that the client gave up is an abort; refused ones were never requests.
FINISHED_REASONS = ("stop", "length", "abort", "error")


class EngineMetrics:
    """A collector over one runtime. Unregister nothing: it lives as long as the engine."""

    def __init__(self, runtime: EngineRuntime, model_name: str) -> None:
        self._runtime, self._labels = runtime, {"model_name": model_name}
        self._ended = Counter(dict.fromkeys(FINISHED_REASONS, 0))
        self._ttft = Histogram(LATENCY_BOUNDS_S)
        self._e2e = Histogram(LATENCY_BOUNDS_S)
        self._decode = Histogram(LATENCY_BOUNDS_S)
        self._tpot = Histogram(TOKEN_BOUNDS_S)
        self._prompt_tokens = Histogram(LENGTH_BOUNDS_TOKENS)
        self._output_tokens = Histogram(LENGTH_BOUNDS_TOKENS)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        runtime.requests.on_end.append(self._observe)

    def text(self) -> bytes:
        """The exposition format of `/metrics`."""
        return generate_latest(self.registry)

    def _observe(self, ended: EndedRequest) -> None:
        outcome = ended.outcome
        if outcome.status is RequestStatus.REJECTED:
            return
        self._ended[ended.finish_reason] += 1
        if outcome.ttft_s is not None:
            self._ttft.observe(outcome.ttft_s)
        if outcome.status is not RequestStatus.FINISHED:
            return
        self._e2e.observe(outcome.finish_s - outcome.arrival_s)
        self._prompt_tokens.observe(outcome.prompt_tokens)
        self._output_tokens.observe(outcome.output_tokens)
        if outcome.first_token_s is not None:
            self._decode.observe(outcome.finish_s - outcome.first_token_s)
        if outcome.tpot_s is not None:
            self._tpot.observe(outcome.tpot_s)

    # ---------------------------------------------------------------- at a scrape

    def collect(self) -> Iterable[Metric]:
        """All families (prometheus_client calls this)."""
        yield from self._totals()
        yield from self._histograms()
        yield from self._replicas()

    def _totals(self) -> Iterable[Metric]:
        counters, counts = self._runtime.requests.counters, self._runtime.requests.counts
        workers = self._runtime.workers
        for name, value, text in (
            ("vllm:prompt_tokens", counters.prompt_tokens, "Prompt tokens computed."),
            ("vllm:generation_tokens", counters.generation_tokens, "Tokens generated."),
            ("vllm:num_preemptions", counters.num_preemptions, "Preemptions."),
            (
                "vllm:prefix_cache_queries",
                counters.prefix_cache_queries,
                "Prompt tokens looked up in the prefix cache.",
            ),
            (
                "vllm:prefix_cache_hits",
                counters.prefix_cache_hits,
                "Prompt tokens found in the prefix cache.",
            ),
            ("tidewright:requests_arrived", counts["arrived"], "Requests, also refused ones."),
            ("tidewright:requests_rejected", counts["rejected"], "Requests refused on arrival."),
            ("tidewright:workers_lost", workers.num_lost, "Workers that died or fell silent."),
            ("tidewright:workers_restarted", workers.num_restarted, "Of these, replaced ones."),
        ):
            family = CounterMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family
        ended = CounterMetricFamily(
            "vllm:request_success",
            "Requests by how they ended.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in self._ended.items():
            ended.add_metric([*self._labels.values(), reason], count)
        yield ended

    def _histograms(self) -> Iterable[Metric]:
        counters = self._runtime.requests.counters
        for name, histogram, text in (
            ("time_to_first_token_seconds", self._ttft, "Arrival to first token."),
            ("inter_token_latency_seconds", counters.inter_token_s, "Between two tokens."),
            ("request_time_per_output_token_seconds", self._tpot, "Mean of a request."),
            ("e2e_request_latency_seconds", self._e2e, "Arrival to last token."),
            ("request_decode_time_seconds", self._decode, "First token to last token."),
            ("request_prompt_tokens", self._prompt_tokens, "Prompt tokens of a request."),
            ("request_generation_tokens", self._output_tokens, "Tokens made for a request."),
        ):
            yield self._histogram(name, histogram, text)
        if counters.queue_s.counts != Histogram(LATENCY_BOUNDS_S).counts:  # leaders measure it
            yield self._histogram(
                "request_queue_time_seconds", counters.queue_s, "Arrival to first step."
            )
            yield self._histogram(
                "request_prefill_time_seconds", counters.prefill_s, "First step to first token."
            )

    def _histogram(self, name: str, histogram: Histogram, text: str) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.sum)
        return family

    def _replicas(self) -> Iterable[Metric]:
        snapshot = self._runtime.snapshot()
        labels = [*self._labels, "replica", "parallel"]
        running, waiting, usage, tokens = (
            kind(name, text, labels=labels)
            for kind, name, text in (
                (GaugeMetricFamily, "vllm:num_requests_running", "Requests in the batch."),
                (GaugeMetricFamily, "vllm:num_requests_waiting", "Requests that wait."),
                (GaugeMetricFamily, "vllm:kv_cache_usage_perc", "Used KV blocks; 1 is all."),
                (
                    CounterMetricFamily,
                    "tidewright:replica_generation_tokens",
                    "Tokens generated by a replica.",
                ),
            )
        )
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "KV cache of each replica.",
            labels=[*labels, "block_size", "num_gpu_blocks"],
        )
        for stats in snapshot.replicas:
            parallel = snapshot.deployment.replica(stats.replica_id).parallel
            key = [*self._labels.values(), str(stats.replica_id), parallel.key]
            running.add_metric(key, stats.num_running)
            waiting.add_metric(key, stats.num_waiting)
            usage.add_metric(key, stats.kv_blocks_used / max(stats.kv_blocks_total, 1))
            tokens.add_metric(key, stats.generated_tokens_total)
            blocks = [str(self._runtime.spec.block_size), str(stats.kv_blocks_total)]
            config.add_metric([*key, *blocks], 1)
        yield from (running, waiting, usage, tokens, config)
        yield self._gauge("tidewright:requests_held", snapshot.num_queued_unrouted, self._labels)
        yield self._gauge("tidewright:deployment_epoch", snapshot.epoch, self._labels)
        yield self._gauge("tidewright:workers_dead", len(snapshot.dead_devices), self._labels)

    def _gauge(self, name: str, value: float, labels: Mapping[str, str]) -> Metric:
        texts = {
            "tidewright:requests_held": "Requests that wait for a replica, as in a switch.",
            "tidewright:workers_dead": "Devices without a worker at present.",
            "tidewright:deployment_epoch": "Rises by one whenever the deployment changes.",
        }
        family = GaugeMetricFamily(name, texts[name], labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
