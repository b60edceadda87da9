"""Metrics of the controller: numbers that a scrape must show, from ticks that the test steps."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import GRID_S, Served

from controller.access import AccessFile, issue_token
from controller.gate import Gate
from controller.metric_table import METRICS
from controller.metrics import ControlMetrics, start_metrics_server
from controller.records import Mode
from controller.security import Security
from engine.errors import UnavailableError
from engine.profile import ProfiledCluster
from policies.base import Observation
from protos import control_pb2 as pb

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Wants:
    """Probability 1 on one row, legal or not; or an exception."""

    def __init__(self, row: int) -> None:
        self.name, self._row = "wants", row

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> np.ndarray:
        if self._row < 0:
            raise RuntimeError("made to fail")
        return np.eye(len(observation.mask))[self._row]


def read(metrics: ControlMetrics) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"tidewright_{name}", tuple(sorted(labels.items()))]


@pytest.fixture
def served(synthetic_cluster: ProfiledCluster, tmp_path: Path) -> Iterator[Served]:
    issue_token(tmp_path / "access", "alice", "admin")
    found = Served(synthetic_cluster)
    try:
        yield found
    finally:
        found.close()


def test_decisions_rates_and_the_state_are_those_of_the_records(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    for _ in range(4):
        served.step(20)
    record, found = served.loop.records[-1], read(metrics)
    assert value(found, "ticks_total", status="decided") == 4
    assert value(found, "decisions_total", action="keep", reason="policy") == 4
    assert value(found, "tick_duration_seconds_count") == 4
    spent = sum(r.tick_s for r in served.loop.records)
    assert value(found, "tick_duration_seconds_sum") == pytest.approx(spent)
    for rate in record.rates:
        assert value(found, "observed_rate_per_second", type=rate.type) == rate.actual_per_s
        told = value(found, "predicted_rate_per_second", type=rate.type, quantile="0.9")
        assert told == rate.forecast_p90_per_s
    assert value(found, "observed_rate_per_second", type="short") == pytest.approx(4.0, rel=0.1)
    assert value(found, "prediction_error_ratio", type="short") < 0.1
    assert value(found, "headroom_ratio") == record.candidates[0].headroom
    assert (value(found, "mode", mode="active"), value(found, "mode", mode="off")) == (1, 0)
    assert (value(found, "epoch"), value(found, "grid_seconds")) == (0, GRID_S)
    assert value(found, "deployment_info", deployment="4xtp1pp1") == 1
    assert value(found, "engine_available") == 1


def test_the_steps_of_a_tick_add_up_to_it(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    for _ in range(3):
        served.step(20)
    found = read(metrics)
    steps = [v for (name, _), v in found.items() if name == "tidewright_step_duration_seconds_sum"]
    assert len(steps) >= 11
    assert sum(steps) == pytest.approx(value(found, "tick_duration_seconds_sum"), rel=0.2)


def test_an_outage_is_a_gap_and_no_zero(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    served.step(20)
    served.cluster.is_gone = True
    served.loop.tick()
    found = read(metrics)
    assert value(found, "ticks_total", status="unavailable") == 1
    assert value(found, "engine_available") == 0
    gone = {"observed_rate_per_second", "headroom_ratio", "requests_running"}
    assert not [n for n, _ in found if n.removeprefix("tidewright_") in gone]
    assert value(found, "epoch") == 0  # is known still


def test_vetoes_masks_and_fallbacks_are_counted_by_rule(served: Served) -> None:
    metrics, loop = ControlMetrics(served.loop), served.loop
    served.operations.hold(600.0, "x")
    served.step(20)
    found = read(metrics)
    num_masked = len(loop.records[-1].candidates) - 1
    assert value(found, "guardrail_masked_total", rule="hold") == num_masked > 0
    assert 0 < value(found, "hold_remaining_seconds", rule="hold") <= 600
    loop.policy_server.policy = Wants(-1)
    served.step(20)
    loop.policy_server.policy = Wants(1)  # masked: no distribution over legal rows
    served.step(20)
    found = read(metrics)
    assert value(found, "policy_fallback_total") == 2
    assert value(found, "decisions_total", action="keep", reason="fallback") == 2


def test_a_switch_leaves_its_phases_bytes_and_outcome(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    served.step(20)
    proposal = served.operations.propose("2xtp2pp1", dry_run=False)
    assert proposal.ticket is not None
    for _ in range(3):
        served.step(20)
    (ticket,) = served.loop.switches
    found = read(metrics)
    assert value(found, "switches_started_total") == 1
    assert value(found, "switches_total", outcome="done") == 1
    assert value(found, "migrated_bytes_total") == ticket.moved_bytes > 0
    for phase, duration_s in ticket.phase_s:
        assert value(found, "switch_duration_seconds_count", phase=phase) == 1
        assert value(found, "switch_duration_seconds_sum", phase=phase) == duration_s
    assert dict(ticket.phase_s).keys() >= {"prepare", "transfer"}
    assert (value(found, "epoch"), value(found, "switch_in_flight")) == (1, 0)


def test_a_switch_that_the_policy_wants_is_one_of_its_decisions(served: Served) -> None:
    metrics, loop = ControlMetrics(served.loop), served.loop
    served.step(20)
    served.step(20)
    legal = [i for i, c in enumerate(loop.records[-1].candidates) if c.legal and i]
    loop.policy_server.policy = Wants(legal[0])
    served.step(20)
    assert loop.records[-1].ticket is not None
    assert value(read(metrics), "decisions_total", action="switch", reason="policy") == 1
    loop.mode = Mode.OFF
    served.step(20)
    assert value(read(metrics), "ticks_total", status="observed") == 1


def test_calls_are_counted_by_method_and_status(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    issue_token(tmp_path / "access", "alice", "admin")
    security = Security(Gate(AccessFile(tmp_path / "access")))
    served = Served(synthetic_cluster, security=security)
    try:
        metrics = ControlMetrics(served.loop, security)
        with pytest.raises(Exception, match="no token"):
            served.stub.GetState(pb.GetStateRequest(), timeout=10)
        found = read(metrics)
        assert value(found, "control_calls_total", method="GetState", code="UNAUTHENTICATED") == 1
        (tmp_path / "access").write_text("spoilt")
        with pytest.raises(Exception, match="no token"):
            served.stub.GetState(pb.GetStateRequest(), timeout=10)
        assert value(read(metrics), "access_reload_failures_total") == 1
    finally:
        served.close()


def test_what_is_scraped_is_what_the_table_says(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    told = {
        (metric.name, metric.type): metric.documentation for metric in metrics.registry.collect()
    }
    expected = {
        (m.name.removesuffix("_total") if m.kind == "counter" else m.name, m.kind): m.meaning
        for m in METRICS
    }
    assert told == expected
    assert all(name.startswith("tidewright_") for name, _ in told)


def test_docs_metrics_is_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [
        (m.name, m.kind, ", ".join(f"`{label}`" for label in m.labels), m.meaning) for m in METRICS
    ]


def test_they_are_served_on_loopback(served: Served) -> None:
    metrics = ControlMetrics(served.loop)
    server, port = start_metrics_server(metrics, 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        assert "tidewright_ticks_total" in text
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(UnavailableError, match="--metrics-port"):
            start_metrics_server(metrics, port)
    finally:
        server.shutdown()
        server.server_close()
