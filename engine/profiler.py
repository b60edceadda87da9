"""`python -m engine.profiler`: measures a ServingProfile on the real engine, in a minute or two.

Every configuration is measured with the whole pool busy (as many replicas as fit, each with the
same load), because ranks that share a host's cores slow one another; or, `--isolated`, with one
replica alone and the cores that its steps keep busy, from which the surrogate computes how replicas
slow one another. Times are taken where tokens reach the engine process, so they hold scheduling,
messages and sampling too. The engine is re-shaped from one configuration to the next by live
switches, which are measured on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cluster import KvCostParams, ParallelConfig, SwitchPhase, SwitchTicket
from engine.config import EngineConfig, add_arguments, parse_config
from engine.errors import InvalidRequestError, TidewrightError, UnavailableError
from engine.facade import EngineCluster
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel, attention_pairs
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.shards import fits
from engine.step_fit import MeasuredSteps, fit_step_times

BATCHES = (1, 4, 12)  # sequences of a step
CONTEXTS = (24, 160)  # prompt tokens before decoding
PREFILLS = (8, 32, 64, 128, 224)  # tokens of one prefill step
NUM_PREFILLS = 3  # of each length
NUM_DECODE_STEPS = 10
DECODE_PARTS = 2  # of those steps: each gives one measurement, as balanced as prefills
ATTEMPTS = 3  # at a configuration whose step times are no fit
NUM_BUSY_BURSTS = 3  # over which processor time is counted: its clock ticks every 10 ms
MIN_BANDWIDTH_BYTES = 1 << 20  # smaller switches say nothing of the link
ISOLATED_HELP = "one replica busy at a time, and the host cores that it keeps busy"
Row = tuple[float, ...]  # of MeasuredSteps
Floats = NDArray[np.float64]


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
        self._num_requests = 0

    # ---------------------------------------------------------------- load

    async def _token_times(self, prompt_tokens: int, num_tokens: int) -> list[float]:
        """Seconds at which each token of one request came."""
        self._num_requests += 1
        name, vocab = f"profile-{self._num_requests}", self.runtime.spec.model.vocab_size
        prompt = [(self._num_requests * 31 + i * 7) % vocab for i in range(prompt_tokens)]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        times: list[float] = [time.perf_counter()]
        async for chunk in self.runtime.generate(name, prompt, params):
            times += [time.perf_counter()] * len(chunk.token_ids)
        return times

    async def _burst(self, per_replica: int, prompt: int, num_tokens: int) -> Floats:
        """Seconds of the start and of each token, [sequences, 1 + tokens], under the same load on
        every replica at once; the router spreads it evenly."""
        count = per_replica * len(self.runtime.deployment.replicas)
        return np.array(
            await asyncio.gather(*(self._token_times(prompt, num_tokens) for _ in range(count)))
        )

    async def _decode_gaps_s(self, per_replica: int, context: int) -> Floats:
        """Median seconds between two tokens of a sequence while that many decode, one for each of
        `DECODE_PARTS` of the steps."""
        times = await self._burst(per_replica, context, NUM_DECODE_STEPS + 2)
        parts = np.array_split(np.diff(times[:, 2:]), DECODE_PARTS, axis=1)
        return np.array([np.median(part) for part in parts])

    async def _decode_rows(self, batch: int, context: int, pp: int, share: float) -> list[Row]:
        """Steps of `batch` sequences, from a load that gives each of pp steps in flight as many:
        a sequence then has a token every pp * share * step_s."""
        gaps_s = await self._decode_gaps_s(pp * batch, context)
        middles = context + NUM_DECODE_STEPS * (np.arange(DECODE_PARTS) + 0.5) / DECODE_PARTS
        return [
            (batch, batch, batch, batch * middle, batch * middle, gap_s / (pp * share))
            for middle, gap_s in zip(middles.tolist(), gaps_s.tolist(), strict=True)
        ]

    async def _prefill_row(self, tokens: int) -> Row:
        times = await self._burst(1, tokens, 1)
        step_s = float(np.median(times[:, 1] - times[:, 0]))
        return tokens, 0, 1, tokens, attention_pairs(0, tokens), step_s

    async def _stage_share(self, pp: int) -> float:
        """Share of a step in which the slowest stage is busy: how much longer pp sequences wait,
        each in a step of its own, than one that is alone."""
        if pp == 1:
            return 1.0
        alone_s = np.median(await self._decode_gaps_s(1, CONTEXTS[0]))
        full_s = np.median(await self._decode_gaps_s(pp, CONTEXTS[0]))
        return float(np.clip(full_s / (pp * alone_s), 1.0 / pp, 1.0))

    async def _busy_cores(self, sequences: int) -> float:
        """Host cores that the workers of a replica keep busy while so many sequences decode."""
        devices = self.runtime.deployment.replicas[0].placement.devices
        pids = [self.runtime.workers.pid(device) for device in devices]
        cpu_s, wall_s = -sum(map(cpu_seconds, pids)), -time.perf_counter()
        for _ in range(NUM_BUSY_BURSTS):
            await self._burst(sequences, CONTEXTS[0], 2 * NUM_DECODE_STEPS)
        return (cpu_s + sum(map(cpu_seconds, pids))) / (wall_s + time.perf_counter())

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
        spec, pp = self.runtime.spec, parallel.pp
        room = spec.model.max_model_len - NUM_DECODE_STEPS - 4
        share = await self._stage_share(pp)
        rows: list[Row] = []
        for batch in sorted({min(batch, spec.max_num_seqs // pp) for batch in BATCHES} - {0}):
            for context in CONTEXTS:
                rows += await self._decode_rows(batch, min(context, room), pp, share)
        for tokens in PREFILLS:
            if tokens <= min(spec.max_num_batched_tokens, room):
                rows += [await self._prefill_row(tokens) for _ in range(NUM_PREFILLS)]
        model = fit_step_times(parallel, MeasuredSteps.of(rows))
        busy_cores = await self._busy_cores(min(4 * pp, spec.max_num_seqs)) if self.isolated else 0
        return replace(model, stage_share=share, busy_cores=busy_cores)

    async def _switch_to(self, parallel: ParallelConfig) -> None:
        runtime = self.runtime
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


def cpu_seconds(pid: int) -> float:
    """Processor time that a process of this machine has taken. Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


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


async def profile(runtime: EngineRuntime, isolated: bool = False) -> ProfiledCluster:
    """Measure every configuration that fits; prints one line each."""
    profiler, steps = Profiler(runtime, isolated), []
    for parallel in candidate_configs(runtime):
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
        cores=float(len(os.sched_getaffinity(0))) if isolated else 0.0,
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
