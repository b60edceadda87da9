"""`python -m engine.profiler`: measures a ServingProfile on the real engine, in a minute or two.

Every configuration is measured with the whole pool busy (as many replicas as fit, each with the
same load), because ranks that share a host's cores slow one another. Times are taken where tokens
reach the engine process, so they hold scheduling, messages and sampling too. The engine is
re-shaped from one configuration to the next by live switches, which are measured on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from engine.cluster import KvCostParams, ParallelConfig, SwitchPhase, SwitchTicket
from engine.config import EngineConfig, add_arguments, parse_config
from engine.errors import TidewrightError, UnavailableError
from engine.facade import EngineCluster
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel
from engine.request import SamplingParams
from engine.runtime import EngineRuntime
from engine.shards import fits

BATCHES = (1, 4, 12)  # sequences of a step
CONTEXTS = (24, 160)  # prompt tokens before decoding
PREFILLS = (8, 64, 128, 224)  # tokens of one prefill step
NUM_DECODE_STEPS = 10
MIN_BANDWIDTH_BYTES = 1 << 20  # smaller switches say nothing of the link


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step of a replica."""

    tokens: int
    sequences: int
    context_tokens: float
    step_s: float


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

    def __init__(self, runtime: EngineRuntime) -> None:
        self.runtime = runtime
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
        async for _ in self.runtime.generate(name, prompt, params):
            times.append(time.perf_counter())
        return times

    async def _burst(self, per_replica: int, prompt: int, num_tokens: int) -> list[list[float]]:
        """The same load on every replica at once; the router spreads it evenly."""
        count = per_replica * len(self.runtime.deployment.replicas)
        return list(
            await asyncio.gather(*(self._token_times(prompt, num_tokens) for _ in range(count)))
        )

    async def _decode_gap_s(self, per_replica: int, context: int) -> float:
        """Median seconds between two tokens of a sequence while that many decode."""
        bursts = await self._burst(per_replica, context, NUM_DECODE_STEPS + 2)
        return float(np.median(np.concatenate([np.diff(times[2:]) for times in bursts])))

    async def _decode_sample(self, batch: int, context: int, pp: int, share: float) -> StepSample:
        """A step of `batch` sequences, from a load that gives each of pp steps in flight as many:
        a sequence then has a token every pp * share * step_s."""
        step_s = await self._decode_gap_s(pp * batch, context) / (pp * share)
        middle = context + NUM_DECODE_STEPS / 2
        return StepSample(batch, batch, batch * middle, step_s)

    async def _prefill_sample(self, tokens: int) -> StepSample:
        repeats = [await self._burst(1, tokens, 1) for _ in range(3)]
        step_s = float(np.median([times[1] - times[0] for burst in repeats for times in burst]))
        return StepSample(tokens, 1, float(tokens), step_s)

    async def _stage_share(self, pp: int) -> float:
        """Share of a step in which the slowest stage is busy: how much longer pp sequences wait,
        each in a step of its own, than one that is alone."""
        if pp == 1:
            return 1.0
        alone_s = await self._decode_gap_s(1, CONTEXTS[0])
        full_s = await self._decode_gap_s(pp, CONTEXTS[0])
        return float(np.clip(full_s / (pp * alone_s), 1.0 / pp, 1.0))

    # ---------------------------------------------------------------- one configuration

    async def measure(self, parallel: ParallelConfig) -> StepTimeModel:
        """Fit the step times of one configuration, the pool re-shaped to it."""
        await self._switch_to(parallel)
        await self._burst(2, 32, 4)  # warm up
        room = self.runtime.spec.model.max_model_len - NUM_DECODE_STEPS - 4
        limit = self.runtime.spec.max_num_batched_tokens
        pp, share = parallel.pp, await self._stage_share(parallel.pp)
        samples = [
            await self._decode_sample(batch, min(context, room), pp, share)
            for batch in BATCHES
            for context in CONTEXTS
            if pp * batch <= self.runtime.spec.max_num_seqs
        ]
        samples += [
            await self._prefill_sample(tokens) for tokens in PREFILLS if tokens <= min(limit, room)
        ]
        return replace(fit_step_times(parallel, samples), stage_share=share)

    async def _switch_to(self, parallel: ParallelConfig) -> None:
        runtime = self.runtime
        target = [parallel] * (runtime.spec.num_devices // parallel.num_devices)
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


def fit_step_times(parallel: ParallelConfig, samples: Sequence[StepSample]) -> StepTimeModel:
    """Non-negative least squares on relative errors."""
    rows: NDArray[np.float64] = np.array(
        [[1.0, s.tokens, s.sequences, s.context_tokens] for s in samples]
    )
    times = np.array([s.step_s for s in samples])
    coefficients, _ = nnls(rows / times[:, None], np.ones(len(times)))
    residual = float(np.median(np.abs(rows @ coefficients / times - 1.0)))
    base, token, sequence, context = map(float, coefficients)
    return StepTimeModel(parallel, base, token, sequence, context, residual_p50=residual)


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


async def profile(runtime: EngineRuntime) -> ProfiledCluster:
    """Measure every configuration that fits; prints one line each."""
    profiler, steps = Profiler(runtime), []
    for parallel in candidate_configs(runtime):
        model = await profiler.measure(parallel)
        steps.append(model)
        print(
            f"{parallel.key}: {1e3 * model.base_s:.2f} ms + {1e6 * model.per_token_s:.0f} us/token "
            f"+ {1e6 * model.per_seq_s:.0f} us/sequence + {1e6 * model.per_context_token_s:.2f} "
            f"us/context token, stage share {model.stage_share:.2f}, median error "
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
    )
    return ProfiledCluster(replace(runtime.spec, link_bytes_per_s=bandwidth), measured)


def main(argv: list[str]) -> int:
    from engine.build import build_runtime

    parser = argparse.ArgumentParser("python -m engine.profiler", description="Measure step times.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_arguments(parser, EngineConfig)
    try:
        config = parse_config(parser, EngineConfig, argv)
        config = config.model_copy(update={"enable_prefix_caching": False})  # every step in full
        with EngineCluster(lambda: build_runtime(config)) as cluster:
            measured = cluster.run(profile(cluster.runtime), timeout_s=600.0)
    except TidewrightError as error:
        parser.exit(2, f"error: {error}\n")
    out: Path = parser.parse_args(argv).out
    out.write_text(json.dumps(measured.to_json(), indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
