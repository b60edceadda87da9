"""The control loop over the surrogate, its fall-backs, its log; no waiting anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from controller.build import build_pipeline, build_predictor, pipeline_facts, pipeline_from_facts
from controller.decision import DecisionConfig, DecisionPipeline
from controller.decision_log import DecisionLog, read_log
from controller.loop import ControlLoop
from controller.policy_server import PolicyServer
from controller.records import Mode, TickStatus
from engine.cluster import (
    ClusterSnapshot,
    Request,
    SwitchPhase,
    WorkloadType,
    WorkloadTyping,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import CheckpointError, InfeasibleError, InvalidRequestError, UnavailableError
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Observation, Policy
from policies.baselines import KeepPolicy

TYPING = WorkloadTyping((WorkloadType("short", 64, 32), WorkloadType("long", 700, 200)), (0.7, 0.3))
CONFIG = DecisionConfig(grid_s=5.0, min_dwell_s=10.0, max_candidates=8)
INITIAL = "4xtp1pp1"


class First:
    """Takes the first legal candidate that is not keep."""

    name = "first"

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        legal = np.flatnonzero(observation.mask)
        out = np.zeros(len(observation.mask))
        out[legal[1] if len(legal) > 1 else 0] = 1.0
        return out


class Broken:
    """Answers as told, or raises."""

    name = "broken"

    def __init__(self, answer: Callable[[Observation], NDArray[np.float64]]) -> None:
        self._answer = answer

    def reset(self) -> None:
        return

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        return self._answer(observation)


class Flaky(SurrogateCluster):
    """An engine that can be made unreachable, or to look restarted."""

    is_gone = False
    clock_shift_s = 0.0

    def snapshot(self) -> ClusterSnapshot:
        if self.is_gone:
            raise UnavailableError("made to be gone")
        return super().snapshot()


class Bench:
    """A loop over a surrogate with steady traffic."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        policy: Policy,
        mode: Mode = Mode.ACTIVE,
        log: Path | None = None,
        deadline_s: float = 5.0,
    ) -> None:
        self.cluster = Flaky(cluster, dense_deployment(parse_deployment_key(INITIAL)))
        self.pipeline = build_pipeline(cluster, TYPING, CONFIG, "ewma2")
        self.server = PolicyServer(policy, KeepPolicy(), deadline_s, deterministic=True)
        self.log = DecisionLog(log, {"policy": policy.name})
        self.loop = ControlLoop(
            self.cluster, self.pipeline, self.server, self.log, mode, np.random.default_rng(0)
        )
        self._sent = 0

    def step(self) -> None:
        """One grid interval of traffic, then a tick."""
        now_s = self.cluster.snapshot().now_s
        for i in range(10):
            self._sent += 1
            request = Request(f"r{self._sent}", now_s + 0.5 * i, 60 + 60 * (i % 3), 30)
            self.cluster.submit(request)
        self.cluster.advance(now_s + CONFIG.grid_s)
        self.loop.tick()

    def close(self) -> None:
        self.server.close()
        self.log.close()


@pytest.fixture
def bench(
    synthetic_cluster: ProfiledCluster, request: pytest.FixtureRequest
) -> Callable[..., Bench]:
    def build(policy: Policy, **options: object) -> Bench:
        found = Bench(synthetic_cluster, policy, **options)  # type: ignore[arg-type]
        request.addfinalizer(found.close)
        return found

    return build


def test_an_active_loop_switches_and_the_record_says_who_decided(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    b = bench(First(), log=tmp_path / "log.jsonl")
    for _ in range(8):
        b.step()
    done = [t for t in b.loop.switches if t.phase is SwitchPhase.DONE]
    decided = {r.decision_id: r for r in b.loop.records}
    assert len(done) >= 2
    for ticket in done:
        record = decided[ticket.decision_id]
        assert (record.policy, record.reason != "") == ("first", True)
        assert record.executed_key == ticket.to_key
        assert record.propensity == 1.0
    assert b.loop.counters.num_switches_done == len(done)
    assert b.loop.counters.num_failed == 0
    contents = read_log(tmp_path / "log.jsonl")
    assert contents.skipped == ()
    kinds = [r["record"] for r in contents.records]
    assert kinds[0] == "header"
    assert kinds.count("decision") == 8
    assert kinds.count("outcome") == len(done)
    first = next(r for r in contents.records if r["record"] == "decision")
    assert len(first["observation"]) == b.pipeline.observation_spec.flat_size
    assert first["candidates"][0]["key"] == INITIAL
    assert sum(first["probabilities"]) == pytest.approx(1.0)


def test_advisory_decides_the_same_but_applies_nothing(bench: Callable[..., Bench]) -> None:
    b = bench(First(), mode=Mode.ADVISORY)
    for _ in range(3):
        b.step()
    assert [r.status for r in b.loop.records] == [TickStatus.DECIDED] * 3
    assert any(r.executed_key != INITIAL for r in b.loop.records)
    assert b.cluster.snapshot().deployment.key == INITIAL
    assert b.cluster.snapshot().routing.weights == ()


def test_off_only_observes(bench: Callable[..., Bench]) -> None:
    b = bench(First(), mode=Mode.OFF)
    b.step()
    assert [r.status for r in b.loop.records] == [TickStatus.OBSERVED]
    assert b.loop.set_mode(Mode.ACTIVE) is Mode.OFF
    b.step()
    assert b.loop.records[-1].status is TickStatus.DECIDED


def test_keep_refreshes_the_routing(bench: Callable[..., Bench]) -> None:
    b = bench(KeepPolicy())
    b.step()
    routing = b.cluster.snapshot().routing
    assert len(routing.weights) == len(TYPING.types)
    for row in routing.weights:
        assert sum(row) == pytest.approx(1.0)


def nan(observation: Observation) -> NDArray[np.float64]:
    return np.full(len(observation.mask), np.nan)


def illegal(observation: Observation) -> NDArray[np.float64]:
    out = np.zeros(len(observation.mask))
    out[-1] = 1.0
    return out


def short(observation: Observation) -> NDArray[np.float64]:
    return np.ones(1)


def explode(observation: Observation) -> NDArray[np.float64]:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("answer", "why"),
    [(nan, "not finite"), (illegal, "masked"), (short, "shape"), (explode, "boom")],
)
def test_a_broken_policy_falls_back_to_the_rule(
    bench: Callable[..., Bench], answer: Callable[[Observation], NDArray[np.float64]], why: str
) -> None:
    b = bench(Broken(answer))
    b.step()
    record = b.loop.records[-1]
    assert (record.status, record.policy) == (TickStatus.DECIDED, "keep")
    assert why in record.reason
    assert b.loop.counters.num_fallbacks == 1


def test_a_late_policy_falls_back_and_the_next_answer_counts(bench: Callable[..., Bench]) -> None:
    release = threading.Event()

    def wait(observation: Observation) -> NDArray[np.float64]:
        release.wait(30)
        return First().probabilities(observation)

    b = bench(Broken(wait), deadline_s=0.05)
    b.step()
    assert "no answer within" in b.loop.records[-1].reason
    release.set()
    b.step()
    assert b.loop.records[-1].policy == "broken"


def test_an_engine_that_is_gone_is_recorded_and_comes_back(bench: Callable[..., Bench]) -> None:
    b = bench(KeepPolicy())
    b.step()
    b.cluster.is_gone = True
    b.loop.tick()
    assert b.loop.records[-1].status is TickStatus.UNAVAILABLE
    assert not b.loop.available
    b.cluster.is_gone = False
    b.step()
    assert b.loop.records[-1].status is TickStatus.DECIDED
    assert b.loop.counters.num_unavailable == 1


def test_a_restarted_engine_is_noticed(
    bench: Callable[..., Bench], synthetic_cluster: ProfiledCluster
) -> None:
    b = bench(KeepPolicy())
    b.step()
    b.cluster = Flaky(synthetic_cluster, dense_deployment(parse_deployment_key("2xtp2pp1")))
    b.loop.cluster = b.cluster
    b.loop.tick()
    assert b.loop.counters.num_restarts == 1
    assert b.loop.records[-1].deployment_key == "2xtp2pp1"


def test_the_loop_ticks_on_its_grid_until_told_to_stop(bench: Callable[..., Bench]) -> None:
    b = bench(KeepPolicy())
    stop, times = threading.Event(), iter([0.0] * 3 + [100.0] * 50)
    ticks = []

    def clock() -> float:
        if len(b.loop.records) >= 3:
            stop.set()
        ticks.append(len(b.loop.records))
        return next(times) * CONFIG.grid_s

    b.loop.run(stop, clock)
    assert len(b.loop.records) == 3
    assert b.loop.counters.num_late > 0


def test_a_proposal_is_planned_guarded_and_applied(bench: Callable[..., Bench]) -> None:
    b = bench(KeepPolicy())
    for _ in range(3):
        b.step()
    dry = b.loop.propose("2xtp2pp1", dry_run=True)
    assert (dry.vetoes, dry.ticket) == ((), None)
    assert dry.decision.plan is not None
    assert b.cluster.snapshot().deployment.key == INITIAL
    real = b.loop.propose("2xtp2pp1", dry_run=False)
    assert real.ticket is not None
    again = b.loop.propose("1xtp4pp1", dry_run=False)
    assert (again.ticket, again.vetoes) == (None, ("switch_in_flight",))
    with pytest.raises(InfeasibleError, match="needs 8 devices"):
        b.loop.propose("2xtp4pp1", dry_run=True)


def test_a_torn_log_is_read_up_to_the_tear(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, {"policy": "x"})
    log.append("decision", {"value": np.float32(1.5), "row": np.array([True, False])})
    log.close()
    with path.open("a") as out:
        out.write('"stray"\n{"record": "decision", "val')
    contents = read_log(path)
    assert [r["record"] for r in contents.records] == ["header", "decision"]
    assert contents.records[1]["row"] == [True, False]
    assert [number for number, _ in contents.skipped] == [3, 4]
    assert "torn" in contents.skipped[1][1]


def test_a_pipeline_is_rebuilt_from_its_facts(synthetic_cluster: ProfiledCluster) -> None:
    facts = json.loads(
        json.dumps(pipeline_facts(synthetic_cluster, TYPING, CONFIG, "naive", "2xtp2pp1"))
    )
    rebuilt: DecisionPipeline = pipeline_from_facts(facts)
    assert rebuilt.cluster == synthetic_cluster
    assert rebuilt.typing == TYPING
    assert rebuilt.config == CONFIG
    assert (
        rebuilt.observation_spec
        == build_pipeline(synthetic_cluster, TYPING, CONFIG).observation_spec
    )
    with pytest.raises(CheckpointError, match="typing"):
        pipeline_from_facts({"cluster": facts["cluster"]})
    with pytest.raises(InvalidRequestError, match="'ewma4'"):
        build_predictor("prophet", 2, 5.0)
