"""What a tick costs beside the engine's own calls: everything that is pure, from events to plan."""

from __future__ import annotations

import time

import numpy as np

from controlling.setting import ToldEngine, pipeline_of, pool
from policies.baselines import HysteresisPolicy

SWITCH_EVERY = 5  # ticks: then a legal candidate is taken at random, and the switch planned
WARM_UP = 3


def measure(
    num_devices: int, key: str, num_ticks: int, seed: int = 0
) -> tuple[list[float], list[float], int]:
    """Milliseconds of each tick by the wall and of the processor; how many planned a switch."""
    cluster, rng = pool(num_devices), np.random.default_rng(seed)
    pipeline, engine = pipeline_of(cluster), ToldEngine(cluster, key, seed)
    policy, switches = HysteresisPolicy(pipeline.observation_spec), 0
    wall, cpu = list[float](), list[float]()
    for number in range(num_ticks + WARM_UP):
        events, snapshot = engine.events(pipeline.config.grid_s), engine.snapshot()
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        pipeline.observe(events)
        prepared = pipeline.prepare(snapshot)
        probabilities = policy.probabilities(prepared.observation)
        legal = np.flatnonzero(prepared.observation.mask)
        action = int(np.argmax(probabilities))
        if number % SWITCH_EVERY == 0 and len(legal) > 1:
            action = int(rng.choice(legal[1:]))
        decision = pipeline.resolve(prepared, action)
        pipeline.routing_for(prepared)
        wall.append(1000.0 * (time.perf_counter() - begun_s))
        cpu.append(1000.0 * (time.process_time() - begun_cpu_s))
        if decision.plan is not None:
            switches += 1
            pipeline.scheduler.record_switch(snapshot.now_s)
            engine.switched(decision.plan)
    return wall[WARM_UP:], cpu[WARM_UP:], switches
