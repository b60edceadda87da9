"""The main job, once: engine, controller and a replayed trace, observed from outside.

Everything is learnt through public doors: the OpenAI API, EngineService and ControlService.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from controller.build import load_profiled_cluster
from controller.control_channel import ClientAccess
from controller.records import Mode, TickRecord
from controller.remote import RemoteCluster
from controller.remote_control import RemoteControl
from engine.cluster import ClusterSnapshot, EventKind, SwitchTicket
from engine.errors import CheckpointError, InvalidRequestError, UnavailableError
from engine.tokens import write_token
from envs.chat import ChatReplay, ChatTrace, build_chat_replay
from envs.processes import ServerProcess, start_server
from envs.replay import Replay, ReplaySummary, build_replay
from envs.workload import Trace, WorkloadConfig, generate
from policies.artifact import manifest_of

ENGINE_READY = r"ready: (?P<url>\S+) grpc (?P<grpc>\S+) model (?P<model>\S+)"
CONTROLLER_READY = r"ready:.* grpc (?P<grpc>\S+)"
START_TIMEOUT_S = 60.0
SAMPLE_INTERVAL_S = 0.5
NUM_ANSWERS = 6  # of a chat, shown in the end
NUM_BYTE_TOKENS = 256  # prompts draw from token ids below it: bytes, in the tiny model


@dataclass(frozen=True, slots=True)
class ShowcaseConfig:
    """What is started and what is sent to it."""

    policy: Path
    run_dir: Path  # logs of both servers, decision logs
    engine_args: tuple[str, ...] = ()
    controller_args: tuple[str, ...] = ()
    seed: int = 0  # of prompts
    watch_s: float = 10.0  # that the controller is held for, to decide on traffic that it has seen


@dataclass(frozen=True, slots=True)
class TrainedPool:
    """The pool that a policy was trained for, as its checkpoint tells; or a measured one."""

    deployment: str  # the one that suits the mean load
    max_model_len: int  # tokens
    num_workers: int
    device_memory_bytes: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def engine_args(self, deployment: str | None = None) -> tuple[str, ...]:
        """Options of `python -m engine` for the same pool."""
        return (
            *("--deployment", deployment or self.deployment),
            *("--num-workers", str(self.num_workers)),
            *("--device-memory-mb", str(self.device_memory_bytes / 1e6)),
            *("--block-size", str(self.block_size)),
            *("--max-model-len", str(self.max_model_len)),
            *("--max-num-seqs", str(self.max_num_seqs)),
            *("--max-num-batched-tokens", str(self.max_num_batched_tokens)),
        )


def _pool(spec: Mapping[str, Any], deployment: str) -> TrainedPool:
    return TrainedPool(
        deployment=deployment,
        max_model_len=spec["model"]["max_model_len"],
        num_workers=spec["num_devices"],
        device_memory_bytes=spec["device_memory_bytes"],
        block_size=spec["block_size"],
        max_num_seqs=spec["max_num_seqs"],
        max_num_batched_tokens=spec["max_num_batched_tokens"],
    )


def measured_pool(profile: Path, deployment: str) -> TrainedPool:
    """The pool that a profile was measured on. Raises InvalidRequestError."""
    return _pool(load_profiled_cluster(profile).to_json()["spec"], deployment)


def read_trained_pool(policy: Path) -> TrainedPool:
    """As the manifest of a checkpoint, or of a shipped policy, tells. Raises CheckpointError."""
    manifest = manifest_of(policy)
    try:
        return _pool(manifest["cluster"]["spec"], manifest["default_deployment"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the manifest of {policy} does not describe the pool it was trained for ({error}); "
            "train it again."
        ) from error


@dataclass(slots=True)
class LiveStatus:
    """What a view shows; its `Observer` is the only writer."""

    title: str
    num_total: int
    elapsed_s: float = 0.0
    num_sent: int = 0
    num_ended: int = 0
    tokens: int = 0
    snapshot: ClusterSnapshot | None = None
    ticks: deque[TickRecord] = field(default_factory=lambda: deque(maxlen=500))
    switches: list[SwitchTicket] = field(default_factory=list)  # terminal ones


class View(Protocol):
    """Shows a `LiveStatus` whenever it has changed."""

    def update(self, status: LiveStatus) -> None: ...


@dataclass(frozen=True, slots=True)
class RunReport:
    """One replay with its switches (terminal tickets) and the controller's decisions."""

    summary: ReplaySummary
    switches: tuple[SwitchTicket, ...]
    decision_ids: frozenset[str]
    reasons: tuple[str, ...]  # why requests were rejected or lost, each once
    answers: tuple[tuple[str, str], ...] = ()  # (question, answer), some, when chat was served


def demo_traffic(duration_s: float, seed: int) -> Trace:
    """Generated traffic whose mix changes every few seconds, so that a short window shows it."""
    config = WorkloadConfig(
        mean_rate_per_s=4.0, cycle_s=60.0, regime_s=15.0, burst_gap_s=60.0, burst_s=5.0
    )
    return generate(config, duration_s, np.random.default_rng(seed))


def cut_window(
    trace: Trace, start_s: float, seconds: float, speed: float, factor: float, max_tokens: int
) -> Trace:
    """What is replayed in `seconds`: `speed` trace seconds in each, lengths times `factor`.

    Raises InvalidRequestError when no request arrives in that window.
    """
    window = trace.window(start_s, seconds * speed)
    if not len(window):
        raise InvalidRequestError(
            f"no request arrives in {start_s:.0f}..{start_s + seconds * speed:.0f} s of the trace, "
            f"which ends at {trace.duration_s:.0f} s; choose another start."
        )
    fast = replace(window, arrival_s=window.arrival_s / speed, duration_s=seconds)
    return fast.scale_lengths(factor, max_tokens)


@dataclass(frozen=True, slots=True)
class Pool:
    """The doors of a running engine and controller, and the key to the first."""

    url: str
    api_key: str
    model: str
    cluster: RemoteCluster
    control: RemoteControl


@contextlib.contextmanager
def running_server(name: str, arguments: list[str], log_path: Path) -> Iterator[ServerProcess]:
    server = start_server(name, arguments, log_path)
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def running_pool(config: ShowcaseConfig, mode: str) -> AsyncIterator[Pool]:
    """Engine, then controller in `mode` (active or off); afterwards none of their processes. Both
    doors of the engine ask for tokens of this run, so that nobody else of the machine gets in."""
    run_dir = config.run_dir / mode
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "decisions.jsonl").unlink(missing_ok=True)
    control, keys = run_dir / "control-token", run_dir / "api-key"
    write_token(control)
    api_key, access = write_token(keys), ClientAccess(token_file=control, prefix="engine-")
    with contextlib.ExitStack() as stack:
        arguments = [
            *("engine", "--port", "0", "--grpc-port", "0", "--control-tokens", str(control)),
            *("--api-keys", str(keys), *config.engine_args),
        ]
        engine = stack.enter_context(running_server("engine", arguments, run_dir / "engine.log"))
        ready = await asyncio.to_thread(engine.wait_ready, ENGINE_READY, START_TIMEOUT_S)
        arguments = [
            *("controller", "--engine", ready["grpc"], "--grpc-port", "0", "--mode", "off"),
            *("--policy", str(config.policy), "--log", str(run_dir / "decisions.jsonl")),
            *("--engine-token-file", str(control)),
            *config.controller_args,
        ]
        controller = stack.enter_context(
            running_server("controller", arguments, run_dir / "controller.log")
        )
        steering = await asyncio.to_thread(controller.wait_ready, CONTROLLER_READY, START_TIMEOUT_S)
        cluster = stack.enter_context(RemoteCluster(ready["grpc"], access=access))
        steered = stack.enter_context(RemoteControl(steering["grpc"]))
        if mode == "active":
            await asyncio.to_thread(steered.hold, config.watch_s, "watches traffic first")
            await asyncio.to_thread(steered.set_mode, Mode.ACTIVE)
        yield Pool(ready["url"], api_key, ready["model"], cluster, steered)


@dataclass(slots=True)
class Observer:
    """Brings a `LiveStatus` up to date from the doors of a pool and the client's own counts."""

    pool: Pool
    replay: Replay
    status: LiveStatus
    started_s: float
    cursor: int = 0
    next_seq: int = 1

    def sample(self) -> None:
        """Blocking. Raises engine.errors when engine or controller do not answer."""
        status, records = self.status, self.replay.records
        status.elapsed_s = time.monotonic() - self.started_s
        status.num_sent, status.num_ended = self.replay.num_sent, len(records)
        status.tokens = sum(r.output_tokens for r in records)
        status.snapshot = self.pool.cluster.snapshot()
        self._sample_switches()
        for tick in self.pool.control.ticks(self.next_seq):
            status.ticks.append(tick)
            self.next_seq = tick.seq + 1

    def _sample_switches(self) -> None:
        batch = self.pool.cluster.events(self.cursor)
        self.cursor = batch.next_cursor
        self.status.switches += [
            event.ticket
            for event in batch.events
            if event.kind is EventKind.SWITCH
            and event.ticket is not None
            and event.ticket.phase.is_terminal
        ]

    async def follow(self, view: View) -> None:
        """Sample and show until cancelled; an answer that fails to come is tried again."""
        while True:
            with contextlib.suppress(UnavailableError):
                await asyncio.to_thread(self.sample)
            view.update(self.status)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def wait_switch_end(self, timeout_s: float = 10.0) -> None:
        """A switch that began before the last token may still release; give it time to end."""
        deadline_s = time.monotonic() + timeout_s
        await asyncio.to_thread(self.sample)
        while time.monotonic() < deadline_s:
            if self.status.snapshot is None or not self.status.snapshot.switch_in_flight:
                return
            await asyncio.sleep(0.1)
            await asyncio.to_thread(self.sample)


def _build_replay(pool: Pool, traffic: Trace | ChatTrace, seed: int) -> Replay:
    url = f"{pool.url}/v1"
    if isinstance(traffic, ChatTrace):
        return build_chat_replay(url, pool.model, traffic, api_key=pool.api_key)
    return build_replay(url, pool.model, traffic, NUM_BYTE_TOKENS, seed, api_key=pool.api_key)


async def run_once(
    config: ShowcaseConfig, traffic: Trace | ChatTrace, mode: str, title: str, view: View
) -> RunReport:
    """Start the pool in `mode`, replay `traffic`, stop the pool."""
    async with running_pool(config, mode) as pool:
        replay = _build_replay(pool, traffic, config.seed)
        trace = replay.trace
        grid_s = await asyncio.to_thread(pool.control.grid_s)
        status = LiveStatus(f"{title}; a decision every {grid_s:g} s", len(trace))
        observer = Observer(pool, replay, status, time.monotonic())
        following = asyncio.create_task(observer.follow(view))
        try:
            summary = await replay.run()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await replay.client.close()
        await observer.wait_switch_end()
        view.update(status)
    return RunReport(
        summary=summary,
        switches=tuple(status.switches),
        decision_ids=frozenset(t.decision_id for t in status.ticks if t.decision_id),
        reasons=tuple(sorted({r.reason for r in replay.records if r.reason})),
        answers=tuple(replay.samples(NUM_ANSWERS)) if isinstance(replay, ChatReplay) else (),
    )
