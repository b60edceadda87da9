"""What requests that ended are worth, and which are charged when: many at once, compiled."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np

compiled = numba.njit(cache=True, nogil=True)


def log_worth(slowdown: float, worst_slowdown: float) -> float:
    """1 at the reference or faster, -1 at `worst_slowdown` times it or slower."""
    fall = 2.0 * math.log(max(slowdown, 1e-9)) / math.log(worst_slowdown)
    return max(-1.0, min(1.0, 1.0 - fall))


_log_worth = compiled(log_worth)


@compiled
def slo_met(slo: Any, finished: Any, lengths: Any, times: Any) -> Any:
    """[E] `SloSpec.is_met_by`. `slo` are the seconds to the first token, per token, and to the
    first token for each of the prompt; lengths prompt and output tokens, [E] each; times seconds
    of arrival, first token and end."""
    (ttft_s, tpot_s, ttft_per_prompt_token_s), (prompt, output) = slo, lengths
    arrival_s, first_s, finish_s = times
    met = finished.copy()
    for e in range(len(met)):
        due_s = ttft_s + ttft_per_prompt_token_s * prompt[e]
        if 0.0 < due_s < first_s[e] - arrival_s[e]:
            met[e] = False
        if output[e] > 1 and 0.0 < tpot_s < (finish_s[e] - first_s[e]) / (output[e] - 1):
            met[e] = False
    return met


@compiled
def weighted_parts(
    weights: Any, worst_slowdown: float, met: Any, output: Any, times: Any, references: Any
) -> Any:
    """[3, E] of latency, time per token and service level, by those weights. `references` are
    seconds of a request's latency and per token, [E] each; the rest as of `slo_met`."""
    (latency, tpot, slo), (arrival_s, first_s, finish_s) = weights, times
    reference_s, reference_tpot_s = references
    found = np.empty((3, len(output)))
    for e in range(len(output)):
        worth = _log_worth((finish_s[e] - arrival_s[e]) / reference_s[e], worst_slowdown)
        found[0, e] = latency * worth
        if output[e] > 1:
            token_s = (finish_s[e] - first_s[e]) / (output[e] - 1)
            worth = _log_worth(token_s / reference_tpot_s[e], worst_slowdown)
        found[1, e] = tpot * worth
        found[2, e] = slo if met[e] else -slo
    return found


@compiled
def charge(
    index: Any, finished: Any, parts: Any, charged: Any, due_s: Any, span: Any, now_s: float
) -> Any:
    """Sums [3] of parts[3, E] of those of `index` not yet charged[N] that finished; how many more
    are charged, unserved or due by now; and the first that is open. All before the first of `span`
    are charged, and those up to its end have arrived."""
    served, unserved, (first, last) = np.zeros(3), 0, span
    for e in range(len(index)):
        if not charged[index[e]]:
            if finished[e]:
                for part in range(3):
                    served[part] += parts[part, e]
            else:
                unserved += 1
        charged[index[e]] = True
    for i in range(first, last):
        if not charged[i] and due_s[i] <= now_s:
            charged[i] = True
            unserved += 1
    while first < last and charged[first]:
        first += 1
    return served, unserved, first


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Compiles everything, or loads it, so that no step waits for it."""
    one, first, yes = np.ones(1), np.zeros(1, np.int64), np.ones(1, np.bool_)
    times = one, one, one
    met = slo_met((0.0, 0.0, 0.0), yes, (first, first), times)
    parts = weighted_parts((1.0, 0.0, 0.0), 2.0, met, first, times, (one, one))
    charge(first, yes, parts, yes.copy(), one, (0, 1), 0.0)
