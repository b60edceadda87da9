"""What is counted of many requests at once, compiled. Requests are counted one after another."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numba
import numpy as np

compiled = numba.njit(cache=True, nogil=True)


@compiled
def nearest(prompt_tokens: Any, output_tokens: Any, log_centres: Any) -> Any:
    """[N] which of log_centres[J, 2] is nearest to (ln prompt, ln output); of equals the first."""
    found = np.zeros(len(prompt_tokens), np.int64)
    for i in range(len(found)):
        prompt, output = math.log(max(prompt_tokens[i], 1.0)), math.log(max(output_tokens[i], 1.0))
        least = np.inf
        for j in range(len(log_centres)):
            x, y = prompt - log_centres[j, 0], output - log_centres[j, 1]
            if x * x + y * y < least:
                least, found[i] = x * x + y * y, j
    return found


@compiled
def buckets(edges: Any, prompt_tokens: Any) -> Any:
    """[N] the first bucket whose upper edge is not below; edges[B - 1] ascend."""
    return np.searchsorted(edges, prompt_tokens)


@compiled
def add_pairs(counts: Any, rows: Any, columns: Any) -> None:
    """Adds 1 to counts[row, column] of each of N."""
    for i in range(len(rows)):
        counts[rows[i], columns[i]] += 1.0


@compiled
def posterior(weights: Any) -> Any:
    """[B, J] shares of weights[B, J] in each bucket; and [J, J] what requests are of, bucket by
    bucket, that are taken for a type by those shares. Rows sum to 1."""
    number, types = weights.shape
    shares, mixing, taken = np.empty((number, types)), np.zeros((types, types)), np.zeros(types)
    for b in range(number):
        total = 0.0
        for j in range(types):
            total += weights[b, j]
        for j in range(types):
            shares[b, j] = weights[b, j] / total
        for i in range(types):
            taken[i] += weights[b, i]
            for j in range(types):
                mixing[i, j] += weights[b, i] * shares[b, j]
    for i in range(types):
        for j in range(types):
            mixing[i, j] /= taken[i]
    return shares, mixing


@compiled
def add_arrivals(
    arrival_s: Any, rows: Any, now_s: float, taus_s: Any, arrived: Any, interval: Any
) -> None:
    """Adds rows[N, J] to interval[J], and to arrived[S, J] as they have decayed by `now_s`."""
    types = rows.shape[1]
    for i in range(len(arrival_s)):
        for s in range(len(taus_s)):
            weight = math.exp(min(arrival_s[i] - now_s, 0.0) / taus_s[s])
            for j in range(types):
                arrived[s, j] += weight * rows[i, j]
        for j in range(types):
            interval[j] += rows[i, j]


@compiled
def add_lengths(
    types: Any, prompt_tokens: Any, output_tokens: Any, keep: float, weights: Any, sums: Any
) -> None:
    """Into weights[J] and sums[J, 2] of tokens; those before count `keep` times per request."""
    counts = np.zeros(len(weights))
    for kind in types:
        counts[kind] += 1.0
    for j in range(len(weights)):
        faded = keep ** counts[j]
        weights[j] = weights[j] * faded + counts[j]
        sums[j] *= faded
    for i in range(len(types)):
        sums[types[i], 0] += prompt_tokens[i]
        sums[types[i], 1] += output_tokens[i]


@compiled
def add_latencies(
    arrival_s: Any,
    first_token_s: Any,
    finish_s: Any,
    output_tokens: Any,
    now_s: float,
    window_s: float,
    sums: Any,
) -> None:
    """Into sums[6], as they have decayed by `now_s`: how many, and their latencies; how many with a
    first token (not nan), and the time to it; with a time per token, and that."""
    for i in range(len(finish_s)):
        weight = math.exp(min(finish_s[i] - now_s, 0.0) / window_s)
        sums[0] += weight
        sums[1] += weight * (finish_s[i] - arrival_s[i])
        if not math.isnan(first_token_s[i]):
            sums[2] += weight
            sums[3] += weight * (first_token_s[i] - arrival_s[i])
            if output_tokens[i] > 1:
                took_s = finish_s[i] - first_token_s[i]
                sums[4] += weight
                sums[5] += weight * took_s / (output_tokens[i] - 1)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Compiles everything, or loads it, so that no decision waits for it."""
    one, square, first = np.ones(1), np.ones((1, 1)), np.zeros(1, np.int64)
    nearest(one, one, np.ones((1, 2)))
    buckets(one, first)
    add_pairs(square, first, first)
    posterior(square)
    add_arrivals(one, square, 0.0, one, square.copy(), one.copy())
    add_lengths(first, first, first, 1.0, one.copy(), np.ones((1, 2)))
    add_latencies(one, one, one, first, 0.0, 1.0, np.zeros(6))
