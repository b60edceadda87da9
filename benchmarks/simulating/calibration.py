"""The profile that the surrogate knows the engine by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.build import build_runtime
from engine.cluster import ParallelConfig, SwitchPhase, SwitchTicket
from engine.config import EngineConfig
from engine.facade import EngineCluster
from engine.profile import ProfiledCluster, spec_from_json
from engine.profiler import Observed, build_profile, fit, measured, observe_all
from engine.step_fit import MeasuredSteps, Residual
from envs.surrogate.calibration import residuals

PASS_TIMEOUT_S = 900.0


class Calibration:
    """Observations of every configuration, made in several passes over the time that all takes,
    since a host is faster at one time than at another."""

    def __init__(self, configs: Sequence[ParallelConfig], processors: int) -> None:
        self._configs, self._processors = list(configs), processors
        self._passes: list[list[Observed]] = []
        self._tickets: list[SwitchTicket] = []

    def observe(self, config: EngineConfig) -> None:
        """One pass, on an engine of its own."""
        with EngineCluster(lambda: build_runtime(config)) as cluster:
            self._spec = cluster.spec
            work = observe_all(cluster.runtime, True, self._configs)
            observed, tickets = cluster.run(work, PASS_TIMEOUT_S)
        self._passes.append(observed)
        self._tickets += tickets

    def profile(self) -> ProfiledCluster:
        """Fitted to all passes so far."""
        return build_profile(
            self._spec, True, self._configs, self._observed(), self._tickets, self._processors
        )

    def _observed(self) -> list[Observed]:
        return [Observed.of(several) for several in zip(*self._passes, strict=True)]

    def residuals(self) -> dict[ParallelConfig, dict[str, Residual]]:
        """Errors of the fits on the steps of all passes that were alone in flight."""
        found = {}
        for parallel, observed in zip(self._configs, self._observed(), strict=True):
            rows = [row for row in observed.rows if row[-1] == np.inf]
            alone = MeasuredSteps.of([row[:-1] for row in rows])
            found[parallel] = residuals(fit(parallel, observed), alone)
        return found

    def mean_factors(self, profiled: ProfiledCluster) -> list[float]:
        """Per pass, measured over fitted seconds of all its steps on one device."""
        fitted = profiled.profile.step_model(self._configs[0])
        steps = [measured(p[0])[0] for p in self._passes]
        return [float(s.step_s.sum() / s.predicted(fitted).sum()) for s in steps]

    def to_json(self) -> dict[str, Any]:
        return {
            "processors": self._processors,
            "configs": [asdict(c) for c in self._configs],
            "spec": asdict(self._spec),
            "passes": [[asdict(o) for o in observed] for observed in self._passes],
            "switches": [
                {
                    "weight_bytes": t.weight_bytes,
                    "kv_bytes": t.kv_bytes,
                    "pause_s": t.pause_s,
                    "duration_s": t.duration_s,
                    "phase_s": dict(t.phase_s),
                }
                for t in self._tickets
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Calibration:
        found = cls([ParallelConfig(**c) for c in data["configs"]], data["processors"])
        found._spec = spec_from_json(data["spec"])
        found._passes = [
            [Observed(o["rows"], o["busy_cores"], tuple(o["slowdowns"])) for o in observed]
            for observed in data["passes"]
        ]
        found._tickets = [_ticket(**t) for t in data["switches"]]
        return found


def _ticket(duration_s: float, phase_s: dict[str, float], **figures: Any) -> SwitchTicket:
    return SwitchTicket(
        ticket_id="",
        phase=SwitchPhase.DONE,
        from_key="",
        to_key="",
        from_epoch=0,
        started_s=0.0,
        updated_s=duration_s,
        phase_s=tuple(phase_s.items()),
        **figures,
    )
