"""Clients of the control service: how long each Decide takes, and when each watcher has a tick."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlling.setting import ToldEngine, pool
from engine.wire import to_proto
from protos import control_pb2 as pb
from protos import control_pb2_grpc

BENCHMARKS = Path(__file__).parents[1]
TIMEOUT_S, STREAM_S = 60.0, 600.0
GRID_S = 15.0


@dataclass
class Service:
    """The process; its ticks are asked for by lines."""

    process: subprocess.Popen[str]
    port: int

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tick(self) -> tuple[int, float]:
        """Its number, and when it was published, on the monotonic clock."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        return told["seq"], told["at_s"]

    def cpu_s(self) -> float:
        """Processor seconds of the process until now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100.0


@contextmanager
def served(num_devices: int, key: str, policy: Path | None) -> Iterator[Service]:
    module, folder = "controlling.service", str(policy.resolve() if policy else "")
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(num_devices), key, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=BENCHMARKS,
    )
    try:
        assert process.stdout is not None
        yield Service(process, json.loads(process.stdout.readline())["port"])
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


class Client:
    """One engine that asks for decisions, a grid interval after the other."""

    def __init__(self, channel: Any, name: str, num_devices: int, key: str, seed: int) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(channel)
        self._name, self._engine = name, ToldEngine(pool(num_devices), key, seed)
        self._seed, self._requests = seed, list[tuple[Any, Any]]()

    def _pair(self, with_events: bool) -> tuple[Any, Any]:
        """What tells the traffic of an interval, and what asks for the decision at its end. With
        events the latter tells all of it."""
        report, request = (
            pb.ReportMetricsRequest(session=self._name),
            pb.DecideRequest(session=self._name),
        )
        for event in self._engine.events(GRID_S):
            to_proto(event, (request if with_events else report).events.add())
        to_proto(self._engine.snapshot(), request.snapshot)
        return report, request

    def prepare(self, num: int, with_events: bool) -> None:
        """The requests to come, so that making them takes no time between calls."""
        self._requests = [self._pair(with_events) for _ in range(num)]

    async def decide(self, pause_s: float) -> list[float]:
        """Milliseconds of each Decide; `pause_s` is the mean of a pause before it, 0: none."""
        rng, took = np.random.default_rng(self._seed), []
        for report, request in self._requests:
            if pause_s:
                await asyncio.sleep(float(rng.exponential(pause_s)))
            if report.events:
                await self._stub.ReportMetrics(report, timeout=TIMEOUT_S)
            begun_s = time.perf_counter()
            await self._stub.Decide(request, timeout=TIMEOUT_S)
            took.append(1000.0 * (time.perf_counter() - begun_s))
        return took


async def decide(
    service: Service, clients: int, num: int, pause_s: float, with_events: bool, key: str
) -> list[float]:
    """Milliseconds of all calls of so many clients at once, without each one's first."""
    async with grpc.aio.insecure_channel(service.target) as channel:
        every = [
            Client(channel, f"{clients}-{i}-{pause_s}-{with_events}", 16, key, i)
            for i in range(clients)
        ]
        for client in every:
            client.prepare(1, with_events)
            await client.decide(0.0)
            client.prepare(num, with_events)
        took = await asyncio.gather(*(client.decide(pause_s) for client in every))
        return [ms for calls in took for ms in calls]


async def round_trips(service: Service, num: int) -> list[float]:
    """Milliseconds of calls that have nothing to do, by a client such as decides: gRPC alone."""
    took, request = [], health_pb2.HealthCheckRequest()
    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(num + 1):
            begun_s = time.perf_counter()
            await stub.Check(request, timeout=TIMEOUT_S)
            took.append(1000.0 * (time.perf_counter() - begun_s))
    return took[1:]


async def fan_out(service: Service, clients: int, num_ticks: int) -> list[list[float]]:
    """Milliseconds from each tick's publication until each of so many watchers has it."""
    seen: dict[int, list[float]] = {}

    async def watch(stub: Any) -> None:
        stream = stub.WatchDecisions(pb.WatchDecisionsRequest(), timeout=STREAM_S)
        await stream.initial_metadata()
        async for response in stream:
            seen.setdefault(response.record.seq, []).append(time.monotonic())

    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        tasks = [asyncio.create_task(watch(stub)) for _ in range(clients)]
        await asyncio.to_thread(service.tick)
        await asyncio.sleep(1.0)  # every stream is there
        found = []
        for _ in range(num_ticks):
            seq, at_s = await asyncio.to_thread(service.tick)
            deadline_s = time.monotonic() + TIMEOUT_S
            while len(seen.get(seq, ())) < clients:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{len(seen.get(seq, ()))} of {clients} have tick {seq}")
                await asyncio.sleep(0.001)
            found.append([1000.0 * (t - at_s) for t in seen[seq]])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found
