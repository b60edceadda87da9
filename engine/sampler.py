"""Choosing tokens from logits, with a counter-based generator: no generator state exists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Penalties, SampleSpec, TokenLogprobs
from engine.sample_kernel import draw_array

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


def sample(logits: Tensor, specs: Sequence[SampleSpec], plain: bool = False) -> list[int]:
    """One token id per row of logits [B, V], float32; rows with penalties are changed in place.

    After the penalties, temperature 0 takes the maximum. Else softmax(logits / temperature), of
    that the tokens of at least min_p times the likeliest, of those the top_k likeliest, of those
    the fewest whose share reaches top_p, and the inverse of the distribution function at
    `uniform(seed, position)`. The function runs in the order of token ids, not of probabilities,
    so that a rounding error in a logit moves it by as little. `plain` keeps to torch's operations.
    """
    assert len(specs) == logits.shape[0], (len(specs), tuple(logits.shape))
    for row, spec in enumerate(specs):
        if spec.penalties is not None:
            penalise(logits[row], spec.penalties)
    plain = plain or logits.device.type != "cpu"
    drawn = [i for i, spec in enumerate(specs) if spec.temperature >= _GREEDY_BELOW]
    if len(drawn) == len(specs):
        return _draw(logits, specs, plain)
    tokens: list[int] = (
        torch.argmax(logits, dim=-1).tolist() if plain else logits.numpy().argmax(axis=-1).tolist()
    )
    if drawn:
        ids = _draw(logits[drawn], [specs[i] for i in drawn], plain)
        for i, token in zip(drawn, ids, strict=True):
            tokens[i] = token
    return tokens


def penalise(logits: Tensor, penalties: Penalties) -> None:
    """Change logits [V] in place. Repetition (CTRL, arXiv 1909.05858, equation 6 with the sign
    mended as transformers does): those of all tokens in prompt and output are divided, below 0
    multiplied. Then, as OpenAI's API has it, frequency times the count in the output and presence
    for each token in it are subtracted."""
    device = logits.device
    if penalties.repetition != 1.0:
        said = np.unique(penalties.prompt_token_ids + penalties.output_token_ids)
        index = torch.from_numpy(said.astype(np.int64)).to(device)
        chosen = logits[index]
        weakened = torch.where(
            chosen > 0, chosen / penalties.repetition, chosen * penalties.repetition
        )
        logits[index] = weakened
    if penalties.output_token_ids and (penalties.presence or penalties.frequency):
        said, counts = np.unique(penalties.output_token_ids, return_counts=True)
        less = penalties.presence + penalties.frequency * counts
        index = torch.from_numpy(said.astype(np.int64)).to(device)
        logits[index] -= torch.from_numpy(less.astype(np.float32)).to(device)


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """For each row of logits [B, V] the log probability of its token and of the num_top likeliest,
    under softmax(logits) itself."""
    logprobs = logits.float().log_softmax(dim=-1)
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(-1, index)[:, 0].tolist()
    best = logprobs.topk(max(num_top), dim=-1)
    rows = zip(token_ids, own, num_top, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, list(zip(ids[:n], values[:n], strict=True)))
        for token_id, logprob, n, ids, values in rows
    ]


def _draw(logits: Tensor, specs: Sequence[SampleSpec], plain: bool) -> list[int]:
    u = np.array([uniform(s.seed, s.position) for s in specs])
    if plain:
        return draw_plain(logits, specs, u)
    return draw_array(
        logits.numpy(),
        [s.temperature for s in specs],
        [s.top_k for s in specs],
        [s.top_p for s in specs],
        [s.min_p for s in specs],
        u,
    )


def draw_plain(logits: Tensor, specs: Sequence[SampleSpec], u: NDArray[np.float64]) -> list[int]:
    """What `engine.sample_kernel.draw` does, by torch's operations on any device."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    probabilities = torch.softmax(logits / column([s.temperature for s in specs]), dim=-1)
    if any(s.min_p > 0.0 for s in specs):
        floor = column([s.min_p for s in specs]) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    if any(s.top_k > 0 or s.top_p < 1.0 for s in specs):
        vocab = logits.shape[-1]
        top_k = column([s.top_k if s.top_k > 0 else vocab for s in specs])
        probabilities = _filter(probabilities, top_k, column([s.top_p for s in specs]))
    cdf = probabilities.double().cumsum(-1)
    wanted = torch.from_numpy(u).to(logits.device)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, wanted, right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())  # the last that has any probability
    return torch.minimum(ids, last)[:, 0].tolist()


def _filter(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k likeliest, of those the fewest whose share reaches top_p; zero the rest."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered = ordered.masked_fill(ranks >= top_k, 0.0)
    before = ordered.cumsum(-1) - ordered
    cut = (before >= top_p * ordered.sum(-1, keepdim=True)) & (ranks > 0) & (top_p < 1.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered.masked_fill(cut, 0.0))
