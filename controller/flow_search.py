"""OServe's search for a deployment, guided by its flow.

From the assignment (`controller.max_flow`) the busiest replicas are bottlenecks and the others are
redundant. Each step draws one of either and tries four moves between them, with every strategy
(tp, pp) of the replicas that change; the best deployment is kept if it is better. The search ends
after PATIENCE steps without a gain (arXiv 2602.12151, section 4 and appendix). A deployment is
judged by what its own assignment carries, so the result is never better than the optimum.

The flow misses what replicas gain by taking the types that they are best at, and with it most of
what unlike replicas are good for. Judged by the exact assignment the same search finds more, and
takes longer: `solve_flow` and `solve_search`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from controller.assignment import solve_batch
from controller.deployments import Counts, fill
from controller.max_flow import FlowAssignment, flow_assignment

Floats = NDArray[np.float64]
PATIENCE = 20  # steps without a gain, as OServe
BOTTLENECK = 0.99  # of the busiest replica's utilisation
GAIN = 1e-9  # relative

Change = tuple[tuple[int, ...], tuple[int, ...]]  # configurations that go, device counts that come


@dataclass(frozen=True, slots=True)
class FlowPlan:
    """Replica counts per configuration, and where each type goes: assignment.shares[K, J] belong
    to the configurations that have replicas, in order."""

    counts: Counts
    assignment: FlowAssignment


# --------------------------------------------------------------------------------------
# Moves between a bottleneck and a redundant replica, by their configurations


def move(bottleneck: int, redundant: int, sizes: Sequence[int]) -> list[Change]:
    """Devices of the redundant replica go to the bottleneck; it keeps at least one."""
    b, r = sizes[bottleneck], sizes[redundant]
    return [((bottleneck, redundant), (b + n, r - n)) for n in range(1, r)]


def merge(bottleneck: int, redundant: int, sizes: Sequence[int]) -> list[Change]:
    """The two become one."""
    return [((bottleneck, redundant), (sizes[bottleneck] + sizes[redundant],))]


def split(bottleneck: int, redundant: int, sizes: Sequence[int]) -> list[Change]:
    """One of them becomes two."""
    return [
        ((k,), (n, sizes[k] - n))
        for k in dict.fromkeys((bottleneck, redundant))
        for n in range(1, sizes[k] // 2 + 1)
    ]


def swap(bottleneck: int, redundant: int, sizes: Sequence[int]) -> list[Change]:
    """They exchange their devices, and take any strategies."""
    return [((bottleneck, redundant), (sizes[redundant], sizes[bottleneck]))]


Assign = Callable[[Floats, Floats], FlowAssignment]
Move = Callable[[int, int, Sequence[int]], list[Change]]
MOVES: tuple[Move, ...] = (move, merge, split, swap)


def changed(
    counts: Counts, change: Change, sizes: Sequence[int], num_devices: int
) -> Iterator[Counts]:
    """Every deployment after the change, one per choice of strategies; idle devices are filled."""
    gone, coming = change
    rest = list(counts)
    for index in gone:
        rest[index] -= 1
    options = [[i for i, size in enumerate(sizes) if size == wanted] for wanted in coming]
    for chosen in dict.fromkeys(tuple(sorted(c)) for c in product(*options)):
        more = Counter(chosen)
        grown = tuple(count + more[i] for i, count in enumerate(rest))
        yield fill(grown, sizes, num_devices)


# --------------------------------------------------------------------------------------
# The search


def exact_assignment(loads: Floats, capacity: Floats) -> FlowAssignment:
    """In place of `flow_assignment`: what a flow would carry if the units of a request could differ
    from replica to replica, which is the exact programme. It tells apart what the flow misses and
    what the search does."""
    found, shares = solve_batch(loads[None], capacity[None])
    theta = float(found[0])
    used = (np.where(np.isfinite(loads), loads, 0.0) * shares[0]).sum(axis=1)
    return FlowAssignment(theta, theta, shares[0], theta * used / capacity)


def search_deployment(
    loads: Floats,
    sizes: Sequence[int],
    num_devices: int,
    rho: float,
    rng: np.random.Generator,
    start: Counts | None = None,
    assign: Assign = flow_assignment,
) -> FlowPlan:
    """From `start`, or the best homogeneous deployment, to a local optimum; arguments as of
    `solve_milp`. loads[C, J] = lambda_j / n_cj. Deployments are judged by `assign`."""
    known: dict[Counts, FlowAssignment] = {}

    def judge(counts: Counts) -> FlowAssignment:
        if counts not in known:
            used = np.flatnonzero(counts)
            known[counts] = assign(loads[used], rho * np.array(counts)[used])
        return known[counts]

    def theta(counts: Counts) -> float:
        return judge(counts).theta

    best = start or max(_homogeneous(sizes, num_devices), key=theta)
    without_gain = 0
    while without_gain < PATIENCE:
        tried = set(_step(best, judge(best).busy, sizes, num_devices, rng))
        found = max(sorted(tried), key=theta, default=best)
        if theta(found) > theta(best) * (1.0 + GAIN):
            best, without_gain = found, 0
        else:
            without_gain += 1
    return FlowPlan(best, judge(best))


def _homogeneous(sizes: Sequence[int], num_devices: int) -> list[Counts]:
    alike = np.diag([num_devices // size for size in sizes]).tolist()
    return [fill(tuple(row), sizes, num_devices) for row in alike if any(row)]


def _step(
    counts: Counts,
    busy: Floats,
    sizes: Sequence[int],
    num_devices: int,
    rng: np.random.Generator,
) -> Iterator[Counts]:
    """The deployments that the moves between a drawn pair lead to. `busy` is by configuration that
    is used."""
    replicas = np.repeat(np.arange(len(counts)), counts)
    full = np.repeat(busy >= BOTTLENECK, [n for n in counts if n])
    first = int(rng.choice(np.flatnonzero(full)))
    others = np.flatnonzero(~full) if not full.all() else np.delete(np.arange(len(full)), first)
    bottleneck = int(replicas[first])
    if not len(others):  # a lone replica
        changes = [*split(bottleneck, bottleneck, sizes), ((bottleneck,), (sizes[bottleneck],))]
    else:
        redundant = int(replicas[rng.choice(others)])
        changes = [change for make in MOVES for change in make(bottleneck, redundant, sizes)]
    for change in changes:
        yield from changed(counts, change, sizes, num_devices)


def solve_flow(
    loads: Floats, sizes: Sequence[int], num_devices: int, rho: float, seed: int = 0
) -> Counts:
    """Replica counts that OServe's search finds; arguments as of `solve_milp`."""
    rng = np.random.default_rng(seed)
    return search_deployment(loads, sizes, num_devices, rho, rng).counts


def solve_search(
    loads: Floats, sizes: Sequence[int], num_devices: int, rho: float, seed: int = 0
) -> Counts:
    """The same, judged by the exact assignment."""
    rng = np.random.default_rng(seed)
    return search_deployment(loads, sizes, num_devices, rho, rng, assign=exact_assignment).counts
