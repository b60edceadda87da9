"""Scores by hand; every policy meets the same windows; hindsight finds the best deployment."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.cluster import RequestOutcome, RequestStatus
from policies.base import Observation
from policies.baselines import KeepPolicy, StaticPolicy
from policies.evaluation import EpisodeRecord, Evaluation, evaluate, rank_static, score


def finished(arrival_s: float, first_s: float, finish_s: float, tokens: int) -> RequestOutcome:
    return RequestOutcome("r", RequestStatus.FINISHED, arrival_s, first_s, finish_s, 10, tokens)


def test_score_by_hand() -> None:
    rejected = RequestOutcome("x", RequestStatus.REJECTED, 1.0, None, 1.0, 10, 0)
    first = EpisodeRecord(
        (finished(0, 1, 3, 5), rejected), (6.0,), 10.0, (1.0, 2.0), 1, 4.0, num_slo_met=1
    )
    second = EpisodeRecord((finished(0, 3, 5, 1),), (), 10.0, (3.0,), 2, 1.0, num_slo_met=0)
    line = score("p", [first, second])
    assert line.latency_s == pytest.approx((3 + 5 + 4) / 3)
    assert line.ttft_p99_s == pytest.approx(np.percentile([1, 3], 99))
    assert line.tpot_p99_s == pytest.approx(0.5)
    assert line.slo_attainment == pytest.approx(1 / 4)
    assert line.mean_reward == pytest.approx(2.0)
    assert (line.switches, line.switch_s) == (3, 5.0)
    assert (line.finished, line.unfinished, line.rejected) == (2, 1, 1)


def test_score_of_nothing() -> None:
    line = score("p", [EpisodeRecord((), (), 0.0, (), 0, 0.0, 0)])
    assert (line.latency_s, line.slo_attainment, line.finished) == (0.0, 1.0, 0)


@dataclass
class Island:
    """Three decisions; the reward of a tick is the worth of the deployment held during it."""

    worth: dict[str, float]
    held: str
    rewards: list[float] = field(default_factory=list)
    switches: int = 0
    closed: bool = False

    def start(self) -> Observation:
        others = [k for k in sorted(self.worth) if k != self.held]
        keys = (self.held, *others)
        rows = np.zeros((len(keys), 1), np.float32)
        return Observation(np.zeros(1, np.float32), rows, np.ones(len(keys), bool), keys)

    def decide(self, action: int) -> tuple[Observation, bool]:
        chosen = self.start().keys[action]
        self.switches += chosen != self.held
        self.held = chosen
        self.rewards.append(self.worth[chosen])
        return self.start(), len(self.rewards) == 3

    def record(self) -> EpisodeRecord:
        return EpisodeRecord((), (), 3.0, tuple(self.rewards), self.switches, 0.0, 0)

    def close(self) -> None:
        self.closed = True


WINDOWS = ({"a": 1.0, "b": 0.0, "c": 3.0}, {"a": 1.0, "b": 5.0, "c": 0.0})


def test_best_static_is_best_on_the_whole_trace() -> None:
    islands: list[Island] = []

    def make(window: dict[str, float], key: str | None) -> Island:
        islands.append(Island(window, key or "a"))
        return islands[-1]

    ground = Evaluation(make, WINDOWS)
    ranking = rank_static(ground, ("a", "b", "c"))
    assert [s.policy for s in ranking] == ["b", "c", "a"]
    assert [s.mean_reward for s in ranking] == [2.5, 1.5, 1.0]
    lines = evaluate(ground, {"keep": KeepPolicy(), "go": StaticPolicy("b")})
    assert [(s.policy, s.mean_reward, s.switches) for s in lines] == [
        ("keep", 1.0, 0),
        ("go", 2.5, 2),
    ]
    assert len(islands) == 10
    assert all(island.closed for island in islands)
