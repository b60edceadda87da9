"""Drawing tokens on the CPU without sorting the vocabulary: compiled by numba.

A weight is exp((logit - max) / temperature), so the likeliest token has weight 1. The filters keep
the likeliest tokens down to a cut, which histograms of the weights' bits find. The plain path
beside it is `engine.sampler.draw_plain`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.vector_exp import vector_exp

f32, f64, u32 = np.float32, np.float64, np.uint32
NUM_BINS = (0x3F800000 >> 16) + 1  # of the upper 16 bits of weights from 0 to 1
LANES = 64  # partial results of a reduction: one alone would wait for itself
RUN = 4 * LANES  # tokens whose weights are summed before the sum is compared


@njit(fastmath=True, nogil=True, error_model="numpy", cache=True)
def _weigh(logits, temperature, weights):  # type: ignore[no-untyped-def]
    """Fill weights [V]."""
    lanes = np.full(LANES, -np.inf, f32)
    whole = logits.size // LANES * LANES
    for begin in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] = max(lanes[j], logits[begin + j])
    top = lanes.max()
    for i in range(whole, logits.size):
        top = max(top, logits[i])
    scale = f32(1.0) / temperature
    for i in range(logits.size):
        weights[i] = vector_exp((logits[i] - top) * scale)


@njit(fastmath=True, nogil=True, error_model="numpy", cache=True)
def _run_sums(weights, sums):  # type: ignore[no-untyped-def]
    """Fill sums [ceil(V / RUN)] with the weight of each run of tokens; returns that of all."""
    lanes = np.empty(LANES, f32)
    total = f64(0.0)
    for run in range(sums.size):
        begin, end = run * RUN, min((run + 1) * RUN, weights.size)
        whole = begin + (end - begin) // LANES * LANES
        lanes[:] = f32(0.0)
        for at in range(begin, whole, LANES):
            for j in range(LANES):
                lanes[j] += weights[at + j]
        here = f64(lanes.sum())
        for i in range(whole, end):
            here += f64(weights[i])
        sums[run] = here
        total += here
    return total


@njit(nogil=True, error_model="numpy", cache=True)
def _walk(counts, masses, highest, max_count, max_mass, count, mass):  # type: ignore[no-untyped-def]
    """From bin `highest` down, the bin in which `max_count` or `max_mass` is reached (-1: none),
    and count and mass above it."""
    for bin in range(highest, -1, -1):
        if counts[bin] == 0:
            continue
        if count + counts[bin] >= max_count or mass + masses[bin] >= max_mass:
            return bin, count, mass
        count += counts[bin]
        mass += masses[bin]
    return -1, count, mass


@njit(nogil=True, error_model="numpy", cache=True)
def _cut(weights, counts, masses, max_count, max_mass):  # type: ignore[no-untyped-def]
    """The likeliest tokens until `max_count` of them or `max_mass` are reached. A radix select: the
    histogram of the upper 16 bits is given, two more of 8 bits each lead to one weight.

    Returns (lowest kept weight, how many tokens of just that weight are kept, mass kept).
    """
    bits = weights.view(np.uint32)
    prefix, count, mass = _walk(counts, masses, NUM_BINS - 1, max_count, max_mass, 0, f64(0.0))
    if prefix < 0:
        return f32(0.0), weights.size, mass
    inside, size = np.empty(counts[prefix], u32), 0
    for i in range(weights.size):
        if bits[i] >> u32(16) == u32(prefix):
            inside[size] = bits[i]
            size += 1
    floats = inside.view(np.float32)
    few, heavy = np.empty(256, np.int64), np.empty(256, f64)
    for shift in (u32(8), u32(0)):
        few[:] = 0
        heavy[:] = 0.0
        for i in range(size):
            if inside[i] >> (shift + u32(8)) == u32(prefix):
                bin = (inside[i] >> shift) & u32(255)
                few[bin] += 1
                heavy[bin] += f64(floats[i])
        bin, count, mass = _walk(few, heavy, 255, max_count, max_mass, count, mass)
        if bin < 0:  # a rounding error of the sums
            bin = 0
        prefix = (prefix << 8) | bin
    lowest = np.array([prefix], u32).view(np.float32)[0]
    ties = 0
    while ties < few[bin] and count < max_count and mass < max_mass:
        ties += 1
        count += 1
        mass += f64(lowest)
    return lowest, ties, mass


@njit(nogil=True, error_model="numpy", cache=True)
def _at_least(weights, floor, found):  # type: ignore[no-untyped-def]
    """Weights of at least `floor`, in `found`; without a branch, which nothing could predict."""
    size = 0
    for i in range(weights.size):
        found[size] = weights[i]
        size += weights[i] >= floor
    return found[:size]


@njit(nogil=True, error_model="numpy", cache=True)
def _count(weights, counts, masses):  # type: ignore[no-untyped-def]
    """Histogram of weights by their upper 16 bits."""
    bits = weights.view(np.uint32)
    counts[:] = 0
    masses[:] = 0.0
    for i in range(weights.size):
        bin = bits[i] >> u32(16)
        counts[bin] += 1
        masses[bin] += f64(weights[i])


@njit(nogil=True, error_model="numpy", cache=True)
def _keep_likeliest(weights, mass, top_k, top_p, counts, masses, scratch):  # type: ignore[no-untyped-def]
    """Zero all weights (their sum is `mass`) but the `top_k` likeliest (0: all), of those the
    fewest whose share reaches `top_p`. Of equally likely tokens the lower ids stay."""
    size = weights.size
    # all tokens below the floor weigh less than what top_p leaves out; half of it for rounding
    floor = f32(0.0) if 0 < top_k < size else f32(0.5 * (1.0 - top_p) * mass / size)
    likely = _at_least(weights, floor, scratch)
    _count(likely, counts, masses)
    lowest, ties = f32(0.0), size
    if 0 < top_k < size:
        lowest, ties, mass = _cut(likely, counts, masses, top_k, np.inf)
    if top_p < 1.0:
        most = top_k if 0 < top_k < size else size
        lowest, ties, mass = _cut(likely, counts, masses, most, top_p * mass)
    equal = 0
    for i in range(size):
        equal += weights[i] == lowest
        weights[i] = weights[i] if weights[i] >= lowest else f32(0.0)
    if equal > ties:
        for i in range(size):
            if weights[i] == lowest:
                ties -= 1
                if ties < 0:
                    weights[i] = f32(0.0)


@njit(nogil=True, error_model="numpy", cache=True)
def _invert(weights, sums, wanted):  # type: ignore[no-untyped-def]
    """The first token, by id, up to which the weights exceed `wanted`; where rounding leaves none,
    the last of any weight. `sums` are the weights of runs."""
    before, last_run = f64(0.0), 0
    for run in range(sums.size):
        if sums[run] > 0.0:
            last_run = run
            if before + sums[run] > wanted:
                break
            before += sums[run]
    else:
        before = f64(-np.inf)
    found = 0
    for i in range(last_run * RUN, min((last_run + 1) * RUN, weights.size)):
        if weights[i] > f32(0.0):
            found = i
            before += f64(weights[i])
            if before > wanted:
                break
    return found


@njit(
    "void(float32[:, ::1], float32[::1], int64[::1], float64[::1], float32[::1], float64[::1],"
    " int64[::1])",
    nogil=True,
    error_model="numpy",
    cache=True,
)
def draw(logits, temperature, top_k, top_p, min_p, u, tokens):  # type: ignore[no-untyped-def]
    """Fill tokens [B] from logits [B, V]; see `engine.sampler.sample` for the meaning of the rest,
    each [B]."""
    weights, scratch = np.empty(logits.shape[1], f32), np.empty(logits.shape[1], f32)
    sums = np.empty(-(-logits.shape[1] // RUN), f64)
    counts, masses = np.empty(NUM_BINS, np.int64), np.empty(NUM_BINS, f64)
    for row in range(logits.shape[0]):
        _weigh(logits[row], temperature[row], weights)
        if min_p[row] > f32(0.0):
            for i in range(weights.size):
                weights[i] = weights[i] if weights[i] >= min_p[row] else f32(0.0)
        mass = _run_sums(weights, sums)
        if top_p[row] < 1.0 or 0 < top_k[row] < weights.size:
            _keep_likeliest(weights, mass, top_k[row], top_p[row], counts, masses, scratch)
            mass = _run_sums(weights, sums)
        tokens[row] = _invert(weights, sums, u[row] * mass)


def draw_array(
    logits: NDArray[np.float32],
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    u: NDArray[np.float64],
) -> list[int]:
    """`draw` over plain sequences, one value per row."""
    tokens = np.empty(len(logits), np.int64)
    draw(
        np.ascontiguousarray(logits),
        np.asarray(temperature, f32),
        np.asarray(top_k, np.int64),
        np.asarray(top_p, f64),
        np.asarray(min_p, f32),
        u,
        tokens,
    )
    result: list[int] = tokens.tolist()
    return result
