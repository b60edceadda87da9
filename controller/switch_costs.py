"""What switches from one deployment would move: exact costs, each found once, and a quick bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from controller.deployments import Counts, configs_of, counts_of
from controller.library import Space
from engine.cluster import ClusterSpec, Deployment, ParallelConfig
from engine.migration.plan import SwitchCost, switch_cost
from engine.migration.roles import IDLE, role_table

Floats = NDArray[np.float64]


class SwitchCosts:
    """Of one present deployment. Costs do not depend on traffic, so what is known stays known."""

    def __init__(
        self, spec: ClusterSpec, current: Deployment, configs: Sequence[ParallelConfig]
    ) -> None:
        self.current, self.counts = current, counts_of(current.configs, configs)
        self._spec, self._configs = spec, tuple(configs)
        self._costs: dict[Counts, SwitchCost] = {}
        self._within: dict[tuple[Space, int], Floats] = {}
        self._least: Floats | None = None

    def cost(self, counts: Counts) -> SwitchCost:
        """Exact, without the fixed overhead."""
        found = self._costs.get(counts)
        if found is None:
            target = configs_of(counts, self._configs)
            found = self._costs[counts] = switch_cost(self._spec, self.current, target)
        return found

    def least_bytes(self, counts: Floats) -> Floats:
        """[N] bytes that a switch to counts[N, C] cannot do with less than: replicas beyond those
        present of a configuration lie on devices that hold something else."""
        if self._least is None:
            self._least = self._bytes_of_one_more()
        present = np.array(self.counts, np.float64)
        return np.asarray(np.maximum(counts - present, 0.0) @ self._least)

    def _bytes_of_one_more(self) -> Floats:
        table = role_table(self._spec.model, {*self._configs, *self.current.configs})
        held = {table.first_role(c) + r for c in self.current.configs for r in range(c.num_devices)}
        least = np.zeros(len(self._configs))
        for c, parallel in enumerate(self._configs):
            for rank in range(parallel.num_devices):
                role = table.first_role(parallel) + rank
                others = [IDLE, *sorted(held - {role})]
                least[c] += table.missing[role, others].min()
        return least

    def possible(self, space: Space | None, listed: Floats, budget_bytes: int) -> Floats:
        """[M, C] of listed[N, C], those that may be within the budget. The list of a space is
        looked through once; without one, `listed` is of this moment only."""
        if space is None:
            return np.asarray(listed[self.least_bytes(listed) <= budget_bytes])
        if (space, budget_bytes) not in self._within:
            self.remember(space, budget_bytes, self.possible(None, listed, budget_bytes))
        return self._within[space, budget_bytes]

    def remember(self, space: Space, budget_bytes: int, left: Floats) -> None:
        """That only these of its list may be: the others were found to cost more."""
        self._within[space, budget_bytes] = left
