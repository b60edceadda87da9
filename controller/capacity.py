"""What a replica sustains and how long its requests take, from measured step times. Fluid, closed.

One replica of configuration c serves requests with prompt P and output O tokens. With m batches in
flight, a (fractional) number `a` of requests entering and leaving each batch per cycle, and
k = max(1, P / max_num_batched_tokens) prefill chunks per request, one batch holds q = O - 1 + k
sequence-steps per entering request, so its step lasts

    tau = base + a * W,   W = per_token (O - 1 + P) + per_seq q + per_context ((O-1)(P + O/2) + k P)

(context is counted at its mean). A cycle, in which each sequence advances by one step, lasts
T = g tau with g = max(1, m stage_share): below 1/stage_share batches the stages still have gaps.
By Little's law the request rate is  n = m a / T,  which rises with `a` towards m / (g W). What ends
the rise: m a q sequences at once, each with P + O/2 tokens and half a block, must fit the KV cache
and max_num_seqs; a (O - 1 + P) tokens must fit max_num_batched_tokens; and an SLO bounds T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ParallelConfig, SloSpec, WorkloadType
from engine.errors import InfeasibleError
from engine.profile import ProfiledCluster
from engine.shards import fits, num_kv_blocks

Floats = NDArray[np.float64]

RATE_FLOOR = 1e-6  # of the best configuration's rate: stands for "cannot meet the objective"
KNEE = 0.97  # utilisation past which 1 / (1 - rho) goes on as its tangent


def feasible_configs(cluster: ProfiledCluster) -> tuple[ParallelConfig, ...]:
    """Profiled configurations that fit the devices, smallest first. Raises InfeasibleError."""
    found = [
        c
        for c in cluster.profile.configs
        if c.num_devices <= cluster.spec.num_devices and fits(cluster.spec, c)
    ]
    if not found:
        raise InfeasibleError(
            f"no profiled configuration of {cluster.spec.model.name} fits "
            f"{cluster.spec.num_devices} devices of {cluster.spec.device_memory_bytes} bytes; "
            "profile larger replicas, give more memory, or lower max_model_len."
        )
    return tuple(sorted(set(found), key=lambda c: (c.num_devices, c.tp)))


@dataclass(frozen=True, slots=True, eq=False)
class Capacity:
    """Figures of C configurations for J types; all arrays [C, J] unless said otherwise."""

    configs: tuple[ParallelConfig, ...]
    kv_tokens: Floats  # [C] KV capacity of one replica
    stages: Floats  # [C] batches in flight at most
    stage_share: Floats  # [C]
    work_s: Floats  # W: marginal step seconds of one request
    lone_step_s: Floats  # a decode step of one sequence alone
    prefill_s: Floats  # marginal step seconds of one request's prefill
    full_cycle_s: Floats  # T at the physical limit
    slots: Floats  # sequences at once at the physical limit
    rates: Floats  # requests/s of one replica with this type alone, no objective
    slo_rates: Floats  # the same under the objectives, floored at RATE_FLOOR of the best
    chunks: Floats  # [J] prefill chunks per request
    output_tokens: Floats  # [J]


def build_capacity(
    cluster: ProfiledCluster,
    types: Sequence[WorkloadType],
    slo: Sequence[SloSpec] = (),
    kv_fill: float = 0.95,
) -> Capacity:
    """Evaluate the model of the module's docstring for all feasible configurations.

    `slo` has one entry per type, or none. `kv_fill` is the share of KV blocks in use at capacity.
    """
    configs, spec = feasible_configs(cluster), cluster.spec
    models = [cluster.profile.step_model(c) for c in configs]
    base, token, seq, context, share = (
        np.array([[getattr(m, name)] for m in models], float)
        for name in ("base_s", "per_token_s", "per_seq_s", "per_context_token_s", "stage_share")
    )
    limit = float(spec.model.max_model_len)
    prompt = np.clip([t.prompt_tokens for t in types], 1.0, limit - 1.0)
    output = np.clip([t.output_tokens for t in types], 1.0, limit - prompt)
    chunks = np.maximum(prompt / spec.max_num_batched_tokens, 1.0)
    held = prompt + output / 2.0
    steps = output - 1.0 + chunks
    prefill_s = token * prompt + seq * chunks + context * chunks * prompt
    work_s = prefill_s + (output - 1.0) * (token + seq + context * held)

    kv_tokens = np.array([num_kv_blocks(spec, c) * spec.block_size for c in configs], float)
    slots = kv_fill * kv_tokens[:, None] / (held + spec.block_size / 2.0)
    slots = np.clip(slots, 1.0, float(spec.max_num_seqs))
    stages = np.array([float(c.pp) for c in configs])
    flight = np.minimum(stages[:, None], slots)
    gaps = np.maximum(1.0, flight * share)
    entering = np.minimum(
        slots / (flight * steps), spec.max_num_batched_tokens / (output - 1.0 + prompt)
    )
    cycle_limit = _cycle_limits(len(types), slo, chunks)
    allowed = np.clip((cycle_limit / gaps - base) / work_s, 0.0, entering)

    def rate(a: Floats) -> Floats:
        return np.asarray(flight * a / (gaps * (base + a * work_s)))

    rates = rate(entering)
    slo_rates = np.where(allowed.max(axis=0) > 0, rate(allowed), rates)
    return Capacity(
        configs=configs,
        kv_tokens=kv_tokens,
        stages=stages,
        stage_share=share[:, 0],
        work_s=work_s,
        lone_step_s=base + token + seq + context * held,
        prefill_s=prefill_s,
        full_cycle_s=gaps * (base + entering * work_s),
        slots=slots,
        rates=rates,
        slo_rates=np.maximum(slo_rates, RATE_FLOOR * slo_rates.max(axis=0)),
        chunks=chunks,
        output_tokens=output,
    )


def _cycle_limits(num_types: int, slo: Sequence[SloSpec], chunks: Floats) -> Floats:
    """[J] longest cycle under the objectives: TPOT is a cycle, TTFT at least `chunks` of them."""
    if not slo:
        return np.full(num_types, np.inf)
    assert len(slo) == num_types, (len(slo), num_types)
    tpot = np.array([s.tpot_s or np.inf for s in slo])
    ttft = np.array([s.ttft_s or np.inf for s in slo])
    return np.minimum(tpot, ttft / chunks)


def service_rates(
    cluster: ProfiledCluster, types: Sequence[WorkloadType], slo: Sequence[SloSpec] = ()
) -> Floats:
    """[C, J] highest rate of type j, requests/s, that one replica of `feasible_configs(cluster)[c]`
    sustains alone. A type whose objective no configuration meets is rated without it."""
    return build_capacity(cluster, types, slo).slo_rates


def mean_latency_s(
    capacity: Capacity, counts: Floats, x: Floats, horizon_s: float = 300.0
) -> Floats:
    """[M] mean request latency of M deployments, seconds; finite, and rising with the load.

    counts[M, C] replicas; x[M, C, J] requests/s sent to all replicas of a configuration. Service
    time comes from the cycle at the present load; waiting from Sakasegawa's approximation for
    GI/G/s queues ("An approximation formula Lq = a rho^b / (1 - rho)", 1977) with coefficients of
    variation of one; overload adds the mean wait of a fluid backlog growing for `horizon_s`.
    """
    each = x / np.maximum(counts, 1.0)[:, :, None]
    total = each.sum(axis=2)
    busy = np.maximum(total, 1e-12)
    cycle_s = _cycle_s(capacity, each, busy)
    service_s = (
        capacity.chunks + capacity.output_tokens - 1.0
    ) * cycle_s[:, :, None] + capacity.prefill_s
    rho = (each / capacity.rates).sum(axis=2)
    slots = busy / np.maximum((each / capacity.slots).sum(axis=2), 1e-15)
    power = np.sqrt(2.0 * (slots + 1.0)) - 1.0
    interval_s = rho / busy  # between departures of a saturated replica
    wait_s = interval_s * rho**power * _inverse_slack(rho)
    wait_s += np.maximum(1.0 - 1.0 / np.maximum(rho, 1.0), 0.0) * horizon_s / 2.0
    latency_s = (x * (service_s + wait_s[:, :, None])).sum(axis=(1, 2))
    return np.asarray(latency_s / np.maximum(x.sum(axis=(1, 2)), 1e-12))


def _cycle_s(capacity: Capacity, each: Floats, busy: Floats) -> Floats:
    """[M, C] cycle at the present load: one batch in flight while fewer than one sequence runs,
    then one per sequence, then as many as there are stages; bounded by the full cycle."""

    def mean(values: Floats) -> Floats:
        return np.asarray((each * values).sum(axis=2) / busy)

    lone_s, full_s = mean(capacity.lone_step_s), mean(capacity.full_cycle_s)
    load = (each * capacity.work_s).sum(axis=2)
    steps = mean(capacity.output_tokens - 1.0 + capacity.chunks)
    gaps = np.maximum(1.0, capacity.stages * capacity.stage_share)
    one = lone_s * _inverse_slack(load)
    several = lone_s + load / (busy * steps)
    used = np.minimum(gaps * load / capacity.stages, 1.0)
    all_stages = lone_s * (1.0 + (gaps - 1.0) * used) * _inverse_slack(used)
    cycle = np.maximum(np.minimum(one, several), all_stages)
    return np.minimum(cycle, np.maximum(full_s, lone_s))


def _inverse_slack(rho: Floats) -> Floats:
    """1 / (1 - rho), continued by its tangent from KNEE on."""
    head = 1.0 / (1.0 - np.minimum(rho, KNEE))
    return np.asarray(head + np.maximum(rho - KNEE, 0.0) / (1.0 - KNEE) ** 2)
