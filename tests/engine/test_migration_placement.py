"""Placement against brute force: fewest bytes, tp groups within nodes, most replicas untouched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from toy_cluster import cluster, deployments

from engine.cluster import (
    ClusterSpec,
    Deployment,
    ParallelConfig,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration import nodes
from engine.migration.placement import Placed, place_optimally
from engine.migration.roles import held_shards
from engine.shards import Shard

Configs = tuple[ParallelConfig, ...]


def missing(need: Shard, have: Shard | None) -> int:
    if have is None:
        return need.nbytes
    rows = min(need.stop, have.stop) - max(need.start, have.start)
    return need.nbytes - need.nbytes * max(rows, 0) // (need.stop - need.start)


def cost_table(spec: ClusterSpec, current: Deployment, target: Configs) -> list[list[int]]:
    """[new rank][device] bytes to receive, from the shards themselves."""
    held = held_shards(spec.model, current)
    ranks = held_shards(spec.model, dense_deployment(target))
    return [
        [
            sum(missing(s, held.get(device, {}).get(name)) for name, s in ranks[rank].items())
            for device in range(spec.num_devices)
        ]
        for rank in range(len(ranks))
    ]


def within_nodes(spec: ClusterSpec, target: Configs, order: tuple[int, ...]) -> bool:
    """Whether every tp group that a node could hold shares one."""
    first = 0
    for parallel in target:
        for _ in range(parallel.pp):
            group = order[first : first + parallel.tp]
            first += parallel.tp
            spread = len({d // spec.devices_per_node for d in group}) > 1
            if spread and parallel.tp <= spec.devices_per_node:
                return False
    return True


def all_placements(
    spec: ClusterSpec, current: Deployment, target: Configs
) -> Iterator[tuple[int, int]]:
    """(bytes, minus the replicas that stay) of every placement that respects nodes."""
    costs = cost_table(spec, current, target)
    before = {(r.parallel, r.placement.devices) for r in current.replicas}
    for order in permutations(range(spec.num_devices), len(costs)):
        if within_nodes(spec, target, order):
            devices, stay = iter(order), 0
            for parallel in target:
                mine = tuple(next(devices) for _ in range(parallel.num_devices))
                stay += (parallel, mine) in before
            yield sum(costs[r][d] for r, d in enumerate(order)), -stay


def outcome(placed: Placed, current: Deployment) -> tuple[int, int]:
    stay = set(placed.deployment.replicas) & set(current.replicas)
    return placed.missing_bytes, -len(stay)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.data())
def test_bytes_and_untouched_replicas_are_those_of_brute_force(
    num_devices: int, node_size: int, data: st.DataObject
) -> None:
    spec = cluster(num_devices, min(node_size, num_devices))
    old, new = data.draw(deployments(num_devices)), data.draw(deployments(num_devices))
    current = place_optimally(spec, Deployment(()), old).deployment
    best = min(all_placements(spec, current, new), default=None)
    assume(best is not None)
    placed = place_optimally(spec, current, new)
    assert outcome(placed, current) == best
    assert placed.lower_bound_bytes == placed.missing_bytes


@pytest.mark.parametrize(
    ("node_size", "old", "new"),
    [
        (3, "1xtp2pp1+1xtp1pp4", "1xtp2pp2+1xtp1pp2"),
        (3, "1xtp4pp1+1xtp2pp1", "2xtp2pp1+2xtp1pp1"),
        (2, "1xtp2pp2+1xtp2pp1", "3xtp2pp1"),
        (3, "6xtp1pp1", "1xtp2pp2+1xtp1pp2"),
    ],
)
def test_six_devices_as_brute_force(node_size: int, old: str, new: str) -> None:
    spec, target = cluster(6, node_size), parse_deployment_key(new)
    current = place_optimally(spec, Deployment(()), parse_deployment_key(old)).deployment
    placed = place_optimally(spec, current, target)
    assert outcome(placed, current) == min(all_placements(spec, current, target))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 64), st.sampled_from((1, 2, 3, 4, 8)), st.data())
@example(64, 8, None)
def test_never_below_the_bound_nor_above_the_same_index_mapping(
    num_devices: int, node_size: int, data: st.DataObject | None
) -> None:
    spec = cluster(num_devices, min(node_size, num_devices))
    if data is None:
        old, new = parse_deployment_key("16xtp4pp1"), parse_deployment_key("16xtp1pp4")
    else:
        old, new = data.draw(deployments(num_devices)), data.draw(deployments(num_devices))
    current = place_optimally(spec, Deployment(()), old).deployment
    placed = place_optimally(spec, current, new, time_limit_s=0.2)
    free = place_optimally(cluster(num_devices), current, new)
    assert free.missing_bytes <= placed.lower_bound_bytes <= placed.missing_bytes
    costs = cost_table(spec, current, new)
    devices = [d for r in placed.deployment.replicas for d in r.placement.devices]
    assert sum(costs[rank][d] for rank, d in enumerate(devices)) == placed.missing_bytes
    if within_nodes(spec, new, tuple(range(len(costs)))):
        assert within_nodes(spec, new, tuple(devices))
        assert placed.missing_bytes <= sum(row[rank] for rank, row in enumerate(costs))


@settings(max_examples=60, deadline=None)
@given(deployments(16), deployments(16))
def test_without_nodes_every_replica_stays_that_the_target_wants(
    old: Configs, new: Configs
) -> None:
    spec, current = cluster(16), dense_deployment(old)
    placed = place_optimally(spec, current, new)
    wanted = sum(min(old.count(c), new.count(c)) for c in set(new))
    assert outcome(placed, current)[1] == -wanted


def test_a_bound_that_was_not_reached_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = cluster(6, 3)
    current = place_optimally(spec, Deployment(()), parse_deployment_key("3xtp2pp1")).deployment
    target = parse_deployment_key("1xtp2pp2+2xtp1pp1")
    exact = place_optimally(spec, current, target)
    monkeypatch.setattr(nodes, "MAX_PATTERNS", 4)
    short = place_optimally(spec, current, target)
    assert short.lower_bound_bytes <= exact.missing_bytes <= short.missing_bytes


def test_a_replica_on_a_dead_device_does_not_stay() -> None:
    spec = cluster(4)
    current = dense_deployment(parse_deployment_key("2xtp2pp1"))
    placed = place_optimally(spec, current, parse_deployment_key("1xtp2pp1"), [1])
    assert placed.deployment.replicas == current.replicas[1:]


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    num_kinds=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_two_nodes_are_filled_as_the_programme_fills_them(
    numbers: list[int], num_kinds: int, seed: int
) -> None:
    """The same bytes, and as many replicas that stay; nothing where nothing fits."""
    rng = np.random.default_rng(seed)
    units = [nodes.Unit(ParallelConfig(n, 1), 0, n) for n in (4, 2, 1)]
    patterns = [
        p for p in product(*(range(n + 1) for n in numbers)) if 4 * p[0] + 2 * p[1] + p[2] <= 8
    ]
    columns = [
        nodes.Column(kind, p, 1000 * int(rng.integers(6)), float(rng.integers(4)))
        for kind in range(num_kinds)
        for p in patterns
    ]
    sizes = [2] if num_kinds == 1 else [1, 1]
    wanted = Counter(dict(zip(units, numbers, strict=True)))
    found, nbytes = nodes.choose_for_two(columns, numbers)
    solved, solved_bytes = nodes.choose(columns, sizes, units, wanted, 10.0)
    assert (found is None) == (solved is None)
    if found is not None and solved is not None:
        moved = [
            sum(n * c.nbytes for n, c in zip(x, columns, strict=True)) for x in (found, solved)
        ]
        stay = [sum(n * c.stays for n, c in zip(x, columns, strict=True)) for x in (found, solved)]
        assert moved == [nbytes, solved_bytes] == [nbytes] * 2
        assert stay[0] == stay[1]
