from __future__ import annotations

from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from controller.deployments import list_counts
from controller.library import Space, list_deployments
from controller.packing import nodes_of, packs, patterns, spread
from engine.cluster import ClusterSpec, ModelSpec, ParallelConfig

CHAIN = [ParallelConfig(4, 1), ParallelConfig(2, 2), ParallelConfig(2, 1), ParallelConfig(1, 3)]
ODD = [ParallelConfig(5, 1), ParallelConfig(3, 2), ParallelConfig(3, 1), ParallelConfig(2, 1)]


def _fits_by_trying(groups: list[int], nodes: tuple[int, ...]) -> bool:
    """Every assignment of groups to nodes."""
    for homes in product(range(len(nodes)), repeat=len(groups)):
        used = [0] * len(nodes)
        for group, home in zip(groups, homes, strict=True):
            used[home] += group
        if all(u <= n for u, n in zip(used, nodes, strict=True)):
            return True
    return False


def _groups(counts: list[int], configs: list[ParallelConfig]) -> list[int]:
    pairs = zip(counts, configs, strict=True)
    return [c.tp for number, c in pairs for _ in range(number * c.pp)]


@pytest.mark.parametrize("nodes", [(4, 4), (4, 3), (8,), (5, 3), (3, 3, 2)])
@pytest.mark.parametrize("configs", [CHAIN, ODD], ids=["powers of two", "threes and fives"])
def test_packs_equals_trying_every_assignment(
    configs: list[ParallelConfig], nodes: tuple[int, ...]
) -> None:
    configs = [c for c in configs if c.tp <= nodes[0]]
    counts = list_counts([c.num_devices for c in configs], sum(nodes), maximal=False)
    found = packs(counts, configs, nodes).tolist()
    expected = [_fits_by_trying(_groups(row, configs), nodes) for row in counts.tolist()]
    assert found == expected


def test_two_nodes_of_four_hold_no_three_and_three_and_two() -> None:
    configs = [ParallelConfig(3, 1), ParallelConfig(2, 1)]
    assert packs(np.array([[2, 0], [1, 2], [2, 1]]), configs, (4, 4)).tolist() == [
        True,
        True,
        False,
    ]
    assert packs(np.array([[2, 1]]), configs, (8,)).tolist() == [True]


def test_a_group_larger_than_a_whole_node_is_spread() -> None:
    model = ModelSpec("toy", 8, 8, 4, 32, 256, 1024, 2048, 4, ())
    spec = ClusterSpec(8, 4, 10**6, 1e9, 16, model, 64, 512)
    large, small = ParallelConfig(8, 1), ParallelConfig(4, 2)
    assert spread([large, small], spec) == (ParallelConfig(1, 8), small)
    assert packs(np.array([[1]]), [ParallelConfig(4, 1)], (3, 3)).tolist() == [False]


@pytest.mark.parametrize("nodes", [(4, 4), (5, 3), (4, 3)])
def test_listed_deployments_are_the_maximal_ones_that_pack(nodes: tuple[int, ...]) -> None:
    configs = [c for c in ODD if c.tp <= nodes[0]]
    listed = set(map(tuple, list_deployments(configs, Space(nodes, sum(nodes))).tolist()))
    every = list_counts([c.num_devices for c in configs], sum(nodes), maximal=False)
    fitting = {tuple(c) for c in every[packs(every, configs, nodes)].tolist()}
    grown = np.eye(len(configs), dtype=np.int64)
    maximal = {
        c
        for c in fitting
        if not any(tuple((np.array(c) + one).tolist()) in fitting for one in grown)
    }
    assert listed == maximal


@pytest.mark.parametrize("devices", [3, 5, 8])
def test_patterns_are_the_maximal_contents_of_a_node(devices: int) -> None:
    sizes = (1, 2, 3, 5)
    found = list(patterns(sizes[1:], devices))
    expected = set()
    for number in range(devices // 2 + 1):
        for bag in combinations_with_replacement(sizes[1:], number):
            if devices - sum(bag) < 2 and sum(bag) <= devices:
                expected.add(tuple(bag.count(s) for s in sizes[1:]))
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_dead_devices_make_nodes_smaller() -> None:
    model = ModelSpec("toy", 8, 8, 4, 32, 256, 1024, 2048, 4, ())
    spec = ClusterSpec(10, 4, 10**6, 1e9, 16, model, 64, 512)
    assert nodes_of(spec) == (4, 4, 2)
    assert nodes_of(spec, (0, 1, 8)) == (4, 2, 1)
    assert nodes_of(spec, (8, 9)) == (4, 4)
