"""The exact optimum over replica counts as a mixed-integer linear programme, solved by HiGHS.

    max theta   s.t.  sum_c f_cj = theta,   sum_j (lambda_j / n_cj) f_cj <= rho y_c,
                      sum_c g_c y_c <= D,   y integer, f >= 0

with y_c replicas of configuration c, g_c devices each, D devices alive, and rho the utilisation
allowed. Identical replicas are exchangeable, so its size does not grow with the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from controller.deployments import Counts, fill

Floats = NDArray[np.float64]
GAP = 1e-6  # relative optimality gap


def solve_milp(loads: Floats, sizes: Sequence[int], num_devices: int, rho: float) -> Counts:
    """Replica counts that maximise headroom; loads[C, J] = lambda_j / n_cj. Solver: HiGHS."""
    num_configs, num_types = loads.shape
    scaled = loads / loads.mean()
    width = 1 + num_configs + num_configs * num_types  # theta, y, f
    demand = np.zeros((num_types, width))
    demand[:, 0] = -1.0
    capacity = np.zeros((num_configs + 1, width))
    for c in range(num_configs):
        first = 1 + num_configs + c * num_types
        demand[:, first : first + num_types] = np.eye(num_types)
        capacity[c, first : first + num_types] = scaled[c]
        capacity[c, 1 + c] = -rho
    capacity[-1, 1 : 1 + num_configs] = sizes
    limit = np.zeros(num_configs + 1)
    limit[-1] = num_devices
    integrality = np.zeros(width)
    integrality[1 : 1 + num_configs] = 1
    objective = np.zeros(width)
    objective[0] = -1.0
    found = milp(
        objective,
        constraints=[LinearConstraint(demand, 0, 0), LinearConstraint(capacity, -np.inf, limit)],
        integrality=integrality,
        bounds=Bounds(0, np.inf),
        options={"mip_rel_gap": GAP},
    )
    assert found.x is not None, found.message  # y = 0 is feasible and theta is bounded
    counts = tuple(int(n) for n in np.rint(found.x[1 : 1 + num_configs]))
    return fill(counts, sizes, num_devices)
