"""What finds a deployment: the exact programme, OServe's search, or every deployment in turn.

All take loads[C, J] = lambda_j / n_cj, devices per replica, devices alive and the utilisation
allowed, and return replica counts per configuration. Where a configuration cannot serve a type its
load is inf. Nodes are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from controller.assignment import solve_batch
from controller.deployments import Counts, enumerate_counts
from controller.flow_search import solve_flow, solve_search
from controller.milp import solve_milp
from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
Solver = Callable[[Floats, Sequence[int], int, float], Counts]
BATCH = 512  # deployments assigned in one call


def headrooms(loads: Floats, deployments: Sequence[Counts], rho: float) -> Floats:
    """[N] the largest multiple of the rates that each deployment can serve, by the exact
    assignment (`controller.assignment`)."""
    counts = np.array(deployments)
    width = int((counts > 0).sum(axis=1).max())
    used = np.argsort(counts == 0, axis=1, kind="stable")[:, :width]  # those with replicas first
    capacity = rho * np.take_along_axis(counts, used, axis=1)
    return solve_batch(np.where(capacity[:, :, None] > 0.0, loads[used], 1.0), capacity)[0]


def solve_exhaustive(loads: Floats, sizes: Sequence[int], num_devices: int, rho: float) -> Counts:
    """The best of all deployments that leave no room for another replica; the first of equals.

    Their number grows steeply with the devices: about a thousand on 16.
    """
    every = list(enumerate_counts(sizes, num_devices))
    best, most = (0,) * len(sizes), -1.0
    for first in range(0, len(every), BATCH):
        part = every[first : first + BATCH]
        found = headrooms(loads, part, rho)
        if found.max() > most:
            best, most = part[int(found.argmax())], float(found.max())
    return best


SolverName = Literal["exact", "oserve", "oserve_exact", "exhaustive"]
SOLVERS: dict[str, Solver] = {
    "exact": solve_milp,
    "oserve": solve_flow,
    "oserve_exact": solve_search,
    "exhaustive": solve_exhaustive,
}


def solver(name: str) -> Solver:
    """Raises InvalidRequestError."""
    if name not in SOLVERS:
        known = ", ".join(SOLVERS)
        raise InvalidRequestError(f"planner {name!r} is not known; expected one of {known}.")
    return SOLVERS[name]
