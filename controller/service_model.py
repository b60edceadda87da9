"""What a replica can do: service rates and request latency from measured step times.

A batch of N sequences steps once in step(T, N, X, Y) = a + b T + d N + e X + f Y seconds, with T
tokens, X tokens of context and Y attention pairs in it (`engine.profile.StepTimeModel.linear`). A
request of P prompt and O output tokens takes part in m = O - 1 + max(1, P / max_num_batched_tokens)
steps, with L = P + O - 1 tokens in all, at a mean context of P + O / 2. So one sequence adds on
average
    beta = b L / m + d + e (P + O / 2) + f L (L + 1) / 2 m
seconds to the step it is in. With n sequences running they form M = min(pp, n) batches, and one
sequence steps once per cycle of
    T(n) = k(M) (a + beta max(n, 1) / M),   k(M) = max(1, stage_share * M),
since a stage takes a new batch every stage_share of a step.

Service rate: r(n) = n / (m T(n)) requests per second, rising in n, so the highest steady rate is
at n_max = min(max_num_seqs, KV tokens / mean context, tokens per step allowed).

Latency at rate R < r(n_max): Little's law n = R m T(n) solved for T gives
    T = max(a + beta, k a / (1 - s R m beta)),   k = k(pp),  s = max(1 / pp, stage_share),
at most T(n_max); the sequence spends m T in the replica. Before that it waits for a place: with
utilisation rho and n_max places, Sakasegawa's approximation for M/M/c (1977),
    wait = m T / n_max * rho^(sqrt(2 (n_max + 1)) - 1) / (1 - rho),
continued beyond RHO_KNEE by its tangent, so that overload costs much but finite time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ClusterSpec, KvCostParams, ParallelConfig
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
    max_running: Floats  # [C, J] n_max
    rates: Floats  # [C, J] requests per second that one replica sustains alone

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """For `controller.headroom_kernel`."""
        own = (self.base_s, self.share, self.pp, self.steps, self.added_s)
        return (*own, self.max_running, self.rates)


def feasible_configs(cluster: ProfiledCluster) -> tuple[ParallelConfig, ...]:
    """Profiled configurations that fit devices, heads, layers and memory; largest first."""
    spec = cluster.spec
    found = [c for c in cluster.profile.configs if c.num_devices <= spec.num_devices]
    found = [c for c in found if fits(spec, c)]
    return tuple(sorted(found, key=lambda c: (-c.num_devices, -c.tp, c.pp)))


def _cycle_s(model: tuple[Floats, Floats, Floats], running: Floats, added_s: Floats) -> Floats:
    """T(n) for base_s, share, pp of shape [C, 1] against running and added_s [C, J]."""
    base_s, share, pp = model
    batches = np.minimum(pp, np.maximum(running, 1.0))
    stretch = np.maximum(1.0, share * batches)
    return np.asarray(stretch * (base_s + added_s * np.maximum(running, 1.0) / batches))


def _max_running(spec: ClusterSpec, kv_tokens: Floats, lengths: Floats, pp: Floats) -> Floats:
    """[C, J] sequences that run together in steady state: places, KV tokens, tokens per step."""
    prompt, output = lengths[:, 0], lengths[:, 1]
    by_kv = kv_tokens[:, None] / (prompt + output / 2.0)[None]
    per_step = np.maximum((prompt + output - 1.0) / _steps(spec, lengths), 1.0)
    by_tokens = pp[:, None] * spec.max_num_batched_tokens / per_step[None]
    return np.asarray(np.clip(np.minimum(by_kv, by_tokens), 1.0, spec.max_num_seqs))


def _steps(spec: ClusterSpec, lengths: Floats) -> Floats:
    prompt, output = lengths[:, 0], lengths[:, 1]
    chunks = np.maximum(1.0, prompt / spec.max_num_batched_tokens)
    return np.asarray(np.maximum(output - 1.0, 0.0) + chunks)


@lru_cache(maxsize=256)
def _linear(model: StepTimeModel, max_tokens: int) -> StepTimeModel:
    return model.linear(max_tokens)


def build_service_model(
    cluster: ProfiledCluster, configs: Sequence[ParallelConfig], lengths: Floats
) -> ServiceModel:
    """Service model of `configs` for types of mean lengths[J, 2] (prompt, output tokens).

    Raises InvalidRequestError when the profile lacks a configuration.
    """
    spec = cluster.spec
    limit = spec.max_num_batched_tokens
    models = [_linear(cluster.profile.step_model(c), limit) for c in configs]
    a, b, d, e, f, share = (
        np.array([getattr(m, name) for m in models], np.float64) for name in COEFFICIENTS
    )
    pp = np.array([c.pp for c in configs], np.float64)
    share = np.maximum(1.0 / pp, share)
    kv_tokens = np.array([num_kv_blocks(spec, c) * spec.block_size for c in configs], np.float64)
    lengths = np.maximum(lengths, 1.0)
    steps, context = _steps(spec, lengths), lengths[:, 0] + lengths[:, 1] / 2.0
    tokens = np.maximum(lengths.sum(axis=1) - 1.0, 1.0) / steps
    pairs = attention_pairs(0.0, lengths.sum(axis=1) - 1.0) / steps
    added_s = b[:, None] * tokens + d[:, None] + e[:, None] * context + f[:, None] * pairs
    running = _max_running(spec, kv_tokens, lengths, pp)
    cycle_s = _cycle_s((a[:, None], share[:, None], pp[:, None]), running, added_s)
    rates = running / (steps * np.maximum(cycle_s, 1e-9))
    return ServiceModel(
        tuple(configs), a, share, pp, kv_tokens, steps, added_s, running, np.asarray(rates)
    )


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
    full_s = _cycle_s((base_s, share, pp), running, added_s)
    busy = np.minimum(share * step_rate * added_s, 1.0 - 1e-9)
    cycle_s = np.maximum(base_s + added_s, np.maximum(1.0, share * pp) * base_s / (1.0 - busy))
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
