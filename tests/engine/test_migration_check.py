"""Plans from outside: what plan_switch makes passes, every way of breaking one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import pytest

from engine.cluster import (
    DISK,
    ClusterSpec,
    Deployment,
    KvCostParams,
    ParallelConfig,
    Placement,
    Replica,
    SwitchPlan,
    Transfer,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InfeasibleError, InvalidRequestError
from engine.migration.check import check_plan
from engine.migration.plan import plan_switch

KV = KvCostParams(1e9, 1000.0, 0.01)
KEYS = ("4xtp1pp1", "2xtp2pp1", "1xtp4pp1", "1xtp2pp2", "1xtp1pp3+1xtp1pp1", "1xtp1pp4", "2xtp1pp1")
PP2 = dense_deployment(parse_deployment_key("1xtp1pp2"))


def plan(spec: ClusterSpec, current: Deployment = PP2, key: str = "2xtp1pp1") -> SwitchPlan:
    return plan_switch(spec, current, 0, parse_deployment_key(key), KV)


@pytest.mark.parametrize(("old", "new"), list(permutations(KEYS, 2)))
def test_every_plan_of_ours_passes_and_no_transfer_is_spare(
    tiny_spec: ClusterSpec, old: str, new: str
) -> None:
    current = dense_deployment(parse_deployment_key(old))
    made = plan(tiny_spec, current, new)
    check_plan(tiny_spec, current, made)
    for i in range(0, len(made.transfers), 7):
        less = replace(made, transfers=made.transfers[:i] + made.transfers[i + 1 :])
        with pytest.raises(
            InvalidRequestError, match=r"plan again|nor do transfers listed before bring it"
        ):
            check_plan(tiny_spec, current, less)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: replace(t, src=99), "device 99 does not hold"),
        (lambda t: replace(t, src=t.dst), "does not hold"),
        (lambda t: replace(t, dst=99), "device 99 does not need it"),
        (lambda t: replace(t, tensor="nope"), "does not need it"),
        (lambda t: replace(t, stop=10**6), r"needs \[\d+, \d+\) only"),
        (lambda t: replace(t, start=t.stop), r"needs \[\d+, \d+\) only"),
        (lambda t: replace(t, dim=7), "has dim 7"),
        (lambda t: replace(t, nbytes=5), "5 bytes, expected"),
    ],
)
def test_a_broken_transfer_is_named(
    tiny_spec: ClusterSpec, change: Callable[[Transfer], Transfer], expected: str
) -> None:
    made = plan(tiny_spec)
    broken = replace(made, transfers=(change(made.transfers[0]), *made.transfers[1:]))
    with pytest.raises(InvalidRequestError, match=expected):
        check_plan(tiny_spec, PP2, broken)


def scale_out(spec: ClusterSpec) -> tuple[Deployment, SwitchPlan]:
    current = dense_deployment(parse_deployment_key("1xtp1pp1"))
    return current, plan(spec, current, "4xtp1pp1")


def test_a_device_may_forward_what_has_arrived_and_only_then(tiny_spec: ClusterSpec) -> None:
    current, made = scale_out(tiny_spec)
    forwarded = [t for t in made.transfers if t.src != 0]
    assert forwarded
    check_plan(tiny_spec, current, made)
    early = (forwarded[0], *(t for t in made.transfers if t != forwarded[0]))
    with pytest.raises(InvalidRequestError, match=r"nor do transfers listed before.* bring \[\]"):
        check_plan(tiny_spec, current, replace(made, transfers=early))


def test_the_disk_holds_everything(tiny_spec: ClusterSpec) -> None:
    current, made = scale_out(tiny_spec)
    read = tuple(replace(t, src=DISK) for t in made.transfers)
    check_plan(tiny_spec, current, replace(made, transfers=read))


def test_a_dead_device_neither_holds_nor_serves(tiny_spec: ClusterSpec) -> None:
    current, made = scale_out(tiny_spec)
    with pytest.raises(InfeasibleError, match=r"devices \[3\], which are dead"):
        check_plan(tiny_spec, current, made, dead_devices=[3])
    tp2 = dense_deployment(parse_deployment_key("1xtp2pp1"))
    grown = plan(tiny_spec, tp2, "1xtp2pp1+1xtp1pp1")
    moved = replace(grown, target=Deployment(grown.target.replicas[1:]))
    with pytest.raises(InvalidRequestError, match="device 0 does not hold that interval"):
        check_plan(tiny_spec, tp2, moved, dead_devices=[0])


def test_a_transfer_sent_twice_is_refused(tiny_spec: ClusterSpec) -> None:
    made = plan(tiny_spec)
    with pytest.raises(InvalidRequestError, match="brings or keeps"):
        check_plan(tiny_spec, PP2, replace(made, transfers=(*made.transfers, made.transfers[0])))


def test_a_device_that_is_not_there_is_infeasible(tiny_spec: ClusterSpec) -> None:
    target = Deployment((Replica(50, ParallelConfig(1, 1), Placement((9,))),))
    with pytest.raises(InfeasibleError, match=r"devices \[9\], the cluster has 0\.\.3"):
        check_plan(tiny_spec, PP2, replace(plan(tiny_spec), target=target))
