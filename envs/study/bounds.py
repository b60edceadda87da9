"""Bounds on what any rule could do with a cell's traffic, from the step times of its profile."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.profile import ProfiledCluster, StepTimeModel
from envs.columns import ColumnLedger
from envs.reward import RewardConfig
from envs.study.world import World
from envs.workload import Trace
from policies.base import TrafficColumns
from policies.oracle import goodput_bound, latency_bound

Floats = NDArray[np.float64]


def bounds(world: World) -> dict[str, Any]:
    """`goodput`: the share of requests that can meet the interactive objective at most;
    `latency_s`: the least that the mean can be; `utility`: the most that its mean can be."""
    cluster, slo = world.cluster, world.objectives.interactive
    configs = [cluster.profile.step_model(c) for c in world.planner.configs]
    met, alone, worth = 0, [], 0.0
    for window in world.test:
        ttft_s, tpot_s = np.min(_alone(cluster, configs, window), axis=0)
        alone.append(ttft_s + tpot_s * (window.output_tokens - 1))
        worth += best_worth(world.objectives.reward, window, ttft_s, tpot_s)
        work_s = np.min([_work_s(cluster, model, window) for model in configs], axis=0)
        due_s = slo.ttft_s + slo.ttft_per_prompt_token_s * window.prompt_tokens
        several = window.output_tokens > 1
        can_meet = (ttft_s <= due_s) & (~several | (tpot_s <= slo.tpot_s))
        patience_s = np.asarray(due_s + slo.tpot_s * (window.output_tokens - 1), np.float64)
        met += goodput_bound(window.arrival_s, work_s, patience_s, can_meet, world.cell.devices)
    total = sum(map(len, world.test))
    return {
        "goodput": round(met / max(total, 1), 5),
        "utility": round(worth / max(total, 1), 5),
        "latency_s": round(latency_bound(np.concatenate(alone)), 5) if total else 0.0,
    }


def best_worth(reward: RewardConfig, window: Trace, ttft_s: Floats, tpot_s: Floats) -> float:
    """Sum of the utilities of requests that have these times alone on the best configuration."""
    several = np.maximum(window.output_tokens - 1, 0)
    first_s = window.arrival_s + ttft_s
    ended = TrafficColumns(
        window.arrival_s,
        window.prompt_tokens,
        np.arange(len(window)),
        np.ones(len(window), np.bool_),
        window.arrival_s,
        first_s,
        first_s + tpot_s * several,
        window.prompt_tokens,
        window.output_tokens,
    )
    return float(ColumnLedger(reward, window, 0.0).parts(ended).sum())


def _alone(
    cluster: ProfiledCluster, configs: list[StepTimeModel], window: Trace
) -> list[tuple[Floats, Floats]]:
    """(TTFT, least time per token after the first) of each request alone, on each configuration."""
    limit, found = float(cluster.spec.max_num_batched_tokens), []
    prompt = window.prompt_tokens.astype(np.float64)
    for model in configs:
        full = np.floor(prompt / limit)
        rest = prompt - full * limit
        fixed_s = model.base_s + model.per_seq_s
        ttft_s = full * (fixed_s + model.token_term_s(limit))
        ttft_s = ttft_s + np.where(rest > 0, fixed_s + model.token_terms_s(rest), 0.0)
        ttft_s = ttft_s + model.per_context_token_s * prompt
        tpot_s = fixed_s + model.token_term_s(1.0) + model.per_context_token_s * prompt
        found.append((ttft_s, tpot_s))
    return found


def _work_s(cluster: ProfiledCluster, model: StepTimeModel, window: Trace) -> Floats:
    """Device-seconds of each request at least: its tokens in steps of the best size, with their
    part of the base, and its own terms; a replica starts a step each stage_share of one."""
    limit = float(cluster.spec.max_num_batched_tokens)
    sizes = np.array([1.0, *(k for k in model.token_knots if k < limit), limit])
    token_s = float(((model.base_s + model.token_terms_s(sizes)) / sizes).min())
    prompt, output = (t.astype(np.float64) for t in (window.prompt_tokens, window.output_tokens))
    tokens = prompt + output - 1.0
    context = prompt * output + output * (output - 1.0) / 2.0
    step_s = token_s * tokens + model.per_seq_s * output + model.per_context_token_s * context
    pairs = tokens * (tokens + 1.0) / 2.0
    devices, share = model.parallel.num_devices, max(model.stage_share, 1.0 / model.parallel.pp)
    return np.asarray(devices * share * (step_s + model.per_pair_s * pairs))
