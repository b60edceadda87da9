"""Cells of the comparison: a deployment, perhaps a switch, and arrivals that cells share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from engine.profile import ProfiledCluster
from envs.workload import Trace
from simulating.runs import Run, simulate
from simulating.settings import SWITCH_LOAD, SWITCH_WORKLOAD, WORKLOADS, Settings, Workload

BACKLOG = 120  # requests at once, to see what a deployment sustains
SEED = 20261


@dataclass(slots=True)
class Cell:
    """`runs` of the engine; cells of the same `traffic` have the same arrivals."""

    deployment: str
    traffic: str
    trace: Trace
    target: str = ""  # of a switch halfway through
    runs: list[Run] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "deployment": self.deployment,
            "target": self.target,
            "traffic": self.traffic,
            "runs": [run.to_json() for run in self.runs],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], traces: Mapping[str, Trace]) -> Cell:
        runs = [Run.from_json(run) for run in data["runs"]]
        name = data["traffic"]
        return cls(data["deployment"], name, traces[name], data["target"], runs)


def trace_to_json(trace: Trace) -> dict[str, Any]:
    return {
        "arrival_s": np.round(trace.arrival_s, 6).tolist(),
        "prompt_tokens": trace.prompt_tokens.tolist(),
        "output_tokens": trace.output_tokens.tolist(),
        "duration_s": trace.duration_s,
    }


def trace_from_json(data: dict[str, Any]) -> Trace:
    prompt, output = (np.array(data[f"{name}_tokens"], np.int64) for name in ("prompt", "output"))
    return Trace(np.array(data["arrival_s"]), prompt, output, data["duration_s"])


def sustained_per_s(profiled: ProfiledCluster, deployment: str, workload: Workload) -> float:
    """Requests per second, by the surrogate, of a backlog that is there at once."""
    drawn = workload.draw(BACKLOG, 1.0, np.random.default_rng(SEED))
    backlog = Trace(np.zeros(len(drawn)), drawn.prompt_tokens, drawn.output_tokens, 1e-3)
    return len(backlog) / float(simulate(profiled, deployment, backlog).finish_s.max())


def draw_cells(settings: Settings, profiled: ProfiledCluster) -> tuple[list[Cell], list[Cell]]:
    """Cells of one deployment each, and cells with a switch."""
    rates = {
        w.name: median(sustained_per_s(profiled, key, w) for key in settings.deployments)
        for w in {*settings.workloads, _switch_workload()}
    }
    traces = {
        f"{w.name}-{load}": _draw(w, load * rates[w.name], settings)
        for w in settings.workloads
        for load in settings.loads
    }
    cells = [
        Cell(key, name, trace) for key in settings.deployments for name, trace in traces.items()
    ]
    return cells, list(_switch_cells(settings, profiled))


def _draw(workload: Workload, rate_per_s: float, settings: Settings) -> Trace:
    seed = [SEED, *workload.name.encode()]
    return workload.draw(rate_per_s, settings.arrivals_s, np.random.default_rng(seed))


def _switch_workload() -> Workload:
    return next(w for w in WORKLOADS if w.name == SWITCH_WORKLOAD)


def _switch_cells(settings: Settings, profiled: ProfiledCluster) -> Iterator[Cell]:
    """At a load that the lesser of both deployments sustains."""
    workload = _switch_workload()
    for key, target in settings.switches:
        rate_per_s = min(sustained_per_s(profiled, k, workload) for k in (key, target))
        trace = _draw(workload, SWITCH_LOAD * rate_per_s, settings)
        yield Cell(key, f"{key} to {target}", trace, target)
