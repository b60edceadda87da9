"""How well the type of a request is guessed when it arrives, with and without class and client.

Traces of several classes and clients are merged on one clock. Every minute the types of those that
arrive are guessed; then they count as finished, and their types are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from controller.posterior import TypePosterior
from controller.workload import Floats, assign, fit_typing
from envs.workload import DEFAULT_TYPES, Trace, WorkloadConfig, generate

MINUTE_S = 60.0
CLIENTS = 12
REGIME_S = 21_600.0  # that a generated client keeps a mix
TYPES_OF = {"interactive": DEFAULT_TYPES[::2], "batch": DEFAULT_TYPES[1::2]}
Sender = tuple[str, str]  # class and client


@dataclass(frozen=True, slots=True)
class LogLoss:
    """Mean -ln P(type) of arrivals, in nats."""

    requests: int  # scored
    prompt: float  # P given the prompt's length
    full: float  # given class and client too


def generated(config: WorkloadConfig, duration_s: float, seed: int) -> dict[Sender, Trace]:
    """Clients of two classes with unequal rates, whose mixes move each by itself. A class has half
    of the request types."""
    shares = 1.0 / np.arange(1, CLIENTS + 1)
    shares /= shares.sum()
    classes = list(TYPES_OF)
    found = {}
    for i, rng in enumerate(np.random.default_rng(seed).spawn(CLIENTS)):
        name = classes[i % len(classes)]
        rate = config.mean_rate_per_s * float(shares[i])
        own = replace(config, types=TYPES_OF[name], mean_rate_per_s=rate, regime_s=REGIME_S)
        found[name, f"client{i}"] = generate(own, duration_s, rng)
    return found


def log_loss(traces: Mapping[Sender, Trace], num_types: int, split: float, fitted: int) -> LogLoss:
    """Of the requests after the share `split` of the time; types are fitted on at most about
    `fitted` of those before, and learning starts with the first."""
    number = [len(trace) for trace in traces.values()]
    arrival_s = np.concatenate([trace.arrival_s for trace in traces.values()])
    order = np.argsort(arrival_s, kind="stable")
    arrival_s = arrival_s[order]
    prompt = np.concatenate([trace.prompt_tokens for trace in traces.values()])[order]
    output = np.concatenate([trace.output_tokens for trace in traces.values()])[order]
    sender = np.repeat(np.arange(len(traces)), number)[order].tolist()
    classes, clients = ([list(traces)[i][part] for i in sender] for part in (0, 1))
    split_s = split * max(trace.duration_s for trace in traces.values())
    stop = int(np.searchsorted(arrival_s, split_s))
    step = max(1, stop // fitted)
    typing = fit_typing(prompt[:stop:step], output[:stop:step], num_types, seed=0)
    types, posterior = assign(typing, prompt, output), TypePosterior(typing)
    losses: list[Floats] = []  # [2, N] each
    edges = np.searchsorted(arrival_s, np.arange(0.0, arrival_s[-1] + MINUTE_S, MINUTE_S))
    for first, last in pairwise(edges.tolist()):
        minute = slice(first, last)
        lengths, kinds = prompt[minute].tolist(), types[minute]
        rows = (
            posterior.rows(lengths),
            posterior.rows_given(lengths, classes[minute], clients[minute]),
        )
        losses.append(np.array([-np.log(r[np.arange(len(kinds)), kinds]) for r in rows]))
        posterior.observe_given(lengths, kinds, classes[minute], clients[minute])
    scored = np.concatenate(losses, axis=1)[:, stop:]
    return LogLoss(scored.shape[1], *scored.mean(axis=1).tolist())
