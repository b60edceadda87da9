"""Requests that move between replicas that stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.cluster import Request, RequestStatus, Routing, dense_deployment, parse_deployment_key
from engine.profile import ProfiledCluster
from envs.surrogate.cluster import SurrogateCluster
from envs.surrogate.rebalancing import EVERY_S, RebalancingCluster


class Small(RebalancingCluster):
    """For replicas of little memory."""

    full, empty = 5.0, 20.0


def requests(number: int, prompt: int, output: int) -> list[Request]:
    return [Request(f"r{i}", 0.001 * i, prompt, output) for i in range(number)]


def run(cluster: SurrogateCluster, waves: list[Request]) -> dict[str, tuple[float, int, int]]:
    """Seconds, tokens and moves of each request; checked every half second."""
    for request in waves:
        cluster.submit(request)
    for until_s in np.arange(0.5, 60.0, 0.5).tolist():
        cluster.advance(until_s)
        cluster.check_integrity()
    ended = [e.outcome for e in cluster.events(0).events if e.outcome is not None]
    assert all(o.status is RequestStatus.FINISHED for o in ended)
    return {o.request_id: (o.finish_s - o.arrival_s, o.output_tokens, o.num_moves) for o in ended}


@pytest.mark.parametrize("key", ["2xtp1pp1", "2xtp1pp2"])
def test_a_full_replica_hands_over_to_an_empty_one(
    small_cluster: ProfiledCluster, key: str
) -> None:
    """All are routed to the first replica, which has not memory enough for all of them."""
    slow = tuple(replace(s, base_s=0.05) for s in small_cluster.profile.steps)
    cluster = replace(small_cluster, profile=replace(small_cluster.profile, steps=slow))
    deployment = dense_deployment(parse_deployment_key(key))
    ids = tuple(r.replica_id for r in deployment.replicas)
    wave = requests(60, 60, 60)
    found = {}
    for kind in (SurrogateCluster, Small):
        surrogate = kind(cluster, deployment)
        surrogate.set_routing(Routing(ids, ((1.0, 0.0),), (), ((1.0,),)))
        found[kind] = run(surrogate, wave)
        assert found[kind].keys() == {r.request_id for r in wave}
        assert {tokens for _, tokens, _ in found[kind].values()} == {60}
    plain, moving = found[SurrogateCluster], found[Small]
    assert sum(moves for *_, moves in plain.values()) == 0
    assert sum(moves for *_, moves in moving.values()) > 3
    assert np.mean([s for s, *_ in moving.values()]) < np.mean([s for s, *_ in plain.values()])


def test_freeness_by_hand(small_cluster: ProfiledCluster) -> None:
    """Two running requests of 100 tokens and a step: what is left of the blocks, by steps."""
    surrogate = RebalancingCluster(
        small_cluster, dense_deployment(parse_deployment_key("2xtp1pp1"))
    )
    size, row = surrogate.spec.block_size, surrogate.rows.order[0]
    blocks = int(surrogate.state.replicas[row]["num_blocks"])
    assert surrogate.freeness(row) == size * blocks
    ids = tuple(r.replica_id for r in surrogate.snapshot().deployment.replicas)
    surrogate.set_routing(Routing(ids, ((1.0, 0.0),), (), ((1.0,),)))
    for request in requests(2, 100, 50):
        surrogate.submit(request)
    surrogate.advance(0.1 * EVERY_S)
    used = int(surrogate.state.seqs["blocks"].sum())
    assert used >= 2 * 100 / size
    assert surrogate.freeness(row) == size * (blocks - used) / 2


def test_replicas_alike_are_left_alone(small_cluster: ProfiledCluster) -> None:
    deployment = dense_deployment(parse_deployment_key("4xtp1pp1"))
    found = [run(kind(small_cluster, deployment), requests(40, 30, 20))
             for kind in (SurrogateCluster, Small)]  # fmt: skip
    assert found[0] == found[1]
