"""The reward of an interval, by hand; and that what does not serve does not pay."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from controller.slo import read_slo
from engine.cluster import Request, RequestOutcome, RequestStatus, SloSpec, UtilitySpec
from engine.profile import ProfiledCluster
from envs.reward import (
    RewardConfig,
    RewardLedger,
    RewardTerms,
    Stretch,
    offered_load,
    parts_of_utility,
    reward_config,
)
from envs.workload import Trace

CONFIG = RewardConfig(0.1, 0.001, 0.02, UtilitySpec(worst_slowdown=16.0), scale_requests=10.0)
REQUEST = Request("r", 5.0, 100, 41)
REFERENCE_S = 0.1 + 0.1 + 0.02 * 40  # = 1.0
SHIPPED = replace(CONFIG, utility=read_slo().utility.spec, slo=SloSpec(0.5, 0.08))


def outcome(
    latency_s: float,
    status: RequestStatus = RequestStatus.FINISHED,
    name: str = "r",
    ttft_s: float = 0.1,
) -> RequestOutcome:
    return RequestOutcome(name, status, 5.0, 5.0 + ttft_s, 5.0 + latency_s, 100, 41)


@pytest.mark.parametrize(
    ("latency_s", "worth"),
    [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (4.0, 0.0), (8.0, -0.5), (16.0, -1.0), (99.0, -1.0)],
)
def test_utility_falls_with_the_logarithm(latency_s: float, worth: float) -> None:
    assert CONFIG.reference_s(100, 41) == pytest.approx(REFERENCE_S)
    assert sum(parts_of_utility(CONFIG, outcome(latency_s), 1.0)) == pytest.approx(worth)


def test_three_parts_by_hand() -> None:
    """Twice the reference in latency; 1.9 s for 40 tokens, 2.375 times the 20 ms; both targets
    met."""
    config = replace(CONFIG, utility=UtilitySpec(0.5, 0.3, 0.2, 16.0), slo=SloSpec(0.5, 0.05))
    latency, tpot, slo = parts_of_utility(config, outcome(2.0), 1.0)
    assert latency == pytest.approx(0.5 * 0.5)
    assert tpot == pytest.approx(0.3 * (1 - 2 * math.log(2.375) / math.log(16.0)))
    assert slo == pytest.approx(0.2)
    assert parts_of_utility(config, outcome(2.0, ttft_s=0.6), 1.0)[2] == pytest.approx(-0.2)


def test_latency_stands_for_the_time_per_token_of_a_single_token() -> None:
    config = replace(CONFIG, utility=UtilitySpec(0.5, 0.5, 0.0, 16.0))
    single = RequestOutcome("r", RequestStatus.FINISHED, 5.0, 5.4, 5.4, 100, 1)
    latency, tpot, _ = parts_of_utility(config, single, 1.0)
    assert latency == tpot == pytest.approx(0.5 * (1 - 2 * math.log(2.0) / math.log(16.0)))


def test_references_stretch_with_the_load_that_arrives() -> None:
    """Three times as long at three times the stretch is worth the same."""
    assert parts_of_utility(CONFIG, outcome(6.0), 3.0) == pytest.approx(
        parts_of_utility(CONFIG, outcome(2.0), 1.0)
    )
    stretch = Stretch((0.0, 10.0), (1.0, 3.0))
    assert stretch.at(np.array([0.0, 5.0, 10.0, 99.0])).tolist() == [1.0, 2.0, 3.0, 3.0]


def test_load_is_counted_in_the_trace_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0.0, 300.0, 200))
    prompt, output = rng.integers(1, 400, (2, 200))
    trace = Trace(times, prompt, output, duration_s=300.0)
    wanted = []
    for at_s in times:
        until_s = max(at_s, 60.0)
        recent = [i for i, t in enumerate(times) if until_s - 60.0 < t <= until_s]
        lone_s = [CONFIG.reference_s(prompt[i], output[i]) for i in recent]
        wanted.append(sum(lone_s) / 60.0)
    assert offered_load(CONFIG, trace).tolist() == pytest.approx(wanted)
    short = trace.window(0.0, 30.0)
    assert set(offered_load(CONFIG, short).round(9)) == {
        round(sum(map(CONFIG.reference_s, short.prompt_tokens, short.output_tokens)) / 30.0, 9)
    }


@pytest.mark.parametrize("status", [s for s in RequestStatus if s is not RequestStatus.FINISHED])
def test_whatever_did_not_finish_is_worst(status: RequestStatus) -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST)
    found = ledger.settle([outcome(0.01, status)], 6.0)
    assert found == RewardTerms(unserved=-0.1)


def test_interval_sums_and_scales() -> None:
    ledger = RewardLedger(CONFIG)
    for name in "abc":
        ledger.admit(Request(name, 5.0, 100, 41))
    ended = [outcome(2.0, name="a"), outcome(0.0, RequestStatus.REJECTED, "b")]
    assert ledger.settle(ended, 8.0).total == pytest.approx((0.5 - 1.0) / 10)
    assert ledger.settle([], 9.0) == RewardTerms()


def test_overdue_is_charged_once() -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST)
    assert ledger.settle([], 20.9).total == 0.0
    assert ledger.settle([], 21.0).total == pytest.approx(-0.1)  # 5 + 16 * 1
    assert ledger.settle([], 30.0).total == 0.0
    assert ledger.settle([outcome(40.0)], 45.0).total == 0.0


def test_stretched_references_fall_due_later() -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST, stretch=2.0)
    assert ledger.settle([], 36.9).total == 0.0
    assert ledger.settle([], 37.0).total == pytest.approx(-0.1)  # 5 + 16 * 2


def test_finished_in_time_is_not_overdue() -> None:
    ledger = RewardLedger(CONFIG)
    ledger.admit(REQUEST)
    assert ledger.settle([outcome(2.0)], 100.0).total == pytest.approx(0.05)
    assert ledger.settle([], 200.0).total == 0.0


def test_total_does_not_depend_on_where_intervals_are_cut() -> None:
    def total(times_s: list[float]) -> float:
        ledger, done = RewardLedger(CONFIG), {"a": 3.0, "b": 12.0, "c": 30.0}
        for name in done:
            ledger.admit(Request(name, 5.0, 100, 41))
        worth, last_s = 0.0, 0.0
        for now_s in times_s:
            ended = [outcome(s, name=n) for n, s in done.items() if last_s < 5.0 + s <= now_s]
            worth, last_s = worth + ledger.settle(ended, now_s).total, now_s
        return worth

    assert total([100.0]) == pytest.approx(total([4.0, 8.1, 10.0, 17.0, 21.0, 21.5, 35.0, 100.0]))


# --------------------------------------------------------------------------------------
# Ways to earn without serving


def served(latencies_s: dict[str, float], status: dict[str, RequestStatus] | None = None) -> float:
    """J of ten requests alike of which those named end so; the others never do."""
    ledger = RewardLedger(SHIPPED)
    for number in range(10):
        ledger.admit(Request(f"r{number}", 5.0, 100, 41))
    ended = [
        outcome(s, (status or {}).get(name, RequestStatus.FINISHED), name)
        for name, s in latencies_s.items()
    ]
    return ledger.settle(ended, 1e6).total


ALL_FINE = {f"r{number}": 2.0 for number in range(10)}


def test_dropping_the_slow_ones_does_not_pay() -> None:
    """Nine fast and one very slow beat nine fast and one dropped, however it is dropped."""
    slow = served(ALL_FINE | {"r9": 15.0})
    for status in (RequestStatus.REJECTED, RequestStatus.FAILED, RequestStatus.CANCELLED):
        assert served(ALL_FINE | {"r9": 0.1}, {"r9": status}) < slow
    nine = {name: s for name, s in ALL_FINE.items() if name != "r9"}
    assert served(nine) < slow


@pytest.mark.parametrize("ttft_s", [0.1, 1.0, 5.9])
def test_delaying_does_not_pay(ttft_s: float) -> None:
    """The later the end, the less it is worth, whether the wait is before or after the first
    token."""
    worths = [
        sum(parts_of_utility(SHIPPED, outcome(latency_s, ttft_s=ttft_s), 1.0))
        for latency_s in (6.0, 7.0, 9.0, 12.0, 15.9)
    ]
    assert worths == sorted(worths, reverse=True)
    assert len(set(worths)) == len(worths)
    early, late = (outcome(6.0, ttft_s=s) for s in (0.1, 0.1 + ttft_s))
    tokens = [parts_of_utility(SHIPPED, o, 1.0) for o in (early, late)]
    assert tokens[0][0] == tokens[1][0], "streaming late or early does not change the latency"


def test_starving_one_type_does_not_pay() -> None:
    """Speeding four of five requests up by a third while the fifth never ends loses, where the
    four meet their objective either way."""
    fair = served(dict.fromkeys(ALL_FINE, 3.0))
    starved = dict.fromkeys(list(ALL_FINE)[:8], 2.0)
    assert served(starved) < fair


# --------------------------------------------------------------------------------------
# What is fixed by the profile


def test_moved_bytes_and_devices_cost_a_little(small_cluster: ProfiledCluster) -> None:
    config = reward_config(small_cluster, UtilitySpec(), device_hour_cost=0.36)
    model = small_cluster.spec.model
    copy_bytes = 4 * sum(
        t.shape[0] * (t.shape[1] if len(t.shape) > 1 else 1) for t in model.tensors
    )
    found = RewardLedger(config).settle([], 1.0, copy_bytes, 4 * 15.0)
    assert found.switch == pytest.approx(-0.02)
    assert found.devices == pytest.approx(-0.36 * 4 * 15 / 3600)
    assert found.total == pytest.approx(found.switch + found.devices)


def test_reference_is_the_fastest_unloaded_replica(small_cluster: ProfiledCluster) -> None:
    """No configuration can serve a lone request faster."""
    config = reward_config(small_cluster, UtilitySpec())
    for prompt, output in ((1, 1), (50, 1), (10, 100)):
        for steps in small_cluster.profile.steps:
            alone_s = steps.step_s(prompt, 1, prompt)
            alone_s += sum(steps.step_s(1, 1, prompt + i) for i in range(1, output))
            assert config.reference_s(prompt, output) <= alone_s + 1e-12
