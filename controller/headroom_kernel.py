"""Headroom and latency of deployments, compiled: one programme each, and the best of very many.

The programme of one deployment is that of `controller.assignment`, in units f_cj of a type's
traffic and a_cj = lambda_j / n_cj, over the configurations it uses. Where every a_cj is finite all
its rows are tight at the optimum (a configuration with room could relieve all others), so a slack
that has left the basis need never come back and capacity rows carry no slack column. Where c cannot
serve j, a_cj is inf: that flow is left out, and capacity rows need their slacks.

The best of many is found by cuts. By duality the headroom of counts y is the least, over prices w
with sum_j w_j = 1, of sum_c y_c rho max_j w_j / a_cj: any prices bound all deployments by one
product, and those of a solved programme meet its own headroom. So the deployment with the highest
bound is solved, its prices lower the bounds of the others, and those below the best found are
dropped, until nothing is left (Benders' decomposition, its master problem a list).

All compiled functions are in this one file, since numba's files of compiled code are renewed when
the file of a function changes, not when that of a function it calls does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from controller.service_model import RHO_KNEE

making = numba.njit(cache=True, nogil=True)
# without references counted: see envs/surrogate/kernel.py
UNCOUNTED: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}
compiled = numba.njit(**UNCOUNTED)
summing = numba.njit(fastmath={"reassoc", "nsz"})  # in any order, for bounds only
PERTURBATION = 1e-10  # of the demand rows, distinct, against ties and cycling
TOLERANCE = 1e-11
MAX_PIVOTS = 400
CUTS = 2  # prices that bound headroom before latency is looked at
FIRST, ROUND = 8, 128  # solved before bounds are looked at again; later twice as many each time
PARTS, MANY = 16, 2000  # of mixes on a replica, told apart where there are many deployments
LEVELS = 64  # of utilisation, at which what a replica adds is tabulated
TUNING = 10  # steps towards prices that say the most
TIE = 1e-9  # relative; of deployments this close the first in the list is the best


@compiled
def _scale(loads: Any, used: Any, num_used: int) -> Any:
    """The mean of the finite loads, and whether all are finite."""
    total, number = 0.0, 0
    for k in range(num_used):
        for load in loads[used[k]]:
            if load < np.inf:
                total += load
                number += 1
    return total / max(number, 1), number == num_used * loads.shape[1]


@compiled
def _fill_table(loads: Any, capacity: Any, used: Any, num_used: int, table: Any) -> int:
    """Columns: theta, flows by configuration and type, slacks of demand, those of capacity where
    they are needed, right-hand side; how many columns. Loads are divided by their mean; where one
    is inf the flow has an empty column, which never enters."""
    types = loads.shape[1]
    scale, finite = _scale(loads, used, num_used)
    rows, slacks = types + num_used, 1 + num_used * types
    width = slacks + types + 1 + (0 if finite else num_used)
    table[: rows + 1, :width] = 0.0
    for j in range(types):
        table[j, 0] = 1.0
        table[j, slacks + j] = 1.0
        table[j, width - 1] = PERTURBATION * (1.0 + j / types)
    for k in range(num_used):
        for j in range(types):
            if loads[used[k], j] < np.inf:
                column = 1 + k * types + j
                table[j, column] = -1.0
                table[types + k, column] = max(loads[used[k], j] / scale, 1e-9)
        if not finite:
            table[types + k, slacks + types + k] = 1.0
        table[types + k, width - 1] = capacity[used[k]]
    table[rows, 0] = -1.0
    return int(width)


@compiled
def _pivot(table: Any, basis: Any, rows: int, width: int) -> bool:
    """One step of the primal simplex; False at the optimum."""
    entering, least = -1, -TOLERANCE
    for column in range(width - 1):
        if table[rows, column] < least:
            least, entering = table[rows, column], column
    if entering < 0:
        return False
    leaving, ratio = -1, np.inf
    for row in range(rows):
        if table[row, entering] > TOLERANCE:
            found = table[row, width - 1] / table[row, entering]
            if found < ratio:
                ratio, leaving = found, row
    if leaving < 0:
        return False
    pivot = 1.0 / table[leaving, entering]
    for column in range(width):
        table[leaving, column] *= pivot
    for row in range(rows + 1):
        factor = table[row, entering]
        if row != leaving and factor != 0.0:
            for column in range(width):
                table[row, column] -= factor * table[leaving, column]
    basis[leaving] = entering
    return True


@compiled
def _pivot_all(
    loads: Any,
    capacity: Any,
    used: Any,
    num_used: int,
    table: Any,
    basis: Any,
    shares: Any,
    prices: Any,
) -> None:
    """Fills shares[C, J] and prices[J], of any sum, by the simplex."""
    types = loads.shape[1]
    rows = types + num_used
    width = _fill_table(loads, capacity, used, num_used, table)
    basis[:rows] = -1
    for _ in range(MAX_PIVOTS):
        if not _pivot(table, basis, rows, width):
            break
    for row in range(rows):
        column = basis[row] - 1
        if 0 <= column < num_used * types:
            k, j = divmod(column, types)
            if table[row, width - 1] > 1e-9:
                shares[used[k], j] = table[row, width - 1]
    for j in range(types):
        prices[j] = max(table[rows, 1 + num_used * types + j], 0.0)


@compiled
def _theta(loads: Any, capacity: Any, used: Any, num_used: int, shares: Any, prices: Any) -> float:
    """What shares[C, J] come to; each type's are made to sum to 1, and so are prices[J]."""
    types, peak = loads.shape[1], 0.0
    for j in range(types):
        total = 0.0
        for k in range(num_used):
            total += shares[used[k], j]
        for k in range(num_used):
            shares[used[k], j] = shares[used[k], j] / total if total > 0.0 else 1.0 / num_used
    for k in range(num_used):
        busy = 0.0
        for j in range(types):
            if shares[used[k], j] > 0.0:
                busy += loads[used[k], j] * shares[used[k], j]
        peak = max(peak, busy / capacity[used[k]])
    prices /= prices.sum()
    return float(1.0 / peak)


@making
def _solve_two(
    first: Any, second: Any, capacity: float, other: float, shares: Any, prices: Any
) -> None:
    """Fills shares[2, J] and prices[J] (of any sum) of replicas of two configurations, from their
    finite loads[J] and capacities. In order of first[j] / second[j], a type s is split: those
    before it are served by the one, those after it by the other, and both are as busy."""
    types = len(first)
    order = np.arange(types)
    for k in range(1, types):
        j, at = order[k], k
        while at > 0 and first[order[at - 1]] * second[j] > first[j] * second[order[at - 1]]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = j
    before, after = 0.0, second.sum()
    for k in range(types):
        s = order[k]
        after -= second[s]
        ratio = second[s] / first[s]
        per_theta = (second[s] + max(after, 0.0) + ratio * before) / (other + ratio * capacity)
        part = (capacity * per_theta - before) / first[s]
        if part <= 1.0 or k == types - 1:
            break
        before += first[s]
    for i in range(k):
        shares[0, order[i]] = 1.0
    for i in range(k + 1, types):
        shares[1, order[i]] = 1.0
    shares[0, s] = min(max(part, 0.0), 1.0)
    shares[1, s] = 1.0 - shares[0, s]
    for j in range(types):
        prices[j] = min(first[j] / first[s], second[j] / second[s])


@making
def _solve(
    loads: Any, capacity: Any, used: Any, table: Any, basis: Any, shares: Any, prices: Any
) -> float:
    """theta of one deployment; fills shares[C, J] (zero where unused) and prices[J].

    loads[C, J] > 0, capacity[C] (0: unused). `used`, `table`, `basis` are scratch. theta is 0 where
    a type can be served by nobody; its shares are equal then. Of one configuration, or two, that
    serve all types no pivot is needed.
    """
    configs, types = loads.shape
    num_used = 0
    for c in range(configs):
        if capacity[c] > 0.0:
            used[num_used] = c
            num_used += 1
    shares[:] = 0.0
    prices[:] = 0.0
    if num_used == 0:
        prices[:] = 1.0 / types
        return 0.0
    if num_used <= 2 and _scale(loads, used, num_used)[1]:
        if num_used == 1:
            shares[used[0]], prices[:] = 1.0, loads[used[0]]
        else:
            a, b = used[0], used[1]
            part = np.zeros((2, types))
            _solve_two(loads[a], loads[b], capacity[a], capacity[b], part, prices)
            shares[a], shares[b] = part[0], part[1]
    else:
        _pivot_all(loads, capacity, used, num_used, table, basis, shares, prices)
    theta: float = _theta(loads, capacity, used, num_used, shares, prices)
    return theta


@making
def _scratch(configs: int, types: int) -> Any:
    table = np.empty((configs + types + 1, configs * types + types + configs + 2))
    return np.empty(configs, np.int64), table, np.empty(configs + types, np.int64)


@compiled
def _cycle_s(pipeline: Any, running: float, rate: float) -> float:
    """`controller.service_model`: T at `rate` sequence steps per second, at most that of `running`
    sequences; of the pipeline's terms q is times the rate."""
    base, share, pp, added, held, prompt = pipeline
    alone_s, running = base + added, max(running, 1.0)
    batches = min(pp, running)
    step_s = base + added * running / batches
    full_s = max(1.0, share * batches) * step_s + held / rate * running / (step_s + prompt)
    full_s = min(full_s, max(1.0, share) * batches * step_s)
    few_s = np.inf
    if alone_s + prompt > held:
        few_s = alone_s * (alone_s + prompt) / (alone_s + prompt - held)
    stretch, work, many_s = max(1.0, share * pp), added * rate, np.inf
    if few_s * rate <= pp:
        plain_s = stretch * base / (1.0 - share * work) if share * work < 1.0 else np.inf
        return float(max(alone_s, min(max(few_s, plain_s), full_s)))
    free = pp - stretch * work
    if free > 0.0:
        half = 0.5 * (pp * (base - prompt + held) + stretch * work * prompt)
        root = np.sqrt(max(half * half + free * pp * base * (prompt - held), 0.0))
        many_s = ((half + root) / free - base) * pp / max(work, 1e-12)
    many_s = max(many_s, stretch * base)
    if work < 1.0:
        many_s = min(many_s, max(1.0, share) * pp * base / (1.0 - work))
    return float(max(alone_s, min(many_s, full_s)))


@compiled
def _latency_s(model: Any, counts: Any, rates: Any, shares: Any) -> float:
    """`controller.service_model.mean_latency_s` of one deployment; shares[C, J] of rates[J]."""
    base_s, stage_share, pp, steps, added_s, held_s2, prompt_s, max_running, service = model
    configs, types = shares.shape
    latency, served = 0.0, 0.0
    for c in range(configs):
        if counts[c] <= 0.0:
            continue
        rate, step_rate, added, places, rho = 0.0, 0.0, 0.0, 0.0, 0.0
        held, prompts = 0.0, 0.0
        for j in range(types):
            flow = shares[c, j] * rates[j] / counts[c]
            rate += flow
            step_rate += flow * steps[j]
            added += flow * steps[j] * added_s[c, j]
            held += flow * steps[j] * held_s2[c, j]
            prompts += flow * steps[j] * held_s2[c, j] * prompt_s[c, j]
            places += flow * steps[j] / max_running[c, j]
            rho += flow / service[c, j]
        if rate <= 0.0:
            continue
        running = step_rate / places
        prompts /= max(held, 1e-18 * step_rate)
        pipeline = (base_s[c], stage_share[c], pp[c], added / step_rate, held, prompts)
        cycle_s = _cycle_s(pipeline, running, step_rate)
        service_s = step_rate / rate * cycle_s
        power = np.sqrt(2.0 * (running + 1.0)) - 1.0
        below = min(rho, RHO_KNEE)
        wait = below**power / (1.0 - below)
        slope = wait * (power / RHO_KNEE + 1.0 / (1.0 - RHO_KNEE))
        wait += slope * max(rho - RHO_KNEE, 0.0)
        latency += rate * counts[c] * service_s * (1.0 + wait / running)
        served += rate * counts[c]
    return float(latency / max(served, 1e-12))


@making
def score(counts: Any, loads: Any, rates: Any, rho: float, model: Any) -> Any:
    """theta[N], latency_s[N] and shares[N, C, J] of counts[N, C] at rates[J]."""
    number, (configs, types) = len(counts), loads.shape
    used, table, basis = _scratch(configs, types)
    prices = np.empty(types)
    theta, latency_s = np.zeros(number), np.zeros(number)
    shares = np.zeros((number, configs, types))
    for i in range(number):
        theta[i] = _solve(loads, rho * counts[i], used, table, basis, shares[i], prices)
        latency_s[i] = _latency_s(model, counts[i], rates, shares[i])
    return theta, latency_s, shares


@making
def score_all(
    counts: Any,
    loads: Any,
    plain: Any,
    rates: Any,
    rho: float,
    model: Any,
    most: float,
    most_s: float,
) -> Any:
    """The same at each of rates[S, J] and loads[S, C, J], at most `most` and `most_s`: theta[S, N],
    latency_s[S, N] and shares[S, N, C, J]. What has no headroom is routed by the loads `plain`;
    where there is no replica the latency is `most_s`."""
    size = (len(rates), len(counts))
    theta, latency_s, shares = np.empty(size), np.empty(size), np.empty((*size, *loads.shape[1:]))
    for s in range(len(rates)):
        theta[s], latency_s[s], shares[s] = score(counts, loads[s], rates[s], rho, model)
        for i in range(len(counts)):
            if counts[i].any():
                if theta[s, i] <= 0.0:
                    _, late_s, late = score(counts[i : i + 1], plain[s], rates[s], rho, model)
                    latency_s[s, i], shares[s, i] = late_s[0], late[0]
                latency_s[s, i] = min(latency_s[s, i], most_s)
            else:
                latency_s[s, i] = most_s
            theta[s, i] = min(theta[s, i], most)
    return theta, latency_s, shares


@making
def _tail_mean(values: Any, tail: float) -> float:
    """Mean of the least share `tail` of equally likely values[S] (their CVaR): the smallest when
    tail <= 1 / S, the mean when it is 1."""
    if tail * len(values) <= 1.0:
        return float(values.min())
    ordered, left, total = np.sort(values), tail * len(values), 0.0
    for value in ordered:
        total += value * min(1.0, left)
        left -= 1.0
        if left <= 0.0:
            break
    return float(total / (tail * len(values)))


@summing
def _dot(counts: Any, i: Any, worth: Any) -> float:
    total = 0.0
    for c in range(len(worth)):
        total += counts[i, c] * worth[c]
    return total


@making
def _cut(
    counts: Any, active: Any, loads: Any, rho: float, prices: Any, bounds: Any, exact: Any
) -> None:
    """Lower the bounds of the active deployments to what these prices allow."""
    configs, types = loads.shape
    worth = np.zeros(configs)
    for c in range(configs):
        for j in range(types):
            worth[c] = max(worth[c], rho * prices[j] / loads[c, j])
    for i in active:
        if not exact[i]:
            bounds[i] = min(bounds[i], _dot(counts, i, worth))


@making
def _value(bounds: Any, tail: float) -> float:
    return bounds[0] if len(bounds) == 1 else _tail_mean(bounds, tail)


@making
def _most_headroom(counts: Any, present: Any, loads: Any, rho: float, tail: float) -> Any:
    """`most_headroom`; and a bound above the tail mean of present[1, C], from the same prices."""
    mixes, configs, types = loads.shape
    number = len(counts)
    own, alone, unsolved = np.full((1, mixes), np.inf), np.arange(1), np.zeros(1, np.bool_)
    used, table, basis = _scratch(configs, types)
    shares, prices = np.empty((configs, types)), np.full(types, 1.0 / types)
    bounds, exact = np.full((number, mixes), np.inf), np.zeros(number, np.bool_)
    values, active = np.empty(number), np.arange(number)
    for s in range(mixes):
        _cut(counts, active, loads[s], rho, prices, bounds[:, s], exact)
        _cut(present, alone, loads[s], rho, prices, own[:, s], unsolved)
    best, solved = 0.0, 0
    while True:
        kept: Any = 0
        top: Any = -1
        for i in active:
            if not exact[i]:
                values[i] = _value(bounds[i], tail)
            if values[i] >= best * (1.0 - TIE):
                active[kept] = i
                kept += 1
                if not exact[i] and (top < 0 or values[i] > values[top]):
                    top = i
        active = active[:kept]
        if top < 0 or values[top] <= 0.0:
            return active[0], values[active[0]], solved, _value(own[0], tail)
        exact[top], solved = True, solved + 1
        for s in range(mixes):
            bounds[top, s] = _solve(loads[s], rho * counts[top], used, table, basis, shares, prices)
            _cut(counts, active, loads[s], rho, prices, bounds[:, s], exact)
            _cut(present, alone, loads[s], rho, prices, own[:, s], unsolved)
        values[top] = _value(bounds[top], tail)
        best = max(best, values[top])


@making
def most_headroom(counts: Any, loads: Any, rho: float, tail: float) -> Any:
    """Index of the deployment of counts[N, C] with the highest tail mean of headroom over mixes
    loads[S, C, J], that value, and how many were solved. N > 0."""
    index, value, solved, _ = _most_headroom(counts, counts[:1], loads, rho, tail)
    return index, value, solved


@making
def most_headroom_or(counts: Any, present: Any, loads: Any, rho: float, tail: float) -> int:
    """The index that `most_headroom` gives, or -1 where present[C] has as much; which is not solved
    where a bound tells that it has less."""
    alone = present.reshape(1, -1)
    index, value, _, own = _most_headroom(counts, alone, loads, rho, tail)
    if own >= value * (1.0 - TIE):
        own = most_headroom(alone, loads, rho, tail)[1]
    return -1 if own >= value * (1.0 - TIE) else int(index)


@making
def dominated(options: Any, owners: Any, rates: Any) -> Any:
    """[C] whether one of options[M, C], which can be in the place of owners[M], serves every type
    at least as well at service rates[C, J]; of equal single ones the first stays."""
    number, (configs, types) = len(options), rates.shape
    found = np.zeros(configs, np.bool_)
    for m in range(number):
        owner = owners[m]
        if found[owner]:
            continue
        better, same = True, True
        for j in range(types):
            total = 0.0
            for c in range(configs):
                if options[m, c] > 0.0:
                    total += options[m, c] * rates[c, j]
            better = better and total >= rates[owner, j]
            same = same and total == rates[owner, j]
            if not better:
                break
        if better and same:
            first, replicas = -1, 0.0
            for c in range(configs):
                replicas += options[m, c]
                if first < 0 and options[m, c] > 0.0:
                    first = c
            better = replicas != 1.0 or first < owner
        found[owner] = better
    return found


@compiled
def _corners(busy: Any, start: float, stop: float, found: Any) -> int:
    """Fills found[V, J], mixes in shares of utilisation: the corners of those whose work adds
    between start and stop of a step at full utilisation; busy[J] is what types add alone."""
    types, slack, number = len(busy), 1e-12 * stop, 0
    found[:] = 0.0
    for j in range(types):
        if start - slack <= busy[j] <= stop + slack:
            found[number, j] = 1.0
            number += 1
    for edge in (start, stop):
        for j in range(types):
            for k in range(types):
                if busy[j] < edge < busy[k]:
                    share = (edge - busy[j]) / (busy[k] - busy[j])
                    found[number, j], found[number, k] = 1.0 - share, share
                    number += 1
    return number


@making
def load_floors(model: Any, rho: float, parts: int) -> Any:
    """What holds of a replica's mixes, told apart in `parts` by the share of a step that their work
    adds, per unit of utilisation. At the corners of a part, number[C, P] of them: requests
    [C, P, V, J] per second, stepping[C, P, V] sequence steps per second, and alone[C, P, V] such
    steps times their seconds in a lone sequence. By level of utilisation, at least: waiting
    [L, C, P], what the wait multiplies a latency by, and step_s[L, C, P], that times a step.

    A step takes no less than base / (1 - share of a step added), or with every place taken what the
    places make of it. That, and the wait, follow from quotients of linear functions of the mix,
    which are least and largest at corners.
    """
    base_s, stage_share, pp, steps, added_s, _, _, max_running, service = model
    configs, types = service.shape
    most = types + 2 * (types // 2) * ((types + 1) // 2)
    number = np.zeros((configs, parts), np.int64)
    requests, mixes = np.zeros((configs, parts, most, types)), np.empty((most, types))
    stepping, alone = np.zeros((configs, parts, most)), np.zeros((configs, parts, most))
    waiting, step_s = np.empty((LEVELS, configs, parts)), np.empty((LEVELS, configs, parts))
    below = np.minimum(rho * np.arange(LEVELS) / LEVELS, RHO_KNEE)
    logs = np.log(np.maximum(below, 1e-300))
    busy = np.empty(types)
    for c in range(configs):
        for j in range(types):
            busy[j] = stage_share[c] * service[c, j] * steps[j] * added_s[c, j]
        width = (busy.max() - busy.min()) / parts
        for part in range(parts):
            start = busy.min() + part * width
            number[c, part] = _corners(busy, start, start + width, mixes)
            added_full_s, fewest, places = np.inf, np.inf, 0.0
            for v in range(number[c, part]):
                rate, lone, cycles, work = 0.0, 0.0, 0.0, 0.0
                for j in range(types):
                    own = mixes[v, j] * service[c, j]
                    requests[c, part, v, j] = own
                    rate += own * steps[j]
                    lone += own * steps[j] * (base_s[c] + added_s[c, j])
                    cycles += own * steps[j] / max_running[c, j]
                    work += mixes[v, j] * busy[j]
                stepping[c, part, v], alone[c, part, v] = rate, lone
                added_full_s = min(added_full_s, work / cycles)
                fewest, places = min(fewest, rate / cycles), max(places, rate / cycles)
            stretch = max(1.0, stage_share[c] * min(pp[c], max(fewest, 1.0)))
            full_s = stretch * base_s[c] + added_full_s
            stretched_s = max(1.0, stage_share[c] * pp[c]) * base_s[c]
            power = np.sqrt(2.0 * (places + 1.0)) - 1.0
            for level in range(LEVELS):
                load = rho * level / LEVELS
                wait = np.exp(power * logs[level]) / (1.0 - below[level])
                waiting[level, c, part] = 1.0 + wait / places
                cycle_s = stretched_s / (1.0 - min(load * start, 1.0 - 1e-9))
                step_s[level, c, part] = waiting[level, c, part] * min(cycle_s, full_s)
    return number, requests, stepping, alone, waiting, step_s


@compiled
def _level(headroom: float) -> int:
    """That of the utilisation at that headroom, of 1 or more."""
    return min(int(LEVELS / headroom), LEVELS - 1)


@compiled
def _least_of(floors: Any, level: int, c: int, worth: Any) -> Any:
    """What a replica of c adds at least to the latencies of its requests less what they are worth
    [C, P, V] at their prices, per second and per unit of utilisation; and part and corner of it."""
    number, _, stepping, alone, waiting, step_s = floors
    least, where, corner = np.inf, 0, 0
    for part in range(number.shape[1]):
        lone, loaded, at_lone, at_loaded = np.inf, np.inf, 0, 0
        for v in range(number[c, part]):
            own = waiting[level, c, part] * alone[c, part, v] - worth[c, part, v]
            if own < lone:
                lone, at_lone = own, v
            own = step_s[level, c, part] * stepping[c, part, v] - worth[c, part, v]
            if own < loaded:
                loaded, at_loaded = own, v
        if max(lone, loaded) < least:
            least, where = max(lone, loaded), part
            corner = at_lone if lone > loaded else at_loaded
    return least, where, corner


@compiled
def _worth_of(floors: Any, c: int, prices: Any, worth: Any) -> None:
    """Fills worth[c, P, V] of the requests at the corners."""
    number, requests = floors[:2]
    for part in range(number.shape[1]):
        for v in range(number[c, part]):
            total = 0.0
            for j in range(len(prices)):
                total += prices[j] * requests[c, part, v, j]
            worth[c, part, v] = total


@making
def _least_load_s(floors: Any, first: int, last: int, prices: Any, least: Any) -> None:
    """Fills least[L, C] at those levels of utilisation: `_least_of` at prices[J]."""
    worth = np.empty(floors[2].shape)
    for c in range(least.shape[1]):
        _worth_of(floors, c, prices, worth)
        for level in range(first, last + 1):
            least[level, c] = _least_of(floors, level, c, worth)[0]


@making
def _tune_prices(
    floors: Any, counts: Any, rates: Any, rho: float, theta: float, latency: float, prices: Any
) -> None:
    """Raises what prices[J] say of the deployment that they come from, whose latencies sum to
    `latency`: Polyak's subgradient steps (USSR Comp. Maths. 9, 1969)."""
    requests = floors[1]
    level, busy = _level(theta), rho / theta
    worth, tried = np.empty(floors[2].shape), prices.copy()
    most, slope = -np.inf, np.empty(len(prices))
    for _ in range(TUNING):
        value = np.dot(tried, rates)
        slope[:] = rates
        for c in range(len(counts)):
            if counts[c] > 0.0:
                _worth_of(floors, c, tried, worth)
                least, part, v = _least_of(floors, level, c, worth)
                value += counts[c] * busy * least
                for j in range(len(slope)):
                    slope[j] -= counts[c] * busy * requests[c, part, v, j]
        if value > most:
            most = value
            prices[:] = tried
        norm = np.dot(slope, slope)
        if norm <= 0.0:
            break
        tried += (latency - value) / norm * slope


@making
def _least_own_s(model: Any, loads: Any, rates: Any, prices: Any, least: Any) -> None:
    """The same at loads[C, J] of other rates than the model's. They say how many requests a replica
    can take and not how long its steps are: a request takes what it takes alone, at least."""
    base_s, _, _, steps, added_s, _, _, _, _ = model
    for c in range(len(base_s)):
        least[:, c] = 0.0  # a replica may stay empty
        for j in range(len(rates)):
            own_s = steps[j] * (base_s[c] + added_s[c, j])
            least[:, c] = np.minimum(least[:, c], rates[j] / loads[c, j] * (own_s - prices[j]))


@making
def _prices_of(model: Any, counts: Any, rates: Any, shares: Any, latency: Any) -> None:
    """Fills latency[J]: what a request of each type takes in this deployment, in the mean."""
    steps = model[3]
    configs, types = shares.shape
    latency[:] = 0.0
    for c in range(configs):
        if counts[c] <= 0.0 or shares[c].sum() <= 0.0:
            continue
        only = np.zeros(configs)
        only[c] = counts[c]
        part = np.zeros((configs, types))
        part[c] = shares[c]
        mean_s = _latency_s(model, only, rates, part)
        number, step_rate = 0.0, 0.0
        for j in range(types):
            number += shares[c, j] * rates[j]
            step_rate += shares[c, j] * rates[j] * steps[j]
        for j in range(types):
            latency[j] += shares[c, j] * steps[j] * mean_s * number / step_rate


@making
def _headroom_bounds(counts: Any, loads: Any, rho: float) -> Any:
    """[N] above the headroom, at some prices; and [C] what each replica adds to it at least, where
    it takes the mix."""
    number, (configs, types) = len(counts), loads.shape
    above, exact = np.full(number, np.inf), np.zeros(number, np.bool_)
    everything, each = np.arange(number), np.empty(configs)
    for c in range(configs):
        each[c] = rho / loads[c].sum()
    used, table, basis = _scratch(configs, types)
    shares, prices = np.empty((configs, types)), np.full(types, 1.0 / types)
    for _ in range(CUTS):  # the prices of those with the highest bounds
        _cut(counts, everything, loads, rho, prices, above, exact)
        top = np.argmax(above)
        _solve(loads, rho * counts[top], used, table, basis, shares, prices)
    return above, each


@making
def _lowest(bounds: Any, left: Any, number: int) -> Any:
    """About so many of them: those with the lowest bounds, in ascending order."""
    if len(left) > number:
        left = left[bounds[left] <= np.partition(bounds[left], number)[number]]
    return left[np.argsort(bounds[left])]


def num_parts(number: int, apart: bool) -> int:
    """In which `load_floors` is told apart for so many deployments; `apart` as `least_latency`."""
    return PARTS if number > MANY and not apart else 1


@making
def _least_latency(
    counts: Any,
    present: Any,
    loads: Any,
    rates: Any,
    rho: float,
    model: Any,
    floors: Any,
    apart: bool,
) -> Any:
    """`least_latency`, with the latency before the number of those solved, and then the latency of
    present[C], inf without headroom 1; `floors` are those of the model. Those that present[C]
    beats are not looked at: -2 where it beats all."""
    number, (configs, types) = len(counts), loads.shape
    used, table, basis = _scratch(configs, types)
    shares, prices, duals = np.empty((configs, types)), np.zeros(types), np.empty(types)
    exact, values = np.zeros(number, np.bool_), np.full(number, np.inf)
    everything, total = np.arange(number), rates.sum()
    above, each = _headroom_bounds(counts, loads, rho)
    active, bounds = everything[above >= 1.0], np.zeros(number)
    least = np.empty((LEVELS, configs))
    many = floors[0].shape[1] > 1
    start = ROUND if many else FIRST  # to solve once a better one was found
    best, solved, size, tuned = np.inf, 0, FIRST, apart
    fastest, spare = present, np.inf  # the best so far, and its headroom
    theta = _solve(loads, rho * present, used, table, basis, shares, duals)
    present_s = _latency_s(model, present, rates, shares) if theta >= 1.0 else np.inf
    if present_s < np.inf:
        best, spare, size = present_s, theta, start
        _prices_of(model, present, rates, shares, prices)
    known = prices.copy()
    while True:
        if best < np.inf and not tuned and (many or size > FIRST):
            prices[:], tuned = known, True
            _tune_prices(floors, fastest, rates, rho, spare, best * total, prices)
        if apart:
            _least_own_s(model, loads, rates, prices, least)
        else:
            low, high = np.inf, 0.0
            for i in active:
                if not exact[i]:
                    low, high = min(low, above[i]), max(high, above[i])
            if high > 0.0:
                _least_load_s(floors, _level(high), _level(low), prices, least)
        base, kept = np.dot(prices, rates), 0
        for i in active:
            if not exact[i]:
                busy = rho / above[i]
                load = _dot(counts, i, least[_level(above[i])])
                if load <= 0.0:
                    busy = rho / max(_dot(counts, i, each), 1.0)
                bounds[i] = max(bounds[i], (base + load * busy) / total)
            if (values[i] if exact[i] else bounds[i]) <= best * (1.0 + TIE):
                active[kept] = i
                kept += 1
        active = active[:kept]
        left = active[~exact[active]]
        if len(left) == 0:
            if best < np.inf and len(active) > 0:
                return active[0], values[active[0]], solved, present_s
            return (-2 if best < np.inf else -1), best, solved, present_s
        prices[:] = 0.0
        order = _lowest(bounds, left, size)
        size *= 2
        for i in order:
            if bounds[i] > best * (1.0 + TIE):
                break
            theta = _solve(loads, rho * counts[i], used, table, basis, shares, duals)
            exact[i], solved = True, solved + 1
            if theta >= 1.0:
                values[i] = _latency_s(model, counts[i], rates, shares)
                if values[i] < best:
                    best, size, tuned = values[i], start, apart
                    fastest, spare = counts[i], theta
                    _prices_of(model, counts[i], rates, shares, prices)
                    known[:] = prices
                    break
        if len(left) > FIRST:
            _cut(counts, active, loads, rho, duals, above, exact)
            active = active[above[active] >= 1.0]


@making
def _least_latency_of(
    counts: Any, loads: Any, rates: Any, rho: float, model: Any, parts: int, apart: bool
) -> Any:
    floors, nothing = load_floors(model, rho, parts), np.zeros(loads.shape[0])
    index, _, solved, _ = _least_latency(counts, nothing, loads, rates, rho, model, floors, apart)
    return index, solved


def least_latency(counts: Any, loads: Any, rates: Any, rho: float, model: Any, apart: bool) -> Any:
    """Index of the deployment of counts[N, C] with the least mean latency among those with headroom
    1 or more at rates[J], loads[C, J]; how many were solved. The index is -1 where there is none.
    `apart`: the loads are of other service rates than the model's.

    If not, a replica's utilisation is rho over the headroom, the same for all (see above), and lies
    between bounds that need no solving. By Little's law the sum of latencies is that of requests in
    the replicas; at any prices z[J] per request it is at least sum_j z_j lambda_j, plus what
    `_least_load_s` says for each replica at the least utilisation. Otherwise the utilisation is at
    most rho over the headroom, and `_least_own_s` says it. The prices are what requests take in the
    best deployment so far; in a long list, and where a round has found none better, they are such
    that the sum says the most of that deployment.
    """
    parts = num_parts(len(counts), apart)
    return _least_latency_of(counts, loads, rates, rho, model, parts, apart)


@making
def least_latency_or(
    counts: Any,
    present: Any,
    loads: Any,
    rates: Any,
    rho: float,
    model: Any,
    floors: Any,
    apart: bool,
    most_s: float,
) -> int:
    """The index that `least_latency` gives, or -2 where present[C] is as good: with headroom 1 and
    as little latency. Beyond `most_s` latencies are equal."""
    index, latency_s, _, present_s = _least_latency(
        counts, present, loads, rates, rho, model, floors, apart
    )
    ties_s = min(latency_s, most_s) * (1.0 + TIE)
    if index >= 0 and present_s < np.inf and min(present_s, most_s) <= ties_s:
        return -2
    return int(index)


@making
def scenarios(powers: Any) -> Any:
    """Rates[2 + J + R, J] from powers[2 + R, 1 + J], the totals and shares of the median forecast,
    of the high one, and of R mixes seen lately.

    Those two forecasts; the median with one type at a time as high as its forecast allows; and
    the median's total in each of the mixes."""
    num_given, types = len(powers), powers.shape[1] - 1
    rates = np.empty((num_given + types, types))
    for k in range(num_given):
        row, whole = (k if k < 2 else types + k), 0.0
        for j in range(types):
            whole += powers[k, 1 + j]
        for j in range(types):
            rates[row, j] = powers[k, 0] * powers[k, 1 + j] / whole
    total = 0.0
    for j in range(types):
        total += rates[0, j]
        rates[2 + j] = rates[0]
        rates[2 + j, j] = max(rates[0, j], rates[1, j])
    for row in range(2 + types, len(rates)):
        whole = 0.0
        for j in range(types):
            whole += rates[row, j]
        for j in range(types):
            rates[row, j] = total * rates[row, j] / whole
    return rates


@making
def best_each(
    listed: Any,
    contenders: Any,
    alike: Any,
    roomy: Any,
    present: Any,
    loads: Any,
    rates: Any,
    rho: float,
    tail: float,
    model: Any,
    floors: Any,
    apart: bool,
    most_s: float,
) -> Any:
    """What `most_headroom_or` gives of contenders[M, C] at loads[0], at loads[1], and over the
    other loads[2:]; what `least_latency_or` gives of listed[N, C] at loads[0], and at loads[1];
    what `most_headroom` gives of alike[K, C], and of roomy[L, C], at loads[0]. The loads are those
    of rates[S, J]."""
    return (
        most_headroom_or(contenders, present, loads[:1], rho, 0.0),
        most_headroom_or(contenders, present, loads[1:2], rho, 0.0),
        most_headroom_or(contenders, present, loads[2:], rho, tail),
        least_latency_or(listed, present, loads[0], rates[0], rho, model, floors, apart, most_s),
        least_latency_or(listed, present, loads[1], rates[1], rho, model, floors, apart, most_s),
        most_headroom(alike, loads[:1], rho, 0.0)[0],
        most_headroom(roomy, loads[:1], rho, 0.0)[0],
    )


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Compiles everything, or loads it, so that no decision waits for it."""
    one, square = np.ones(1), np.ones((1, 1))
    model = (one, one, one, one, square, square, square, square, square)
    floors = load_floors(model, 0.9, 1)
    cube = np.ones((3, 1, 1))
    score_all(square, cube, cube, cube[0], 0.9, model, 1.0, 1.0)
    most_headroom(square, square[None], 0.9, 0.0)
    most_headroom_or(square, one, square[None], 0.9, 0.0)
    least_latency_or(square, one, square, one, 0.9, model, floors, False, 1.0)
    lists = square, square, square, square, one
    best_each(*lists, cube, cube[:, 0], 0.9, 0.0, model, floors, False, 1.0)
    dominated(square, np.zeros(1, np.int64), square)
    scenarios(np.ones((3, 2)))
