"""Workers as Ray actors on a cluster of two nodes: identity, a switch across nodes, a lost node."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from identity import (
    Reference,
    assert_identical,
    plan_to,
    prompt,
    serve,
    serve_through_loss,
)

from engine.channel import ChannelConfig
from engine.cluster import EventKind, RequestStatus, SwitchPhase
from engine.errors import UnavailableError
from engine.facade import EngineCluster
from engine.ray_executor import RayConfig, RayExecutor
from engine.sockets import make_curve_keys
from envs.processes import start_server

pytest.importorskip("ray", reason="extra 'ray' is not installed")
READY = r"ready: (http://\S+) grpc (\S+)"
GONE_TIMEOUT_S = 20.0


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    """All end by themselves within the time-out."""
    _, alive = psutil.wait_procs(processes, GONE_TIMEOUT_S)
    assert not alive, [p.cmdline() for p in alive]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with two CPUs each; the first is the head."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    before = set(descendants())
    folder = tempfile.mkdtemp(prefix="tw-ray-")  # short: it holds sockets
    os.environ["RAY_TMPDIR"] = folder  # the address file goes to `ray` in it
    os.mkdir(f"{folder}/ray")
    options = {"num_cpus": 2, "object_store_memory": 80_000_000, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    try:
        cluster.add_node(**options)
        cluster.wait_for_nodes(30)
        started = [p for p in descendants() if p not in before]
        yield cluster
    finally:
        cluster.shutdown()
        del os.environ["RAY_TMPDIR"]
        shutil.rmtree(folder, ignore_errors=True)
    assert_gone(started)


@pytest.fixture
def engine(nodes: Any, open_engine: Any) -> Iterator[EngineCluster]:
    executor = RayExecutor(RayConfig(nodes.address, devices_per_node=2))
    channel = ChannelConfig(host="127.0.0.1", keys=make_curve_keys())
    options = {"executor": executor, "channel": channel, "devices_per_node": 2}
    with open_engine("1xtp2pp2", **options) as cluster:
        workers = [psutil.Process(executor.pid(device)) for device in range(4)]
        yield cluster
    assert_gone(workers)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_serve_switch_and_lose_a_node(
    engine: EngineCluster, nodes: Any, references: list[Reference], greedy: Any
) -> None:
    runtime = engine.runtime
    executor = runtime._executor
    assert isinstance(executor, RayExecutor)
    homes = [executor.node_id(device) for device in range(4)]
    assert homes[0] == homes[1] != homes[2] == homes[3]  # devices_per_node is true
    outputs, _ = engine.run(serve(runtime, references, 0, None, "tp2pp2"), 120)
    assert assert_identical(references, outputs) == 0

    long = [greedy(prompt(length), 150) for length in (40, 60)]
    for key in ("1xtp4pp1", "2xtp2pp1"):  # both move weights and KV between the nodes
        plan = engine.on_loop(lambda key=key: plan_to(runtime, key))
        assert any(homes[t.src] != homes[t.dst] for t in plan.transfers)
        outputs, ticket = engine.run(serve(runtime, long, 2, plan, key), 120)
        assert ticket is not None
        assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
        assert ticket.num_migrated == len(long)
        assert assert_identical(long, outputs) == 0

    def kill_one() -> None:
        os.kill(executor.pid(1), signal.SIGKILL)

    def is_back() -> bool:
        return any(e.kind is EventKind.DEVICE_JOINED for e in runtime.events(0).events)

    outputs = engine.run(serve_through_loss(runtime, references, kill_one, is_back), 120)
    assert assert_identical(references, outputs) == 0
    assert executor.node_id(1) == homes[1]
    plan = engine.on_loop(lambda: plan_to(runtime, "2xtp2pp1"))
    outputs, ticket = engine.run(serve(runtime, references, 2, plan, "back"), 120)
    assert ticket is not None
    assert (ticket.phase, ticket.reason) == (SwitchPhase.DONE, "")
    assert assert_identical(references, outputs) == 0

    victim = next(n for n in nodes.list_all_nodes() if n.node_id != nodes.head_node.node_id)
    lost = tuple(d for d in range(4) if homes[d] == victim.node_id)
    raylet = victim.all_processes["raylet"][0].process.pid

    def kill() -> None:
        os.kill(raylet, signal.SIGKILL)

    def is_noticed() -> bool:
        return bool(runtime.snapshot().dead_devices == lost)

    outputs = engine.run(serve_through_loss(runtime, references * 2, kill, is_noticed), 120)
    assert assert_identical(references * 2, outputs) == 0
    ended = [e.outcome for e in runtime.events(0).events if e.outcome is not None]
    assert {o.status for o in ended} == {RequestStatus.FINISHED}
    assert len(ended) == 5 * len(references) + 2 * len(long)
    assert runtime.deployment.key == "1xtp2pp1"


def test_an_unreachable_cluster_is_named(open_engine: Any) -> None:
    executor = RayExecutor(RayConfig("127.0.0.1:1", devices_per_node=2))
    with (
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"),
        open_engine("4xtp1pp1", executor=executor, channel=ChannelConfig("127.0.0.1")),
    ):
        pass


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_line_starts_a_cluster_and_leaves_nothing(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    arguments = ["engine", "--executor", "ray", "--model", str(tiny_model_dir)]
    arguments += ["--num-workers", "2", "--deployment", "1xtp2pp1", "--max-model-len", "256"]
    arguments += ["--port", "0", "--grpc-port", "0"]
    before = set(descendants())
    process = start_server("engine", arguments, tmp_path / "engine.log")
    try:
        process.wait_ready(READY, 120)
        started = [p for p in descendants() if p not in before]
        assert sum("raylet" in p.name() for p in started) == 1
        process.signal_group(signal.SIGINT)  # what Ctrl-C does: everybody gets it
        assert process.process.wait(20) == 0
        assert_gone(started)
    finally:
        process.stop()
