"""The switch plan against brute force and by hand: placement, transfers, KV copies."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_cluster import KV, SHAPES, cluster, deployments, model

from engine.cluster import (
    Binding,
    BoundSequence,
    ClusterSpec,
    Deployment,
    KvCostParams,
    ParallelConfig,
    Placement,
    Replica,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError
from engine.migration.binding import (
    MAX_ROUNDS,
    bind_sequence,
    drain_timeout_s,
    is_round_due,
    is_settled,
)
from engine.migration.kv import kv_moves
from engine.migration.plan import (
    held_shards,
    place,
    plan_switch,
    plan_transfers,
    switch_cost,
)


def missing_bytes(spec: ClusterSpec, current: Deployment, target: Deployment) -> int:
    """Bytes every device lacks for its new rank, counted element by element."""
    held, total = held_shards(spec.model, current), 0
    for device, needs in held_shards(spec.model, target).items():
        for name, need in needs.items():
            have = held.get(device, {}).get(name)
            owned = set() if have is None else set(range(have.start, have.stop))
            lacking = len(set(range(need.start, need.stop)) - owned)
            total += need.nbytes * lacking // (need.stop - need.start)
    return total


def with_devices(target: Deployment, order: tuple[int, ...]) -> Deployment:
    replicas, first = [], 0
    for r in target.replicas:
        count = r.parallel.num_devices
        replicas.append(Replica(r.replica_id, r.parallel, Placement(order[first : first + count])))
        first += count
    return Deployment(tuple(replicas))


@settings(max_examples=40, deadline=None)
@given(deployments(4), deployments(4))
def test_placement_moves_as_few_bytes_as_any_permutation(
    old: tuple[ParallelConfig, ...], new: tuple[ParallelConfig, ...]
) -> None:
    spec, current = cluster(4), dense_deployment(old)
    plan = plan_switch(spec, current, 0, new, KV)
    needed = sum(c.num_devices for c in new)
    best = min(
        missing_bytes(spec, current, with_devices(plan.target, order))
        for order in permutations(range(4), needed)
    )
    assert plan.weight_bytes == best
    assert plan.lower_bound_bytes == best
    assert switch_cost(spec, current, new).weight_bytes == best


@settings(max_examples=60, deadline=None)
@given(deployments(6), deployments(6))
def test_transfers_fill_exactly_what_is_missing(
    old: tuple[ParallelConfig, ...], new: tuple[ParallelConfig, ...]
) -> None:
    spec, current = cluster(6), dense_deployment(old)
    target = place(spec, current, new)
    held, received = held_shards(spec.model, current), {}
    for t in plan_transfers(spec.model, current, target):
        source = held.get(t.src, {}).get(t.tensor)
        owned = set() if source is None else set(range(source.start, source.stop))
        for element in range(t.start, t.stop):
            assert element in owned or (t.src, t.tensor, element) in received
        for element in range(t.start, t.stop):
            key = (t.dst, t.tensor, element)
            assert key not in received, "sent twice"
            received[key] = True
    for device, needs in held_shards(spec.model, target).items():
        for name, need in needs.items():
            have = held.get(device, {}).get(name)
            for element in range(need.start, need.stop):
                local = have is not None and have.start <= element < have.stop
                assert local != ((device, name, element) in received)


def test_merging_four_tp4_into_two_tp8_moves_nothing() -> None:
    spec = cluster(16)
    plan = plan_switch(
        spec, dense_deployment(parse_deployment_key("4xtp4pp1")), 3,
        parse_deployment_key("2xtp8pp1"), KV,
    )  # fmt: skip
    assert (plan.weight_bytes, plan.transfers, plan.expected_epoch) == (0, (), 3)


def test_a_replica_that_stays_keeps_id_and_devices() -> None:
    spec = cluster(4)
    current = dense_deployment(parse_deployment_key("1xtp2pp1+2xtp1pp1"))
    target = place(spec, current, parse_deployment_key("2xtp2pp1"))
    assert current.replicas[0] in target.replicas
    assert target.replicas[1].replica_id == 3


@given(deployments(8), deployments(8))
@settings(max_examples=60, deadline=None)
def test_tp_groups_stay_within_a_node(
    old: tuple[ParallelConfig, ...], new: tuple[ParallelConfig, ...]
) -> None:
    spec = replace(cluster(8), devices_per_node=4)
    target = place(spec, place(spec, Deployment(()), old), new)
    assert len(target.devices) == sum(c.num_devices for c in new)
    for replica in target.replicas:
        tp, nodes = replica.parallel.tp, [d // 4 for d in replica.placement.devices]
        if tp <= 4:
            stages = [nodes[i : i + tp] for i in range(0, len(nodes), tp)]
            assert all(len(set(stage)) == 1 for stage in stages), target


def test_two_groups_take_a_node_each() -> None:
    spec = replace(cluster(4), devices_per_node=2)
    current = place(spec, Deployment(()), parse_deployment_key("1xtp4pp1"))
    target = place(spec, current, parse_deployment_key("2xtp2pp1"))
    assert sorted(sorted(r.placement.devices) for r in target.replicas) == [[0, 1], [2, 3]]
    spread = place(replace(spec, devices_per_node=4), current, parse_deployment_key("2xtp2pp1"))
    moved = [missing_bytes(spec, current, t) for t in (target, spread)]
    assert moved[0] >= moved[1]  # what staying within nodes costs


def test_dead_devices_are_left_out() -> None:
    spec, current = cluster(4), dense_deployment(parse_deployment_key("3xtp1pp1"))
    target = place(spec, current, parse_deployment_key("2xtp1pp1"), dead_devices=[0])
    assert 0 not in target.devices
    with pytest.raises(InfeasibleError, match="only 3 are alive"):
        place(spec, current, parse_deployment_key("1xtp4pp1"), dead_devices=[0])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("5xtp1pp1", "needs 5 devices, the cluster has 4"),
        ("1xtp3pp1", "8 attention heads, which tp=3 does not divide"),
        ("1xtp1pp8", "needs 8 devices"),
        ("tp2", "not understood"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(key: str, message: str) -> None:
    spec, current = cluster(4), dense_deployment(parse_deployment_key("4xtp1pp1"))
    with pytest.raises(InfeasibleError, match=message):
        place(spec, current, parse_deployment_key(key))


def test_a_deployment_without_room_for_one_sequence_is_refused() -> None:
    spec = ClusterSpec(4, 4, 3000, 1e9, 4, model(), 8, 64)
    with pytest.raises(InfeasibleError, match="more memory"):
        place(spec, dense_deployment(parse_deployment_key("1xtp4pp1")), [ParallelConfig(1, 1)])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from(SHAPES))
def test_kv_copies_cover_every_layer_and_head_once(
    src: ParallelConfig, dst: ParallelConfig
) -> None:
    spec = model(num_layers=5)
    old = dense_deployment([src]).replicas[0]
    new = dense_deployment([dst], first_replica_id=1).replicas[0]
    written = {}
    for move in kv_moves(spec, old, new, [3, 1], [0, 2]):
        src_rank = old.placement.devices.index(move.src)
        dst_rank = new.placement.devices.index(move.dst)
        src_layer0 = src.layer_range(src.stage_of(src_rank), 5)[0]
        dst_layer0 = dst.layer_range(dst.stage_of(dst_rank), 5)[0]
        src_head0 = src.shard_range(src.tp_rank_of(src_rank), 8)[0]
        dst_head0 = dst.shard_range(dst.tp_rank_of(dst_rank), 8)[0]
        assert move.src_layers[0] + src_layer0 == move.dst_layers[0] + dst_layer0
        assert move.src_heads[0] + src_head0 == move.dst_heads[0] + dst_head0
        for layer in range(*move.dst_layers):
            for head in range(*move.dst_heads):
                key = (layer + dst_layer0, head + dst_head0)
                assert key not in written
                written[key] = move
    assert len(written) == 5 * 8


def test_binding_takes_the_cheapest_way() -> None:
    kv = KvCostParams(link_bytes_per_s=1000.0, prefill_tokens_per_s=100.0, decode_step_s=0.1)

    def bound(computed: int, nbytes: int, fits: bool, remaining: int) -> Binding:
        return bind_sequence(kv, "r", computed, nbytes, fits, remaining).binding

    # 50 tokens: 0.5 s to compute again; 400 bytes: 0.4 s to move; 600 bytes: 0.6 s
    assert bound(50, 400, True, 9) is Binding.MIGRATE
    assert bound(50, 600, True, 9) is Binding.RECOMPUTE
    assert bound(50, 400, False, 9) is Binding.RECOMPUTE
    assert bound(50, 400, True, 3) is Binding.DRAIN
    assert bound(50, 400, True, 4) is Binding.MIGRATE  # of equals the one that waits for nobody
    assert bound(0, 0, True, 1) is Binding.RECOMPUTE
    assert bind_sequence(kv, "r", 50, 400, False, 3) == BoundSequence(
        "r", Binding.DRAIN, 3 * 0.1, None, 0.5
    )


def test_rounds_of_kv_copies() -> None:
    """Until one is shorter than a step (0.1 s) or longer than half of the one before."""
    assert is_round_due([], 0.1)
    assert is_round_due([1.0], 0.1)
    assert not is_round_due([0.09], 0.1)
    assert is_round_due([1.0, 0.5], 0.1)
    assert not is_round_due([1.0, 0.51], 0.1)
    assert not is_round_due([1.0, 0.5, 0.25, 0.09], 0.1)
    halving = [2.0**-i for i in range(MAX_ROUNDS)]
    assert is_round_due(halving[:-1], 0.01)
    assert not is_round_due(halving, 0.01)


def test_who_is_bound_for_good() -> None:
    bound = BoundSequence("r", Binding.DRAIN, 2.0, None, 9.0)
    assert not is_settled(None, may_drain=True)
    assert is_settled(bound, may_drain=True)
    assert not is_settled(bound, may_drain=False)
    assert is_settled(replace(bound, binding=Binding.MIGRATE), may_drain=False)
    assert is_settled(replace(bound, binding=Binding.RECOMPUTE), may_drain=False)
    waited = replace(bound, binding=Binding.RECOMPUTE, recompute_s=0.0)
    assert not is_settled(waited, may_drain=True)  # it may have begun by the next round
    assert drain_timeout_s([0.5, 2.0]) == 3.0
