"""Two controllers of one engine, as processes: one acts, the other takes over, and who was
succeeded can do nothing any more. Without any, the engine serves on."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from controller.decision_log import read_log
from controller.records import Mode
from controller.remote import RemoteCluster
from controller.remote_control import RemoteControl
from engine.cluster import KvCostParams, Request, SwitchPlan, parse_deployment_key
from engine.errors import InvalidRequestError, StaleEpochError, TidewrightError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from engine.terms import Terms
from envs.served_surrogate import ServedSurrogate
from tests.controller import small_kubernetes
from tests.controller.small_etcd import serve

ROOT = Path(__file__).parents[2]
LEASE_S = 2.0
BUILD_S = 8.0  # beside the lease, for a loaded machine to build pipeline and service
WAIT_S = 60.0


class Process:
    """A controller with a restless policy; its lines as they come."""

    def __init__(self, engine: str, log: Path, *arguments: str) -> None:
        own = ("--faults", str(log.with_name("no faults")), "--dwell-s", "0.5", "--grid-s", "0.2")
        given = (
            "--engine",
            engine,
            "--rule",
            "keep",
            "--grpc-port",
            "0",
            "--http-port",
            "0",
            "--log",
            str(log),
        )
        drawn = ("--no-deterministic", "--lease-s", str(LEASE_S), *arguments)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "envs.soak.controller", *own, *given, *drawn],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self._readers:
            reader.start()
        self.target = ""

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self._lines.put(line)

    def until_line(self, pattern: str) -> re.Match[str]:
        deadline_s = time.monotonic() + WAIT_S
        seen = []
        while True:
            try:
                seen.append(self._lines.get(timeout=max(0.0, deadline_s - time.monotonic())))
            except queue.Empty:
                raise AssertionError("".join(seen)) from None
            if found := re.search(pattern, seen[-1]):
                return found

    def until_ready(self) -> None:
        self.target = self.until_line(r"ready: grpc (127\.0\.0\.1:\d+)")[1]

    def until_waiting(self) -> str:
        return self.until_line(r"stands by: lease (\S+) is held by")[1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(30)
        for reader in self._readers:
            reader.join(10)


def until(condition: Callable[[], object], problem: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, problem
        time.sleep(0.05)


@pytest.fixture
def engine(synthetic_cluster: ProfiledCluster) -> Iterator[ServedSurrogate]:
    with ServedSurrogate(synthetic_cluster, "4xtp1pp1", rate_per_s=5.0) as served:
        yield served


@pytest.fixture(params=["file", "etcd", "kubernetes"])
def lease(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, ...]]:
    """Arguments; the file is the default, beside the log that both write."""
    if request.param == "file":
        yield ()
        return
    if request.param == "kubernetes":
        with small_kubernetes.serve(tmp_path) as api:
            host, _, port = api.url.removeprefix("https://").partition(":")
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
            yield ("--lease", "kubernetes://serving/test", "--lease-account", str(tmp_path))
        return
    with serve() as url:
        yield ("--lease", f"{url}/tidewright/test")


@dataclass
class Held:
    """One who is sure to be the leader."""

    term: int

    def check(self) -> None:
        """Sure."""


def plan_for(engine: RemoteCluster) -> SwitchPlan:
    snapshot = engine.snapshot()
    target = parse_deployment_key("3xtp1pp1" if snapshot.epoch % 2 else "1xtp2pp1")
    costs = KvCostParams(engine.spec.link_bytes_per_s, 1e3, 0.01)
    return plan_switch(engine.spec, snapshot.deployment, snapshot.epoch, target, costs)


def test_the_second_takes_over_from_a_killed_one_whose_late_calls_are_refused(
    engine: ServedSurrogate, lease: tuple[str, ...], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        first = Process(engine.target, log, *lease)
        stack.callback(first.close)
        first.until_ready()
        second = Process(engine.target, log, *lease)
        stack.callback(second.close)
        second.until_waiting()
        until(lambda: engine.snapshot().epoch >= 1, "nothing was switched")
        records = read_log(log).records
        assert sum(r["record"] == "header" for r in records) == 1, "one writes the log"
        first.process.kill()
        killed_s = time.monotonic()
        first.process.wait(30)
        second.until_ready()
        assert time.monotonic() - killed_s < LEASE_S + BUILD_S
        before = max(r["seq"] for r in records if "seq" in r)
        with RemoteControl(second.target) as control:
            known = partial(control.ticks, 1)
            until(lambda: known() and known()[-1].seq > before, "the second does not tick")
            seqs = [tick.seq for tick in known()]
        assert seqs == list(range(1, seqs[-1] + 1)), "the first one's ticks are known to it"
        late = stack.enter_context(RemoteCluster(engine.target, leader=Held(1)))
        assert late.snapshot().num_arrived > 0, "looking is allowed"
        assert late.highest_term() == 2
        plan = plan_for(late)
        for act in (
            lambda: late.apply(plan),
            lambda: late.set_routing(late.snapshot().routing),
            lambda: late.cancel("switch-0000"),
        ):
            with pytest.raises(StaleEpochError, match="of term 1, one of term 2 has taken over"):
                act()
    contents = read_log(log)
    assert len(contents.skipped) <= 2, "each was killed: a record may be torn"
    ticks = [r["seq"] for r in contents.records if r["record"] in ("decision", "tick")]
    assert ticks == list(range(1, len(ticks) + 1))


def test_one_that_was_stopped_and_goes_on_later_stands_by(
    engine: ServedSurrogate, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        first = Process(engine.target, log)
        stack.callback(first.close)
        first.until_ready()
        second = Process(engine.target, log)
        stack.callback(second.close)
        second.until_waiting()
        until(lambda: engine.snapshot().epoch >= 1, "nothing was switched")
        first.process.send_signal(signal.SIGSTOP)
        second.until_ready()
        first_life = read_log(log).records[0]["life"]
        first.process.send_signal(signal.SIGCONT)
        late = stack.enter_context(RemoteControl(first.target, timeout_s=5.0))
        now = engine.snapshot()
        other = "4xtp1pp1" if now.deployment.key == "2xtp2pp1" else "2xtp2pp1"
        with pytest.raises(TidewrightError):  # refused, or already gone
            late.apply(other, now.epoch)
        first.until_waiting()
        epoch = engine.snapshot().epoch
        until(lambda: engine.snapshot().epoch > epoch, "the second does not switch")
    contents = read_log(log)
    headers = [r["life"] for r in contents.records if r["record"] == "header"]
    assert headers[0] == first_life
    assert len(headers) == len(set(headers)) == 2, "the first wrote nothing after the second began"
    assert len(contents.skipped) <= 1
    decided = {
        r["decision_id"] for r in contents.records if r["record"] in ("decision", "proposal")
    }
    with RemoteCluster(engine.target) as remote:
        events = remote.events(0).events
    switched = {e.ticket.decision_id for e in events if e.ticket is not None}
    assert switched <= decided


def test_a_controller_that_ends_lets_the_next_one_have_it_at_once(
    engine: ServedSurrogate, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ExitStack() as stack:
        first = Process(engine.target, log, "--lease-s", "3600")
        stack.callback(first.close)
        first.until_ready()
        with RemoteControl(first.target) as control:
            control.set_mode(Mode.ADVISORY)
        first.process.terminate()
        assert first.process.wait(30) == 0
        second = Process(engine.target, log, "--lease-s", "3600")
        stack.callback(second.close)
        second.until_ready()
        with RemoteControl(second.target) as control:
            assert control.state()["mode"] == "MODE_ADVISORY"


def test_without_a_controller_the_surrogate_serves_on_as_planned_last(
    engine: ServedSurrogate, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        controller = Process(engine.target, tmp_path / "log")
        stack.callback(controller.close)
        until(lambda: engine.snapshot().epoch >= 1, "nothing was switched")
        controller.process.kill()
        controller.process.wait(30)
        until(lambda: not engine.snapshot().switch_in_flight, "the switch does not end")
        before = engine.snapshot()
        until(lambda: engine.snapshot().num_finished > before.num_finished + 10, "nothing finishes")
        after = engine.snapshot()
    assert (after.epoch, after.deployment, after.routing) == (
        before.epoch,
        before.deployment,
        before.routing,
    )
    assert after.num_rejected == 0


@pytest.mark.slow
def test_without_a_controller_the_engine_serves_on_as_planned_last(
    open_engine: Callable[..., Any], tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The real engine, whose controller is killed while requests run."""
    from engine.server import start_grpc
    from engine.tokenizer import Tokenizer

    with ExitStack() as stack:
        engine = stack.enter_context(open_engine("2xtp1pp1"))
        events = engine.on_loop(asyncio.get_running_loop)
        serving = start_grpc(engine.runtime, Tokenizer(tiny_model_dir), "tiny", "127.0.0.1", 0)
        server, port = asyncio.run_coroutine_threadsafe(serving, events).result(30)
        stack.callback(lambda: asyncio.run_coroutine_threadsafe(server.stop(0), events).result(30))
        profile = ROOT / "configs" / "profiles" / "tiny_llama_cpu4.json"
        given = ("--profile", str(profile), "--dwell-s", "1000")
        controller = Process(f"127.0.0.1:{port}", tmp_path / "log", *given)
        stack.callback(controller.close)
        controller.until_ready()
        with RemoteControl(controller.target) as control:
            until(lambda: control.ticks(1), "no tick")
        now_s = engine.snapshot().now_s
        for i in range(20):
            engine.submit(Request(f"r{i}", now_s + 0.02 * i, 12, 40))
        engine.advance(now_s + 0.3)
        controller.process.kill()
        controller.process.wait(30)
        until(lambda: not engine.snapshot().switch_in_flight, "the switch does not end")
        before = engine.snapshot()
        engine.advance(engine.snapshot().now_s + 0.2)
        until(lambda: engine.snapshot().num_finished == 20, "requests are lost")
        after = engine.snapshot()
    assert (after.epoch, after.deployment, after.routing) == (
        before.epoch,
        before.deployment,
        before.routing,
    )
    assert (after.num_arrived, after.num_rejected) == (20, 0)


# ------------------------------------------------------------------------ terms


def test_terms_only_rise_and_calls_by_hand_pass() -> None:
    terms = Terms()
    terms.hear(None, is_acting=True)
    terms.hear("3", is_acting=True)
    terms.hear("2", is_acting=False)
    assert terms.highest == 3
    terms.hear("3", is_acting=True)
    terms.hear(None, is_acting=True)
    with pytest.raises(StaleEpochError):
        terms.hear("2", is_acting=True)
    terms.hear("4", is_acting=False)
    with pytest.raises(StaleEpochError):
        terms.hear("3", is_acting=True)
    for wrong in ("", "0", "-1", "x", "1.5", "9" * 40):
        with pytest.raises(InvalidRequestError, match="tidewright-term"):
            terms.hear(wrong, is_acting=False)


def test_a_new_leader_begins_above_what_the_engine_knows(
    engine: ServedSurrogate, tmp_path: Path
) -> None:
    """Its own count was lost, with the file."""
    with RemoteCluster(engine.target, leader=Held(41)) as before:
        before.snapshot()
    controller = Process(engine.target, tmp_path / "log")
    try:
        controller.until_ready()
        until(lambda: engine.snapshot().epoch >= 1, "it was refused")
        with RemoteCluster(engine.target) as remote:
            assert remote.highest_term() == 42
    finally:
        controller.close()
