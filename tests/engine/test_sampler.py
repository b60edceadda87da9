import math

import pytest
import torch

from engine.request import SampleSpec
from engine.sampler import sample, uniform


def spec(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, **key: int) -> SampleSpec:
    return SampleSpec(temperature, top_p, top_k, key.get("seed", 0), key.get("position", 0))


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
