"""What holds for every executor: sockets and stores over TCP, signs of life, staged groups."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq
from identity import Reference, assert_identical, plan_to, serve, serve_through_loss
from zmq.utils.monitor import recv_monitor_message

from engine.build import build_channel_config
from engine.channel import ChannelConfig
from engine.cluster import EventKind, RequestStatus, SwitchPhase
from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.parallel import (
    DirectGroup,
    GroupConfig,
    StagedGroup,
    build_gloo,
    host_store,
    meet,
    open_store,
)
from engine.sockets import Sockets, make_curve_keys

LOOPBACK = "127.0.0.1"
CPU = torch.device("cpu")
KEYS = ("1xtp2pp2", "2xtp2pp1", "1xtp4pp1", "4xtp1pp1")


# -------------------------------------------------------------------------------- TCP


def test_switches_keep_tokens_over_tcp_with_keys_and_staged_tensors(
    open_engine: Any, references: list[Reference]
) -> None:
    channel = ChannelConfig(host=LOOPBACK, keys=make_curve_keys())
    with open_engine(KEYS[0], channel=channel, stage_tensors=True) as cluster:
        runtime = cluster.runtime
        assert runtime.workers.channel.endpoint.startswith(f"tcp://{LOOPBACK}:")
        for key in KEYS[1:]:
            plan = cluster.on_loop(lambda key=key: plan_to(runtime, key))
            outputs, ticket = cluster.run(serve(runtime, references, 5, plan, key), 120)
            assert ticket is not None
            assert ticket.phase is SwitchPhase.DONE, ticket.reason
            assert assert_identical(references, outputs) == 0
        assert not list(Path(runtime._run_dir).iterdir())  # nothing met in the file system


def test_a_key_that_is_not_the_engines_opens_nothing(tmp_path: Path) -> None:
    keys, foreign = make_curve_keys(), make_curve_keys()
    engine = Sockets(zmq.Context(), str(tmp_path), LOOPBACK, keys)
    stranger = zmq.Context()
    try:
        inbox, endpoint = engine.bind(zmq.PULL, "inbox")
        outsider = stranger.socket(zmq.PUSH)
        outsider.setsockopt(zmq.LINGER, 0)
        outsider.curve_publickey, outsider.curve_secretkey = foreign.public, foreign.secret
        outsider.curve_serverkey = keys.public  # even if it has learnt that
        monitor = outsider.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        outsider.connect(endpoint)
        assert monitor.poll(10_000)
        assert recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        member = engine.connect(zmq.PUSH, endpoint)
        member.send(b"from a member")
        assert inbox.poll(10_000)
        assert inbox.recv() == b"from a member"
        outsider.disable_monitor()
    finally:
        stranger.destroy(linger=0)
        engine.close()


def test_a_plain_client_does_not_reach_a_socket_with_keys(tmp_path: Path) -> None:
    engine = Sockets(zmq.Context(), str(tmp_path), LOOPBACK, make_curve_keys())
    stranger = zmq.Context()
    try:
        inbox, endpoint = engine.bind(zmq.PULL, "inbox")
        outsider = stranger.socket(zmq.PUSH)
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        monitor = outsider.get_monitor_socket(events | zmq.EVENT_DISCONNECTED)
        outsider.connect(endpoint)
        assert monitor.poll(10_000)
        outsider.disable_monitor()
        assert not inbox.poll(0)
    finally:
        stranger.destroy(linger=0)
        engine.close()


def test_options_choose_the_channel() -> None:
    local = build_channel_config(EngineConfig(heartbeat_timeout_s=3))
    assert (local.host, local.keys, local.heartbeat_timeout_s) == ("", None, 3.0)
    first, second = (build_channel_config(EngineConfig(executor="ray")) for _ in range(2))
    assert first.host == LOOPBACK
    assert first.keys is not None
    assert first.keys != second.keys
    assert first.keys.secret.decode() not in repr(first)
    assert build_channel_config(EngineConfig(executor="ray", trusted_network=True)).keys is None
    with pytest.raises(InvalidRequestError, match="channel_host"):
        build_channel_config(EngineConfig(executor="ray", channel_host="0.0.0.0"))


@pytest.mark.parametrize("host", ["", LOOPBACK])
def test_a_hosted_store_is_seen_by_all_and_goes_with_the_last(host: str, tmp_path: Path) -> None:
    hosted, address = host_store(str(tmp_path), "group", host, 10.0)
    first = hosted or open_store(address, 2, 10.0)
    second = open_store(address, 2, 10.0)
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert address.startswith("tcp://127.0.0.1:" if host else f"file://{tmp_path}/")
    del first, second, hosted
    assert not list(tmp_path.iterdir())


def test_ranks_meet_or_give_up_at_once(tmp_path: Path) -> None:
    _, address = host_store(str(tmp_path), "group", "", 10.0)
    stores = [open_store(address, 2, 10.0) for _ in range(2)]
    with pytest.raises(RuntimeError, match="given up"):
        meet(stores[0], 0, 2, 60.0, lambda: True)
    with pytest.raises(RuntimeError, match="not all 2 ranks"):
        meet(stores[0], 0, 2, 0.0, lambda: False)
    meet(stores[1], 1, 2, 60.0, lambda: False)
    meet(stores[0], 0, 2, 60.0, lambda: False)


# -------------------------------------------------------------------------------- staging


def run_pair(work: Any) -> list[Any]:
    """`work(rank, group)` on both ranks of a gloo group, in two threads."""
    results: list[Any] = [None, None]
    hosted, address = host_store("", "pair", LOOPBACK, 20.0)

    def rank_main(rank: int) -> None:
        store = hosted if rank == 0 else open_store(address, 2, 20.0)
        config = GroupConfig(LOOPBACK, CPU, 20.0)
        results[rank] = work(rank, build_gloo(config, store, "pair", rank, 2))

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_staged_tensors_equal_direct_ones() -> None:
    inputs = [torch.randn(5, 7, generator=torch.Generator().manual_seed(r)) for r in range(2)]

    def work(rank: int, raw: Any) -> list[torch.Tensor]:
        found = []
        for tag, group in enumerate((DirectGroup(raw), StagedGroup(raw))):
            summed = inputs[rank].clone().t()  # no contiguous tensor either way
            summed = summed if isinstance(group, StagedGroup) else summed.contiguous()
            group.all_reduce(summed)
            got = torch.empty(5, 7)
            if rank == 0:
                group.send(inputs[0], 1, tag).wait()
                group.recv(got, 1, tag)
            else:
                group.recv(got, 0, tag)
                group.send(got * 2, 0, tag).wait()
            found += [summed, got]
        return found

    for direct_sum, direct_got, staged_sum, staged_got in run_pair(work):
        assert torch.equal(direct_sum, staged_sum)
        assert torch.equal(direct_got, staged_got)
        torch.testing.assert_close(direct_sum, (inputs[0] + inputs[1]).t())
    assert torch.equal(direct_got, inputs[0])


# -------------------------------------------------------------------------------- life and death


def test_a_silent_worker_is_killed_replaced_and_loses_no_request(
    open_engine: Any, references: list[Reference]
) -> None:
    channel = ChannelConfig(heartbeat_timeout_s=2.0)
    with open_engine("1xtp2pp1+2xtp1pp1", channel=channel) as cluster:
        runtime = cluster.runtime
        victim = runtime.deployment.replicas[0].placement.devices[1]
        process = psutil.Process(runtime._executor.pid(victim))

        def stop() -> None:
            os.kill(process.pid, signal.SIGSTOP)

        def is_noticed() -> bool:
            back = [e for e in runtime.events(0).events if e.kind is EventKind.DEVICE_JOINED]
            return bool(back)

        work = serve_through_loss(runtime, references * 3, stop, is_noticed)
        outputs = cluster.run(work, 120)
        assert assert_identical(references * 3, outputs) == 0
        process.wait(10)  # killed, not left stopped
        outcomes = [e.outcome for e in runtime.events(0).events if e.outcome is not None]
        assert [o.status for o in outcomes] == [RequestStatus.FINISHED] * len(outputs)
        snapshot = cluster.snapshot()
        assert (snapshot.dead_devices, snapshot.deployment.key) == ((), "2xtp1pp1")
        assert runtime._executor.pid(victim) != process.pid
