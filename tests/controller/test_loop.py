"""The control loop when the engine is restarted or refuses, and what it logs for evaluation."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from steered import INITIAL, Even, build_loop, close, drive, start

from controller.decision_log import read_log
from controller.log_records import REQUEST_FIELDS
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.records import Mode, TickStatus
from engine.cluster import Cluster, ClusterSnapshot, EventBatch, Routing, SwitchPlan, SwitchTicket
from engine.errors import StaleEpochError, UnavailableError
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Policy, choose
from policies.baselines import KeepPolicy

MakeLoop = Callable[..., ControlLoop]


@pytest.fixture
def make_loop(synthetic_cluster: ProfiledCluster) -> Iterator[MakeLoop]:
    made: list[ControlLoop] = []

    def build(cluster: Cluster, policy: Policy, log: Path | None = None) -> ControlLoop:
        made.append(build_loop(synthetic_cluster, cluster, policy, log))
        return made[-1]

    yield build
    for loop in made:
        close(loop)


class Refusing(SurrogateCluster):
    """Another controller was quicker: plans and routings are always stale."""

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        raise StaleEpochError("epoch 1 is over")

    def set_routing(self, routing: Routing) -> None:
        raise StaleEpochError("epoch 1 is over")


class LosesEvents(SurrogateCluster):
    """Answers snapshots, but the event call fails once."""

    num_failures = 0

    def events(self, cursor: int) -> EventBatch:
        if self.num_failures:
            self.num_failures -= 1
            raise UnavailableError("no answer in 5 s")
        return super().events(cursor)


class Unreadable(SurrogateCluster):
    """Its snapshot is not what was agreed."""

    def snapshot(self) -> ClusterSnapshot:
        return replace(super().snapshot(), deployment=None)  # type: ignore[arg-type]


def test_the_log_has_every_request_once_and_the_propensity_of_what_ran(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, Even(), tmp_path / "log")
    drive(cluster, loop, 12)
    loop.log.close()
    contents = read_log(tmp_path / "log")
    assert contents.skipped == ()
    by_kind = Counter(r["record"] for r in contents.records)
    assert (by_kind["interval"], by_kind["decision"]) == (12, 12)

    intervals = [r for r in contents.records if r["record"] == "interval"]
    assert sum(len(r["arrivals"]) for r in intervals) == 120
    rows = [dict(zip(REQUEST_FIELDS, q, strict=True)) for r in intervals for q in r["requests"]]
    ids = [q["request_id"] for q in rows]
    assert len(ids) == len(set(ids)) == cluster.snapshot().num_finished
    assert [r["from_s"] for r in intervals[1:]] == [r["to_s"] for r in intervals[:-1]]

    decisions = [r for r in contents.records if r["record"] == "decision"]
    for record in decisions:  # the guard map applied by hand
        probabilities, reasons = record["probabilities"], record["mask_reasons"]
        keys = [c["key"] for c in record["candidates"]]
        executed = [row if not reasons[row] else 0 for row in range(len(keys))]
        ran = executed[record["action"]]
        mass = sum(p for p, row in zip(probabilities, executed, strict=False) if row == ran)
        assert record["propensity"] == pytest.approx(mass)
        assert record["executed_key"] == keys[ran]
        assert record["guard_map"][: len(keys)] == executed
        rng = np.random.default_rng(record["seeds"])  # the draw, repeated
        assert choose(np.array(probabilities), rng, deterministic=False) == record["action"]
        assert record["snapshot"]["deployment"]["replicas"]
        assert record["decision_s"] > 0
    assert len({tuple(r["seeds"]) for r in decisions}) == 12
    assert any(0 < r["propensity"] < 1 for r in decisions)
    known = {r["decision_id"] for r in decisions}
    outcomes = [r for r in contents.records if r["record"] == "outcome"]
    assert outcomes
    started = [r for r in contents.records if r["record"] == "switch"]
    assert {r["event"] for r in started} == {"started"}
    assert {r["decision_id"] for r in started} == {r["decision_id"] for r in decisions if r["plan"]}
    assert {r["ticket"]["decision_id"] for r in outcomes} <= known


@pytest.mark.parametrize("kind", ["earlier", "later"])
def test_a_restart_is_noticed_even_when_the_clock_did_not_go_back(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, kind: str
) -> None:
    first = start(synthetic_cluster)
    loop = make_loop(first, KeepPolicy())
    drive(first, loop, 2)
    second = start(synthetic_cluster, "2xtp2pp1")
    second.advance(3.0 if kind == "earlier" else 30.0)
    loop.cluster = second
    drive(second, loop, 1, per_tick=4)
    record = loop.records[-1]
    assert (record.status, record.deployment_key) == (TickStatus.DECIDED, "2xtp2pp1")
    assert loop.counters.num_restarts == 1
    assert loop.counters.num_events_lost == 0
    drive(second, loop, 1)
    assert loop.counters.num_restarts == 1


def test_refusals_are_counted_and_the_loop_goes_on(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    cluster = Refusing(synthetic_cluster, INITIAL)
    loop = make_loop(cluster, Even())
    drive(cluster, loop, 6)
    assert {r.status for r in loop.records} == {TickStatus.DECIDED}
    wanted = sum(r.executed_key != "4xtp1pp1" for r in loop.records)
    assert loop.counters.num_switches_failed == wanted > 0
    assert loop.counters.num_switches_started == 0
    with pytest.raises(StaleEpochError):
        Operations(loop).propose("2xtp2pp1", dry_run=False)


def test_events_of_a_failed_tick_are_counted_in_the_next(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = LosesEvents(synthetic_cluster, INITIAL)
    loop = make_loop(cluster, KeepPolicy(), tmp_path / "log")
    drive(cluster, loop, 1)
    cluster.num_failures = 1
    drive(cluster, loop, 2)
    statuses = [r.status for r in loop.records]
    assert statuses == [TickStatus.DECIDED, TickStatus.UNAVAILABLE, TickStatus.DECIDED]
    loop.log.close()
    records = read_log(tmp_path / "log").records
    assert [r["status"] for r in records if r["record"] == "tick"] == ["unavailable"]
    intervals = [r for r in records if r["record"] == "interval"]
    spans = [(r["from_s"], r["to_s"], len(r["arrivals"])) for r in intervals]
    assert spans == [(0.0, 5.0, 10), (5.0, 15.0, 20)]


def test_a_tick_never_raises(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = Unreadable(synthetic_cluster, INITIAL)
    loop = make_loop(cluster, KeepPolicy(), tmp_path / "log")
    record = loop.tick()
    assert record.status is TickStatus.FAILED
    assert "AttributeError" in record.reason
    assert loop.counters.num_failed == 1
    loop.log.close()
    (told,) = [r for r in read_log(tmp_path / "log").records if r["record"] == "tick"]
    assert (told["status"], told["seq"], told["reason"]) == ("failed", 1, record.reason)


def test_readers_do_not_wait_for_a_tick_under_way(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop
) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Slow(SurrogateCluster):
        def events(self, cursor: int) -> EventBatch:
            asked.set()
            assert answer.wait(30)
            return super().events(cursor)

    loop = make_loop(Slow(synthetic_cluster, INITIAL), KeepPolicy())
    ticking = threading.Thread(target=loop.tick)
    ticking.start()
    assert asked.wait(30)
    assert loop.lock.acquire(timeout=5.0)
    loop.lock.release()
    answer.set()
    ticking.join(30)
    assert loop.records[-1].status is TickStatus.DECIDED


def test_the_present_deployment_is_no_proposal(
    synthetic_cluster: ProfiledCluster, make_loop: MakeLoop, tmp_path: Path
) -> None:
    cluster = start(synthetic_cluster)
    loop = make_loop(cluster, KeepPolicy(), tmp_path / "log")
    drive(cluster, loop, 2)
    refused = Operations(loop).propose("4xtp1pp1", dry_run=False)
    assert (refused.vetoes, refused.ticket) == (("already_deployed",), None)
    Operations(loop).set_mode(Mode.ADVISORY)
    assert Operations(loop).propose("2xtp2pp1", dry_run=False).ticket is None
    Operations(loop).set_mode(Mode.ACTIVE)
    ticket = Operations(loop).propose("2xtp2pp1", dry_run=False).ticket
    assert ticket is not None
    drive(cluster, loop, 2)
    loop.log.close()
    records = read_log(tmp_path / "log").records
    proposals = [r for r in records if r["record"] == "proposal"]
    assert [(r["chosen_key"], r["mode"]) for r in proposals] == [
        ("4xtp1pp1", "active"),
        ("2xtp2pp1", "advisory"),
        ("2xtp2pp1", "active"),
    ]
    (outcome,) = [r for r in records if r["record"] == "outcome"]
    assert outcome["ticket"]["decision_id"] == proposals[-1]["decision_id"]
