"""Choosing tokens from logits, with a counter-based generator: no generator state exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import SampleSpec

_MASK = (1 << 64) - 1
_GREEDY_BELOW = 1e-5  # a lower temperature overflows float32 and means argmax anyway


def _splitmix64(x: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable generators")."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of seed and position; 53 random bits."""
    return (_splitmix64(_splitmix64(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """One token id per row of logits [B, V].

    Temperature 0 takes the maximum. Else softmax(logits / temperature) in float32, top_k, then
    top_p of what is left, and the inverse of the distribution function at `uniform(seed,
    position)`. The function runs in the order of token ids, not of probabilities, so that a
    rounding error in a logit moves it by as little.
    """
    assert len(specs) == logits.shape[0], (len(specs), tuple(logits.shape))
    tokens: list[int] = torch.argmax(logits, dim=-1).tolist()
    drawn = [i for i, spec in enumerate(specs) if spec.temperature >= _GREEDY_BELOW]
    if drawn:
        ids = _draw(logits[drawn].float(), [specs[i] for i in drawn])
        for i, token in zip(drawn, ids, strict=True):
            tokens[i] = token
    return tokens


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    probabilities = torch.softmax(logits / column([s.temperature for s in specs]), dim=-1)
    if any(s.top_k > 0 or s.top_p < 1.0 for s in specs):
        vocab = logits.shape[-1]
        top_k = column([s.top_k if s.top_k > 0 else vocab for s in specs])
        probabilities = _filter(probabilities, top_k, column([s.top_p for s in specs]))
    cdf = probabilities.double().cumsum(-1)
    u = torch.tensor([uniform(s.seed, s.position) for s in specs], dtype=torch.float64)
    wanted = u.to(logits.device)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, wanted, right=True)
    last = torch.searchsorted(
        cdf, cdf[:, -1:].contiguous()
    )  # the last token that has any probability
    return torch.minimum(ids, last)[:, 0].tolist()


def _filter(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k likeliest, of those the fewest whose share reaches top_p; zero the rest."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    before = ordered.cumsum(-1) - ordered
    cut = (before >= top_p * ordered.sum(-1, keepdim=True)) & (ranks > 0) & (top_p < 1.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(cut, 0.0))
