"""Which switches are in place: against `choose_mode` on the planned transfers, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from controller.transition import TransitionRoom, live_limits
from engine.cluster import SwitchMode, dense_deployment, parse_deployment_key
from engine.migration.order import choose_mode, default_staging_bytes
from engine.migration.plan import place, plan_transfers
from engine.profile import ProfiledCluster

MakeCluster = Callable[[int, int], ProfiledCluster]
KEYS = ("4xtp1pp1", "1xtp2pp1+2xtp1pp1", "2xtp2pp1", "1xtp4pp1", "1xtp1pp2+2xtp1pp1")


@pytest.mark.parametrize("headroom_mb", [0, 6, 14])
@pytest.mark.parametrize("key", KEYS)
def test_it_says_what_a_plan_would(
    synthetic_cluster: ProfiledCluster, key: str, headroom_mb: int
) -> None:
    spec = replace(synthetic_cluster.spec, switch_headroom_bytes=headroom_mb * 2**20)
    current = dense_deployment(parse_deployment_key("4xtp1pp1"))
    target = parse_deployment_key(key)
    room = TransitionRoom(spec, synthetic_cluster.profile.configs)
    assert not room.always_live
    placed, staging = place(spec, current, target), default_staging_bytes(spec)
    transfers = plan_transfers(spec.model, current, placed)
    limits = live_limits(spec, current, target)
    for replica in range(4):
        most = limits.get(replica, 100)
        for used in {0, max(most, 0), max(most + 1, 0), 400}:
            blocks = dict.fromkeys(range(4), 0) | {replica: used}
            mode, _ = choose_mode(spec, current, placed, transfers, blocks, staging)
            assert room.is_in_place(current, blocks, target) == (mode is SwitchMode.IN_PLACE)


def test_a_pool_with_room_for_two_generations_is_never_asked(
    synthetic_cluster: ProfiledCluster,
) -> None:
    room = TransitionRoom(synthetic_cluster.spec, synthetic_cluster.profile.configs)
    assert room.always_live
    current = dense_deployment(parse_deployment_key("4xtp1pp1"))
    assert not room.is_in_place(current, {0: 10**9}, parse_deployment_key("2xtp2pp1"))


def test_what_cannot_be_placed_is_left_to_others(synthetic_cluster: ProfiledCluster) -> None:
    spec = replace(synthetic_cluster.spec, switch_headroom_bytes=0)
    current = dense_deployment(parse_deployment_key("4xtp1pp1"))
    assert live_limits(spec, current, parse_deployment_key("5xtp1pp1")) == {}
