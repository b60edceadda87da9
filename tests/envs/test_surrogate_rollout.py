"""The surrogate as a `Simulator`: forks and rollouts."""

from __future__ import annotations

import numpy as np
import pytest

from engine.cluster import KvCostParams, Request, Routing, dense_deployment, parse_deployment_key
from engine.errors import StaleEpochError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from policies.base import Counts, Future, Rollout, Simulator

KV = KvCostParams(1e15, 1.0, 0.01)
INSTANTS_S = np.arange(0.3, 0.95, 0.04)  # before, in every phase of and after a switch at 0.4


def build(cluster: ProfiledCluster, columns: bool) -> SurrogateCluster:
    return SurrogateCluster(
        cluster, dense_deployment(parse_deployment_key("4xtp1pp1")), columns=columns
    )


def draw_future(seed: int, from_s: float, number: int = 80) -> Future:
    rng = np.random.default_rng(seed)
    arrival_s = from_s + np.cumsum(rng.exponential(0.01, number))
    return Future(arrival_s, rng.integers(1, 150, number), rng.integers(1, 60, number))


def submit(surrogate: SurrogateCluster, future: Future) -> None:
    columns = zip(*(getattr(future, name).tolist() for name in Future.__slots__), strict=True)
    for i, (arrival_s, prompt, output) in enumerate(columns):
        surrogate.submit(Request(f"{arrival_s:.6f}-{i}", arrival_s, prompt, output))


def loaded(cluster: ProfiledCluster, until_s: float) -> SurrogateCluster:
    """Busy at `until_s`; from 0.4 s on it switches."""
    surrogate = build(cluster, columns=False)
    submit(surrogate, draw_future(0, 0.0))
    surrogate.advance(min(0.4, until_s))
    if until_s > 0.4:
        target = parse_deployment_key("1xtp2pp1+2xtp1pp1")
        deployment = surrogate.snapshot().deployment
        surrogate.apply(plan_switch(cluster.spec, deployment, 0, target, KV, 0.2))
        surrogate.advance(until_s)
    return surrogate


def same(a: Rollout, b: Rollout) -> bool:
    one, two = a.traffic.to_dict(), b.traffic.to_dict()
    return a.snapshot == b.snapshot and all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("at_s", INSTANTS_S.tolist())
def test_equal_futures_give_equal_rollouts(small_cluster: ProfiledCluster, at_s: float) -> None:
    """Original and fork, and a fork of the fork half way; another fork leaves them alone."""
    simulator: Simulator = loaded(small_cluster, at_s)
    future, other = draw_future(1, at_s), draw_future(2, at_s, 200)
    before = simulator.snapshot()
    twin, stranger = simulator.fork(), simulator.fork()
    assert not same(stranger.rollout(9.0, other), twin.fork().rollout(9.0, future))
    assert simulator.snapshot() == twin.snapshot() == before
    half = twin.fork()
    half.rollout(at_s + 0.2, future)
    assert half.fork().rollout(9.0).snapshot == half.rollout(9.0).snapshot
    ours = simulator.rollout(9.0, future)
    assert same(ours, twin.rollout(9.0, future))
    assert half.snapshot() == ours.snapshot
    assert ours.snapshot.num_arrived == before.num_arrived + len(future.arrival_s)
    assert ours.snapshot.num_finished == ours.snapshot.num_arrived


def test_rollout_equals_events(small_cluster: ProfiledCluster) -> None:
    """The same future submitted as objects and told as events."""
    surrogate = loaded(small_cluster, 0.3)
    submitted = surrogate.fork()
    rolled = surrogate.rollout(9.0)  # what was submitted before arrives
    cursor = submitted.events(0).next_cursor
    submitted.advance(9.0)
    ends = [e.outcome for e in submitted.events(cursor).events if e.outcome is not None]
    assert rolled.traffic.finish_s.tolist() == [o.finish_s for o in ends]
    assert rolled.traffic.first_token_s.tolist() == [o.first_token_s for o in ends]
    assert rolled.snapshot == submitted.snapshot()


def test_choices_are_made_first(small_cluster: ProfiledCluster) -> None:
    surrogate = loaded(small_cluster, 0.3)
    deployment, target = surrogate.snapshot().deployment, parse_deployment_key("2xtp2pp1")
    plan = plan_switch(small_cluster.spec, deployment, 0, target, KV, 0.2)
    first_only = Routing((0, 1, 2, 3), ((1.0, 0.0, 0.0, 0.0),), (), ((1.0,),))
    switched = surrogate.fork().rollout(9.0, plan=plan).snapshot
    assert (switched.epoch, switched.deployment) == (1, plan.target)
    routed = surrogate.fork().rollout(9.0, draw_future(3, 0.3), routing=first_only).snapshot
    kept = surrogate.fork().rollout(9.0, draw_future(3, 0.3)).snapshot
    grown = [r.generated_tokens_total for r in routed.replicas]
    assert grown[0] > kept.replicas[0].generated_tokens_total
    with pytest.raises(StaleEpochError):
        surrogate.fork().rollout(9.0, routing=Routing((0, 1)))


def test_lengths_are_drawn_anew(small_cluster: ProfiledCluster) -> None:
    """Every live request is to make exactly two tokens more; nothing else is submitted."""

    def two_more(prompt_tokens: Counts, output_tokens: Counts) -> Counts:
        assert (prompt_tokens > 0).all()
        return output_tokens + 2

    surrogate = loaded(small_cluster, 0.3)
    before = surrogate.snapshot()
    num_live = before.num_arrived - before.num_finished
    made = sum(r.generated_tokens_total for r in before.replicas)
    nothing = draw_future(0, 0.3, 0)
    after = surrogate.fork(two_more).rollout(30.0, nothing).snapshot
    assert sum(r.generated_tokens_total for r in after.replicas) == made + 2 * num_live
    told = surrogate.fork().rollout(30.0, nothing).snapshot
    assert sum(r.generated_tokens_total for r in told.replicas) != made + 2 * num_live
