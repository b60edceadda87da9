"""Pure: tp groups stay within a machine when devices are assigned to ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def keep_within_nodes(
    costs: np.ndarray, groups: Sequence[Sequence[int]], nodes: Sequence[int]
) -> np.ndarray:
    """Assignment costs [ranks, devices] that make every group of ranks share one node.

    `groups` are the rows of each tp group, `nodes` the node of each column. The largest group
    chooses first, the node where it costs least; devices elsewhere then cost it more than any
    assignment does. A group that no node has room for is left free.
    """
    forbidding = float(np.abs(costs).sum()) + 1.0
    node_of, shaped = np.array(nodes), costs.copy()
    free = np.ones(len(nodes), dtype=bool)
    for rows in sorted((np.array(g) for g in groups if len(g) > 1), key=len, reverse=True):
        options = []
        for node in sorted(set(nodes)):
            columns = np.flatnonzero(free & (node_of == node))
            if len(columns) >= len(rows):
                block = costs[rows][:, columns]
                chosen = linear_sum_assignment(block)
                options.append((float(block[chosen].sum()), node, columns[chosen[1]]))
        if options:
            _, node, taken = min(options, key=lambda option: option[:2])
            free[taken] = False
            shaped[rows] += forbidding * (node_of != node)
    return shaped
