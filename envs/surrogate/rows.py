"""Which replica is which row of the state, and the tables that requests are routed by. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from engine.cluster import Deployment, ParallelConfig, Replica, Routing
from envs.surrogate import kernel
from envs.surrogate.state import SurrogateState


@numba.njit(cache=True, nogil=True)
def _shares(posterior: Any, weights: Any, columns: Any) -> Any:
    """[B, R] from posterior[B, J] and weights[J, R], added in the order of `engine.router`."""
    found = np.zeros((len(posterior), len(columns)))
    for j in range(len(weights)):
        for b in range(len(posterior)):
            for i in range(len(columns)):
                found[b, i] += posterior[b, j] * weights[j, columns[i]]
    return found


class Rows:
    """Replicas of the deployment that serves and of one that is coming. `order` are the rows of the
    first, in its order; `shares[b, i]` of prompts of bucket b (`edges`) are for order[i]."""

    def __init__(
        self,
        num_blocks: Mapping[ParallelConfig, int],
        step_records: Mapping[ParallelConfig, NDArray[Any]],
    ) -> None:
        self._num_blocks, self._step_records = num_blocks, step_records
        self._rows: dict[int, int] = {}  # replica id -> row

    def copy(self) -> Rows:
        other = copy(self)
        other._rows = self._rows.copy()
        return other

    def of(self, replica: Replica) -> int:
        return self._rows[replica.replica_id]

    def replica_ids(self) -> dict[int, int]:
        """By row."""
        return {row: replica_id for replica_id, row in self._rows.items()}

    def add(self, state: SurrogateState, replicas: Iterable[Replica]) -> None:
        """Rows for new replicas, idle and closed."""
        for replica in replicas:
            row = min(set(range(len(state.replicas))) - set(self._rows.values()))
            self._rows[replica.replica_id] = row
            parallel = replica.parallel
            blocks = self._num_blocks[parallel]
            state.add_replica(row, parallel, self._step_records[parallel], blocks)

    def drop(self, state: SurrogateState, replicas: Sequence[Replica]) -> None:
        for replica in replicas:
            state.clear_lists(self._rows.pop(replica.replica_id))

    def serve(self, state: SurrogateState, deployment: Deployment) -> Routing:
        """Open the rows of a deployment; the routing by load that holds from then on."""
        self.order = np.array([self.of(r) for r in deployment.replicas], np.int64)
        state.replicas["is_open"][self.order] = 1
        routing = Routing(tuple(r.replica_id for r in deployment.replicas))
        self.set_routing(deployment, routing)
        return routing

    def set_routing(self, deployment: Deployment, routing: Routing) -> None:
        """Tabulate `engine.router.shares` per bucket of prompt lengths."""
        edges = routing.prompt_edges if routing.weights else ()
        self.edges = np.array(edges, np.int64)
        if not routing.weights:
            self.shares = np.array([[float(r.parallel.num_devices) for r in deployment.replicas]])
            return
        columns = [routing.replica_ids.index(r.replica_id) for r in deployment.replicas]
        weights, posterior = np.array(routing.weights), np.array(routing.posterior)
        self.shares = _shares(posterior, weights, np.array(columns, np.int64))

    def route(self, state: SurrogateState, slots: list[int], now_s: float) -> None:
        """Send requests to the replicas that are open now, or hold them while there is none."""
        if not slots:
            return
        kernel.route(
            state.seqs,
            state.replicas,
            state.lists,
            self.order,
            self.shares,
            self.edges,
            state.limits[0],
            state.counts[0],
            np.array(slots, np.int64),
            state.work_time(now_s),
        )
