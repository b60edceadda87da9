"""What a decision interval was worth. Pure.

Each request is worth its utility once, in the interval in which it ends:

    utility = 1 - 2 ln(x) / ln(worst_slowdown), cut to [-1, 1],   x = latency / reference,

where the reference is the latency it would have had alone on the fastest configuration. A request
that is rejected, lost or cancelled is worth -1; so is one not ended when x reaches
`worst_slowdown`: it is charged at that moment and counts for nothing when it ends. The sum is
divided by a constant, and a small price per moved weight byte settles ties in favour of staying.

Ways to earn reward without serving well that were considered:
- *Finish few requests.* A mean over ended requests would pay for that; the sum is over all, and
  the number of arrivals is not the policy's to choose.
- *Never finish the slow ones* (starvation, endless preemption, requests stuck in a switch). They
  fall due at `worst_slowdown` without ending.
- *Reject when busy.* A rejection costs as much as the worst latency.
- *Leave a backlog at the end.* Episodes are truncated, not terminated, so the value of the last
  state is bootstrapped; what fell due before has been charged.
- *Switch for its own sake* (a switch resets queues or counters). Only latency pays; bytes cost.
- *Serve the many short requests and let the few long ones wait.* A request's latency is divided by
  its own reference, so waiting hurts short ones more, which is how users feel it; but long ones
  count no more than short ones. Whoever is paid by token should weigh the utility.
- *Make the reference slow.* It comes from the profile before training, never from the run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cluster import Request, RequestOutcome, RequestStatus, SloSpec
from engine.profile import ProfiledCluster, StepTimeModel
from policies.base import TrafficColumns

WORST = -1.0


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """Reference latency, in seconds: ttft_s + prompt_token_s * prompt + tpot_s * (output - 1)."""

    ref_ttft_s: float
    ref_prompt_token_s: float
    ref_tpot_s: float
    worst_slowdown: float = 32.0  # latency / reference at which a request is worth -1
    scale_requests: float = 100.0  # the sum of utilities is divided by this
    switch_byte_cost: float = 1e-10  # per weight byte moved, after that division

    def reference_s(self, prompt_tokens: int, output_tokens: int) -> float:
        decoding_s = self.ref_tpot_s * (output_tokens - 1)
        return self.ref_ttft_s + self.ref_prompt_token_s * prompt_tokens + decoding_s


def reward_config(cluster: ProfiledCluster, scale_requests: float = 100.0) -> RewardConfig:
    """References of an unloaded replica: the least of each figure over the profiled
    configurations. One switch of every weight of one model copy costs 0.02."""
    steps = [s.linear(cluster.spec.max_num_batched_tokens) for s in cluster.profile.steps]
    model = cluster.spec.model
    model_bytes = sum(math.prod(t.shape) for t in model.tensors) * model.dtype_bytes
    return RewardConfig(
        ref_ttft_s=min(_first_token_s(s) for s in steps),
        ref_prompt_token_s=min(s.per_token_s + s.per_context_token_s for s in steps),
        ref_tpot_s=min(_first_token_s(s) + s.per_token_s for s in steps),
        scale_requests=scale_requests,
        switch_byte_cost=0.02 / max(model_bytes, 1),
    )


def _first_token_s(step: StepTimeModel) -> float:
    return step.base_s + step.per_seq_s


def utility(config: RewardConfig, outcome: RequestOutcome, reference_s: float) -> float:
    """In [-1, 1]; see the module."""
    if outcome.status is not RequestStatus.FINISHED:
        return WORST
    slowdown = max((outcome.finish_s - outcome.arrival_s) / reference_s, 1e-9)
    return max(-1.0, min(1.0, 1.0 - 2.0 * math.log(slowdown) / math.log(config.worst_slowdown)))


def meets_slo(slo: SloSpec, outcome: RequestOutcome) -> bool:
    """Whether a request finished with both its TTFT and its TPOT within the objective."""
    if outcome.status is not RequestStatus.FINISHED or outcome.ttft_s is None:
        return False
    due_s = slo.ttft_s + slo.ttft_per_prompt_token_s * outcome.prompt_tokens
    slow_start = 0 < due_s < outcome.ttft_s
    slow_tokens = outcome.tpot_s is not None and 0 < slo.tpot_s < outcome.tpot_s
    return not (slow_start or slow_tokens)


def slo_met(slo: SloSpec, ended: TrafficColumns) -> NDArray[np.bool_]:
    """[E] `meets_slo` of each request."""
    due_s = slo.ttft_s + slo.ttft_per_prompt_token_s * ended.prompt_tokens
    ttft_s = ended.first_token_s - ended.ended_arrival_s
    tpot_s = (ended.finish_s - ended.first_token_s) / np.maximum(ended.output_tokens - 1, 1)
    slow_start = (due_s > 0) & (ttft_s > due_s)
    slow_tokens = (slo.tpot_s > 0) & (ended.output_tokens > 1) & (tpot_s > slo.tpot_s)
    return np.asarray(ended.finished & ~slow_start & ~slow_tokens)


class RewardLedger:
    """Knows which requests were handed in and not yet charged; each is charged exactly once."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._reference_s: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []  # heap of (time it falls due, id)

    def admit(self, request: Request) -> None:
        """Call at submission; the lengths are the trace's, which only the environment knows."""
        reference_s = self.config.reference_s(request.prompt_tokens, request.output_tokens)
        self._reference_s[request.request_id] = reference_s
        due_s = request.arrival_s + self.config.worst_slowdown * reference_s
        heapq.heappush(self._due, (due_s, request.request_id))

    def settle(
        self, outcomes: Iterable[RequestOutcome], now_s: float, switched_bytes: int = 0
    ) -> float:
        """The reward of the interval that ends at `now_s`, in which `outcomes` ended."""
        total = 0.0
        for outcome in outcomes:
            reference_s = self._reference_s.pop(outcome.request_id, None)
            if reference_s is not None:
                total += utility(self.config, outcome, reference_s)
        while self._due and self._due[0][0] <= now_s:
            _, request_id = heapq.heappop(self._due)
            if self._reference_s.pop(request_id, None) is not None:
                total += WORST
        return total / self.config.scale_requests - self.config.switch_byte_cost * switched_bytes
