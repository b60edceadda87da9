"""The reward of an interval, by hand."""

from __future__ import annotations

import pytest

from engine.cluster import Request, RequestOutcome, RequestStatus
from engine.profile import ProfiledCluster
from envs.reward import RewardConfig, RewardLedger, reward_config, utility

CONFIG = RewardConfig(0.1, 0.001, 0.02, worst_slowdown=16.0, scale_requests=10.0)
REQUEST = Request("r", 5.0, 100, 41)
REFERENCE_S = 0.1 + 0.1 + 0.02 * 40  # = 1.0


def outcome(
    latency_s: float, status: RequestStatus = RequestStatus.FINISHED, name: str = "r"
) -> RequestOutcome:
    return RequestOutcome(name, status, 5.0, 5.1, 5.0 + latency_s, 100, 41)


@pytest.mark.parametrize(
    ("latency_s", "worth"),
    [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (4.0, 0.0), (8.0, -0.5), (16.0, -1.0), (99.0, -1.0)],
)
def test_utility_falls_with_the_logarithm(latency_s: float, worth: float) -> None:
    assert CONFIG.reference_s(100, 41) == pytest.approx(REFERENCE_S)
    assert utility(CONFIG, outcome(latency_s), REFERENCE_S) == pytest.approx(worth)


@pytest.mark.parametrize("status", [s for s in RequestStatus if s is not RequestStatus.FINISHED])
def test_whatever_did_not_finish_is_worst(status: RequestStatus) -> None:
    assert utility(CONFIG, outcome(0.01, status), REFERENCE_S) == -1.0


def test_interval_sums_and_scales() -> None:
    ledger = RewardLedger(CONFIG)
    for name in "abc":
        ledger.admit(Request(name, 5.0, 100, 41))
    ended = [outcome(2.0, name="a"), outcome(0.0, RequestStatus.REJECTED, "b")]
    assert ledger.settle(ended, 8.0) == pytest.approx((0.5 - 1.0) / 10)
    assert ledger.settle([], 9.0) == 0.0


def test_overdue_is_charged_once() -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST)
    assert ledger.settle([], 20.9) == 0.0
    assert ledger.settle([], 21.0) == pytest.approx(-0.1)  # 5 + 16 * 1
    assert ledger.settle([], 30.0) == 0.0
    assert ledger.settle([outcome(40.0)], 45.0) == 0.0


def test_finished_in_time_is_not_overdue() -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST)
    assert ledger.settle([outcome(2.0)], 100.0) == pytest.approx(0.05)
    assert ledger.settle([], 200.0) == 0.0


def test_total_does_not_depend_on_where_intervals_are_cut() -> None:
    def total(times_s: list[float]) -> float:
        ledger, done = RewardLedger(CONFIG), {"a": 3.0, "b": 12.0, "c": 30.0}
        for name in done:
            ledger.admit(Request(name, 5.0, 100, 41))
        worth, last_s = 0.0, 0.0
        for now_s in times_s:
            ended = [outcome(s, name=n) for n, s in done.items() if last_s < 5.0 + s <= now_s]
            worth, last_s = worth + ledger.settle(ended, now_s), now_s
        return worth

    assert total([100.0]) == pytest.approx(total([4.0, 8.1, 10.0, 17.0, 21.0, 21.5, 35.0, 100.0]))


def test_moved_bytes_cost_a_little(small_cluster: ProfiledCluster) -> None:
    config = reward_config(small_cluster)
    model = small_cluster.spec.model
    copy_bytes = 4 * sum(
        t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in model.tensors
    )
    assert RewardLedger(config).settle([], 1.0, copy_bytes) == pytest.approx(-0.02)


def test_reference_is_the_fastest_unloaded_replica(small_cluster: ProfiledCluster) -> None:
    """No configuration can serve a lone request faster."""
    config = reward_config(small_cluster)
    for prompt, output in ((1, 1), (50, 1), (10, 100)):
        for steps in small_cluster.profile.steps:
            alone_s = steps.step_s(prompt, 1, prompt)
            alone_s += sum(steps.step_s(1, 1, prompt + i) for i in range(1, output))
            assert config.reference_s(prompt, output) <= alone_s + 1e-12
