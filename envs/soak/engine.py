"""The engine of the soak test: a served surrogate that tells nothing, nonsense, or tells it late,
and that notes with what knowledge each switch was asked for."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace

from controller.last_good import is_good
from engine.cluster import ClusterSnapshot, SwitchPlan, SwitchTicket
from envs.served_surrogate import ServedSurrogate, SurrogateRuntime


@dataclass(slots=True)
class Faults:
    """In force now; set by the soak, read by the engine."""

    is_dark: bool = False  # no measurements
    is_nan: bool = False  # measurements that are no numbers
    delay_s: float = 0.0  # of every look


@dataclass(frozen=True, slots=True)
class Asked:
    """A switch as it was asked for, whether or not it was begun."""

    decision_id: str
    at_s: float
    is_second: bool  # while another ran
    since_last_s: float  # from the end of the switch before; inf: the first
    age_s: float  # of the oldest good measurement given out, over the replicas


class FaultyRuntime(SurrogateRuntime):
    """One life. `faults` and `asked` are those of the engine, over all its lives."""

    faults: Faults
    asked: deque[Asked]
    good: dict[int, float]  # replica id -> time of the last good measurement given out

    def snapshot(self) -> ClusterSnapshot:
        time.sleep(self.faults.delay_s)
        snapshot = super().snapshot()
        if self.faults.is_dark:
            snapshot = replace(snapshot, replicas=())
        if self.faults.is_nan:
            bad = tuple(replace(r, measured_at_s=math.nan) for r in snapshot.replicas)
            snapshot = replace(snapshot, replicas=bad)
        self.good |= {r.replica_id: r.measured_at_s for r in snapshot.replicas if is_good(r)}
        return snapshot

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        now = self.at_present().snapshot()
        last = now.switch
        is_over = last is not None and last.phase.is_terminal
        measured = [self.good.get(r.replica_id, -math.inf) for r in now.deployment.replicas]
        self.asked.append(
            Asked(
                decision_id=plan.decision_id,
                at_s=now.now_s,
                is_second=now.switch_in_flight,
                since_last_s=now.now_s - last.updated_s if last and is_over else math.inf,
                age_s=now.now_s - min(measured, default=-math.inf),
            )
        )
        return super().apply(plan)


class FaultyEngine(ServedSurrogate):
    """Owns what outlives its lives."""

    def build_runtime(self) -> SurrogateRuntime:
        if not self.num_lives:
            self.faults, self.asked = Faults(), deque[Asked]()
        runtime = FaultyRuntime(
            self.cluster, self.key, self.rate_per_s, self.seed + self.num_lives, self.regime_s
        )
        runtime.faults, runtime.asked, runtime.good = self.faults, self.asked, {}
        return runtime

    def truth(self) -> ClusterSnapshot:
        """The snapshot without faults."""

        async def ask() -> ClusterSnapshot:
            return self.runtime.at_present().snapshot()

        return self.run(ask())
