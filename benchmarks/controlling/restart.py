"""How long a controller that was killed takes to its next tick: process start, imports, the log of
an hour, and the first decision."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.build import pipeline_from_facts
from controller.decision_log import DecisionLog
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.policy_server import PolicyServer
from controller.records import Mode
from controller.resume import Keeper
from controlling.setting import pool
from engine.cluster import Request, dense_deployment, parse_deployment_key
from envs.served_surrogate import ServedSurrogate
from envs.surrogate.cluster import SurrogateCluster
from policies.artifact import manifest_of
from policies.baselines import HysteresisPolicy

ROOT = Path(__file__).parents[2]
PAST_TICKS, RATE_PER_S, WAIT_S = 240, 10.0, 120.0


def write_past(log: Path, key: str, policy: Path, num_ticks: int) -> None:
    """The decision log of so many ticks, with 10 requests/s, as a loop writes it."""
    cluster = pool(16)
    engine = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)))
    pipeline = pipeline_from_facts(manifest_of(policy), cluster)
    rule = HysteresisPolicy(pipeline.observation_spec)
    server = PolicyServer(rule, rule, 10.0, deterministic=True)
    decisions = DecisionLog(log, {}, sync=False)
    loop = ControlLoop(engine, pipeline, server, decisions, Mode.ACTIVE)
    loop.keep = Keeper(loop, Operations(loop), {"mode": "active", "policy": ""}).keep
    grid_s = pipeline.config.grid_s
    for number in range(num_ticks):
        for i in range(round(RATE_PER_S * grid_s)):
            at_s = grid_s * number + i / RATE_PER_S
            engine.submit(Request(f"{number}-{i}", at_s, 100 + 37 * (i % 40), 40 + 11 * (i % 20)))
        engine.advance(grid_s * (number + 1))
        loop.tick()
    server.close()
    decisions.close()


@contextmanager
def controller(engine: str, log: Path, arguments: tuple[str, ...]) -> Iterator[float]:
    """A process until its first new decision is in the log; gives the seconds that took. It is
    killed without warning."""
    size = log.stat().st_size
    begun_s = time.monotonic()
    command = [
        "-m",
        "controller",
        "--engine",
        engine,
        "--log",
        str(log),
        "--grpc-port",
        "0",
        "--http-port",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        while not _has_decided(log, size):
            if time.monotonic() - begun_s > WAIT_S or process.poll() is not None:
                raise TimeoutError(f"no decision: {command} {arguments}")
            time.sleep(0.005)
        yield time.monotonic() - begun_s
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)


def _has_decided(log: Path, size: int) -> bool:
    with log.open("rb") as file:
        file.seek(size)
        return b'"record": "decision"' in file.read()


def measure(key: str, policy: Path, num: int, num_past: int) -> dict[str, list[float]]:
    """Seconds of each start: with the policy given, and with a rule."""
    took: dict[str, list[float]] = {"restart_s": [], "restart_learned_s": []}
    with tempfile.TemporaryDirectory() as folder, ServedSurrogate(pool(16), key) as engine:
        log = Path(folder) / "log"
        write_past(log, key, policy, num_past)
        ways = {
            "restart_s": ("--rule", "hysteresis"),
            "restart_learned_s": ("--policy", str(policy)),
        }
        for number in range(num + 1):
            for name, arguments in ways.items():
                with controller(engine.target, log, arguments) as seconds:
                    if number:  # the first one loads libraries from disk
                        took[name].append(seconds)
    return took
