"""`python -m engine.profiler`: measures a ServingProfile on the real engine, in a few minutes.

Every configuration is measured with the whole pool busy (as many replicas as fit, each with the
same load), because ranks that share a host's processors slow one another; or, `--isolated`, with
one replica alone, and then several together, from which the surrogate computes how replicas slow
one another. Step times are the leaders' own reports, from the end of one step to the end of the
next, so they hold scheduling, messages and sampling too. The engine is re-shaped from one
configuration to the next by live switches, which are measured on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ClusterSpec, KvCostParams, ParallelConfig, SwitchPhase, SwitchTicket
from engine.config import EngineConfig, add_arguments, parse_config
from engine.errors import TidewrightError, UnavailableError
from engine.facade import EngineCluster
from engine.messages import StepReport
from engine.migration.plan import plan_switch
from engine.profile import Crowding, ProfiledCluster, ServingProfile, StepTimeModel
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.shards import fits
from engine.step_fit import MeasuredSteps, fit_pipeline

CLIENTS = (1, 2, 4, 8, 16)  # per replica and stage, each with one request at a time
BUSY_CLIENTS = 4  # the same, while replicas are compared alone and together
NUM_REQUESTS = 3  # of each client
PROMPTS, OUTPUTS = (8, 384), (4, 64)  # tokens, drawn log-uniformly between the two
NUM_BUSY_STEPS = 60  # over which processor time is counted: its clock ticks every 10 ms
TOKEN_KNOTS = (1, 4, 16, 64)  # few tokens are bound by memory, many by arithmetic
LEAST_SHARED = 1.2  # a slowdown that tells an exponent
EXPONENTS = (0.5, 3.0)  # least and largest that are believed
MIN_BANDWIDTH_BYTES = 1 << 20  # smaller switches say nothing of the link
ISOLATED_HELP = "one replica alone, and how much slower several are together"
DRAWN = (PROMPTS, OUTPUTS)
NO_CROWDING = Crowding()
Row = tuple[float, ...]  # of MeasuredSteps, and seconds since the step before ended


def candidate_configs(runtime: EngineRuntime) -> list[ParallelConfig]:
    """Configurations that fit this pool: tp up to four or eight, pp up to four."""
    spec = runtime.spec
    return [
        parallel
        for tp in (1, 2, 3, 4, 8)
        for pp in (1, 2, 3, 4)
        if (parallel := ParallelConfig(tp, pp)).num_devices <= spec.num_devices
        and fits(spec, parallel)
    ]


@dataclass(frozen=True, slots=True)
class Observed:
    """One configuration under load, by as many replicas as fit or, isolated, one."""

    rows: list[Row]
    busy_cores: float = 0.0  # processors that one step in flight keeps busy
    slowdowns: tuple[float, ...] = (1.0,)  # of one replica, two together, and so on

    @classmethod
    def of(cls, several: Sequence[Observed]) -> Observed:
        """All steps of several observations, and means of the rest."""
        return cls(
            [row for o in several for row in o.rows],
            float(np.mean([o.busy_cores for o in several])),
            tuple(np.mean([o.slowdowns for o in several], axis=0).tolist()),
        )


class Profiler:
    """Drives one engine. Coroutines run on the engine's loop."""

    def __init__(self, runtime: EngineRuntime, isolated: bool) -> None:
        self.runtime, self.isolated = runtime, isolated
        self.tickets: list[SwitchTicket] = []
        self._reports: dict[int, list[StepReport]] = defaultdict(list)  # by replica
        self._num_requests = 0
        runtime.on_step = lambda replica_id, step: self._reports[replica_id].append(step)

    # ---------------------------------------------------------------- load

    async def _request(self, prompt_tokens: int, num_tokens: int) -> None:
        self._num_requests += 1
        name, vocab = f"profile-{self._num_requests}", self.runtime.spec.model.vocab_size
        prompt = [(self._num_requests * 31 + i * 7) % vocab for i in range(prompt_tokens)]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        async for _ in self.runtime.generate(name, prompt, params):
            pass

    async def _serve(self, per_replica: int) -> float:
        """Seconds for so many clients per replica, whose requests follow from their number; the
        router spreads them evenly."""
        began_s = time.perf_counter()
        count = per_replica * len(self.runtime.deployment.replicas)
        await asyncio.gather(*(self._client(i % per_replica) for i in range(count)))
        return time.perf_counter() - began_s

    async def _client(self, number: int) -> None:
        draw, longest = random.Random(number), self.runtime.spec.model.max_model_len - OUTPUTS[1]
        for _ in range(NUM_REQUESTS):
            prompt, output = (round(math.exp(draw.uniform(*map(math.log, r)))) for r in DRAWN)
            await self._request(min(prompt, longest), output)

    def _take_reports(self) -> list[list[StepReport]]:
        """Those since the last call, a list per replica that made steps."""
        taken = list(self._reports.values())
        self._reports.clear()
        return taken

    # ---------------------------------------------------------------- one configuration

    async def observe(self, parallel: ParallelConfig) -> Observed:
        """The pool re-shaped to one configuration and put under load."""
        await self._switch_to(parallel)
        await self._serve(2)  # warm up
        self._take_reports()
        most = self.runtime.spec.max_num_seqs
        for clients in sorted({min(parallel.pp * number, most) for number in CLIENTS}):
            await self._serve(clients)
        rows = [row for steps in self._take_reports() for row in step_rows(steps)]
        if not self.isolated:
            return Observed(rows)
        busy_cores, alone_s = await self._busy_cores(), await self._serve(BUSY_CLIENTS)
        slowdowns = [1.0]
        for together in range(2, self.runtime.spec.num_devices // parallel.num_devices + 1):
            await self._switch_to(parallel, together)
            await self._serve(1)
            slowdowns.append(await self._serve(BUSY_CLIENTS) / alone_s)
        return Observed(rows, busy_cores, tuple(slowdowns))

    async def _busy_cores(self) -> float:
        """Processors that engine and workers keep busy while one step of a replica is in flight."""
        devices = self.runtime.deployment.replicas[0].placement.devices
        pids = [os.getpid(), *(self.runtime.workers.pid(device) for device in devices)]
        cpu_s, wall_s = -sum(map(cpu_seconds, pids)), -time.perf_counter()
        await self._request(8, NUM_BUSY_STEPS)
        return (cpu_s + sum(map(cpu_seconds, pids))) / (wall_s + time.perf_counter())

    async def _switch_to(self, parallel: ParallelConfig, replicas: int | None = None) -> None:
        """As many replicas as fit, or, isolated, one."""
        runtime = self.runtime
        if replicas is None:
            replicas = 1 if self.isolated else runtime.spec.num_devices // parallel.num_devices
        target = [parallel] * replicas
        kv = KvCostParams(runtime.spec.link_bytes_per_s, 1.0, 0.01)
        plan = plan_switch(runtime.spec, runtime.deployment, runtime.epoch, target, kv)
        if plan.target == runtime.deployment:
            return
        load = asyncio.create_task(self._serve(1))  # so that KV moves too
        await asyncio.sleep(0)
        ticket = await runtime.ended(runtime.apply(plan).ticket_id)
        await load
        if ticket.phase is not SwitchPhase.DONE:
            raise UnavailableError(f"the switch to {ticket.to_key} failed: {ticket.reason}")
        self.tickets.append(ticket)


def step_rows(steps: Sequence[StepReport]) -> list[Row]:
    """Steps of one replica, in the order of their ends."""
    before_s = [-math.inf, *(s.ended_s for s in steps)]
    return [
        (
            s.tokens,
            s.decoding,
            s.sequences,
            s.context_tokens,
            s.pairs,
            s.ended_s - s.started_s,
            s.ended_s - before if s.others_at_start else math.inf,
        )
        for s, before in zip(steps, before_s, strict=False)
    ]


def fit(
    parallel: ParallelConfig, observed: Observed, crowding: Crowding = NO_CROWDING
) -> StepTimeModel:
    """Step times of one configuration, free of what its own ranks and stages took from one another;
    `busy_cores` as processor time tells. Raises InvalidRequestError when they are no fit."""
    steps, gap_s = measured(observed)

    def slowdowns(at_work: float) -> tuple[float, float]:
        busy = at_work * observed.busy_cores
        return crowding.slowdown(busy), crowding.memory_slowdown(busy)

    model = fit_pipeline(
        parallel, steps, gap_s, TOKEN_KNOTS, leader_computes=True, slowdowns=slowdowns
    )
    model = replace(model, busy_cores=observed.busy_cores)
    return replace(model, crowding_exponent=crowding_exponent(model, observed, crowding))


def crowding_exponent(model: StepTimeModel, observed: Observed, crowding: Crowding) -> float:
    """To what power crowding slows steps, by how much slower as many as fit are together: ranks in
    step wait for the last of them, stages leave processors idle."""
    alone = at_work(model) * model.busy_cores
    together = len(observed.slowdowns) * alone
    shared = crowding.slowdown(together) / crowding.slowdown(alone)
    if shared < LEAST_SHARED:
        return 1.0
    memory = (crowding.memory_slowdown(together), crowding.memory_slowdown(alone))
    slower, alone_s = (_compared_s(model, observed, factor) for factor in memory)
    rest = observed.slowdowns[-1] * alone_s / slower
    return float(np.clip(math.log(rest) / math.log(shared), *EXPONENTS))


def _compared_s(model: StepTimeModel, observed: Observed, memory: float) -> float:
    """Seconds that the model gives the steps of a load like that under which replicas are compared
    alone and together, with memory so many times as slow."""
    steps, _ = measured(observed)
    times_s = replace(steps, memory=np.full_like(steps.step_s, memory)).predicted(model)
    return float(times_s[steps.sequences <= BUSY_CLIENTS].sum())


def measured(observed: Observed) -> tuple[MeasuredSteps, NDArray[np.float64]]:
    """Steps, and seconds from the end of the one before each."""
    columns = np.array(observed.rows, np.float64).T
    return MeasuredSteps.of(columns[:-1].T), columns[-1]


def crowd(model: StepTimeModel, observed: Observed, processors: int) -> Crowding:
    """What replicas take from one another, as those of the smallest configuration showed it.

    `model` is theirs. More busy processors than there are share them; what they were slower
    besides is memory's, whose share of a step's time is that in the load they were compared under.
    """
    by_memory = 1.0 - _compared_s(model, observed, 0.0) / _compared_s(model, observed, 1.0)
    busy = model.busy_cores * at_work(model) * np.arange(1.0, 1.0 + len(observed.slowdowns))
    sharing = np.maximum(1.0, busy / processors)
    sharing /= sharing[0]
    rest = np.array(observed.slowdowns) / sharing
    memory = np.maximum.accumulate(np.append(1.0, 1.0 + (rest[1:] - 1.0) / by_memory))
    return Crowding(_knots(busy, sharing), _knots(busy, memory))


def _knots(busy: Iterable[float], slowdowns: Iterable[float]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(map(float, busy), map(float, slowdowns), strict=True))


def at_work(model: StepTimeModel) -> float:
    """Steps of a replica that are at work together when it is full."""
    return min(float(model.parallel.pp), 1.0 / model.stage_share)


def _told(knots: Iterable[tuple[float, float]]) -> str:
    return ", ".join(f"{slowdown:.2f} at {busy:.2f}" for busy, slowdown in knots)


def _size(parallel: ParallelConfig) -> tuple[int, int]:
    return parallel.num_devices, parallel.pp


def cpu_seconds(pid: int) -> float:
    """Processor time that a process of this machine has taken. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def _switch_figures(tickets: Sequence[SwitchTicket], link: float) -> tuple[float, float, float]:
    """(bytes per second, seconds of a switch that moves nothing, of a pause). What moves while
    requests stand still is the last of many rounds, and little."""
    speeds = [
        t.weight_bytes / dict(t.phase_s)[SwitchPhase.TRANSFER]
        for t in tickets
        if t.weight_bytes > MIN_BANDWIDTH_BYTES
    ]
    bandwidth = float(np.median(speeds)) if speeds else link
    overheads = [max(t.duration_s - t.weight_bytes / bandwidth, 0.0) for t in tickets]
    pauses = [t.pause_s for t in tickets if t.pause_s > 0.0]
    return (
        bandwidth,
        float(np.median(overheads)) if overheads else 0.0,
        float(np.median(pauses)) if pauses else 0.0,
    )


async def observe_all(
    runtime: EngineRuntime, isolated: bool, configs: Sequence[ParallelConfig]
) -> tuple[list[Observed], list[SwitchTicket]]:
    """Each configuration, and the switches between them."""
    profiler = Profiler(runtime, isolated)
    return [await profiler.observe(parallel) for parallel in configs], profiler.tickets


def build_profile(
    spec: ClusterSpec,
    isolated: bool,
    configs: Sequence[ParallelConfig],
    observed: Sequence[Observed],
    tickets: Sequence[SwitchTicket],
    processors: int,
) -> ProfiledCluster:
    """Fit what was observed; prints a line for each configuration. Raises InvalidRequestError."""
    crowding = NO_CROWDING
    if isolated:
        smallest = min(range(len(configs)), key=lambda i: _size(configs[i]))
        alone = fit(configs[smallest], observed[smallest])
        crowding = crowd(alone, observed[smallest], processors)
        print(f"slower by processors kept busy: {_told(crowding.processors)}")
        print(f"memory besides: {_told(crowding.memory)}")
    models = [fit(c, o, crowding) for c, o in zip(configs, observed, strict=True)]
    for m in models:
        print(
            f"{m.parallel.key}: {1e3 * m.base_s:.2f} ms + {1e6 * m.per_token_s:.0f} us/token "
            f"+ {1e6 * m.per_seq_s:.0f} us/sequence + {1e6 * m.per_context_token_s:.2f} "
            f"us/context token + {1e9 * m.per_pair_s:.0f} ns/pair, stage share "
            f"{m.stage_share:.2f}, {m.busy_cores:.2f} processors busy, crowding to the power "
            f"{m.crowding_exponent:.2f}, median error {100 * m.residual_p50:.0f} %",
            flush=True,
        )
    bandwidth, overhead_s, pause_s = _switch_figures(tickets, spec.link_bytes_per_s)
    print(
        f"switch: {1e-6 * bandwidth:.0f} MB/s, {overhead_s:.2f} s and a pause of "
        f"{1e3 * pause_s:.0f} ms ({len(tickets)} switches)"
    )
    found = ServingProfile(
        model=spec.model.name,
        device=f"cpu {platform.machine()}",
        steps=tuple(models),
        link_bytes_per_s=bandwidth,
        switch_overhead_s=overhead_s,
        pause_overhead_s=pause_s,
        crowding=crowding,
    )
    return ProfiledCluster(replace(spec, link_bytes_per_s=bandwidth), found)


async def profile(runtime: EngineRuntime, isolated: bool = False) -> ProfiledCluster:
    """Measure every configuration that fits."""
    configs = candidate_configs(runtime)
    observed, tickets = await observe_all(runtime, isolated, configs)
    processors = len(os.sched_getaffinity(0))
    return build_profile(runtime.spec, isolated, configs, observed, tickets, processors)


def main(argv: list[str]) -> int:
    from engine.build import build_runtime

    parser = argparse.ArgumentParser("python -m engine.profiler", description="Measure step times.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--isolated", action="store_true", help=ISOLATED_HELP)
    add_arguments(parser, EngineConfig)
    try:
        config = parse_config(parser, EngineConfig, argv)
        args = parser.parse_args(argv)
        out, isolated = args.out, args.isolated
        config = config.model_copy(update={"enable_prefix_caching": False})  # every step in full
        with EngineCluster(lambda: build_runtime(config)) as cluster:
            measured = cluster.run(profile(cluster.runtime, isolated), timeout_s=600.0)
    except TidewrightError as error:
        parser.exit(2, f"error: {error}\n")
    out.write_text(json.dumps(measured.to_json(), indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
