"""OpenTelemetry: one span per request, with the semantic attributes for generative AI.

The packages are optional (extra `otel`) and imported only when an endpoint is given.
"""

from __future__ import annotations

import time
from typing import Any

from engine.cluster import RequestStatus
from engine.live_request import EndedRequest
from engine.otlp import open_exporter
from engine.runtime import EngineRuntime

FLUSH_TIMEOUT_MS = 2000


class Tracing:
    """Owns the exporter's thread. A span is made when its request has ended, with its true times;
    its parent is the caller's `traceparent`."""

    def __init__(self, runtime: EngineRuntime, provider: Any, model_name: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._runtime, self._provider, self._model_name = runtime, provider, model_name
        self._tracer = provider.get_tracer("tidewright.engine")
        self._propagator = TraceContextTextMapPropagator()
        runtime.requests.on_end.append(self._record)

    def _record(self, ended: EndedRequest) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        outcome = ended.outcome
        clock_ns = time.time_ns() - round(self._runtime.now_s() * 1e9)  # of the cluster's zero
        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(dict(ended.trace_headers)),
            kind=SpanKind.SERVER,
            attributes=self._attributes(ended),
            start_time=clock_ns + round(outcome.arrival_s * 1e9),
        )
        if outcome.first_token_s is not None:
            span.add_event("first token", timestamp=clock_ns + round(outcome.first_token_s * 1e9))
        if outcome.status in (RequestStatus.FAILED, RequestStatus.REJECTED):
            span.set_status(Status(StatusCode.ERROR, ended.finish_reason))
        span.end(end_time=clock_ns + round(outcome.finish_s * 1e9))

    def _attributes(self, ended: EndedRequest) -> dict[str, Any]:
        outcome, params = ended.outcome, ended.params
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "tidewright",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": outcome.request_id,
            "gen_ai.response.finish_reasons": (ended.finish_reason,),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "gen_ai.server.time_to_first_token": outcome.ttft_s,
            "gen_ai.server.time_per_output_token": outcome.tpot_s,
            "gen_ai.server.request.duration": outcome.finish_s - outcome.arrival_s,
            "tidewright.replica": outcome.replica_id,
            "tidewright.cached_tokens": ended.num_cached_tokens,
            "tidewright.preemptions": outcome.num_preemptions,
            "tidewright.moves": outcome.num_moves,
            "tidewright.longest_gap": outcome.longest_gap_s,
        }
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """Send what is left, for a moment. Blocks; call it off the event loop."""
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def start_tracing(runtime: EngineRuntime, endpoint: str, model_name: str) -> Tracing:
    """Export spans to an OTLP gRPC endpoint such as http://localhost:4317.

    Raises InvalidRequestError when the packages are missing.
    """
    return Tracing(runtime, open_exporter(endpoint, "tidewright"), model_name)
