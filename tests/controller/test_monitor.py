from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from controller.monitor import Monitor
from engine.cluster import (
    Arrival,
    ClusterEvent,
    ClusterSnapshot,
    EventKind,
    ParallelConfig,
    ReplicaStats,
    RequestOutcome,
    RequestStatus,
    Routing,
    WorkloadTyping,
    dense_deployment,
)


def _snapshot(now_s: float, **changes: object) -> ClusterSnapshot:
    stats = tuple(ReplicaStats(i, now_s, 3, 1, 200, 900, 100, 25 * (i + 1), 0, 0) for i in (0, 1))
    deployment = dense_deployment([ParallelConfig(2, 1)] * 2)
    snapshot = ClusterSnapshot(now_s, 0, deployment, Routing((0, 1)), stats, None)
    return replace(snapshot, **changes)  # type: ignore[arg-type]


def _arrival(at_s: float, prompt_tokens: int) -> ClusterEvent:
    return ClusterEvent(0, at_s, EventKind.ARRIVED, arrival=Arrival("r", at_s, prompt_tokens))


def _end(at_s: float, prompt: int, output: int, latency_s: float = 2.0) -> ClusterEvent:
    arrival_s = at_s - latency_s
    outcome = RequestOutcome(
        "r", RequestStatus.FINISHED, arrival_s, arrival_s + 0.5, at_s, prompt, output
    )
    return ClusterEvent(0, at_s, EventKind.ENDED, outcome=outcome)


def test_steady_arrivals_are_measured_at_every_scale(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, window_s=20.0, stale_after_s=5.0)
    monitor.reset(100.0)
    monitor.observe(_arrival(100.0 + (i + 0.5) / 4.0, 40) for i in range(240))
    totals = [sum(scale) for scale in monitor.state(_snapshot(160.0)).rates]
    assert totals == pytest.approx([4.0] * 3, rel=0.03)
    assert sum(monitor.take_interval(160.0)) == pytest.approx(4.0)
    assert sum(monitor.take_interval(175.0)) == 0.0


def test_rates_do_not_depend_on_how_events_are_batched(four_types: WorkloadTyping) -> None:
    events = [_arrival(i * 0.37, 30 + 17 * i) for i in range(100)]
    whole, parts = Monitor(four_types, 30.0, 5.0), Monitor(four_types, 30.0, 5.0)
    whole.observe(events)
    for event in events:
        parts.observe([event])
    one, other = whole.state(_snapshot(40.0)), parts.state(_snapshot(40.0))
    assert np.allclose(one.rates, other.rates)


def test_arrivals_count_with_the_posterior(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, 30.0, 5.0)
    monitor.observe([_arrival(1.0, 900)] * 10)
    assert monitor.take_interval(10.0) == pytest.approx(monitor.posterior.rows([900])[0])


def test_arrivals_count_as_their_client_has_it(four_types: WorkloadTyping) -> None:
    """Prompts of 50 tokens look like types 0 and 1; one client's turn out to be of type 1."""
    monitor = Monitor(four_types, 30.0, 5.0)
    outcome = RequestOutcome(
        "r", RequestStatus.FINISHED, 0.0, 0.5, 1.0, 50, 250, request_class="chat", client_id="ann"
    )
    monitor.observe([ClusterEvent(0, 1.0, EventKind.ENDED, outcome=outcome)] * 40)
    found: list[np.ndarray] = []
    for name, client in (("chat", "ann"), ("batch", "ann"), ("", "")):
        arrival = Arrival("r", 1.0, 50, name, client)
        monitor.observe([ClusterEvent(0, 1.0, EventKind.ARRIVED, arrival=arrival)])
        found.append(monitor.take_interval(2.0 + len(found)))
    by_prompt = monitor.posterior.rows([50])[0]
    assert found[0][1] / 0.5 > 0.98 > 0.96 > by_prompt[1]
    assert found[1] == pytest.approx(by_prompt)
    assert found[2] == pytest.approx(by_prompt)


def test_latencies_and_lengths_of_finished_requests(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, 30.0, 5.0)
    monitor.observe([_end(5.0, 40, 16, 2.0)] * 20)
    state = monitor.state(_snapshot(6.0))
    assert state.latency_s == pytest.approx(2.0)
    assert state.ttft_s == pytest.approx(0.5)
    assert state.tpot_s == pytest.approx(1.5 / 15)
    # 20 finished of 16 tokens against the centre of 20 with the weight of 20
    assert state.output_tokens[0] == pytest.approx(18.0, rel=0.02)
    assert state.output_tokens[1:] == pytest.approx((250.0, 40.0, 300.0))


def test_load_is_summed_over_replicas(four_types: WorkloadTyping) -> None:
    state = Monitor(four_types, 30.0, 5.0).state(_snapshot(6.0, num_queued_unrouted=2))
    assert (state.num_outstanding, state.num_waiting) == (10, 4)
    assert (state.waiting_prompt_tokens, state.running_context_tokens) == (400, 1800)
    assert (state.kv_usage_mean, state.kv_usage_max) == (0.375, 0.5)
    assert not state.is_stale


def test_unknown_is_not_zero(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, 30.0, 5.0)
    monitor.observe([_arrival(1.0, 40)] * 7)
    fresh = _snapshot(10.0)
    old = replace(fresh.replicas[0], measured_at_s=4.0)
    lost = replace(fresh.replicas[0], measured_at_s=math.nan)
    for replicas in ((), fresh.replicas[:1], (old, fresh.replicas[1]), (lost, fresh.replicas[1])):
        state = monitor.state(replace(fresh, replicas=replicas))
        assert state.is_stale
        assert state.num_outstanding == 7  # by its own count of events
    assert not monitor.state(fresh).is_stale


def test_a_hundred_events_are_cheap(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, 30.0, 5.0)
    events = [_arrival(i * 0.1, 50 + i) for i in range(60)] + [_end(6.0, 50, 60)] * 40
    took_s = []
    for _ in range(20):
        start_s = time.perf_counter()
        monitor.observe(events)
        took_s.append(time.perf_counter() - start_s)
    assert min(took_s) < 2e-3  # typically 0.3 ms; wide for busy machines


def test_mixes_of_the_last_hour_come_by_quarters(four_types: WorkloadTyping) -> None:
    monitor = Monitor(four_types, window_s=20.0, stale_after_s=5.0)
    monitor.reset(0.0)
    for at_s in (100.0, 1000.0, 1700.0, 3500.0):
        monitor.observe([_arrival(at_s, 40)])
        monitor.take_interval(at_s)
    for now_s, expected in ((3599.0, [1.0, 2.0, 1.0]), (4000.0, [2.0, 1.0]), (9000.0, [])):
        assert [sum(c) for c in monitor.recent_counts(now_s)] == pytest.approx(expected)
    monitor.reset(0.0)
    assert monitor.recent_counts(0.0) == ()
