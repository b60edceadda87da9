"""Pictures and text of an environment follow its state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.cluster import (
    ClusterSnapshot,
    Routing,
    SwitchPhase,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.experiment import build_env
from envs.registered import load_experiment
from envs.render import BAR_CELLS, CACHE, HEAD, RUNNING, SHARE, SWITCHING, WAITING, Frame, draw
from envs.render import show_text as text
from envs.surrogate.cluster import SurrogateCluster
from envs.traffic_feed import IntervalCounts


@pytest.fixture
def frame(small_cluster: ProfiledCluster) -> Frame:
    initial = dense_deployment(parse_deployment_key("1xtp2pp1+2xtp1pp1"))
    cluster = SurrogateCluster(small_cluster, initial)
    counts = IntervalCounts(arrived=30, finished=20, met=10, rejected=2)
    return Frame(cluster.snapshot(), cluster.spec, counts, 10.0, 0.0, 0.25)


def with_load(frame: Frame, replica: int, **load: int) -> Frame:
    stats = list(frame.snapshot.replicas)
    stats[replica] = replace(stats[replica], **load)
    return replace(frame, snapshot=replace(frame.snapshot, replicas=tuple(stats)))


def pixels(picture: NDArray[np.uint8], color: tuple[int, int, int]) -> int:
    """Of that colour, the legend left out."""
    found = (picture[: HEAD + 240] == np.array(color, np.uint8)).all(axis=-1)
    return int(found.sum())


def test_text_by_hand(frame: Frame) -> None:
    lines = text(with_load(frame, 0, num_running=8, num_waiting=20)).splitlines()
    assert lines[0] == "t = 0 s   1xtp2pp1+2xtp1pp1   epoch 0"
    assert lines[1].startswith("arrived 3.00/s   finished 2.00/s   goodput 1.00/s   rejected 2")
    assert lines[2] == "switch  no switch yet"
    assert lines[3] == "replica 0 tp2pp1 on devices 0,1, routed by load"
    half = "#" * (BAR_CELLS // 2) + "." * (BAR_CELLS // 2)  # 8 of at most 16 sequences
    assert lines[4].split() == ["running", "8", half]
    assert lines[5].split() == ["waiting", "20", "#" * BAR_CELLS]
    assert len(lines) == 3 + 3 * 4


def test_picture_has_one_size_whatever_the_deployment(frame: Frame) -> None:
    picture = draw(frame)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    other = dense_deployment(parse_deployment_key("1xtp4pp1"))
    snapshot = replace(frame.snapshot, deployment=other, replicas=())
    changed = draw(replace(frame, snapshot=snapshot))
    assert changed.shape == picture.shape
    assert (changed != picture).any()


def test_bars_grow_with_what_they_show(frame: Frame) -> None:
    idle = draw(frame)
    assert not any(pixels(idle, color) for color in (RUNNING, WAITING, CACHE, SHARE))
    for color, name, small, large in (
        (RUNNING, "num_running", 4, 8),
        (WAITING, "num_waiting", 5, 10),
        (CACHE, "kv_blocks_used", 10, 20),
    ):
        one, two = (pixels(draw(with_load(frame, 1, **{name: n})), color) for n in (small, large))
        assert two == pytest.approx(2 * one, rel=0.1), name
        assert one > 0, name


def test_routing_switch_and_dead_devices_are_seen(frame: Frame) -> None:
    snapshot = frame.snapshot
    routing = Routing((0, 1, 2), ((0.5, 0.25, 0.25), (0.5, 0.25, 0.25)), (), ((0.5, 0.5),))
    ticket = SwitchTicket("switch-7", SwitchPhase.TRANSFER, "a", "b", 0, 1.0, 3.5)

    def shown(**changes: object) -> tuple[NDArray[np.uint8], str]:
        changed: ClusterSnapshot = replace(snapshot, **changes)  # type: ignore[arg-type]
        other = replace(frame, snapshot=changed)
        return draw(other), text(other)

    picture, lines = shown(routing=routing)
    assert pixels(picture, SHARE) > 0
    assert "routed 50 %" in lines
    picture, lines = shown(switch=ticket)
    assert pixels(picture, SWITCHING) > 0 == pixels(draw(frame), SWITCHING)
    assert "switch-7: a to b, transfer, 2.5 s" in lines
    picture, lines = shown(dead_devices=(3,))
    assert (picture != draw(frame)).any()
    assert "dead devices: 3" in lines


def test_an_environment_renders_its_present_state() -> None:
    experiment = load_experiment(None, {"env.episode_s": 60.0})
    env = build_env(experiment, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(0)
    assert env.render().shape == first.shape
    assert (env.render() != first).any()
    env.render_mode = "ansi"
    assert env.render().startswith("t = 15 s")
    env.render_mode = None
    with pytest.raises(InvalidRequestError, match="render_mode is not set"):
        env.render()
