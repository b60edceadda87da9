"""OServe's assignment of requests to replicas: a maximum flow.

    source -> type j -> replica in -> replica out -> sink

A type sends at most its rate, a replica takes at most e_kj of a type, and what passes through
in -> out shares its capacity M_k: a request of type j uses M_k / n_kj units of it, n_kj being the
rate of the type that the replica sustains alone. M_k = lcm_j(n_kj) of integer rates makes those
units whole (arXiv 2602.12151, section 4). Identical replicas are one node here: they are
exchangeable.

A flow keeps its amount from arc to arc, so the units of a request must be the same at every
replica. They are exactly if n_kj = a_k b_j; then M_k = a_k lcm(b) and a request uses lcm(b) / b_j.
Otherwise the nearest such rates (least squares of the logarithms) give M_k and the units, the
limits e_kj stay those of the rates as measured, and what the assignment carries is less than the
exact programme's (`controller.assignment`) optimum. Only ratios of capacities matter, so instead
of an lcm, which outgrows 64 bits, all capacities are rounded to whole units of which the replicas
have MAX_UNITS together.

Below capacity every deployment carries the whole demand, which tells them not apart. So the flow is
taken at the largest multiple of the rates that the network carries: Newton's method on the cut.

The solver is scipy's (Dinic): compiled and a dependency already. Its value is that of preflow-push.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Floats = NDArray[np.float64]
Whole = NDArray[np.int32]
MAX_UNITS = 2**30  # of capacity in all: scipy counts in 32 bits
MAX_STEPS = 20  # of Newton's method; each finds a smaller cut


@dataclass(frozen=True, slots=True)
class FlowAssignment:
    """`flow`: the multiple of the rates that the network carries. shares[K, J]: where the types
    go. `theta`: the multiple at which the busiest replica is full by the measured rates, 0 where a
    type can go nowhere. busy[K]: how full each is then."""

    flow: float
    theta: float
    shares: Floats
    busy: Floats


def rank_one(loads: Floats) -> tuple[Floats, Floats]:
    """speed[K], work[J] whose quotients work_j / speed_k are nearest to loads[K, J], in ln; inf
    entries are left out."""
    known = np.isfinite(loads)
    logs = np.log(np.where(known, loads, 1.0))
    if known.all():
        mean = logs.mean(axis=0)
        return np.exp(mean.mean() - logs.mean(axis=1)), np.exp(mean)
    rows, columns = np.nonzero(known)
    terms = np.zeros((len(rows), sum(loads.shape)))
    terms[np.arange(len(rows)), rows] = -1.0
    terms[np.arange(len(rows)), len(loads) + columns] = 1.0
    found = np.linalg.lstsq(terms, logs[known])[0]
    return np.exp(found[: len(loads)]), np.exp(found[len(loads) :])


def flow_assignment(loads: Floats, capacity: Floats) -> FlowAssignment:
    """Assign J types to K kinds of replicas.

    loads[K, J] = lambda_j / n_kj, inf where k cannot serve j; capacity[K] > 0 is the count of its
    replicas times the utilisation allowed.
    """
    able = np.isfinite(loads)
    if not able.any(axis=0).all():
        return FlowAssignment(0.0, 0.0, np.zeros_like(loads), np.zeros(len(loads)))
    speed, work = rank_one(loads)
    through = speed * capacity  # M_k
    most = np.where(able, capacity[:, None] * work / loads, 0.0)  # e_kj
    unit = through.sum() / MAX_UNITS
    arcs = np.rint(np.minimum(most, through[:, None]) / unit).astype(np.int32)
    flow, carried = _largest_multiple(work / unit, arcs, np.rint(through / unit).astype(np.int32))
    shares = carried / carried.sum(axis=0)
    used = (np.where(able, loads, 0.0) * shares).sum(axis=1) / capacity
    return FlowAssignment(flow, float(1.0 / used.max()), shares, used / used.max())


def _largest_multiple(demand: Floats, arcs: Whole, through: Whole) -> tuple[float, Floats]:
    """The largest multiple of demand[J] that arcs[K, J] and through[K] carry, and what they do."""
    num_types = arcs.shape[1]
    multiple = float(through.sum()) / demand.sum()
    graph = _network(arcs, through)
    for _ in range(MAX_STEPS):
        wanted = np.rint(multiple * demand).astype(np.int32)
        graph[0, 1 : 1 + num_types] = wanted
        capacities = csr_array(graph)
        found = maximum_flow(capacities, 0, len(graph) - 1)
        short = wanted.sum() - found.flow_value
        if short <= arcs.size:  # what rounding explains
            break
        left = csr_array(capacities - found.flow)
        left.eliminate_zeros()
        reached = np.zeros(len(graph), bool)
        reached[breadth_first_order(left, 0, return_predecessors=False)] = True
        inner = demand[reached[1 : 1 + num_types]].sum()
        crossing = graph[1:][np.ix_(reached[1:], ~reached)].sum()
        multiple = float(crossing) / inner
    carried = found.flow.toarray()[1 : 1 + num_types, 1 + num_types : 1 + num_types + len(arcs)]
    return multiple, np.maximum(carried.T, 0).astype(np.float64)


def _network(arcs: Whole, through: Whole) -> NDArray[np.int32]:
    """Capacities between source, J types, K replicas in, K out, sink; no demand yet."""
    kinds, num_types = arcs.shape
    into, out = 1 + num_types, 1 + num_types + kinds
    graph = np.zeros((out + kinds + 1, out + kinds + 1), np.int32)
    graph[1:into, into:out] = arcs.T
    graph[into:out, out : out + kinds] = np.diag(through)
    graph[out : out + kinds, -1] = through
    return graph
