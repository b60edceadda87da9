"""Metrics, logs and traces of real requests, read as their consumers read them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from engine.cluster import (
    KvCostParams,
    RequestOutcome,
    RequestStatus,
    SwitchPhase,
    parse_deployment_key,
)
from engine.facade import EngineCluster
from engine.live_request import EndedRequest
from engine.logs import JsonFormatter, RequestLog
from engine.metrics import EngineMetrics
from engine.migration.plan import plan_switch
from engine.request import SamplingParams
from engine.tracing import start_tracing

PARAMS = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def engine(open_engine: Any) -> Iterator[EngineCluster]:
    with open_engine("2xtp1pp1") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def metrics(engine: EngineCluster) -> EngineMetrics:
    return engine.on_loop(lambda: EngineMetrics(engine.runtime, "m"))


def scrape(engine: EngineCluster, metrics: EngineMetrics) -> dict[str, float]:
    """name{sorted labels} -> value; labels without model_name, which every sample must have."""
    found = {}
    for family in text_string_to_metric_families(engine.on_loop(metrics.text).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m", sample
            text = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            found[f"{sample.name}{{{text}}}" if text else sample.name] = sample.value
    return found


async def run(
    engine: EngineCluster, name: str, params: SamplingParams = PARAMS, **more: Any
) -> None:
    async for _ in engine.runtime.generate(name, [5, 6, 7], params, **more):
        continue


# -------------------------------------------------------------------------------- metrics


def test_every_name_is_vllms(engine: EngineCluster, metrics: EngineMetrics) -> None:
    engine.run(run(engine, "names"))
    found = {key.split("{")[0] for key in scrape(engine, metrics)}
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total",
        "generation_tokens_total", "request_success_total", "num_preemptions_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_sum", "e2e_request_latency_seconds_count",
        "request_decode_time_seconds_bucket", "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket", "cache_config_info",
        "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket",
    ):  # fmt: skip
        assert f"vllm:{name}" in found


def test_figures_of_finished_and_abandoned_requests(
    engine: EngineCluster, metrics: EngineMetrics
) -> None:
    before = scrape(engine, metrics)

    async def abandon() -> None:
        stream = engine.runtime.generate("left", [1, 2], PARAMS)
        await anext(stream)
        stream.cancel()

    engine.run(run(engine, "done"))
    engine.run(abandon())
    after = scrape(engine, metrics)

    def grown(key: str) -> float:
        return after[key] - before[key]

    assert grown("vllm:request_success_total{finished_reason=length}") == 1
    assert grown("vllm:request_success_total{finished_reason=abort}") == 1
    assert grown("vllm:prompt_tokens_total") == 5
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert grown("vllm:request_generation_tokens_sum") == 10
    assert grown("vllm:request_prompt_tokens_bucket{le=2.0}") == 0
    assert grown("vllm:request_prompt_tokens_bucket{le=5.0}") == 1
    assert grown("vllm:inter_token_latency_seconds_count") >= 9
    assert grown("vllm:generation_tokens_total") >= 11


def test_token_counters_grow_while_a_request_runs(
    engine: EngineCluster, metrics: EngineMetrics
) -> None:
    async def watch() -> list[float]:
        seen = []
        async for _ in engine.runtime.generate("watched", [9, 9], PARAMS):
            text = metrics.text().decode()
            line = next(x for x in text.splitlines() if x.startswith("vllm:generation_tokens_t"))
            seen.append(float(line.split()[-1]))
        return seen

    seen = engine.run(watch())
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]


def test_a_switch_resets_no_counter(engine: EngineCluster, metrics: EngineMetrics) -> None:
    engine.run(run(engine, "before the switch"))
    before = scrape(engine, metrics)
    runtime = engine.runtime
    target = parse_deployment_key("1xtp2pp1")
    kv = KvCostParams(1e9, 1e3, 0.01)

    def apply() -> str:
        plan = plan_switch(runtime.spec, runtime.deployment, runtime.epoch, target, kv)
        return runtime.apply(plan).ticket_id

    ticket = engine.run(runtime.ended(engine.on_loop(apply)), 60)
    assert ticket.phase is SwitchPhase.DONE, ticket.reason
    engine.run(run(engine, "after the switch"))
    after = scrape(engine, metrics)
    totals = [k for k in before if k.split("{")[0].endswith(("_total", "_count", "_bucket"))]
    for key in totals:
        if "replica=" not in key:
            assert after[key] >= before[key], key
    assert after["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"] + 10
    replicas = [k for k in after if k.startswith("vllm:num_requests_running")]
    assert len(replicas) == 1
    assert "parallel=tp2pp1" in replicas[0]


# -------------------------------------------------------------------------------- logs


def ended_request() -> EndedRequest:
    outcome = RequestOutcome("id-1", RequestStatus.FINISHED, 1.0, 1.5, 3.5, 7, 5, replica_id=2)
    return EndedRequest(outcome, "stop", PARAMS, num_cached_tokens=4)


@pytest.mark.parametrize(("log_format", "level"), [("json", "INFO"), ("text", "DEBUG")])
def test_a_request_is_one_line(
    caplog: pytest.LogCaptureFixture, log_format: str, level: str
) -> None:
    with caplog.at_level(logging.DEBUG, "engine.requests"):
        RequestLog(log_format)(ended_request())
    (record,) = caplog.records
    assert record.levelname == level
    line = json.loads(JsonFormatter().format(record))
    wanted = {
        "request_id": "id-1", "finish_reason": "stop", "replica": 2, "prompt_tokens": 7,
        "output_tokens": 5, "cached_tokens": 4, "ttft_s": 0.5, "tpot_s": 0.5, "latency_s": 2.5,
    }  # fmt: skip
    assert {k: line[k] for k in wanted} == wanted


def test_exceptions_stay_on_their_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed %d", (7,), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["message"], line["level"]) == ("failed 7", "error")
    assert "ValueError: broken" in line["exception"]


# -------------------------------------------------------------------------------- traces


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.got_some = threading.Event()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.got_some.set()
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    found = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield found, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(v) for v in value.array_value.values]
    return getattr(value, kind)


def test_one_span_per_request_under_the_callers_trace(
    engine: EngineCluster, receiver: tuple[Receiver, str]
) -> None:
    found, endpoint = receiver
    tracing = engine.on_loop(lambda: start_tracing(engine.runtime, endpoint, "m"))
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    engine.run(run(engine, "traced", trace_headers=headers))
    tracing.close()
    assert found.got_some.wait(10)
    (span,) = found.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    attributes = {a.key: plain(a.value) for a in span.attributes}
    assert attributes["gen_ai.usage.input_tokens"] == 3
    assert attributes["gen_ai.usage.output_tokens"] == 10
    assert attributes["gen_ai.request.model"] == "m"
    assert attributes["gen_ai.response.id"] == "traced"
    assert attributes["gen_ai.response.finish_reasons"] == ["length"]
    duration_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert duration_s == pytest.approx(attributes["gen_ai.server.request.duration"], abs=1e-4)
    assert [event.name for event in span.events] == ["first token"]
    engine.runtime.requests.on_end.remove(tracing._record)


def test_without_the_package_the_option_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.exporter'] = None\n"
        "from engine.tracing import start_tracing\n"
        "from engine.errors import InvalidRequestError\n"
        "try: start_tracing(None, 'http://x', 'm')\n"
        "except InvalidRequestError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "tidewright[otel]" in done.stdout, done.stderr


def test_the_engine_loads_no_tracing_unless_asked() -> None:
    code = "import sys, engine.app; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
