"""Replicas that share the cores of a host, against plain processor sharing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.cluster import KvCostParams, Request, Routing, dense_deployment, parse_deployment_key
from engine.errors import InvalidRequestError
from engine.migration.plan import plan_switch
from engine.profile import Crowding, ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from tests.envs.plain_cluster import PlainCluster, PlainReplica

CROWDING = Crowding(processors=((2.0, 1.0), (3.0, 1.5), (4.0, 2.4)))


@pytest.fixture(scope="module")
def shared_cluster(small_cluster: ProfiledCluster) -> ProfiledCluster:
    """A step keeps one processor busy per device, and a tenth more when there are several. More
    than two slow one another down."""
    steps = tuple(
        replace(m, busy_cores=m.parallel.num_devices * 1.0 + 0.1 * (m.parallel.num_devices > 1))
        for m in small_cluster.profile.steps
    )
    profile = replace(small_cluster.profile, steps=steps, crowding=CROWDING)
    return replace(small_cluster, profile=profile)


def share_by_hand(
    cluster: ProfiledCluster, plain: PlainCluster, requests: list[Request]
) -> dict[str, list[float]]:
    """Token times when the work that is left of each step (pp=1) shrinks at the common rate."""
    replicas, now_s = list(plain.replicas.values()), 0.0
    left: dict[PlainReplica, float] = {}
    todo = sorted(requests, key=lambda r: r.arrival_s)
    while True:
        for replica in replicas:
            if replica not in left and replica.scheduler.has_work:
                replica.last_end_s = now_s
                replica._start(now_s)
                left[replica] = replica.last_end_s - now_s
        busy = sum(replica.steps.busy_cores for replica in left)
        rate = 1.0 / cluster.profile.crowding.slowdown(busy)
        first = min(left, key=lambda r: left[r], default=None)
        until_s = now_s + left[first] / rate if first is not None else np.inf
        is_arrival = bool(todo) and todo[0].arrival_s < until_s
        if is_arrival:
            until_s = todo[0].arrival_s
        if until_s == np.inf:
            return {k: times for r in replicas for k, times in r.token_times.items()}
        left = {r: work_s - (until_s - now_s) * rate for r, work_s in left.items()}
        now_s = until_s
        if is_arrival:
            request = todo.pop(0)
            replica_id = int(request.request_id.split("@")[1])
            plain.replicas[replica_id].add(request, now_s)
        elif first is not None:
            del left[first]
            first._end(now_s, *first.in_flight.popleft())


@pytest.mark.parametrize("key", ["4xtp1pp1", "1xtp2pp1+2xtp1pp1", "2xtp2pp1", "1xtp1pp1"])
def test_equals_plain_processor_sharing(shared_cluster: ProfiledCluster, key: str) -> None:
    deployment = dense_deployment(parse_deployment_key(key))
    routing = Routing(tuple(r.replica_id for r in deployment.replicas))
    rng = np.random.default_rng(len(key))
    arrival_s = np.cumsum(rng.exponential(0.02, 150)).tolist()
    lengths = rng.integers(1, 60, (150, 2)).tolist()
    surrogate = SurrogateCluster(shared_cluster, deployment)
    for i, (prompt, output) in enumerate(lengths):
        surrogate.submit(Request(f"r{i}", arrival_s[i], prompt, output))
    surrogate.advance(1e5)
    surrogate.check_integrity()
    ends = [e.outcome for e in surrogate.events(0).events if e.outcome is not None]
    outcomes = {o.request_id: o for o in ends}
    requests = [  # where the surrogate sent them
        Request(f"r{i}@{outcomes[f'r{i}'].replica_id}", arrival_s[i], *lengths[i])
        for i in range(150)
    ]
    plain = PlainCluster(shared_cluster, deployment, routing)
    times = share_by_hand(shared_cluster, plain, requests)
    for name, token_times in times.items():
        outcome = outcomes[name.split("@")[0]]
        assert outcome.first_token_s == pytest.approx(token_times[0], abs=1e-7)
        assert outcome.finish_s == pytest.approx(token_times[-1], abs=1e-7)
    alone = SurrogateCluster(
        replace(shared_cluster, profile=replace(shared_cluster.profile, crowding=Crowding())),
        deployment,
    )
    for i, (prompt, output) in enumerate(lengths):
        alone.submit(Request(f"r{i}", arrival_s[i], prompt, output))
    alone.advance(1e5)
    last = max(e.outcome.finish_s for e in alone.events(0).events if e.outcome is not None)
    slower = max(o.finish_s for o in ends) > 1.02 * last
    assert slower == (key != "1xtp1pp1"), "two processors suffice one replica of one device"


def test_more_knots_than_the_kernel_takes_are_refused(small_cluster: ProfiledCluster) -> None:
    knots = tuple((float(busy), float(busy)) for busy in range(1, 18))
    one = dense_deployment(parse_deployment_key("1xtp1pp1"))
    for crowding, what in ((Crowding(knots), "crowding"), (Crowding(memory=knots), "of memory")):
        profile = replace(small_cluster.profile, crowding=crowding)
        with pytest.raises(InvalidRequestError, match=f"{what} has 17 knots"):
            SurrogateCluster(replace(small_cluster, profile=profile), one)


def test_three_replicas_by_hand(shared_cluster: ProfiledCluster) -> None:
    """Steps of w s each start at 0, 0 and w / 2. Until then two processors suffice; then all three
    go at 2/3: the first two end at w / 2 + 3/2 * w / 2 = 5/4 w, the third has done half by then and
    ends at 5/4 w + w / 2."""
    deployment = dense_deployment(parse_deployment_key("3xtp1pp1"))
    work_s = shared_cluster.profile.step_model(deployment.configs[0]).step_s(10, 1, 10)
    surrogate = SurrogateCluster(shared_cluster, deployment)
    for i, at_s in enumerate([0.0, 0.0, work_s / 2]):
        surrogate.submit(Request(f"r{i}", at_s, 10, 1))
    surrogate.advance(1.0)
    ends = [e.outcome.finish_s for e in surrogate.events(0).events if e.outcome is not None]
    assert ends == pytest.approx([1.25 * work_s, 1.25 * work_s, 1.75 * work_s])


def test_memory_slows_a_step_by_how_many_are_busy_when_it_starts(
    shared_cluster: ProfiledCluster,
) -> None:
    """Of two steps that start at once the first finds itself alone, the second that two are busy.
    Two processors suffice."""
    crowding = replace(CROWDING, memory=((1.0, 1.0), (3.0, 1.5)))
    cluster = replace(shared_cluster, profile=replace(shared_cluster.profile, crowding=crowding))
    deployment = dense_deployment(parse_deployment_key("2xtp1pp1"))
    step = cluster.profile.step_model(deployment.configs[0])
    surrogate = SurrogateCluster(cluster, deployment)
    for i in range(2):
        surrogate.submit(Request(f"r{i}", 0.0, 10, 1))
    surrogate.advance(1.0)
    ends = [e.outcome.finish_s for e in surrogate.events(0).events if e.outcome is not None]
    assert ends == pytest.approx([step.step_s(10, 1, 10), step.step_s(10, 1, 10, memory=1.25)])


def test_an_exponent_stretches_steps_that_start_beside_others(
    small_cluster: ProfiledCluster,
) -> None:
    """Three steps of w start at once, the last when three are busy, which slow one another to 1.5:
    squared, it has 1.5 w to do. The others end at 1.5 w, when w of it is done, and it at 2 w."""
    steps = tuple(
        replace(m, busy_cores=1.0, crowding_exponent=2.0) for m in small_cluster.profile.steps
    )
    profile = replace(small_cluster.profile, steps=steps, crowding=CROWDING)
    deployment = dense_deployment(parse_deployment_key("3xtp1pp1"))
    work_s = profile.step_model(deployment.configs[0]).step_s(10, 1, 10)
    surrogate = SurrogateCluster(replace(small_cluster, profile=profile), deployment)
    for i in range(3):
        surrogate.submit(Request(f"r{i}", 0.0, 10, 1))
    surrogate.advance(1.0)
    ends = [e.outcome.finish_s for e in surrogate.events(0).events if e.outcome is not None]
    assert ends == pytest.approx([1.5 * work_s, 1.5 * work_s, 2.0 * work_s])


def test_a_pipeline_keeps_as_many_busy_as_it_has_steps_at_work(
    small_cluster: ProfiledCluster,
) -> None:
    """A step of w s starts at 0, a second one w / 2 later, when the first stage is free: then three
    are at work with that of another replica, and go at 2/3. The first ends at w / 2 + 3/2 * w / 2 =
    5/4 w, and the second w / 2 after it."""
    steps = tuple(
        replace(m, busy_cores=1.0, stage_share=1.0 / m.parallel.pp)
        for m in small_cluster.profile.steps
    )
    profile = replace(small_cluster.profile, steps=steps, crowding=CROWDING)
    deployment = dense_deployment(parse_deployment_key("1xtp1pp2+1xtp1pp1"))
    pipeline = profile.step_model(deployment.configs[0])
    assert (pipeline.parallel.pp, pipeline.stage_share) == (2, 0.5)
    work_s = pipeline.step_s(10, 1, 10)
    surrogate = SurrogateCluster(replace(small_cluster, profile=profile), deployment)
    ids = [r.replica_id for r in deployment.replicas]
    to_pipeline = ((1.0, 0.0), (0.0, 1.0))
    surrogate.set_routing(Routing(tuple(ids), to_pipeline, (20,), ((1.0, 0.0), (0.0, 1.0))))
    for name, prompt in (("a", 10), ("b", 10), ("long", 190)):
        surrogate.submit(Request(name, 0.0, prompt, 1))
    surrogate.advance(1e3)
    events = surrogate.events(0).events
    ends = {e.outcome.request_id: e.outcome.finish_s for e in events if e.outcome is not None}
    assert ends["long"] > 1.75 * work_s, "it is there all the time"
    assert (ends["a"], ends["b"]) == pytest.approx((1.25 * work_s, 1.75 * work_s))


def test_cutting_time_changes_nothing(shared_cluster: ProfiledCluster) -> None:
    """Bit by bit, with pipelines and a switch, whose weights take cores as well."""

    def run(cuts_s: list[float]) -> SurrogateCluster:
        rng = np.random.default_rng(4)
        deployment = dense_deployment(parse_deployment_key("1xtp1pp2+2xtp1pp1"))
        surrogate = SurrogateCluster(shared_cluster, deployment)
        for i, at_s in enumerate(np.cumsum(rng.exponential(0.02, 150)).tolist()):
            prompt, output = rng.integers(1, 100, 2).tolist()
            surrogate.submit(Request(f"r{i}", at_s, prompt, output))
        surrogate.advance(0.5)
        kv = KvCostParams(1e15, 1.0, 0.01)
        target = parse_deployment_key("2xtp2pp1")
        surrogate.apply(plan_switch(surrogate.spec, deployment, 0, target, kv, 0.2))
        for cut_s in [*sorted(cuts_s), 1e4]:
            surrogate.advance(cut_s)
            surrogate.check_integrity()
        return surrogate

    cut = run(np.random.default_rng(1).uniform(0.5, 4.0, 80).tolist())
    whole = run([])
    assert whole.events(0) == cut.events(0)
    assert whole.snapshot().epoch == 1
    assert whole.snapshot().num_finished == 150
