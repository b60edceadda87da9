"""Sources and schedule: the makespan against a second method, bounds, order, forwarding."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_cluster import KV, cluster, deployments, model

from engine.cluster import (
    DISK,
    ClusterSpec,
    Deployment,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    Transfer,
    dense_deployment,
    parse_deployment_key,
)
from engine.migration.bounds import lower_bound_s
from engine.migration.check import check_plan
from engine.migration.open_shop import Job, order_jobs
from engine.migration.pieces import device_groups, divide
from engine.migration.plan import (
    link_seconds,
    node_seconds,
    place,
    plan_switch,
    plan_transfers,
    switch_cost,
)
from engine.migration.roles import held_shards, role_table
from engine.migration.schedule import devices_of, link_bytes
from engine.migration.sources import balance

Configs = tuple[ParallelConfig, ...]
Rows = tuple[str, int]


def optimum(model: ModelSpec, old: Deployment, new: Deployment, relays: bool = True) -> float:
    table = role_table(model, {*old.configs, *new.configs})
    groups = device_groups(table, old, new)
    return balance(table, groups, divide(table, groups), relays).port_bytes


def rows_by_set(
    model: ModelSpec, old: Deployment, new: Deployment
) -> Iterator[tuple[frozenset[int], frozenset[int], int]]:
    """(holders, devices that lack it, bytes) of every single row of every tensor."""
    held, needed = held_shards(model, old), held_shards(model, new)
    for tensor in model.tensors:
        for row in range(tensor.shape[tensor.tp_dim or 0]):
            has = {d for d, s in held.items() if covers(s.get(tensor.name), row)}
            wants = {d for d, s in needed.items() if covers(s.get(tensor.name), row)}
            size = tensor.shape[1 - (tensor.tp_dim or 0)] if len(tensor.shape) > 1 else 1
            if wants - has:
                yield frozenset(has), frozenset(wants - has), size * model.dtype_bytes


def covers(shard: object, row: int) -> bool:
    return shard is not None and shard.start <= row < shard.stop  # type: ignore[attr-defined]


def least_makespan(model: ModelSpec, old: Deployment, new: Deployment) -> float:
    """Bytes by Hall's condition: every set of devices must send what nobody else can; the optimum
    is the largest such load per device, over all sets, or what one device must receive."""
    rows = list(rows_by_set(model, old, new))
    devices = sorted(old.devices | new.devices)
    loads = [float(sum(n for _, lacking, n in rows if d in lacking)) for d in devices]
    for size in range(1, len(devices) + 1):
        for chosen in map(frozenset, combinations(devices, size)):
            forced = sum(
                n * (len(lacking) if lacking <= chosen else 1)
                for has, lacking, n in rows
                if has <= chosen
            )
            loads.append(forced / size)
    return max(loads)


@settings(max_examples=25, deadline=None)
@given(deployments(5), deployments(5))
def test_the_programme_finds_the_least_makespan(old: Configs, new: Configs) -> None:
    spec, current = cluster(5, num_layers=4), dense_deployment(old)
    target = place(spec, current, new)
    least = least_makespan(spec.model, current, target)
    assert optimum(spec.model, current, target) == pytest.approx(least, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(deployments(8), deployments(8), st.integers(256, 4096))
def test_plans_keep_their_bounds_and_pass_the_check(
    old: Configs, new: Configs, chunk_bytes: int
) -> None:
    spec, current = cluster(8, hidden=64), dense_deployment(old)
    made = plan_switch(spec, current, 0, new, KV, chunk_bytes=chunk_bytes)
    check_plan(spec, current, made)
    best_s = optimum(spec.model, current, made.target) / spec.link_bytes_per_s
    assert made.lower_bound_s <= best_s * (1 + 1e-6)
    assert made.lower_bound_s <= made.predicted_s
    assert made.weight_bytes == sum(t.nbytes for t in made.transfers) == made.lower_bound_bytes
    uncut = 16 * 64 * 4  # bytes of the largest tensor that is not sliced
    assert made.predicted_s <= best_s + 4 * uncut / spec.link_bytes_per_s
    assert max((t.nbytes for t in made.transfers if t.dim is not None), default=0) <= chunk_bytes
    assert switch_cost(spec, current, new).seconds == pytest.approx(best_s)


@settings(max_examples=40, deadline=None)
@given(deployments(6), deployments(6), st.sets(st.integers(0, 5), max_size=2))
def test_what_only_dead_devices_held_is_read_from_disk(
    old: Configs, new: Configs, dead: set[int]
) -> None:
    spec, current = cluster(6), dense_deployment(old)
    if sum(c.num_devices for c in new) > 6 - len(dead):
        return
    made = plan_switch(spec, current, 0, new, KV, dead_devices=dead)
    check_plan(spec, current, made, dead)
    alive = [s for d, s in held_shards(spec.model, current).items() if d not in dead]
    for t in made.transfers:
        assert not {t.src, t.dst} & dead
        if t.src == DISK:
            assert not any(covers(s.get(t.tensor), row) for s in alive for row in (t.start,))
    assert made.weight_bytes == sum(t.nbytes for t in made.transfers if t.src != DISK)
    assert made.lower_bound_bytes == made.weight_bytes
    assert made.lower_bound_s <= made.predicted_s


@settings(max_examples=60, deadline=None)
@given(deployments(8), deployments(8), st.sets(st.integers(0, 7), max_size=2), st.integers(1, 900))
def test_what_links_carry_is_known_before_the_transfers_are_made(
    old: Configs, new: Configs, dead: set[int], first_id: int
) -> None:
    """Figures of a plan equal those of its transfers, made after them, whatever replica ids are;
    and the transfers equal those that are made at once."""
    if sum(c.num_devices for c in new) > 8 - len(dead):
        return
    spec = cluster(8, 4, hidden=64)
    current = dense_deployment(old, first_id)
    made = plan_switch(spec, current, 0, new, KV, dead_devices=dead, nic_bytes_per_s=1e8)
    figures = made.predicted_s, made.weight_bytes
    known, devices = link_bytes(made.transfers), devices_of(made.transfers)
    listed = tuple(made.transfers)
    assert (known, devices) == (link_bytes(listed), devices_of(listed))
    ports_s = link_seconds(listed, spec.link_bytes_per_s)
    assert figures[0] == max(ports_s, node_seconds(listed, 4, 1e8))
    assert figures[1] == sum(t.nbytes for t in listed if t.src != DISK)
    at_once = plan_transfers(spec.model, current, made.target, dead, node_size=4)
    assert made.transfers == at_once == pickle.loads(pickle.dumps(made)).transfers
    assert hash(made.transfers) == hash(at_once)
    stay = {r.replica_id for r in current.replicas} & {r.replica_id for r in made.target.replicas}
    assert all(current.replica(i) == made.target.replica(i) for i in stay)
    assert made.target == place(spec, current, new, dead)


def scale_out(num_replicas: int, hidden: int = 256) -> tuple[ClusterSpec, Deployment, Deployment]:
    spec = cluster(num_replicas, num_layers=8, hidden=hidden)
    current = dense_deployment([ParallelConfig(1, 1)])
    return spec, current, place(spec, current, [ParallelConfig(1, 1)] * num_replicas)


@pytest.mark.parametrize("num_replicas", [2, 3, 4, 8])
def test_scaling_out_takes_no_longer_for_many_than_for_one(num_replicas: int) -> None:
    spec, current, target = scale_out(num_replicas)
    whole_s = sum(s.nbytes for s in held_shards(spec.model, current)[0].values()) / 1e9
    bound_s = lower_bound_s(spec.model, current, target, 1e9)
    assert bound_s == pytest.approx(whole_s)
    forwarded = plan_transfers(spec.model, current, target)
    assert link_seconds(forwarded, 1e9) == pytest.approx(whole_s, rel=0.03)
    only_sources = plan_transfers(spec.model, current, target, relays=False)
    assert link_seconds(only_sources, 1e9) == pytest.approx((num_replicas - 1) * whole_s)


@pytest.mark.parametrize(
    ("old", "new"),
    [("1xtp4pp1", "4xtp1pp1"), ("2xtp4pp1", "4xtp2pp1"), ("1xtp1pp4", "1xtp4pp1")],
)
def test_one_hop_among_equals_takes_the_bound(old: str, new: str) -> None:
    spec, current = cluster(8, hidden=64), dense_deployment(parse_deployment_key(old))
    made = plan_switch(spec, current, 0, parse_deployment_key(new), KV)
    slack_s = 16 * 64 * 4 / spec.link_bytes_per_s  # an embedding, which is not cut
    assert made.predicted_s <= made.lower_bound_s + slack_s


def in_list_order(transfers: Sequence[Transfer]) -> float:
    """Bytes that pass on the clock when every port takes its transfers in the list's order, one at
    a time, and forwards what has arrived."""
    sends: dict[int, float] = {}
    receives: dict[int, float] = {}
    arrived: dict[tuple[int, str], list[tuple[int, int, float]]] = {}
    for t in transfers:
        here = arrived.get((t.src, t.tensor), [])
        has_it = max((at for a, b, at in here if a < t.stop and t.start < b), default=0.0)
        begin = max(sends.get(t.src, 0.0), receives.get(t.dst, 0.0), has_it)
        sends[t.src] = receives[t.dst] = begin + t.nbytes
        arrived.setdefault((t.dst, t.tensor), []).append((t.start, t.stop, begin + t.nbytes))
    return max([0.0, *receives.values()])


@settings(max_examples=25, deadline=None)
@given(deployments(8), deployments(8))
def test_the_order_keeps_ports_busy(old: Configs, new: Configs) -> None:
    spec, current = cluster(8, num_layers=6, hidden=1024), dense_deployment(old)
    transfers = plan_transfers(spec.model, current, place(spec, current, new))
    assert in_list_order(transfers) <= 1.6 * link_seconds(transfers, 1.0)


def test_jobs_begin_when_both_ports_are_free_and_the_bytes_are_there() -> None:
    def job(src: int, dst: int, after: int = -1) -> Job:
        return Job(0, 0, 10, src, dst, after, 0.0)

    jobs = [job(0, 1), job(1, 2, 0), job(3, 2), job(DISK, 4), job(DISK, 5)]
    order = order_jobs(jobs)
    assert order.index(jobs[0]) < order.index(jobs[1])
    assert set(order[:4]) == {jobs[0], jobs[2], jobs[3], jobs[4]}, "the disk has no port"


def test_holders_send_within_their_node_where_they_can() -> None:
    spec = cluster(8, 4, num_layers=8, hidden=64)
    tp2 = ParallelConfig(2, 1)
    there = [Replica(0, tp2, Placement((0, 1))), Replica(1, tp2, Placement((6, 7)))]
    current = Deployment(tuple(there))
    made = plan_switch(spec, current, 0, [tp2] * 4, KV)
    check_plan(spec, current, made)
    assert made.predicted_s == pytest.approx(made.lower_bound_s, rel=0.05)
    across = sum(t.nbytes for t in made.transfers if t.src // 4 != t.dst // 4)
    assert across <= made.weight_bytes / 20  # of what all hold, shares are no whole copies


def test_the_network_port_of_a_node_counts_in_the_prediction_and_in_the_bound() -> None:
    spec = cluster(4, 2, num_layers=8, hidden=64)
    current = dense_deployment(parse_deployment_key("1xtp2pp1"))
    target = parse_deployment_key("2xtp2pp1")
    fast = plan_switch(spec, current, 0, target, KV)
    slow = plan_switch(spec, current, 0, target, KV, nic_bytes_per_s=1e8)
    once = (16 * 64 + 8 * 64) * 4  # embedding and norms go to both devices, to the node once
    assert slow.lower_bound_s == pytest.approx((slow.weight_bytes - once) / 1e8)
    assert fast.predicted_s < slow.lower_bound_s <= slow.predicted_s <= slow.weight_bytes / 1e8


def test_the_toy_model_is_cut_where_stages_begin() -> None:
    table = role_table(model(num_layers=4), [ParallelConfig(2, 1), ParallelConfig(1, 3)])
    layers = [[t.layer for t in c.tensors] for c in table.classes if c.tensors[0].layer is not None]
    assert sorted(map(tuple, layers)) == [(0, 1)] * 3 + [(2,)] * 3 + [(3,)] * 3
