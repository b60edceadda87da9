"""What was served over time: as logged, in a model, or in a window. For tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cluster import RequestOutcome, RequestStatus, SloSpec
from envs.recalibration import pace_of
from envs.reward import slo_met, tpot_of
from policies.base import TrafficColumns

Floats = NDArray[np.float64]
NUM_BINS, FINEST_BIN_S = 60, 30.0  # of curves
BLOCK_S = 1800.0  # of the worst block


@dataclass(frozen=True, slots=True)
class Switch:
    """One line of the switch ledger."""

    at_s: float
    before: str
    after: str
    why: str = ""
    switch_s: float | None = None  # what it was expected to take
    probability: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """T intervals and E requests that ended, times in seconds from the start."""

    name: str
    at_s: Floats  # [T] starts
    keys: tuple[str, ...]  # [T] deployment that served
    reward: Floats  # [T]
    arrived: Floats  # [T] requests
    ended_s: Floats  # [E]
    latency_s: Floats  # [E]
    met: Floats  # [E] 1 where the service level was met
    grid_s: float
    switches: tuple[Switch, ...] = ()

    @property
    def hours(self) -> float:
        return len(self.at_s) * self.grid_s / 3600.0

    @property
    def switches_per_hour(self) -> float:
        return len(self.switches) / self.hours if self.hours else 0.0

    @property
    def latency_mean_s(self) -> float:
        return float(self.latency_s.mean()) if len(self.latency_s) else 0.0

    @property
    def bin_s(self) -> float:
        """Of curves, whole multiples of FINEST_BIN_S."""
        wanted_s = 3600.0 * self.hours / NUM_BINS
        return FINEST_BIN_S * max(1, round(wanted_s / FINEST_BIN_S))

    def curve(self, values: Floats, bin_s: float) -> tuple[Floats, Floats]:
        """Mean per bin of a figure of requests: middles of the bins that have any, and means."""
        index = (self.ended_s // bin_s).astype(np.int64)
        if not len(index):
            return np.zeros(0), np.zeros(0)
        count, total = np.bincount(index), np.bincount(index, weights=values)
        filled = np.flatnonzero(count)
        return np.asarray((filled + 0.5) * bin_s, np.float64), total[filled] / count[filled]

    def goodput(self, bin_s: float) -> tuple[Floats, Floats]:
        """Requests per second that met their service level, per bin."""
        index = (self.ended_s // bin_s).astype(np.int64)
        good = np.bincount(index, weights=self.met) if len(index) else np.zeros(0)
        return np.asarray((np.arange(len(good)) + 0.5) * bin_s, np.float64), good / bin_s


def ledger_of_keys(at_s: Sequence[float], keys: Sequence[str]) -> tuple[Switch, ...]:
    """The changes of deployment, at the interval after which another one served."""
    pairs = zip(at_s[1:], keys[:-1], keys[1:], strict=True)
    return tuple(Switch(float(t), old, new) for t, old, new in pairs if old != new)


@dataclass
class Watched:
    """Collects the requests of a replay, interval by interval; see `envs.logged_replay.Watch`."""

    slo: SloSpec
    traffic: list[TrafficColumns] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)

    def __call__(self, info: Mapping[str, Any]) -> None:
        self.traffic.append(TrafficColumns(**info["traffic"]))
        self.arrived.append(int(info["arrived"]))

    def ended(self) -> tuple[Floats, Floats, Floats]:
        """Ends, latencies and whether levels were met, of finished requests."""
        found = TrafficColumns.join(self.traffic)
        done, met = found.finished, slo_met(self.slo, found).astype(np.float64)
        latency_s = found.finish_s - found.ended_arrival_s
        return found.finish_s[done], latency_s[done], met[done]

    def pace(self) -> Floats:
        """[T] see `envs.recalibration.pace_of`."""
        return np.array([pace_of(tpot_of(ended)[ended.finished]) for ended in self.traffic])


def ended_of_log(
    outcomes: Sequence[RequestOutcome], slo: SloSpec, start_s: float
) -> tuple[Floats, Floats, Floats]:
    """The same of logged requests."""
    done = [o for o in outcomes if o.status is RequestStatus.FINISHED]
    return (
        np.array([o.finish_s - start_s for o in done], np.float64),
        np.array([o.finish_s - o.arrival_s for o in done], np.float64),
        np.array([slo.is_met_by(o) for o in done], np.float64),
    )


@dataclass(frozen=True, slots=True)
class WorstBlock:
    """The block in which a policy did worst beside another: ratio of worth, (1 + J) / 2."""

    ratio: float
    at_s: float
    block_s: float


def worst_block(
    ours: Floats, theirs: Floats, arrived: Floats, grid_s: float, scale: float, at_s: float = 0.0
) -> WorstBlock | None:
    """Of rewards per interval, [T] each, times `scale` requests; None when no block is whole or no
    request arrived."""
    size = max(1, round(BLOCK_S / grid_s))
    found = []
    for first in range(0, len(ours) - size + 1, size):
        block = slice(first, first + size)
        if (number := float(arrived[block].sum())) > 0:
            worths = [1 + scale * float(r[block].sum()) / number for r in (ours, theirs)]
            found.append((worths[0] / max(worths[1], 1e-9), at_s + first * grid_s))
    return WorstBlock(*min(found), size * grid_s) if found else None
