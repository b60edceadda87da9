"""Workload typing: k types of requests, and what a prompt's length tells of its type.

Nobody knows the output length of a request at arrival: types are statistics of finished requests,
and at arrival only P(type | prompt length) is used; `controller.posterior` adds class and client.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller import counting
from engine.cluster import WorkloadType, WorkloadTyping
from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
NUM_EDGES = 24
EDGE_SPAN = 8.0  # edges reach from an eighth of the least to eight times the largest centre
PRIOR_WIDTH = 0.75  # spread of ln(prompt length) assumed inside a type before any is seen


def _log_lengths(prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> Floats:
    prompt, output = np.asarray(prompt_tokens), np.asarray(output_tokens)
    pairs = np.empty((*prompt.shape, 2))
    pairs[..., 0], pairs[..., 1] = prompt, output
    return np.log(np.maximum(pairs, 1.0, out=pairs), out=pairs)


def fit_typing(
    prompt_tokens: ArrayLike, output_tokens: ArrayLike, k: int, seed: int
) -> WorkloadTyping:
    """k-means on (ln prompt, ln output); types ordered by prompt length. Deterministic in `seed`.

    Raises InvalidRequestError when there are fewer distinct length pairs than types.
    """
    points = _log_lengths(prompt_tokens, output_tokens)
    distinct = len(np.unique(points, axis=0)) if len(points) else 0
    if k < 1 or distinct < k:
        raise InvalidRequestError(
            f"typing into k={k} types needs at least that many distinct (prompt, output) lengths, "
            f"got {distinct}; give more requests or choose a smaller k."
        )
    from sklearn.cluster import KMeans  # takes longer to import than a controller may take to start

    fitted = KMeans(n_clusters=k, n_init=4, random_state=seed).fit(points)
    centres = np.exp(fitted.cluster_centers_)
    order = np.lexsort((centres[:, 1], centres[:, 0]))
    share = np.bincount(fitted.labels_, minlength=k) / len(points)
    types = tuple(
        WorkloadType(f"type{i}", float(centres[j, 0]), float(centres[j, 1]))
        for i, j in enumerate(order)
    )
    return WorkloadTyping(types, tuple(float(share[j]) for j in order))


def default_typing(max_model_len: int) -> WorkloadTyping:
    """Four equal types, for a pool whose traffic nobody has seen: short and long prompts with short
    and long outputs, as shares of the longest sequence."""
    prompts, outputs = {"short": 1 / 32, "long": 1 / 3}, {"short": 1 / 32, "long": 1 / 4}
    types = tuple(
        WorkloadType(f"{p}_{o}", max(1.0, share * max_model_len), max(1.0, out * max_model_len))
        for p, share in prompts.items()
        for o, out in outputs.items()
    )
    return WorkloadTyping(types, (0.25,) * len(types))


def centres(typing: WorkloadTyping) -> Floats:
    """[J, 2] prompt and output tokens of the types."""
    return np.array([(t.prompt_tokens, t.output_tokens) for t in typing.types], np.float64)


@lru_cache(maxsize=64)
def _log_centres(typing: WorkloadTyping) -> Floats:
    return np.log(centres(typing))


def prior(typing: WorkloadTyping) -> Floats:
    """[J] share of each type when the typing was fitted; equal shares when it says nothing."""
    count = len(typing.types)
    share = np.array(typing.prior) if typing.prior else np.full(count, 1.0 / count)
    return np.asarray(share / share.sum())


def assign(
    typing: WorkloadTyping, prompt_tokens: ArrayLike, output_tokens: ArrayLike
) -> NDArray[np.int64]:
    """[N] nearest type in (ln prompt, ln output) of finished requests."""
    lengths = np.asarray(prompt_tokens, np.float64), np.asarray(output_tokens, np.float64)
    found: NDArray[np.int64] = counting.nearest(*lengths, _log_centres(typing))
    return found


def prompt_edges(typing: WorkloadTyping) -> tuple[int, ...]:
    """Fixed, log-spaced upper edges of the prompt-length buckets, in tokens."""
    lengths = [t.prompt_tokens for t in typing.types]
    low, high = max(1.0, min(lengths) / EDGE_SPAN), max(lengths) * EDGE_SPAN
    return tuple(sorted({round(e) for e in np.geomspace(low, high, NUM_EDGES)}))


class PromptPosterior:
    """P(type | prompt-length bucket), counted from finished requests.

    Each bucket starts from `smoothing` pseudo-requests, shared out by the typing's prior and a
    log-normal of width PRIOR_WIDTH around each centre's prompt length. Counts decay by
    `1 - 1/memory_requests` per finished request, so that the table follows the traffic.
    Bucket b holds edges[b-1] < prompt <= edges[b], as in `engine.cluster.Routing`.

    `matrix`[B, J] and `table`[bucket][type] are the same; rows sum to 1. `mixing`[J, J] is what
    requests taken for type i turn out to be: of those that the table takes for it, bucket by
    bucket, the share of each type. Rows sum to 1; the identity would mean that the prompt's length
    tells the type. None of them is written to: new ones take their place.
    """

    def __init__(
        self, typing: WorkloadTyping, smoothing: float = 4.0, memory_requests: float = 4000.0
    ) -> None:
        counting.warm_up()
        self.edges = prompt_edges(typing)
        self._edges = np.array(self.edges, np.float64)
        self._decay = 1.0 - 1.0 / memory_requests
        self._pseudo = smoothing * self._initial(typing)
        self.reset()

    def _initial(self, typing: WorkloadTyping) -> Floats:
        bounds = np.concatenate([[self._edges[0] / 2], self._edges, [self._edges[-1] * 2]])
        middle = 0.5 * (np.log(bounds[:-1]) + np.log(bounds[1:]))
        z = (middle[:, None] - np.log(centres(typing)[:, 0])[None]) / PRIOR_WIDTH
        weight = np.log(np.maximum(prior(typing), 1e-6))[None] - 0.5 * z**2
        weight = np.exp(weight - weight.max(axis=1, keepdims=True))
        return np.asarray(weight / weight.sum(axis=1, keepdims=True) + 0.02)

    def reset(self) -> None:
        self._counts = np.zeros_like(self._pseudo)
        self._refresh()

    def _refresh(self) -> None:
        """All that follows from the counts, as they are counted: decisions ask for it later."""
        self.matrix: Floats
        self.mixing: Floats
        self.matrix, self.mixing = counting.posterior(self._pseudo + self._counts)
        self.table: tuple[tuple[float, ...], ...] = tuple(map(tuple, self.matrix.tolist()))

    def buckets(self, prompt_tokens: ArrayLike) -> NDArray[np.int64]:
        """[N] row of `matrix` for each prompt length."""
        found: NDArray[np.int64] = counting.buckets(
            self._edges, np.asarray(prompt_tokens, np.int64)
        )
        return found

    def rows(self, prompt_tokens: ArrayLike) -> Floats:
        """[N, J] P(type | prompt) of arrivals."""
        return self.matrix[self.buckets(prompt_tokens)]

    def observe(self, prompt_tokens: ArrayLike, types: NDArray[np.int64]) -> None:
        """Count finished requests of known type."""
        if not len(types):
            return
        self._counts *= math.pow(self._decay, len(types))
        counting.add_pairs(self._counts, self.buckets(prompt_tokens), types)
        self._refresh()
