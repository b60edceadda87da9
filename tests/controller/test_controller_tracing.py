"""Spans of a decision, from the metrics that it reads to the last phase of its switch."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import Served
from test_controller_metrics import Wants

from controller.tracing import DecisionTracing
from engine.profile import ProfiledCluster

ROOT = Path(__file__).parents[2]
STEPS = ["snapshot", "observe", "monitor", "forecast", "propose", "admit", "prepare", "act"]
AFTER = ["review", "plan", "resolve", "log", "apply", "shadows"]


@pytest.fixture
def served(synthetic_cluster: ProfiledCluster) -> Iterator[Served]:
    found = Served(synthetic_cluster)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def spans(served: Served) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = DecisionTracing(served.loop, provider)
    yield exporter
    tracing.close()


def roots(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return [s for s in spans.get_finished_spans() if s.parent is None]


def children(spans: InMemorySpanExporter, root: ReadableSpan) -> list[Any]:
    found = [
        s
        for s in spans.get_finished_spans()
        if s.parent is not None and s.parent.span_id == root.context.span_id
    ]
    return sorted(found, key=lambda s: s.start_time)


def test_a_tick_is_one_trace_of_its_steps_in_order(
    served: Served, spans: InMemorySpanExporter
) -> None:
    before_ns = time.time_ns()
    served.step(20)
    after_ns = time.time_ns()
    (root,) = roots(spans)
    steps = children(spans, root)
    assert root.name == "decision"
    assert [s.name for s in steps] == [*STEPS, *(n for n in AFTER if n != "plan")]
    for one, following in itertools.pairwise(steps):
        assert one.end_time == following.start_time
    slack_ns = 5_000_000  # between two readings of two clocks
    assert before_ns - slack_ns <= root.start_time <= root.end_time <= after_ns + slack_ns
    assert (steps[0].start_time, steps[-1].end_time) == (root.start_time, root.end_time)
    record = served.loop.records[-1]
    assert root.attributes["tidewright.decision"] == record.decision_id
    assert root.attributes["tidewright.executed"] == record.executed_key


def test_a_switch_is_in_the_trace_of_the_decision_that_began_it(
    served: Served, spans: InMemorySpanExporter
) -> None:
    served.step(20)
    served.step(20)
    candidates = served.loop.records[-1].candidates
    served.loop.policy_server.policy = Wants(
        next(i for i, c in enumerate(candidates) if c.legal and i)
    )
    served.step(20)
    record = served.loop.records[-1]
    served.loop.policy_server.policy = Wants(0)
    while not served.loop.switches:
        served.step(20)
    (switch,) = [s for s in spans.get_finished_spans() if s.name == "switch"]
    (decision,) = [r for r in roots(spans) if r.attributes["tidewright.seq"] == record.seq]
    assert "plan" in [s.name for s in children(spans, decision)]
    assert switch.parent.span_id == decision.context.span_id
    assert switch.context.trace_id == decision.context.trace_id
    assert switch.attributes["tidewright.outcome"] == "done"
    (ticket,) = served.loop.switches
    assert [s.name for s in children(spans, switch)] == [phase for phase, _ in ticket.phase_s]
    assert len(ticket.phase_s) >= 2
    assert switch.end_time - switch.start_time == pytest.approx(1e9 * ticket.duration_s, abs=1e3)


def test_a_switch_by_hand_has_a_trace_of_its_own(
    served: Served, spans: InMemorySpanExporter
) -> None:
    served.step(20)
    assert served.operations.propose("2xtp2pp1", dry_run=False).ticket is not None
    while not served.loop.switches:
        served.step(20)
    (switch,) = [s for s in spans.get_finished_spans() if s.name == "switch"]
    assert switch.parent is None


def test_a_tick_without_an_engine_is_an_error(served: Served, spans: InMemorySpanExporter) -> None:
    served.cluster.is_gone = True
    served.loop.tick()
    (root,) = roots(spans)
    assert (root.name, root.status.status_code.name) == ("tick", "ERROR")
    assert root.end_time >= root.start_time


def test_the_packages_are_imported_nowhere_but_in_functions() -> None:
    for path in sorted((ROOT / "controller").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", ())]
            found = [*names, getattr(node, "module", "") or ""]
            assert not [n for n in found if n.startswith("opentelemetry")], path


def test_without_the_packages_an_endpoint_is_refused_in_one_sentence() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry.sdk.trace'] = None\n"
        "from controller.tracing import start_tracing\n"
        "from engine.errors import InvalidRequestError\n"
        "try: start_tracing(None, 'http://localhost:4317')\n"
        "except InvalidRequestError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert "pip install 'tidewright[otel]'" in done.stdout, done.stderr
