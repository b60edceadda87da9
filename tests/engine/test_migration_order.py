"""The order of a switch in place against a replay, byte by byte, and against brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import (
    DISK,
    ClusterSpec,
    Deployment,
    ModelSpec,
    ParallelConfig,
    Placement,
    Replica,
    SwitchMode,
    TensorSpec,
    Transfer,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError
from engine.migration.order import (
    InPlaceStep,
    choose_mode,
    default_staging_bytes,
    in_place_order,
    live_shortage,
)
from engine.shards import Shard, rank_shards

SHAPES = [ParallelConfig(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 3) if tp * pp <= 8]
Holding = dict[str, Shard]


def spec_of(num_devices: int = 8, num_layers: int = 3, memory: int = 10**6) -> ClusterSpec:
    tensors = [TensorSpec("embed", (16, 8), "embed"), TensorSpec("head", (24, 8), "head")]
    for layer in range(num_layers):
        tensors += [
            TensorSpec(f"{layer}.k", (8, 8), "kv", layer, 0),
            TensorSpec(f"{layer}.o", (8, 16), "layer", layer, 1),
            TensorSpec(f"{layer}.norm", (8,), "layer", layer),
        ]
    model = ModelSpec("toy", num_layers, 8, 4, 2, 8, 16, 32, 1, tuple(tensors))
    return ClusterSpec(num_devices, num_devices, memory, 1e9, 4, model, 8, 64, 0)


def holdings(model: ModelSpec, deployment: Deployment) -> dict[int, Holding]:
    return {
        device: {s.tensor: s for s in rank_shards(model, r.parallel, rank)}
        for r in deployment.replicas
        for rank, device in enumerate(r.placement.devices)
    }


def transfers_of(model: ModelSpec, current: Deployment, target: Deployment) -> list[Transfer]:
    """Every missing row run of every shard, from the first device that holds its rows."""
    held, transfers = holdings(model, current), []
    for dst, needs in holdings(model, target).items():
        for name, need in needs.items():
            own = rows(held.get(dst, {}).get(name))
            missing = [row for row in range(need.start, need.stop) if row not in own]
            source = {
                row: next((d for d, h in held.items() if row in rows(h.get(name))), DISK)
                for row in missing
            }
            for src, run in groupby(missing, key=source.__getitem__):
                transfers += [_transfer(need, r, src, dst) for r in _runs(list(run))]
    return transfers


def rows(shard: Shard | None) -> range:
    return range(0) if shard is None else range(shard.start, shard.stop)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1] + 1


def _transfer(need: Shard, run: tuple[int, int], src: int, dst: int) -> Transfer:
    nbytes = need.nbytes * (run[1] - run[0]) // (need.stop - need.start)
    return Transfer(need.tensor, need.dim, *run, src, dst, nbytes)


def changing(current: Deployment, target: Deployment) -> tuple[set[int], set[int]]:
    """Devices of the replicas that go, and of those that come."""
    kept = set(current.replicas) & set(target.replicas)
    return tuple(  # type: ignore[return-value]
        {d for r in deployment.replicas if r not in kept for d in r.placement.devices}
        for deployment in (current, target)
    )


def replay(
    spec: ClusterSpec,
    current: Deployment,
    target: Deployment,
    steps: Sequence[InPlaceStep],
    staging_bytes: int,
    free_bytes: dict[int, int],
) -> None:
    """Carry the steps out on paper; AssertionError when memory or a source is not there."""
    old, wanted = holdings(spec.model, current), holdings(spec.model, target)
    limit = {
        d: sum(s.nbytes for s in old.get(d, {}).values()) + free - staging_bytes
        for d, free in free_bytes.items()
    }
    leaving, coming = changing(current, target)
    new: dict[int, Holding] = {d: {} for d in coming}
    for d in coming:  # an interval that stays keeps its storage
        new[d] = {n: s for n, s in wanted[d].items() if old.get(d, {}).get(n) == s}
    staged: dict[int, Holding] = {d: {} for d in leaving}
    filled: dict[tuple[int, str], set[int]] = {}

    def check_memory() -> None:
        for d in leaving | coming:
            held = {(s.tensor, s.start, s.stop): s.nbytes for s in new.get(d, {}).values()}
            held |= {
                (s.tensor, s.start, s.stop): s.nbytes
                for s in old.get(d, {}).values()
                if s.tensor not in staged.get(d, {})
            }
            assert sum(held.values()) <= limit[d], (d, held, limit[d])
            assert sum(s.nbytes for s in staged.get(d, {}).values()) <= staging_bytes

    for step in steps:
        for d, name in step.parked:
            staged[d][name] = old[d][name]
        for d, name in step.made:
            assert name not in new[d]
            new[d][name] = wanted[d][name]
            filled[d, name] = set(rows(wanted[d][name])) & set(rows(old.get(d, {}).get(name)))
        check_memory()
        for t in step.transfers:
            span = set(range(t.start, t.stop))
            at_source = set(rows(old.get(t.src, {}).get(t.tensor)))
            assert t.src == DISK or span <= at_source | filled.get((t.src, t.tensor), set())
            assert not span & filled[t.dst, t.tensor]
            filled[t.dst, t.tensor] |= span
        for d, name in step.made:
            assert filled[d, name] == set(rows(new[d][name])), (d, name)
        for d, name in step.freed:
            staged[d].pop(name, None)
            del old[d][name]
    check_memory()
    assert not any(staged.values())
    for d in leaving | coming:
        assert new.get(d, {}) == (wanted[d] if d in coming else {})
        assert all(new.get(d, {}).get(n) == s for n, s in old.get(d, {}).items() if d in leaving)


@st.composite
def switches(draw: st.DrawFn, num_devices: int, max_pp: int) -> tuple[Deployment, Deployment]:
    """Two deployments on devices drawn at random; a replica of the first may stay."""
    shapes = [shape for shape in SHAPES if shape.pp <= max_pp]
    found = []
    for first_id in (0, 10):
        devices = draw(st.permutations(range(num_devices)))
        replicas, at = [], 0
        for shape in draw(st.lists(st.sampled_from(shapes), min_size=2, max_size=8)):
            if at + shape.num_devices <= num_devices:
                placed = Placement(tuple(devices[at : at + shape.num_devices]))
                replicas.append(Replica(first_id + len(replicas), shape, placed))
                at += shape.num_devices
        found.append(replicas)
    current, target = (Deployment(tuple(r)) for r in found)
    if draw(st.booleans()) and current.replicas:
        stays = current.replicas[0]
        others = [r for r in target.replicas if not set(r.placement.devices) & _on(stays)]
        target = Deployment((stays, *others))
    return current, target


def _on(replica: Replica) -> set[int]:
    return set(replica.placement.devices)


@given(switches(8, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_no_step_needs_more_than_there_is(
    switch: tuple[Deployment, Deployment], data: st.DataObject
) -> None:
    current, target = switch
    spec = spec_of(num_layers=data.draw(st.integers(3, 5)))
    leaving, coming = changing(current, target)
    old, new = holdings(spec.model, current), holdings(spec.model, target)
    staging = data.draw(st.sampled_from((0, 64, 128, 192)))
    free = {}
    for d in sorted(leaving | coming):
        before, after = (sum(s.nbytes for s in h.get(d, {}).values()) for h in (old, new))
        slack = data.draw(st.sampled_from((0, 0, 8, 64, 200)))
        free[d] = max(0, after - before) + staging + slack
    transfers = transfers_of(spec.model, current, target)
    try:
        steps = in_place_order(spec, current, target, transfers, staging, free)
    except InfeasibleError:
        return
    assert [t for s in steps for t in s.transfers if t.tensor == "embed"] == [
        t for t in transfers if t.tensor == "embed"
    ]
    assert sum(len(s.transfers) for s in steps) == len(transfers)
    replay(spec, current, target, steps, staging, free)


@given(switches(4, 1), st.data())
@settings(max_examples=60, deadline=None)
def test_an_order_is_found_whenever_one_exists(
    switch: tuple[Deployment, Deployment], data: st.DataObject
) -> None:
    """Without staging, against every permutation of the tensors."""
    current, target = switch
    spec = spec_of(4, num_layers=1)
    leaving, coming = changing(current, target)
    old, new = holdings(spec.model, current), holdings(spec.model, target)
    free = {d: data.draw(st.sampled_from((0, 72, 104, 136, 200))) for d in sorted(leaving | coming)}
    moves: dict[str, dict[int, tuple[int, int]]] = {}
    for d in free:
        for name in old.get(d, {}).keys() | new.get(d, {}).keys():
            was = old.get(d, {}).get(name) if d in leaving else None
            comes = new.get(d, {}).get(name) if d in coming else None
            if was != comes:
                moves.setdefault(name, {})[d] = (
                    comes.nbytes if comes else 0,
                    was.nbytes if was else 0,
                )

    def works(order: Sequence[str]) -> bool:
        used = dict.fromkeys(free, 0)
        for name in order:
            if any(used[d] + made > free[d] for d, (made, _) in moves[name].items()):
                return False
            for d, (made, freed) in moves[name].items():
                used[d] += made - freed
        return True

    possible = any(works(order) for order in permutations(moves))
    try:
        in_place_order(spec, current, target, [], 0, free)
    except InfeasibleError:
        assert not possible
    else:
        assert possible


def swapped() -> tuple[Deployment, Deployment]:
    """Two stages that change places: each device needs exactly what the other must free."""
    pp2 = ParallelConfig(1, 2)
    current = Deployment((Replica(0, pp2, Placement((0, 1))),))
    return current, Deployment((Replica(1, pp2, Placement((1, 0))),))


def test_a_cycle_is_broken_through_staging() -> None:
    spec = spec_of(2, num_layers=2)
    current, target = swapped()
    transfers = transfers_of(spec.model, current, target)
    # device 0 holds embed 128 + layer 200, device 1 layer 200 + norm 0 + head 192
    growth = {0: 64, 1: 0}
    staging = 192
    free = {d: g + staging for d, g in growth.items()}
    steps = in_place_order(spec, current, target, transfers, staging, free)
    assert any(step.parked for step in steps)
    replay(spec, current, target, steps, staging, free)
    with pytest.raises(InfeasibleError, match=r"device \d must hold \d+ bytes more .* 7 bytes of"):
        in_place_order(spec, current, target, transfers, 7, {d: g + 7 for d, g in growth.items()})


def test_layers_move_one_by_one_when_there_is_room() -> None:
    spec = spec_of(2, num_layers=4)
    current, target = swapped()
    transfers = transfers_of(spec.model, current, target)
    steps = in_place_order(spec, current, target, transfers, 0, {0: 600, 1: 600})
    assert sorted(step.tensors for step in steps) == [
        *((f"{i}.k", f"{i}.o", f"{i}.norm") for i in range(4)),
        ("embed",),
        ("head",),
    ]
    assert not any(step.parked for step in steps)


def test_live_counts_what_both_generations_need() -> None:
    """tp2 -> 2 x tp1 on two devices, by hand: norms stay, halves become wholes."""
    spec = spec_of(2, num_layers=1)
    current = dense_deployment(parse_deployment_key("1xtp2pp1"))
    target = dense_deployment(parse_deployment_key("2xtp1pp1"), 1)
    # device 1 holds embed 128, k 32, o 64, norm 8; it gets embed, k 64, o 128, norm, head 192;
    # a token of KV is 2 * 2 heads * 2 = 8 bytes for tp2, 16 for tp1
    weights = 128 + 32 + 64 + 8 + 64 + 128 + 192
    needed = weights + 3 * 4 * 8 + 32 * 16 + 10

    def shortage(memory: int) -> str:
        return live_shortage(spec_of(2, 1, memory), current, target, {0: 3}, 10)

    assert shortage(needed) == ""
    assert str(needed) in shortage(needed - 1)
    assert "device" in shortage(needed - 1)
    transfers = transfers_of(spec.model, current, target)
    assert choose_mode(spec, current, target, transfers, {0: 3}, 10) == (SwitchMode.LIVE, "")
    tight = spec_of(2, 1, needed - 1)
    mode, why = choose_mode(tight, current, target, transfers, {0: 3}, 10)
    assert mode is SwitchMode.IN_PLACE
    assert str(needed - 1) in why
    with pytest.raises(InfeasibleError, match="neither live nor in place"):
        choose_mode(spec_of(2, 1, 300), current, target, transfers, {0: 3}, 10)


def test_a_replica_that_stays_is_not_counted() -> None:
    spec = spec_of(2, num_layers=1, memory=600)
    current = dense_deployment(parse_deployment_key("2xtp1pp1"))
    target = Deployment(current.replicas[:1])
    assert live_shortage(spec, current, target, {0: 10**6}, 0) == ""
    assert default_staging_bytes(spec) == 600 // 16
