"""The skeleton of a switch on the surrogate, in either mode: ticket, stages, pause, failure. Pure.

A switch is a chain of stages: each does its work at one instant and sets `border_s`, when the next
is due.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Deployment, Replica, SwitchPhase, SwitchPlan, SwitchTicket
from engine.errors import InfeasibleError
from engine.migration.plan import link_seconds
from engine.migration.schedule import devices_of
from engine.profile import ServingProfile
from envs.surrogate import kernel

if TYPE_CHECKING:
    from envs.surrogate.cluster import SurrogateCluster

# not bound, so that a copied switch goes on with itself
Stage = Callable[[Any, "SurrogateCluster", float], None]


@dataclass(frozen=True, slots=True)
class SwitchSetup:
    """What a switch starts with. Its times are the profile's, multiplied by `factor`; with
    `fails_at` it fails after that share of the time until the weights are there."""

    plan: SwitchPlan
    ticket_id: str
    current: Deployment
    profile: ServingProfile
    factor: float
    fails_at: float | None


class PhasedSwitch(ABC):
    """One switch. `due_s` is when the next thing happens; the cluster calls `cross_border`."""

    def __init__(self, setup: SwitchSetup) -> None:
        plan, current = setup.plan, setup.current
        self.plan, self._old = plan, current
        self._profile, self._factor = setup.profile, setup.factor
        kept = set(current.replicas) & set(plan.target.replicas)
        self.leaving = [r for r in current.replicas if r not in kept]
        self.coming = [r for r in plan.target.replicas if r not in kept]
        self.ticket = SwitchTicket(
            ticket_id=setup.ticket_id,
            phase=SwitchPhase.PREPARE,
            from_key=current.key,
            to_key=plan.target.key,
            from_epoch=plan.expected_epoch,
            started_s=0.0,
            updated_s=0.0,
            decision_id=plan.decision_id,
            mode=plan.mode,
            planned_bytes=plan.weight_bytes,
            lower_bound_bytes=plan.lower_bound_bytes,
            predicted_s=plan.predicted_s,
            lower_bound_s=plan.lower_bound_s,
        )
        self.border_s = 0.0
        self._next: Stage = type(self)._begin_transfer
        self._paused_at_s: float | None = None
        self._phase_began_s = 0.0
        self._fails_at, self._fails_at_s = setup.fails_at, inf
        self._reason = ""  # why it cannot be prepared

    def copy(self) -> Self:
        """One that goes on from here on its own."""
        return copy(self)

    @property
    def due_s(self) -> float:
        return min(self.border_s, self._fails_at_s)

    def start(self, host: SurrogateCluster, now_s: float) -> None:
        """What cannot be prepared is rolled back as soon as time goes on."""
        self.ticket = replace(self.ticket, started_s=now_s, updated_s=now_s)
        self._phase_began_s = now_s
        host.publish(self.ticket)
        try:
            self._prepare(host)
        except InfeasibleError as error:
            self._reason = str(error)
            self._then(PhasedSwitch._give_up, now_s)
            return
        overhead_s = self._profile.switch_overhead_s
        self.border_s = now_s + overhead_s * self._factor
        if self._fails_at is not None:
            whole_s = (overhead_s + self._moving_s) * self._factor
            self._fails_at_s = now_s + self._fails_at * whole_s

    def _give_up(self, host: SurrogateCluster, now_s: float) -> None:
        self._undo(host, now_s, SwitchPhase.ROLLED_BACK, self._reason)

    def cross_border(self, host: SurrogateCluster, now_s: float) -> None:
        """Do what is due at `due_s`, which is `now_s`."""
        if now_s >= self._fails_at_s:
            self._fails_at_s = inf
            self._fail(host, now_s, "failed as drawn, before all weights were there")
        else:
            self._next(self, host, now_s)

    def cancel(self, host: SurrogateCluster, now_s: float) -> None:
        self._undo(host, now_s, SwitchPhase.CANCELLED, "cancelled on request")

    def forget_failure(self) -> None:
        """Nobody knows whether it will fail."""
        self._fails_at_s = inf

    def lose(self, host: SurrogateCluster, device: int, now_s: float) -> None:
        """A worker is gone. The switch fails where that has a part in it, else it is called off."""
        devices = {d for r in (*self.leaving, *self.coming) for d in r.placement.devices}
        devices |= devices_of(self.plan.transfers)
        if device in devices:
            self._fail(host, now_s, f"worker {device} is lost")
        else:
            self.cancel(host, now_s)

    def reserved_blocks(self) -> dict[int, int]:
        """Row -> blocks taken there for sequences still on their old replicas."""
        return {}

    # ---------------------------------------------------------------- what the modes differ in

    @abstractmethod
    def _prepare(self, host: SurrogateCluster) -> None:
        """At the start. May raise InfeasibleError."""

    @abstractmethod
    def _begin_transfer(self, host: SurrogateCluster, now_s: float) -> None:
        """Stage: everything is prepared."""

    @abstractmethod
    def _undo(self, host: SurrogateCluster, now_s: float, phase: SwitchPhase, reason: str) -> None:
        """The old deployment serves on; nothing of the new one is left."""

    def _fail(self, host: SurrogateCluster, now_s: float, reason: str) -> None:
        self._undo(host, now_s, SwitchPhase.ROLLED_BACK, reason)

    # ---------------------------------------------------------------- what both modes do

    def _then(self, stage: Stage, at_s: float) -> None:
        self._next, self.border_s = stage, at_s

    def _update(self, host: SurrogateCluster, now_s: float, **changes: Any) -> None:
        self.ticket = replace(self.ticket, updated_s=now_s, **changes)
        host.publish(self.ticket)

    def _enter(self, host: SurrogateCluster, phase: SwitchPhase, now_s: float) -> None:
        ended = (self.ticket.phase.value, now_s - self._phase_began_s)
        self._phase_began_s = now_s
        self._update(host, now_s, phase=phase, phase_s=(*self.ticket.phase_s, ended))

    def _end(self, host: SurrogateCluster, now_s: float, **changes: Any) -> None:
        """With a terminal phase among the changes."""
        pause_s = 0.0 if self._paused_at_s is None else now_s - self._paused_at_s
        self._update(host, now_s, pause_s=pause_s, **changes)

    @property
    def _moving_s(self) -> float:
        """How long weights move, as profiled, or as the plan predicts if that is longer; without
        the factor."""
        return max(self.plan.predicted_s - self._profile.switch_overhead_s, self._links_s)

    @cached_property
    def _links_s(self) -> float:
        return link_seconds(self.plan.transfers, self._profile.link_bytes_per_s)

    @cached_property
    def _weight_movers(self) -> float:
        """Cores kept busy: one for each device that sends or receives weights."""
        return float(len(devices_of(self.plan.transfers)))

    def _pause(self, host: SurrogateCluster, now_s: float) -> float:
        """Leaving replicas take nothing new and start no step. When those in flight have ended."""
        self._paused_at_s = now_s
        host.stop(self.leaving)
        return self._quiet_s(host, now_s)

    def _quiet_s(self, host: SurrogateCluster, now_s: float) -> float:
        """When the last step in flight on the replicas that leave has ended."""
        return max(host.state.quiet_s(host.rows.of(r), now_s) for r in self.leaving)

    def _resume(self, host: SurrogateCluster, now_s: float) -> None:
        """The old replicas serve on, with all their blocks."""
        host.move_with(0.0, now_s)
        for replica in self.leaving:
            row = host.rows.of(replica)
            host.state.limit_blocks(row, None)
            host.state.replicas[row]["is_open"], host.state.replicas[row]["is_paused"] = 1, 0
            host.state.wake(row, now_s)
        host.route_held(now_s)


def choose_rows(
    host: SurrogateCluster,
    target: Iterable[Replica],
    owned: Iterable[int],
    slots: NDArray[np.int64],
) -> list[int]:
    """`engine.migration.sequences.choose_replicas`: a row for each sequence, where `owned` rows
    have been chosen before, one entry for each."""
    replicas = host.state.replicas.copy()
    rows = np.array([host.rows.of(r) for r in target], np.int64)
    replicas["is_open"][rows] = 1
    np.add.at(replicas["num_outstanding"], list(owned), 1)
    chosen = np.zeros(len(slots), np.int64)
    block_size = host.spec.block_size
    kernel.spread(host.state.seqs, replicas, rows, block_size, slots, chosen)
    found: list[int] = chosen.tolist()
    return found
