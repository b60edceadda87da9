"""Times of the operators of a transformer layer on a GPU, as rooflines fitted to measurements.

An operator does F floating point operations and moves B bytes of device memory. Its time is
    t = (overhead^p + (F / flops_per_s)^p + (B / bytes_per_s)^p)^(1 / p),
for p to infinity the roofline max(overhead, compute, memory), for smaller p a smooth knee. The four
parameters belong to a kind of operator on a kind of device; F and B follow from a model's sizes, so
a fit made on one model predicts others. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, least_squares

from engine.architectures import Sizes

Floats = NDArray[np.float64]

BF16_BYTES = 2
MATRIX_KINDS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
VECTOR_KINDS = (
    "attn_rope",
    "mlp_act",
    "input_layernorm",
    "post_attention_layernorm",
    "add",
    "emb",
)
KINDS = MATRIX_KINDS + VECTOR_KINDS
NUM_CURVE_POINTS = 32


@dataclass(frozen=True, slots=True)
class Roofline:
    """Time of one kind of operator; see the module. `flops_per_s` is inf where F is nought."""

    overhead_s: float
    flops_per_s: float
    bytes_per_s: float
    sharpness: float  # p

    def seconds(self, flops: ArrayLike, nbytes: ArrayLike) -> Floats:
        compute = np.asarray(flops, np.float64) / self.flops_per_s
        memory = np.asarray(nbytes, np.float64) / self.bytes_per_s
        longest = np.maximum(np.maximum(compute, memory), self.overhead_s)
        terms = sum((t / longest) ** self.sharpness for t in (self.overhead_s, compute, memory))
        return np.asarray(longest * terms ** (1.0 / self.sharpness))


@dataclass(frozen=True, slots=True)
class Curve:
    """Time of a collective by message size in bytes: a line through ascending points, which goes on
    at its last slope."""

    sizes: tuple[float, ...]
    times_s: tuple[float, ...]

    def seconds(self, nbytes: ArrayLike) -> Floats:
        x, sizes, times = np.asarray(nbytes, np.float64), self.sizes, self.times_s
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        return np.asarray(np.interp(x, sizes, times) + slope * np.maximum(x - sizes[-1], 0.0))

    @property
    def bytes_per_s(self) -> float:
        """Of the longest message."""
        return self.sizes[-1] / self.times_s[-1]


def operator_work(
    kind: str, sizes: Sizes, gated: bool, tp: int, tokens: ArrayLike
) -> tuple[Floats, Floats]:
    """(F, B) of one operator of one layer on one tp rank, for each number of tokens.

    `emb` is the look-up of input embeddings, `add` one residual addition; `gated` tells whether
    the MLP has two matrices up.
    """
    t = np.asarray(tokens, np.float64)
    hidden, inner = sizes.hidden_size, sizes.inner_size / tp
    query = sizes.num_heads * sizes.head_dim / tp
    kv = max(1, sizes.num_kv_heads // tp) * sizes.head_dim
    up = (2 if gated else 1) * inner
    matrices = {
        "attn_pre_proj": (hidden, query + 2 * kv),
        "attn_post_proj": (query, hidden),
        "mlp_up_proj": (hidden, up),
        "mlp_down_proj": (inner, hidden),
    }
    if kind in matrices:
        return matrix_work(*matrices[kind], t)
    values = {  # read and written per token
        "attn_rope": 2 * (query + kv),
        "mlp_act": up + inner,
        "input_layernorm": 2 * hidden,
        "post_attention_layernorm": 2 * hidden,
        "add": 3 * hidden,
        "emb": 2 * hidden,
    }
    return 0.0 * t, BF16_BYTES * values[kind] * t


def matrix_work(rows: float, columns: float, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """(F, B) of [tokens, rows] @ [rows, columns]."""
    t = np.asarray(tokens, np.float64)
    moved = rows * columns + t * (rows + columns)
    return 2.0 * t * rows * columns, BF16_BYTES * moved


def fit_roofline(flops: Floats, nbytes: Floats, times_s: Floats) -> Roofline:
    """Least squares on log(predicted / measured), errors beyond 5 % counting less.

    Raises ValueError when the measurements do not determine a roofline.
    """
    if len(times_s) < 8 or not np.all(times_s > 0):
        raise ValueError(
            f"a roofline has 4 parameters, got {len(times_s)} measurements of which "
            f"{int(np.sum(times_s <= 0))} are not positive; give at least 8 positive ones."
        )
    matrix = bool(np.any(flops > 0))
    fastest = [float(np.max(flops / times_s)) if matrix else np.inf, np.max(nbytes / times_s)]

    def roofline(x: Floats) -> Roofline:
        overhead_s, bytes_per_s, above_one = np.exp(x[:3]).tolist()
        flops_per_s = float(np.exp(x[3])) if matrix else np.inf
        return Roofline(overhead_s, flops_per_s, bytes_per_s, 1.0 + above_one)

    def errors(x: Floats) -> Floats:
        return np.asarray(np.log(roofline(x).seconds(flops, nbytes) / times_s))

    start = np.log([np.min(times_s), fastest[1], 1.0] + ([fastest[0]] if matrix else []))
    return roofline(least_squares(errors, start, loss="soft_l1", f_scale=0.05).x)


def fit_curve(sizes: Sequence[float], times_s: Sequence[float]) -> Curve:
    """Medians of measurements binned by the logarithm of their size, made ascending.

    Raises ValueError for fewer than two sizes.
    """
    size, time = np.array(sizes, np.float64), np.array(times_s, np.float64)
    if len(np.unique(size)) < 2:
        raise ValueError(f"a curve needs two sizes of message or more, got {sorted(set(sizes))}.")
    edges = np.geomspace(size.min(), size.max(), NUM_CURVE_POINTS + 1)
    bins = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, NUM_CURVE_POINTS - 1)
    used = np.unique(bins)
    middle = np.array([np.median(size[bins == b]) for b in used])
    medians = isotonic_regression(np.log([np.median(time[bins == b]) for b in used])).x
    return Curve(tuple(middle.tolist()), tuple(np.exp(medians).tolist()))
