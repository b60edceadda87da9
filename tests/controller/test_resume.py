"""A restarted controller goes on where the last one stopped: what operators said, what it may do,
what it expects. The surrogate is the engine that goes on meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from controller.breaker import Actor
from controller.canary import CanaryConfig
from controller.decision_log import read_log, read_tail
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.oversight import Oversight, OversightConfig
from controller.records import Mode, TickRecord
from controller.resume import TAIL_BYTES, Keeper, _events, resume
from controller.roster import PolicyRoster
from controller.service import ControlService
from controller.sessions import Sessions
from controller.switch_watch import Undo
from engine.cluster import Arrival, RequestOutcome, RequestStatus
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Policy
from policies.baselines import KeepPolicy
from protos import control_pb2 as pb
from tests.controller.steered import CONFIG, GRID_S, Clock, Even, build_loop, close, drive, start

ARGUMENTS = {"mode": "active", "policy": "started with"}


@dataclass
class Life:
    """One controller process, but for the process."""

    loop: ControlLoop
    operations: Operations
    keeper: Keeper
    resumed: bool

    def tick(self, num: int = 1, per_tick: int = 10) -> None:
        assert isinstance(self.loop.cluster, SurrogateCluster)
        drive(self.loop.cluster, self.loop, num, per_tick)

    def kill(self) -> None:
        """Nothing more is written; what it holds in memory is gone."""
        close(self.loop)
        self.loop.trials.close()


class World:
    """An engine, a wall clock, and one life of the controller after the other."""

    def __init__(self, profiled: ProfiledCluster, log: Path) -> None:
        self.profiled, self.log, self.wall_s = profiled, log, 5000.0
        self.engine = start(profiled)
        self.lives: list[Life] = []

    def begin(
        self,
        policy: Policy | None = None,
        clock_s: float = 1000.0,
        arguments: dict[str, str] = ARGUMENTS,
        policies: Path = Path("none"),
        **changes: Any,
    ) -> Life:
        past = read_tail(self.log, TAIL_BYTES)
        oversight = Oversight(OversightConfig())
        config = replace(CONFIG, **changes)
        loop = build_loop(
            self.profiled, self.engine, policy or KeepPolicy(), self.log, oversight, config
        )
        assert isinstance(loop.clock, Clock)
        loop.clock.now_s = clock_s
        operations = Operations(loop, PolicyRoster(loop.pipeline, policies))
        keeper = Keeper(loop, operations, arguments, lambda: self.wall_s)
        life = Life(loop, operations, keeper, resume(keeper, past))
        loop.keep, operations.idempotency.on_answer = keeper.keep, keeper.answer
        self.lives.append(life)
        return life


@pytest.fixture
def world(synthetic_cluster: ProfiledCluster, tmp_path: Path) -> Iterator[World]:
    made = World(synthetic_cluster, tmp_path / "log")
    try:
        yield made
    finally:
        for life in made.lives:
            life.kill()


def last(life: Life) -> TickRecord:
    return life.loop.records[-1]


def test_without_a_log_there_is_nothing_to_go_on_from(world: World) -> None:
    assert not world.begin().resumed


def test_ticks_forecasts_and_observations_are_those_of_one_that_never_stopped(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    """Killed after every third tick, beside one that runs through: equal to the last bit."""
    whole, parts = (World(synthetic_cluster, tmp_path / name) for name in ("whole", "parts"))
    through = whole.begin()
    for _ in range(4):
        through.tick(3)
        life = parts.begin()
        life.tick(3)
        life.kill()
    through.kill()
    ours, theirs = (read_log(w.log).records for w in (whole, parts))
    kinds = ("interval", "decision")
    for kind in kinds:
        one, other = ([r for r in records if r["record"] == kind] for records in (ours, theirs))
        assert len(one) == len(other) == 12
        ignored = ("n", "crc32", "seeds", "decision_s", "decision_id")
        for a, b in zip(one, other, strict=True):
            for name in a.keys() - set(ignored):
                assert a[name] == b[name], (kind, name)
    assert [r["seq"] for r in theirs if r["record"] == "decision"] == list(range(1, 13))
    assert read_log(parts.log).skipped == ()


def test_rows_of_earlier_versions_lack_the_last_fields() -> None:
    ended = ["a", "finished", 1.0, 1.5, 4.0, 10, 6, 2]
    record = {"arrivals": [[1.0, 10, "chat"]], "requests": [ended, [*ended, "chat", "ann"]]}
    arrival, *ends = _events(record)
    assert arrival.arrival == Arrival("", 1.0, 10, "chat")
    plain = RequestOutcome("a", RequestStatus.FINISHED, 1.0, 1.5, 4.0, 10, 6, 2)
    named = replace(plain, request_class="chat", client_id="ann")
    assert [e.outcome for e in ends] == [plain, named]


def test_dwell_and_budget_are_kept_though_the_engine_tells_of_one_switch_only(
    world: World,
) -> None:
    slow = {"min_dwell_s": 0.0, "switches_per_hour": 1.0, "switch_burst": 2.0}
    first = world.begin(Even(), **slow)
    first.tick(30)
    assert first.loop.counters.num_switches_started == 2
    first.kill()
    second = world.begin(Even(), **slow)
    second.tick(10)
    assert second.loop.counters.num_switches_started == 0
    assert any(c.mask_reason == "switch_budget" for c in last(second).candidates)
    fresh = world.begin(Even(), **slow, arguments=ARGUMENTS)
    fresh.loop.pipeline.scheduler.reset(0.0)
    fresh.tick(10)
    assert fresh.loop.counters.num_switches_started, "a fresh budget would have been spent again"


def test_holds_expire_by_the_time_that_passes_while_nobody_runs(world: World) -> None:
    first = world.begin()
    first.tick(2)
    first.operations.hold(600.0, "maintenance")
    first.kill()
    world.wall_s += 100.0
    second = world.begin(clock_s=7.0)
    (held,) = second.loop.oversight.holds(7.0)
    assert (held.reason, held.until_s) == ("maintenance", 7.0 + 500.0)
    second.tick()
    assert any(c.mask_reason == "hold" for c in last(second).candidates)
    second.kill()
    world.wall_s += 600.0
    assert world.begin().loop.oversight.holds(1000.0) == ()


def test_bans_an_undo_that_is_due_and_the_breaker_are_kept(world: World) -> None:
    first = world.begin()
    first.tick(2)
    oversight, at_s = first.loop.oversight, first.loop.clock()
    oversight.take_back(at_s, Undo("t", "2xtp2pp1", "4xtp1pp1", 0.9, 0.2))
    for i in range(3):
        oversight.breaker.failure(at_s + i, "no answer")
    first.keeper.keep()
    first.kill()
    oversight = world.begin(clock_s=50.0).loop.oversight
    assert oversight.undo == Undo("t", "2xtp2pp1", "4xtp1pp1", 0.9, 0.2)
    assert dict(oversight.restraints(50.0).banned) == {"4xtp1pp1": "undone"}
    assert oversight.breaker.reason == "3 failures, the last: no answer"
    assert oversight.actor(50.0 + 299.0) is Actor.RULE
    assert oversight.actor(50.0 + 303.0) is Actor.POLICY, "on trial when the cool-down is over"
    assert not oversight.restraints(50.0 + 1801.0).banned


def test_the_mode_is_what_operators_said_until_the_arguments_change(world: World) -> None:
    first = world.begin()
    first.tick()
    first.operations.set_mode(Mode.ADVISORY)
    first.kill()
    second = world.begin()
    assert second.loop.mode is Mode.ADVISORY
    second.tick()
    second.kill()
    other = ARGUMENTS | {"mode": "off"}
    assert world.begin(arguments=other).loop.mode is Mode.ACTIVE  # as `build_loop` made it


def test_loaded_policies_come_back_and_can_be_rolled_back(world: World) -> None:
    first = world.begin()
    first.tick()
    first.operations.load_policy("hysteresis")
    first.operations.load_policy("myopic")
    first.kill()
    second = world.begin()
    assert second.loop.active.name == second.loop.policy_server.policy.name == "myopic"
    assert second.operations.rollback()[0].name == "hysteresis"
    assert second.operations.rollback()[0].name == "keep"


def test_a_policy_that_is_gone_is_told_and_the_one_started_with_decides(world: World) -> None:
    first = world.begin()
    first.tick()
    first.loop.active = replace(first.loop.active, name="deleted")
    first.keeper.keep()
    first.kill()
    second = world.begin()
    second.tick()
    assert second.loop.active.name == "keep"
    assert any("not resumed: policy deleted" in note for note in last(second).notes)


def test_a_canary_goes_on_in_the_middle_of_its_block_with_the_same_draws(world: World) -> None:
    first = world.begin()
    first.tick(2)
    loaded = first.operations.roster.load("myopic")
    config = CanaryConfig(0.5, min_block_s=20.0, max_block_s=30.0, burn_in_s=5.0, min_requests=1)
    targets = first.loop.oversight.watch.targets
    first.loop.trials.begin_canary(loaded, config, targets, first.loop.snapshot.now_s)  # type: ignore[union-attr]
    first.tick(20)
    canary = first.loop.trials.canary
    assert canary is not None
    assert len(canary.blocks) >= 3
    first.kill()
    second = world.begin()
    again = second.loop.trials.canary
    assert again is not None
    assert again.saved() == canary.saved()
    assert second.loop.trials.arm == canary.arm
    canary._begin(500.0)
    again._begin(500.0)
    assert again.saved() == canary.saved()


def test_a_switch_by_hand_meanwhile_is_drift_and_one_of_its_own_is_not(world: World) -> None:
    first = world.begin(Even(), min_dwell_s=0.0)
    while not first.loop.counters.num_switches_started:
        first.tick()
    first.kill()  # before it saw the end of the switch
    second = world.begin(Even(), min_dwell_s=0.0)
    second.tick(8, 5)
    assert second.loop.counters.num_drifts == 0
    second.operations.set_mode(Mode.OFF)
    while second.loop.snapshot is None or second.loop.snapshot.switch_in_flight:
        second.tick()
    second.kill()
    prepared = second.loop.prepared
    assert prepared is not None
    snapshot = world.engine.snapshot()
    rows = [i for i, c in enumerate(prepared.candidates) if c.key != snapshot.deployment.key]
    plan = second.loop.pipeline.plan(replace(prepared, snapshot=snapshot), rows[0], "other-1")
    world.engine.apply(plan)
    world.engine.advance(snapshot.now_s + 60.0)
    third = world.begin()
    third.tick()
    assert third.loop.counters.num_drifts == 1


def test_a_switch_that_was_watched_is_watched_on(world: World) -> None:
    first = world.begin(Even(), min_dwell_s=0.0)
    watch = first.loop.oversight.watch
    for _ in range(60):
        first.tick()
        if watch.saved()["watched"] is not None:
            break
    told = watch.saved()
    assert told["watched"] is not None
    first.kill()
    second = world.begin()
    assert second.loop.oversight.watch.saved() == told


def test_an_engine_that_was_restarted_meanwhile_is_noticed(world: World) -> None:
    first = world.begin()
    first.tick(6)
    first.kill()
    world.engine = start(world.profiled)
    second = world.begin()
    second.tick(2)
    assert second.loop.counters.num_restarts == 1
    assert last(second).seq == 8
    intervals = [r for r in read_log(world.log).records if r["record"] == "interval"]
    assert [r["from_s"] for r in intervals[-2:]] == [0.0, GRID_S]


def test_other_settings_of_decisions_learn_rates_anew_and_keep_the_rest(world: World) -> None:
    first = world.begin()
    first.tick(4)
    first.operations.hold(600.0, "x")
    first.kill()
    second = world.begin(grid_s=2 * GRID_S)
    second.tick()
    assert any("not resumed: rates" in note for note in last(second).notes)
    assert (last(second).seq, len(second.loop.oversight.holds(1000.0))) == (5, 1)


def test_no_arrival_is_logged_twice_and_none_is_left_out(world: World) -> None:
    for _ in range(3):
        life = world.begin()
        life.tick(4)
        life.kill()
    intervals = [r for r in read_log(world.log).records if r["record"] == "interval"]
    arrivals = [a[0] for r in intervals for a in r["arrivals"]]
    assert arrivals == sorted(set(arrivals))
    assert len(arrivals) == world.engine.snapshot().num_arrived
    spans = [(r["from_s"], r["to_s"]) for r in intervals]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


# ------------------------------------------------------------------------ what clients see


class NoContext:
    """Handlers under test ask nothing of it."""


def call(life: Life, use: Callable[[ControlService], Any]) -> Any:
    async def work() -> Any:
        sessions = Sessions(life.loop.pipeline, 1.0)
        try:
            return await use(ControlService(life.loop, life.operations, sessions))
        finally:
            sessions.close()

    return asyncio.run(work())


async def take(stream: Any, num: int) -> list[Any]:
    found = []
    async for response in stream:
        found.append(response)
        if len(found) == num:
            break
    await stream.aclose()
    return found


def test_the_same_key_gives_the_same_answer_in_the_next_life(world: World) -> None:
    first = world.begin()
    first.tick()
    request = pb.HoldRequest(duration_s=60.0, reason="x", idempotency_key="k")
    told = call(first, lambda s: s.Hold(request, NoContext()))
    first.kill()
    second = world.begin()
    second.operations.resume()
    assert call(second, lambda s: s.Hold(request, NoContext())) == told
    assert second.loop.oversight.holds(1000.0) == (), "it was not done again"
    other = pb.HoldRequest(duration_s=70.0, reason="x", idempotency_key="k")
    with pytest.raises(InvalidRequestError, match="used for another request"):
        call(second, lambda s: s.Hold(other, NoContext()))


def test_resume_tokens_lead_on_into_the_next_life_and_nothing_is_lost(world: World) -> None:
    first = world.begin(Even(), min_dwell_s=0.0)
    first.tick(6)
    watch = pb.WatchDecisionsRequest
    seen = call(first, lambda s: take(s.WatchDecisions(watch(from_seq=1), NoContext()), 3))
    state = call(first, lambda s: take(s.WatchState(pb.WatchStateRequest(), NoContext()), 1))
    before = list(first.loop.records)
    first.kill()
    second = world.begin(Even(), min_dwell_s=0.0)
    second.tick()
    token = seen[-1].resume_token
    on = call(second, lambda s: take(s.WatchDecisions(watch(resume_token=token), NoContext()), 4))
    assert [(r.record.seq, r.num_lost) for r in on] == [(4, 0), (5, 0), (6, 0), (7, 0)]
    again = pb.WatchStateRequest(resume_token=state[0].resume_token)
    (later,) = call(second, lambda s: take(s.WatchState(again, NoContext()), 1))
    assert later.state.last_tick.seq == 7
    for was, found in zip(before, second.loop.records, strict=False):
        slim = None if was.ticket is None else replace(was.ticket, bindings=())
        expected = replace(was, tick_s=0.0, notes=(), ticket=slim)
        assert found == expected


def test_a_token_of_another_log_is_refused(world: World) -> None:
    life = world.begin()
    life.tick()
    request = pb.WatchDecisionsRequest(resume_token="other:1")
    with pytest.raises(InvalidRequestError, match="not of this controller"):
        call(life, lambda s: take(s.WatchDecisions(request, NoContext()), 1))


def test_the_tail_is_read_across_files_from_a_whole_line_on(world: World) -> None:
    life = world.begin()
    life.loop.log._max_bytes = 60_000
    life.tick(12)
    whole = read_log(world.log).records
    assert len({r.get("part") for r in whole}) > 2
    for size in (1, 1000, 50_000, 90_000, 10**7):
        tail = read_tail(world.log, size)
        assert tail == whole[len(whole) - len(tail) :]
        assert size < 10**4 or tail
    assert read_tail(world.log, 10**7) == whole
    assert read_tail(world.log.with_name("none"), 100) == ()


def test_a_tick_that_lost_the_engine_after_its_decision_is_one_tick(world: World) -> None:
    first = world.begin()
    first.tick(2)
    told = {"seq": 2, "at_s": 10.0, "status": "unavailable", "mode": "active", "reason": "gone"}
    first.loop.log.append("tick", told | {"deployment_key": "", "tick_s": 0.1})
    first.kill()
    second = world.begin()
    second.tick()
    assert [(t.seq, str(t.status)) for t in second.loop.records] == [
        (1, "decided"),
        (2, "unavailable"),
        (3, "decided"),
    ]
