"""What a decision interval was worth. Pure.

Each request is worth its utility once, in the interval in which it ends: the weighted mean of three
parts in [-1, 1] (`UtilitySpec`, fixed in configs/slo.yaml),

    of its latency, and of its time per output token:
        1 - 2 ln(x) / ln(worst_slowdown), cut to [-1, 1],   x = what it took / reference,
    of its service level: 1 when it was met, else -1.

The reference is what the request would take alone on the fastest configuration, times `stretch`:
how many times as long requests take in the best deployment at the load that arrives just then.
That load is counted in the trace (reference seconds of arrivals per second), never in a queue which
the policy made. A request that is rejected, lost or cancelled is worth -1; so is one not ended when
its latency reaches `worst_slowdown` references: it is charged at that moment and counts for nothing
when it ends. The sum is divided by a constant; a small price per moved weight byte settles ties in
favour of staying, and a price per device-second, zero unless set, pays for devices given back.

Ways to earn reward without serving well that were considered:
- *Finish few requests.* A mean over ended requests would pay for that; the sum is over all, and
  the number of arrivals is not the policy's to choose.
- *Never finish the slow ones* (starvation, endless preemption, requests stuck in a switch). They
  fall due at `worst_slowdown` without ending.
- *Reject when busy.* A rejection costs as much as the worst latency.
- *Delay the first token and then hurry* (or the reverse). Latency counts from arrival to the end.
- *Leave a backlog at the end.* Episodes are truncated, not terminated, so the value of the last
  state is bootstrapped; what fell due before has been charged.
- *Switch for its own sake* (a switch resets queues or counters). Only latency pays; bytes cost.
- *Serve the many short requests and let the few long ones wait.* A request's latency is divided by
  its own reference, so waiting hurts short ones more, which is how users feel it; but long ones
  count no more than short ones. Whoever is paid by token should weigh the utility.
- *Make the reference slow.* It comes from the profile before training and from the arrivals of the
  trace, never from the run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from engine.cluster import NO_SLO, Request, RequestOutcome, RequestStatus, SloSpec, UtilitySpec
from engine.profile import ProfiledCluster, StepTimeModel
from envs.workload import Trace
from policies.base import Seconds, TrafficColumns

WORST = -1.0
LATENCY_ONLY = UtilitySpec()
compiled = numba.njit(cache=True, nogil=True)


@dataclass(frozen=True, slots=True)
class Stretch:
    """How many times as long requests take, in the best deployment, by the work that arrives:
    linear between the loads, flat beyond the last."""

    loads: tuple[float, ...]  # reference seconds per second, rising
    factors: tuple[float, ...]  # at least 1

    def at(self, load: float | Seconds) -> NDArray[np.float64]:
        return np.asarray(np.interp(load, self.loads, self.factors))

    def of(self, config: RewardConfig, trace: Trace) -> Seconds:
        """[N] at each arrival of a trace."""
        return self.at(offered_load(config, trace))


NO_STRETCH = Stretch((0.0,), (1.0,))


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Reference latency, in seconds, of a lone request:
    ref_ttft_s + ref_prompt_token_s * prompt + ref_tpot_s * (output - 1)."""

    ref_ttft_s: float
    ref_prompt_token_s: float
    ref_tpot_s: float
    utility: UtilitySpec = LATENCY_ONLY
    slo: SloSpec = NO_SLO  # of the third part of the utility
    stretch: Stretch = NO_STRETCH
    scale_requests: float = 100.0  # the sum of utilities is divided by this
    switch_byte_cost: float = 1e-10  # per weight byte moved, after that division
    device_s_cost: float = 0.0  # per device-second in use, after that division

    def reference_s(self, prompt_tokens: float, output_tokens: float) -> float:
        decoding_s = self.ref_tpot_s * (output_tokens - 1)
        return self.ref_ttft_s + self.ref_prompt_token_s * prompt_tokens + decoding_s


@dataclass(frozen=True, slots=True)
class RewardTerms:
    """A reward by what it came from; they add up to it."""

    latency: float = 0.0
    tpot: float = 0.0
    slo: float = 0.0
    unserved: float = 0.0  # rejected, lost, or fallen due
    switch: float = 0.0
    devices: float = 0.0

    @property
    def total(self) -> float:
        served = self.latency + self.tpot + self.slo
        return served + self.unserved + self.switch + self.devices


def reward_config(
    cluster: ProfiledCluster,
    utility: UtilitySpec,
    slo: SloSpec = NO_SLO,
    device_hour_cost: float = 0.0,
) -> RewardConfig:
    """References of an unloaded replica: the least of each figure over the profiled
    configurations. One switch of every weight of one model copy costs 0.02."""
    steps = [s.linear(cluster.spec.max_num_batched_tokens) for s in cluster.profile.steps]
    model = cluster.spec.model
    model_bytes = sum(math.prod(t.shape) for t in model.tensors) * model.dtype_bytes
    return RewardConfig(
        ref_ttft_s=min(_first_token_s(s) for s in steps),
        ref_prompt_token_s=min(s.per_token_s + s.per_context_token_s for s in steps),
        ref_tpot_s=min(_first_token_s(s) + s.per_token_s for s in steps),
        utility=utility,
        slo=slo,
        switch_byte_cost=0.02 / max(model_bytes, 1),
        device_s_cost=device_hour_cost / 3600.0,
    )


def _first_token_s(step: StepTimeModel) -> float:
    return step.base_s + step.per_seq_s


# --------------------------------------------------------------------------------------
# One request


def log_worth(slowdown: float, worst_slowdown: float) -> float:
    """1 at the reference or faster, -1 at `worst_slowdown` times it or slower."""
    fall = 2.0 * math.log(max(slowdown, 1e-9)) / math.log(worst_slowdown)
    return max(-1.0, min(1.0, 1.0 - fall))


_log_worth = compiled(log_worth)


def log_worths(slowdown: Seconds, worst_slowdown: float) -> Seconds:
    """`log_worth` of each."""
    fall = 2.0 * np.log(np.maximum(slowdown, 1e-9)) / math.log(worst_slowdown)
    return np.clip(1.0 - fall, -1.0, 1.0)


def parts_of_utility(
    config: RewardConfig, outcome: RequestOutcome, stretch: float
) -> tuple[float, float, float]:
    """Weighted parts of latency, time per token and service level of a finished request. A
    request of one token has no time per token: its latency stands for it."""
    weigh = config.utility
    reference_s = stretch * config.reference_s(outcome.prompt_tokens, outcome.output_tokens)
    by_latency = log_worth(
        (outcome.finish_s - outcome.arrival_s) / reference_s, weigh.worst_slowdown
    )
    by_tpot, tpot_s = by_latency, outcome.tpot_s
    if tpot_s is not None:
        by_tpot = log_worth(tpot_s / (stretch * config.ref_tpot_s), weigh.worst_slowdown)
    by_slo = 1.0 if config.slo.is_met_by(outcome) else -1.0
    return weigh.latency * by_latency, weigh.tpot * by_tpot, weigh.slo * by_slo


def slo_met(slo: SloSpec, ended: TrafficColumns) -> NDArray[np.bool_]:
    """[E] `SloSpec.is_met_by` of each request."""
    limits = float(slo.ttft_s), float(slo.tpot_s), float(slo.ttft_per_prompt_token_s)
    lengths = ended.prompt_tokens, ended.output_tokens
    found: NDArray[np.bool_] = _slo_met(limits, ended.finished, lengths, times_of(ended))
    return found


def times_of(ended: TrafficColumns) -> tuple[Seconds, Seconds, Seconds]:
    """Of arrival, first token and end."""
    return ended.ended_arrival_s, ended.first_token_s, ended.finish_s


def tpot_of(ended: TrafficColumns) -> Seconds:
    """[E] seconds per output token after the first; 0 where there is only one."""
    decoding_s = ended.finish_s - ended.first_token_s
    return np.asarray(decoding_s / np.maximum(ended.output_tokens - 1, 1))


def offered_load(config: RewardConfig, trace: Trace) -> Seconds:
    """[N] reference seconds that arrive per second, around each arrival of a trace: over the
    utility's window before it, at the start over the first window."""
    width_s = min(config.utility.window_s, trace.duration_s)
    until_s = np.maximum(trace.arrival_s, width_s)
    work_s = np.concatenate([[0.0], np.cumsum(lone_seconds(config, trace))])
    until, since = (
        np.searchsorted(trace.arrival_s, edge_s, side="right")
        for edge_s in (until_s, until_s - width_s)
    )
    return np.asarray((work_s[until] - work_s[since]) / width_s)


def lone_seconds(config: RewardConfig, trace: Trace) -> Seconds:
    """[N] `RewardConfig.reference_s` of each request."""
    decoding_s = config.ref_tpot_s * (trace.output_tokens - 1)
    prefill_s = config.ref_prompt_token_s * trace.prompt_tokens
    return np.asarray(config.ref_ttft_s + prefill_s + decoding_s)


# --------------------------------------------------------------------------------------
# Many requests at once, compiled; all in this file, which numba's cache goes by


@compiled
def _slo_met(slo: Any, finished: Any, lengths: Any, times: Any) -> Any:
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
    seconds of a request's latency and per token, [E] each; the rest as of `_slo_met`."""
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
    met = _slo_met((0.0, 0.0, 0.0), yes, (first, first), times)
    parts = weighted_parts((1.0, 0.0, 0.0), 2.0, met, first, times, (one, one))
    charge(first, yes, parts, yes.copy(), one, (0, 1), 0.0)


# --------------------------------------------------------------------------------------
# An interval


class RewardLedger:
    """Knows which requests were handed in and not yet charged; each is charged exactly once."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._stretch: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []  # heap of (time it falls due, id)

    def admit(self, request: Request, stretch: float = 1.0) -> None:
        """Call at submission; the lengths are the trace's, which only the environment knows."""
        config = self.config
        reference_s = stretch * config.reference_s(request.prompt_tokens, request.output_tokens)
        self._stretch[request.request_id] = stretch
        due_s = request.arrival_s + config.utility.worst_slowdown * reference_s
        heapq.heappush(self._due, (due_s, request.request_id))

    def settle(
        self,
        outcomes: Iterable[RequestOutcome],
        now_s: float,
        switched_bytes: int = 0,
        device_s: float = 0.0,
    ) -> RewardTerms:
        """The reward of the interval that ends at `now_s`, in which `outcomes` ended."""
        served, unserved = np.zeros(3), 0
        for outcome in outcomes:
            stretch = self._stretch.pop(outcome.request_id, None)
            if stretch is None:
                continue
            if outcome.status is RequestStatus.FINISHED:
                served += parts_of_utility(self.config, outcome, stretch)
            else:
                unserved += 1
        while self._due and self._due[0][0] <= now_s:
            _, request_id = heapq.heappop(self._due)
            unserved += self._stretch.pop(request_id, None) is not None
        return reward_terms(self.config, served, unserved, switched_bytes, device_s)


def reward_terms(
    config: RewardConfig,
    served: NDArray[np.float64],
    num_unserved: int,
    switched_bytes: int,
    device_s: float,
) -> RewardTerms:
    """`served` [3]: sums over requests of what `parts_of_utility` gives."""
    latency, tpot, slo = (served / config.scale_requests).tolist()
    return RewardTerms(
        latency,
        tpot,
        slo,
        WORST * num_unserved / config.scale_requests,
        -config.switch_byte_cost * switched_bytes,
        -config.device_s_cost * device_s,
    )
