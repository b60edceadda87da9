"""What a replica can do: service rates and request latency from measured step times.

A batch of N sequences steps once in step(T, N, X, Y) = a + b T + d N + e X + f Y seconds, with T
tokens, X tokens of context and Y attention pairs in it (`engine.profile.StepTimeModel.linear`). A
request of P prompt and O output tokens takes part in m = O - 1 + max(1, P / max_num_batched_tokens)
steps, with L = P + O - 1 tokens in all, at a mean context of P + O / 2. So one sequence adds on
average
    beta = b L / m + d + e (P + O / 2) + f L (L + 1) / 2 m
seconds to the step it is in. With n sequences running they form M = min(pp, n) batches of E =
a + beta max(n, 1) / M seconds each, and one sequence steps once per cycle of
    T(n) = k E + q n / (E + g),   k = max(1, s M),   s = max(1 / pp, stage_share),   at most M E.
k E: a stage takes a new batch every s of a step. The rest: a batch with a prompt in it, which takes
H = b min(P, max_num_batched_tokens) longer, holds up the pp - 1 others behind it. Small variations
let batches circling through pp stages wait like customers of a closed network: not at all where all
steps take the same time, pp - 1 times a stage's mean time per cycle where they are exponential, in
between in proportion to their squared coefficient of variation; a long one holds each of the others
up for HELD_UP times its own, no more. Both limits hold with g = s H / HELD_UP and, per sequence
step,
    q = s (pp - 1) / pp * b^2 P min(P, max_num_batched_tokens) / m,
P times SPREAD2 for what lengths of a type vary. Both constants were chosen on simulated runs of 71
replicas, five pairs of profile and trace, at loads of 0.15, 0.4 and 0.7: there mean latency is off
by 6, 8 and 12 % with pp > 1, by 5, 6 and 9 % without.

Service rate: r(n) = n / (m T(n)) requests per second; the highest steady rate is taken to be at
n_max = min(max_num_seqs, KV tokens / (P + O), tokens per step allowed): with the context at its
end, since a sequence that cannot grow is preempted and computed again.

Latency at rate R < r(n_max): Little's law n = r T with r = R m steps per second, solved for T:
    T = E / (1 - q r / (E + g)) at E = a + beta, while n <= pp;  beyond it (E - a) pp / (beta r)
with E the positive root of, G = g - q r and k = max(1, s pp),
    (pp - k beta r) E^2 + (pp (G - a) - k beta r g) E - pp a G = 0,
at least max(a + beta, k a / (1 - s r beta)), as with q = 0; at most that of one batch at a time,
pp a / (1 - beta r), and at most T(n_max). The sequence spends m T in the replica. Before, it waits:
with utilisation rho and n_max places, Sakasegawa's approximation for M/M/c (1977),
    wait = m T / n_max * rho^(sqrt(2 (n_max + 1)) - 1) / (1 - rho),
continued beyond RHO_KNEE by its tangent, so that overload costs much but finite time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from engine.cluster import KvCostParams, ParallelConfig
from engine.profile import ProfiledCluster, StepTimeModel, attention_pairs
from engine.shards import fits, num_kv_blocks

Floats = NDArray[np.float64]
RHO_KNEE = 0.97
COEFFICIENTS = (
    "base_s",
    "per_token_s",
    "per_seq_s",
    "per_context_token_s",
    "per_pair_s",
    "stage_share",
)
SPREAD2 = 1.7  # mean square of prompt lengths of one type over their squared mean
HELD_UP = 4.0  # longest that a prompt holds another batch up, in times of its own work


@dataclass(frozen=True, slots=True, eq=False)
class ServiceModel:
    """Coefficients of C configurations and J types, and what follows from them."""

    configs: tuple[ParallelConfig, ...]
    base_s: Floats  # [C] a
    share: Floats  # [C] s = max(1 / pp, stage_share)
    pp: Floats  # [C]
    kv_tokens: Floats  # [C] capacity of one replica
    steps: Floats  # [J] m
    added_s: Floats  # [C, J] beta of a type alone
    held_s2: Floats  # [C, J] q of a type alone
    prompt_s: Floats  # [C, J] g of a type alone
    max_running: Floats  # [C, J] n_max
    rates: Floats  # [C, J] requests per second that one replica sustains alone

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """For `controller.headroom_kernel`."""
        own = (self.base_s, self.share, self.pp, self.steps, self.added_s)
        return (*own, self.held_s2, self.prompt_s, self.max_running, self.rates)

    def mixed(self, mixing: Floats) -> ServiceModel:
        """The model of requests of which only a guess of the type is known: those taken for type i
        are of type j with probability mixing[i, j], and each guess counts as a type."""
        steps = mixing @ self.steps
        weight = mixing * self.steps / steps[:, None]  # [i, j] of the steps
        held_s2 = self.held_s2 @ weight.T
        prompt_s = (self.held_s2 * self.prompt_s) @ weight.T / np.maximum(held_s2, 1e-18)
        return replace(
            self,
            steps=steps,
            added_s=self.added_s @ weight.T,
            held_s2=held_s2,
            prompt_s=prompt_s,
            max_running=1.0 / ((1.0 / self.max_running) @ weight.T),
            rates=mixed_rates(self.rates, mixing),
        )


def mixed_rates(rates: Floats, mixing: Floats) -> Floats:
    """[C, J] service rates of guessed types, from those[C, J] of true ones; 0 where a type that
    is not served is among them."""
    return np.asarray(_mixed_rates(np.ascontiguousarray(rates), np.ascontiguousarray(mixing)))


@numba.njit(cache=True, nogil=True)
def _mixed_rates(rates: Any, mixing: Any) -> Any:
    found = np.zeros(rates.shape)
    for c in range(len(rates)):
        for i in range(len(mixing)):
            work = 0.0
            for j in range(len(mixing)):
                if mixing[i, j] > 0.0:
                    work += mixing[i, j] / rates[c, j] if rates[c, j] > 0.0 else np.inf
            found[c, i] = 1.0 / work
    return found


def feasible_configs(cluster: ProfiledCluster) -> tuple[ParallelConfig, ...]:
    """Profiled configurations that fit devices, heads, layers and memory; largest first."""
    spec = cluster.spec
    found = [c for c in cluster.profile.configs if c.num_devices <= spec.num_devices]
    found = [c for c in found if fits(spec, c)]
    return tuple(sorted(found, key=lambda c: (-c.num_devices, -c.tp, c.pp)))


@dataclass(frozen=True, slots=True, eq=False)
class _Pipeline:
    """The terms of T, all of shapes that broadcast to one."""

    base_s: Floats
    share: Floats
    pp: Floats
    added_s: Floats
    held_s2: Floats
    prompt_s: Floats

    def full_s(self, running: Floats) -> Floats:
        """T(n)."""
        running = np.maximum(running, 1.0)
        batches = np.minimum(self.pp, running)
        step_s = np.maximum(self.base_s + self.added_s * running / batches, 1e-12)
        held_s = self.held_s2 * running / (step_s + self.prompt_s)
        cycle_s = np.maximum(1.0, self.share * batches) * step_s + held_s
        return np.asarray(np.minimum(cycle_s, np.maximum(1.0, self.share) * batches * step_s))

    def loaded_s(self, step_rate: Floats) -> Floats:
        """T at so many sequence steps per second; inf where there is no steady state."""
        a, g, pp = self.base_s, self.prompt_s, self.pp
        alone_s, held_s = a + self.added_s, self.held_s2 * step_rate
        k, work = np.maximum(1.0, self.share * pp), self.added_s * step_rate
        with np.errstate(divide="ignore", invalid="ignore"):
            plain_s = np.where(self.share * work < 1.0, k * a / (1.0 - self.share * work), np.inf)
            few_s = alone_s * (alone_s + g) / np.maximum(alone_s + g - held_s, 0.0)
            free = pp - k * work
            half = 0.5 * (pp * (a - g + held_s) + k * work * g)
            root = np.sqrt(np.maximum(half**2 + free * pp * a * (g - held_s), 0.0))
            step_s = np.where(free > 0.0, (half + root) / free, np.inf)
            many_s = np.maximum((step_s - a) * pp / np.maximum(work, 1e-12), k * a)
            single_s = np.where(work < 1.0, pp * a / (1.0 - work), np.inf)
            many_s = np.minimum(many_s, np.maximum(1.0, self.share) * single_s)
        cycle_s = np.where(few_s * step_rate <= pp, np.maximum(few_s, plain_s), many_s)
        return np.asarray(np.maximum(alone_s, cycle_s))


@lru_cache(maxsize=256)
def _linear(model: StepTimeModel, max_tokens: int) -> StepTimeModel:
    return model.linear(max_tokens)


@lru_cache(maxsize=64)
def _coefficients(cluster: ProfiledCluster, configs: tuple[ParallelConfig, ...]) -> Floats:
    """[8, C]: those of the step times, the stage's share at least 1 / pp, then pipeline stages and
    tokens of KV."""
    spec, pp = cluster.spec, np.array([c.pp for c in configs], np.float64)
    limit = spec.max_num_batched_tokens
    models = [_linear(cluster.profile.step_model(c), limit) for c in configs]
    *found, share = (
        np.array([getattr(m, name) for m in models], np.float64) for name in COEFFICIENTS
    )
    kv_tokens = np.array([num_kv_blocks(spec, c) * spec.block_size for c in configs], np.float64)
    return np.array([*found, np.maximum(1.0 / pp, share), pp, kv_tokens])


@numba.njit(cache=True, nogil=True)
def _terms(coefficients: Any, lengths: Any, limit: float, max_num_seqs: float) -> Any:
    """steps[J]; added_s, held_s2, prompt_s, max_running and rates, [C, J] each."""
    number, types = coefficients.shape[1], len(lengths)
    steps, found = np.empty(types), np.empty((5, number, types))
    for j in range(types):
        prompt, output = max(lengths[j, 0], 1.0), max(lengths[j, 1], 1.0)
        m = steps[j] = max(output - 1.0, 0.0) + max(1.0, prompt / limit)
        total, context = prompt + output, prompt + output / 2.0
        ahead = total - 1.0
        tokens, per_step = max(ahead, 1.0) / m, max(ahead / m, 1.0)
        pairs = ahead * ((ahead + 1.0) / 2.0) / m  # `engine.profile.attention_pairs`
        for c in range(number):
            a, b, d, e, f, share, pp, kv_tokens = coefficients[:, c]
            added_s = b * tokens + d + e * context + f * pairs
            places = min(kv_tokens / total, pp * limit / per_step)
            running = min(max(places, 1.0), max_num_seqs)
            held_up_s = share * b * min(SPREAD2 * prompt, limit)
            prompt_s = held_up_s / HELD_UP
            held_s2 = (pp - 1.0) / pp * b * held_up_s * prompt / m
            batches = min(pp, running)
            step_s = max(a + added_s * running / batches, 1e-12)
            cycle_s = max(1.0, share * batches) * step_s + held_s2 * running / (step_s + prompt_s)
            cycle_s = min(cycle_s, max(1.0, share) * batches * step_s)
            found[0, c, j], found[1, c, j], found[2, c, j] = added_s, held_s2, prompt_s
            found[3, c, j], found[4, c, j] = running, running / (m * max(cycle_s, 1e-9))
    return steps, found


def build_service_model(
    cluster: ProfiledCluster, configs: Sequence[ParallelConfig], lengths: Floats
) -> ServiceModel:
    """Service model of `configs` for types of mean lengths[J, 2] (prompt, output tokens).

    Raises InvalidRequestError when the profile lacks a configuration.
    """
    spec, coefficients = cluster.spec, _coefficients(cluster, tuple(configs))
    limit, most = float(spec.max_num_batched_tokens), float(spec.max_num_seqs)
    steps, found = _terms(coefficients, np.ascontiguousarray(lengths), limit, most)
    base_s, *_, share, pp, kv_tokens = coefficients
    return ServiceModel(tuple(configs), base_s, share, pp, kv_tokens, steps, *found)


def service_rates(
    cluster: ProfiledCluster, configs: Sequence[ParallelConfig], lengths: Floats
) -> Floats:
    """[C, J] highest request rate of each type that each configuration alone sustains, per s."""
    return build_service_model(cluster, configs, lengths).rates


def _wait_s(service_s: Floats, running: Floats, rho: Floats) -> Floats:
    """Sakasegawa's mean wait for one of `running` places, tangent beyond the knee."""
    power = np.sqrt(2.0 * (running + 1.0)) - 1.0
    below = np.minimum(rho, RHO_KNEE)
    value = below**power / (1.0 - below)
    slope = value * (power / RHO_KNEE + 1.0 / (1.0 - RHO_KNEE))
    return np.asarray(service_s / running * (value + slope * np.maximum(rho - RHO_KNEE, 0.0)))


def mean_latency_s(
    model: ServiceModel, rows: NDArray[np.int64], counts: Floats, flows: Floats
) -> Floats:
    """[B] mean request latency of B deployments.

    rows[B, K] are configurations (rows of the model), counts[B, K] their replicas (0: unused) and
    flows[B, K, J] requests per second sent to each. Mixed traffic on a replica is treated as one
    type whose beta, context and places are weighted by its sequences' steps.
    """
    used = counts > 0.0
    flow = np.where(used[:, :, None], flows, 0.0) / np.where(used, counts, 1.0)[:, :, None]
    rate = flow.sum(axis=2)  # of one replica
    stepping = flow * model.steps  # sequence steps per second, by type
    step_rate = np.maximum(stepping.sum(axis=2), 1e-12)
    weight = stepping / step_rate[:, :, None]
    added_s = (weight * model.added_s[rows]).sum(axis=2)
    running = 1.0 / np.maximum((weight / model.max_running[rows]).sum(axis=2), 1e-9)
    running = np.where(rate > 0.0, running, 1.0)
    base_s, share, pp = model.base_s[rows], model.share[rows], model.pp[rows]
    held = weight * model.held_s2[rows]
    held_s2 = held.sum(axis=2)
    prompt_s = (held * model.prompt_s[rows]).sum(axis=2) / np.maximum(held_s2, 1e-18)
    pipeline = _Pipeline(base_s, share, pp, added_s, held_s2, prompt_s)
    full_s, cycle_s = pipeline.full_s(running), pipeline.loaded_s(step_rate)
    cycle_s = np.minimum(cycle_s, np.maximum(full_s, base_s + added_s))
    rho = (flow / model.rates[rows]).sum(axis=2)
    service_s = step_rate / np.maximum(rate, 1e-12) * cycle_s
    latency_s = service_s + _wait_s(service_s, running, rho)
    total = np.maximum((rate * counts).sum(axis=1), 1e-12)
    return np.asarray((rate * counts * np.where(used, latency_s, 0.0)).sum(axis=1) / total)


def kv_cost_params(cluster: ProfiledCluster, target: Sequence[ParallelConfig]) -> KvCostParams:
    """Costs that bind running requests to migrate or recompute, for the slowest of `target`:
    prefill speed of full steps, and a decode step of one sequence in mid context."""
    spec, context = cluster.spec, cluster.spec.model.max_model_len / 2.0
    models = [cluster.profile.step_model(c) for c in set(target)]
    full = spec.max_num_batched_tokens
    pairs = attention_pairs(max(context - full, 0.0), full)
    step_s = max(max(m.step_s(full, 1, context, pairs), 1e-9) for m in models)
    decode_s = max(max(m.step_s(1, 1, context, context), 1e-9) for m in models)
    return KvCostParams(cluster.profile.link_bytes_per_s, full / step_s, decode_s)
