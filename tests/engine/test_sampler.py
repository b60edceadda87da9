import math

import numpy as np
import pytest
import torch

from engine.request import Penalties, SampleSpec
from engine.sampler import penalise, sample, token_logprobs, uniform


def spec(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, **key: int
) -> SampleSpec:
    seed, position = key.get("seed", 0), key.get("position", 0)
    return SampleSpec(temperature, top_p, top_k, seed, position, min_p)


def test_uniform_is_pure_uniform_and_uncorrelated() -> None:
    n = 20_000
    by_position = torch.tensor([uniform(7, i) for i in range(n)], dtype=torch.float64)
    by_seed = torch.tensor([uniform(i, 3) for i in range(n)], dtype=torch.float64)
    assert uniform(7, 5) == by_position[5]
    for u in (by_position, by_seed):
        assert (u >= 0).all()
        assert (u < 1).all()
        assert abs(u.mean().item() - 0.5) < 4 / math.sqrt(12 * n)
        counts = torch.histc(u, bins=20, min=0, max=1)
        chi2 = ((counts - n / 20) ** 2 / (n / 20)).sum().item()
        assert chi2 < 43.8  # 99.9 % quantile of chi-square with 19 degrees of freedom
        lag = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].item()
        assert abs(lag) < 4 / math.sqrt(n)


def test_uniform_takes_any_integer_seed() -> None:
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert uniform(0, 1) != uniform(1, 0)


def test_splitmix64_known_answer() -> None:
    from engine.sampler import _splitmix64

    assert _splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference code at seed 0


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    greedy = [spec(temperature=0.0, seed=i) for i in range(5)]
    assert sample(logits, greedy) == logits.argmax(-1).tolist()


def draw_many(logits: list[float], n: int, **filters: float) -> torch.Tensor:
    rows = torch.tensor(logits).expand(n, -1)
    specs = [spec(position=i, **filters) for i in range(n)]  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(sample(rows, specs)), minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0.0, 0.0]),  # of 4/9 3/9 2/9: 7/9 >= 0.75
        ({"top_p": 0.0}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies_by_hand(filters: dict[str, float], expected: list[float]) -> None:
    n = 8_000
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    seen = draw_many(logits, n, **filters)
    for frequency, p in zip(seen.tolist(), expected, strict=True):
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / n)


def test_inverse_of_the_distribution_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
    for position in range(50):
        u = uniform(3, position)
        expected = 0 if u < 0.25 else 1 if u < 0.5 else 2
        assert sample(logits, [spec(seed=3, position=position)]) == [expected]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    specs = [spec(0.0), spec(), spec(0.7, top_k=5), spec(1.3, 0.9), spec(top_p=0.3), spec(2.0)]
    alone = [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(specs)]
    assert sample(logits, specs) == alone


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = {sample(logits, [spec(position=i)])[0] for i in range(200)}
    assert drawn == {0, 2}


def kept(logits: np.ndarray, spec: SampleSpec) -> np.ndarray:
    """Filtered distribution of one row in float64, by sorting: the definition itself."""
    weights = np.exp((logits - logits.max()) / spec.temperature)
    weights[weights < spec.min_p] = 0.0
    order = np.argsort(-weights, kind="stable")
    if spec.top_k:
        weights[order[spec.top_k :]] = 0.0
    if spec.top_p < 1.0:
        before = np.cumsum(weights[order]) - weights[order]
        cut = before >= spec.top_p * weights.sum()
        cut[0] = False
        weights[order[cut]] = 0.0
    return weights / weights.sum()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])  # flat, usual and peaked
def test_draws_follow_the_definition(plain: bool, scale: float) -> None:
    """Both paths against float64 and a sort. A draw may differ only where u falls within 1e-4 of
    the border between two tokens of the definition, or of a filter's own cut."""
    rng = np.random.default_rng(3)
    rows, vocab = 120, 3000
    logits = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    logits[::7] = np.round(logits[::7])  # many ties
    filters = [(0, 1.0, 0.0), (0, 0.9, 0.0), (40, 1.0, 0.0), (50, 0.79, 0.0), (0, 0.95, 0.02)]
    specs = [
        SampleSpec(0.8, top_p, top_k, 5, i, min_p)
        for i, (top_k, top_p, min_p) in enumerate(filters[i % 5] for i in range(rows))
    ]
    drawn = sample(torch.from_numpy(logits.copy()), specs, plain)
    differing = 0
    for i, (token, spec) in enumerate(zip(drawn, specs, strict=True)):
        cdf = np.cumsum(kept(logits[i].astype(np.float64), spec))
        u = uniform(5, i)
        if token != int(np.searchsorted(cdf, u, side="right")):
            differing += 1
            assert np.abs(cdf[max(token - 1, 0) : token + 1] - u).min() < 1e-4, (i, token)
    assert differing <= 2


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 1), (0.5, 3), (1.0, 4)])
def test_ties_at_the_cut_keep_the_lower_ids(temperature: float, top_k: int) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 2.0]])
    expected = {1: {1}, 3: {1, 2, 4}, 4: {1, 2, 4, 5}}[top_k]
    for plain in (False, True):
        specs = [spec(temperature, top_k=top_k, position=i) for i in range(200)]
        assert set(sample(logits.repeat(200, 1), specs, plain)) == expected


def test_min_p_by_hand() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 those of at least 0.6 x 0.4 stay."""
    seen = draw_many([math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], 4_000, min_p=0.6)
    assert seen[2:].tolist() == [0.0, 0.0]
    assert abs(seen[0].item() - 4 / 7) < 4 * math.sqrt(12 / 49 / 4_000)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0, 1.0])
    penalise(logits, Penalties(0.5, 0.25, 2.0, [0, 1], [2, 2]))
    # repetition halves 2 and 3, doubles -2; token 2 was said twice: 0.5 + 2 * 0.25 less
    assert logits.tolist() == [1.0, -4.0, 1.5 - 1.0, 1.0]


def test_penalties_change_the_choice_of_their_row_only() -> None:
    rows = torch.tensor([[3.0, 2.9], [3.0, 2.9]])
    said = SampleSpec(0.0, 1.0, 0, 0, 1, penalties=Penalties(0.2, 0.0, 1.0, [], [0]))
    assert sample(rows, [said, spec(0.0)]) == [1, 0]


def test_log_probabilities_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    first, second = token_logprobs(logits, [1, 2], [0, 2])
    assert first.top == []
    assert first.logprob == pytest.approx(math.log(0.25))
    assert second.logprob == pytest.approx(math.log(0.7))
    assert [token for token, _ in second.top] == [2, 1]
    assert [value for _, value in second.top] == pytest.approx([math.log(0.7), math.log(0.2)])
