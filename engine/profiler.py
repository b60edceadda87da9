"""`python -m engine.profiler`: measures a ServingProfile on the real engine, in a few minutes.

Every configuration is measured with the whole pool busy (as many replicas as fit, each with the
same load), because ranks that share a host's cores slow one another; or, `--isolated`, with one
replica alone and the cores that its steps keep busy, from which the surrogate computes how replicas
slow one another. Step times are the leaders' own reports, from the end of one step to the end of
the next, so they hold scheduling, messages and sampling too. The engine is re-shaped from one
configuration to the next by live switches, which are measured on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.cluster import KvCostParams, ParallelConfig, SwitchPhase, SwitchTicket
from engine.config import EngineConfig, add_arguments, parse_config
from engine.errors import InvalidRequestError, TidewrightError, UnavailableError
from engine.facade import EngineCluster
from engine.messages import StepReport
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.shards import fits
from engine.step_fit import MeasuredSteps, fit_step_times

BATCHES = (1, 2, 4, 8, 16)  # sequences of a step
CONTEXTS = (24, 160)  # prompt tokens before decoding
PREFILLS = (8, 16, 32, 64, 128, 224)  # tokens of one prompt
NUM_PREFILLS = 3  # of each length, alone and beside others that decode
NUM_DECODE_STEPS = 12
NUM_BESIDE = (3, 9)  # sequences that decode beside prefills
ATTEMPTS = 3  # at a configuration whose step times are no fit
NUM_BUSY_STEPS = 60  # over which processor time is counted: its clock ticks every 10 ms
MIN_BANDWIDTH_BYTES = 1 << 20  # smaller switches say nothing of the link
ISOLATED_HELP = "one replica busy at a time, and the host cores that it keeps busy"
Row = tuple[float, ...]  # of MeasuredSteps


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

    async def _burst(self, per_replica: int, prompt_tokens: int, num_tokens: int) -> None:
        """The same load on every replica at once; the router spreads it evenly."""
        count = per_replica * len(self.runtime.deployment.replicas)
        await asyncio.gather(*(self._request(prompt_tokens, num_tokens) for _ in range(count)))

    async def _prefills(self, lengths: Sequence[int], beside: int = 0) -> None:
        """One prompt after another on every replica, beside sequences that decode meanwhile."""
        num_steps = 3 * NUM_PREFILLS * len(lengths)
        decoding = asyncio.gather(*(self._burst(1, CONTEXTS[0], num_steps) for _ in range(beside)))
        for length in lengths:
            for _ in range(NUM_PREFILLS):
                await self._burst(1, length, 2)
        await decoding

    def _take_reports(self) -> list[list[StepReport]]:
        """Those since the last call, a list per replica that made steps."""
        taken = list(self._reports.values())
        self._reports.clear()
        return taken

    # ---------------------------------------------------------------- one configuration

    async def measure(self, parallel: ParallelConfig) -> StepTimeModel:
        """Fit the step times of one configuration, the pool re-shaped to it. Raises
        InvalidRequestError when they are no fit, several times over."""
        await self._switch_to(parallel)
        await self._burst(2, 32, 4)  # warm up
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._measure(parallel)
            except InvalidRequestError as error:
                if attempt == ATTEMPTS:
                    raise
                print(f"{parallel.key}: measured once more: {error}", flush=True)
        raise AssertionError(ATTEMPTS)

    async def _measure(self, parallel: ParallelConfig) -> StepTimeModel:
        steps, share = await self.measure_steps(parallel)
        busy_cores = await self._busy_cores() if self.isolated else 0.0
        model = fit_step_times(parallel, steps)
        return replace(model, stage_share=share, busy_cores=busy_cores)

    async def measure_steps(self, parallel: ParallelConfig) -> tuple[MeasuredSteps, float]:
        """Steps of the present configuration, and its stage share."""
        spec, pp = self.runtime.spec, parallel.pp
        room = self._room
        self._take_reports()
        share = await self._stage_share(pp)
        for batch in sorted({min(batch, spec.max_num_seqs // pp) for batch in BATCHES} - {0}):
            for context in CONTEXTS:
                await self._burst(pp * batch, min(context, room), NUM_DECODE_STEPS)
        lengths = self._prefill_lengths()
        await self._prefills(lengths)
        if pp == 1:
            for beside in NUM_BESIDE:
                await self._prefills(lengths, min(beside, spec.max_num_seqs - 1))
        rows = [row for steps in self._take_reports() for row in step_rows(steps, pp, share)]
        return MeasuredSteps.of(rows).averaged(), share

    @property
    def _room(self) -> int:
        """Most tokens of a prompt that has tokens to come."""
        return self.runtime.spec.model.max_model_len - NUM_DECODE_STEPS - 4

    def _prefill_lengths(self) -> list[int]:
        most = min(self.runtime.spec.max_num_batched_tokens, self._room)
        return [n for n in PREFILLS if n <= most]

    async def _stage_share(self, pp: int) -> float:
        """Share of a step in which the slowest stage is busy: how often one ends with the pipeline
        full of steps of one sequence, over how long one takes that is alone."""
        if pp == 1:
            return 1.0
        await self._burst(1, CONTEXTS[0], 3 * NUM_DECODE_STEPS)
        alone_s = [s.ended_s - s.started_s for steps in self._take_reports() for s in steps[1:]]
        await self._burst(pp, CONTEXTS[0], 3 * NUM_DECODE_STEPS)
        full_s = [gap_s for steps in self._take_reports() for _, gap_s in full_steps(steps, pp)]
        return float(np.clip(np.median(full_s) / np.median(alone_s), 1.0 / pp, 1.0))

    async def _busy_cores(self) -> float:
        """Host cores that engine and workers keep busy while one step of a replica is in flight."""
        devices = self.runtime.deployment.replicas[0].placement.devices
        pids = [os.getpid(), *(self.runtime.workers.pid(device) for device in devices)]
        cpu_s, wall_s = -sum(map(cpu_seconds, pids)), -time.perf_counter()
        await self._burst(1, CONTEXTS[0], NUM_BUSY_STEPS)
        return (cpu_s + sum(map(cpu_seconds, pids))) / (wall_s + time.perf_counter())

    async def shared_cores(self, model: StepTimeModel) -> float:
        """Host cores that all replicas share, as steps show: with every device busy, replicas of
        that configuration take longer than one that is alone by busy cores over cores. Processors
        count for less than their number where they share caches and arithmetic units."""
        replicas = self.runtime.spec.num_devices // model.parallel.num_devices
        await self._switch_to(model.parallel, replicas)
        await self._burst(2, CONTEXTS[0], 4)  # warm up
        self._take_reports()
        await self._prefills(self._prefill_lengths(), NUM_BESIDE[0])
        pp, share = model.parallel.pp, model.stage_share
        rows = [row for steps in self._take_reports() for row in step_rows(steps, pp, share)]
        steps = MeasuredSteps.of(rows)
        slowdown = float(steps.step_s.sum() / steps.predicted(model).sum())
        busy = replicas * model.busy_cores
        return busy / slowdown if slowdown > 1 else max(busy, float(num_processors()))

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
        load = asyncio.create_task(self._burst(1, 64, 32))  # so that KV moves too
        await asyncio.sleep(0)
        ticket = await runtime.ended(runtime.apply(plan).ticket_id)
        await load
        if ticket.phase is not SwitchPhase.DONE:
            raise UnavailableError(f"the switch to {ticket.to_key} failed: {ticket.reason}")
        self.tickets.append(ticket)


def step_rows(steps: Sequence[StepReport], pp: int, share: float) -> list[Row]:
    """Rows of `MeasuredSteps` from steps of one replica: of a pipeline those that were alone, and
    those of sequences that only decode while it is full, one of which ends every share * step_s."""
    timed = [(s, s.ended_s - s.started_s) for s in steps if not s.others_at_start + s.others_at_end]
    if pp > 1:
        timed += [
            (s, gap_s / share) for s, gap_s in full_steps(steps, pp) if s.decoding == s.sequences
        ]
    return [
        (s.tokens, s.decoding, s.sequences, s.context_tokens, s.pairs, step_s)
        for s, step_s in timed
    ]


def full_steps(steps: Sequence[StepReport], pp: int) -> list[tuple[StepReport, float]]:
    """Steps that ended in a pipeline full of steps of one size for a round of it, with the seconds
    since the one before ended."""
    ends = list(pairwise(steps))
    full = [
        s.others_at_start == s.others_at_end == pp - 1 and s.tokens == before.tokens
        for before, s in ends
    ]
    return [
        (s, s.ended_s - before.ended_s)
        for i, (before, s) in enumerate(ends)
        if i >= pp - 1 and all(full[i - pp + 1 : i + 1])
    ]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process of this machine has taken. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


def num_processors() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def _switch_figures(tickets: Sequence[SwitchTicket], link: float) -> tuple[float, float, float]:
    """(bytes per second, seconds of a switch that moves nothing, of a pause that moves nothing)."""
    speeds = [
        t.weight_bytes / dict(t.phase_s)[SwitchPhase.TRANSFER]
        for t in tickets
        if t.weight_bytes > MIN_BANDWIDTH_BYTES
    ]
    bandwidth = float(np.median(speeds)) if speeds else link
    overheads = [max(t.duration_s - t.weight_bytes / bandwidth, 0.0) for t in tickets]
    pauses = [max(t.pause_s - t.kv_bytes / bandwidth, 0.0) for t in tickets]
    return (
        bandwidth,
        float(np.median(overheads)) if overheads else 0.0,
        float(np.median(pauses)) if pauses else 0.0,
    )


async def profile(
    runtime: EngineRuntime,
    isolated: bool = False,
    configs: Sequence[ParallelConfig] | None = None,
) -> ProfiledCluster:
    """Measure `configs`, by default all that fit; prints one line each."""
    profiler, steps = Profiler(runtime, isolated), []
    for parallel in configs or candidate_configs(runtime):
        model = await profiler.measure(parallel)
        steps.append(model)
        print(
            f"{parallel.key}: {1e3 * model.base_s:.2f} ms + {1e6 * model.per_token_s:.0f} us/token "
            f"+ {1e6 * model.per_seq_s:.0f} us/sequence + {1e6 * model.per_context_token_s:.2f} "
            f"us/context token + {1e9 * model.per_pair_s:.0f} ns/pair, stage share "
            f"{model.stage_share:.2f}, {model.busy_cores:.2f} cores busy, median error "
            f"{100 * model.residual_p50:.0f} %",
            flush=True,
        )
    cores = 0.0
    if isolated:
        smallest = min(steps, key=lambda m: (m.parallel.pp, m.parallel.tp))
        cores = await profiler.shared_cores(smallest)
        print(f"replicas share {cores:.2f} of {num_processors()} cores", flush=True)
    bandwidth, overhead_s, pause_s = _switch_figures(
        profiler.tickets, runtime.spec.link_bytes_per_s
    )
    print(
        f"switch: {1e-6 * bandwidth:.0f} MB/s, {overhead_s:.2f} s and a pause of "
        f"{1e3 * pause_s:.0f} ms without bytes ({len(profiler.tickets)} switches)"
    )
    measured = ServingProfile(
        model=runtime.spec.model.name,
        device=f"cpu {platform.machine()}",
        steps=tuple(steps),
        link_bytes_per_s=bandwidth,
        switch_overhead_s=overhead_s,
        pause_overhead_s=pause_s,
        cores=cores,
    )
    return ProfiledCluster(replace(runtime.spec, link_bytes_per_s=bandwidth), measured)


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
