"""What switches from one deployment would move: exact costs, each found once, and quick bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controller.deployments import Counts, configs_of, counts_of
from controller.library import Space
from controller.milp import Changes, change_costs
from engine.cluster import ClusterSpec, Deployment, ParallelConfig
from engine.migration.plan import SwitchCost, switch_cost
from engine.migration.roles import IDLE, role_table

Floats = NDArray[np.float64]


class Budget(NamedTuple):
    """Of a cheap switch: it keeps to the bytes of weights, or else to the seconds on the links."""

    weight_bytes: float
    seconds: float

    def allows(self, cost: SwitchCost) -> bool:
        return cost.weight_bytes <= self.weight_bytes or cost.seconds <= self.seconds


class SwitchCosts:
    """Of one present deployment. Costs do not depend on traffic, so what is known stays known."""

    def __init__(
        self, spec: ClusterSpec, current: Deployment, configs: Sequence[ParallelConfig]
    ) -> None:
        self.current, self.counts = current, counts_of(current.configs, configs)
        self._spec, self._configs = spec, tuple(configs)
        self._costs: dict[Counts, SwitchCost] = {}
        self._within: dict[tuple[Space, Budget], Floats] = {}
        self._one_more: tuple[Floats, Floats] | None = None

    def cost(self, counts: Counts) -> SwitchCost:
        """Exact, without the fixed overhead."""
        found = self._costs.get(counts)
        if found is None:
            target = configs_of(counts, self._configs)
            found = self._costs[counts] = switch_cost(self._spec, self.current, target)
        return found

    def least(self, counts: Floats) -> tuple[Floats, Floats]:
        """[N] bytes, and seconds, that a switch to counts[N, C] cannot do with less than: replicas
        beyond those present of a configuration lie on devices that hold something else."""
        if self._one_more is None:
            self._one_more = self._bytes_of_one_more()
        total, largest = self._one_more
        more = np.maximum(counts - np.array(self.counts, np.float64), 0.0)
        received = np.where(more > 0.0, largest, 0.0).max(axis=1, initial=0.0)
        return more @ total, received / self._spec.link_bytes_per_s

    def _bytes_of_one_more(self) -> tuple[Floats, Floats]:
        """[C] of all ranks of a replica, and of the rank that lacks the most."""
        table = role_table(self._spec.model, {*self._configs, *self.current.configs})
        held = {table.first_role(c) + r for c in self.current.configs for r in range(c.num_devices)}
        total, largest = np.zeros(len(self._configs)), np.zeros(len(self._configs))
        for c, parallel in enumerate(self._configs):
            for rank in range(parallel.num_devices):
                role = table.first_role(parallel) + rank
                others = [IDLE, *sorted(held - {role})]
                lacking = float(table.missing[role, others].min())
                total[c], largest[c] = total[c] + lacking, max(largest[c], lacking)
        return total, largest

    def possible(self, space: Space | None, listed: Floats, budget: Budget) -> Floats:
        """[M, C] of listed[N, C], those that may be within the budget. The list of a space is
        looked through once; without one, `listed` is of this moment only."""
        if space is None:
            nbytes, seconds = self.least(listed)
            return np.asarray(listed[(nbytes <= budget.weight_bytes) | (seconds <= budget.seconds)])
        if (space, budget) not in self._within:
            self.remember(space, budget, self.possible(None, listed, budget))
        return self._within[space, budget]

    def remember(self, space: Space, budget: Budget, left: Floats) -> None:
        """That only these of its list may be: the others were found to cost more."""
        self._within[space, budget] = left

    def changes(self, budget: Budget) -> list[Changes]:
        """For the programme: within the bytes, and within what a device receives in the seconds.
        One that the other includes is left out."""
        link_bytes = budget.seconds * self._spec.link_bytes_per_s
        limits = [(budget.weight_bytes, np.inf)] if budget.weight_bytes or not link_bytes else []
        limits += [(np.inf, link_bytes)] if link_bytes else []
        return [
            change_costs(self._spec, self.current, self._configs, total, (), each)
            for total, each in limits
        ]
