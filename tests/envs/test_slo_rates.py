from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq

from controller.build import SLO_RATES, find_slo_rates, load_profiled_cluster
from controller.service_model import service_rates
from controller.slo import read_slo
from controller.slo_rates import SloRates
from controller.workload import centres
from engine.cluster import ParallelConfig, SloSpec, WorkloadType, WorkloadTyping
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster, ServingProfile, StepTimeModel
from envs.slo_rates import LoneReplica, default_typing, slo_rates

ONE, TWO = ParallelConfig(1, 1), ParallelConfig(2, 1)
LENGTHS = np.array([20.0, 30.0])
PROFILES = SLO_RATES.parent / "profiles"
SHARE = 0.9


def _waits_within(t: float, rate: float, service: float) -> float:
    """M/D/1: P(wait <= t) (Erlang 1909)."""
    terms = (
        (rate * (k * service - t)) ** k / math.factorial(k) * math.exp(-rate * (k * service - t))
        for k in range(int(t / service) + 1)
    )
    return (1 - rate * service) * sum(terms)


@pytest.mark.parametrize("wait_s", [0.25, 0.45])
def test_one_at_a_time_is_an_m_d_1_queue(small_cluster: ProfiledCluster, wait_s: float) -> None:
    """Every request is one step of 0.1 s, one at a time: the rate at which 90 % wait at most so
    long has a closed form. Mean of eight seeds, within three of its standard errors."""
    step_s = 0.1
    profile = ServingProfile("one", "cpu", (StepTimeModel(ONE, step_s, 0, 0, 0),), 1e9, 0, 0)
    cluster = ProfiledCluster(replace(small_cluster.spec, max_num_seqs=1), profile)
    slo = SloSpec(ttft_s=wait_s + step_s)
    found = [
        LoneReplica(cluster, ONE, np.array([8.0, 1.0]), seed).highest_rate(slo, SHARE)
        for seed in range(8)
    ]
    exact = brentq(lambda r: _waits_within(wait_s, r, step_s) - SHARE, 0.1, 9.99)
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert abs(np.mean(found) - exact) < 3 * error
    assert error < 0.03 * exact, "the runs are long enough to tell"


def test_bisection_finds_the_border_of_a_sweep(small_cluster: ProfiledCluster) -> None:
    """Every rate of a fine grid is simulated: below the rate found they meet the targets, above it
    they do not, but for the grain of grid and bisection."""
    replica = LoneReplica(small_cluster, ONE, LENGTHS, seed=0)
    slo = SloSpec(0.05, 0.012)
    found = replica.highest_rate(slo, SHARE)
    grid = np.linspace(0.02, 1.0, 99) * replica.most
    met = np.array([replica.attainment(rate, slo) >= SHARE for rate in grid.tolist()])
    assert 0.1 * replica.most < found < 0.9 * replica.most
    assert met[grid < found - 0.01 * replica.most].all()
    assert not met[grid > found + 0.01 * replica.most].any()


def test_looser_targets_never_give_a_lower_rate(small_cluster: ProfiledCluster) -> None:
    replica = LoneReplica(small_cluster, TWO, LENGTHS, seed=1)
    for make in (
        lambda s: SloSpec(ttft_s=0.004 * s),
        lambda s: SloSpec(tpot_s=0.002 * s),
        lambda s: SloSpec(0.004 * s, 0.002 * s),
        lambda s: SloSpec(0.001, 0.0, 0.0001 * s),
    ):
        rates = [replica.highest_rate(make(s), SHARE) for s in np.geomspace(0.1, 1e4, 16)]
        assert (np.diff(rates) >= 0).all()
        assert (rates[0], rates[-1]) == (0.0, replica.most)
    by_share = [replica.highest_rate(SloSpec(0.02, 0.008), s) for s in (0.99, 0.9, 0.5)]
    assert (np.diff(by_share) >= 0).all()


def test_targets_out_of_reach_give_no_rate(small_cluster: ProfiledCluster) -> None:
    replica = LoneReplica(small_cluster, ONE, LENGTHS, seed=0)
    assert replica.highest_rate(SloSpec(tpot_s=1e-4), SHARE) == 0.0
    assert replica.highest_rate(SloSpec(), SHARE) == replica.most


def _small(cluster: ProfiledCluster) -> tuple[ProfiledCluster, WorkloadTyping]:
    profile = replace(cluster.profile, device="cpu", steps=cluster.profile.steps[:2])
    types = (WorkloadType("short", 8.0, 6.0), WorkloadType("long", 60.0, 20.0))
    return replace(cluster, profile=profile), WorkloadTyping(types, (0.5, 0.5))


def test_rates_of_a_profile_by_class(small_cluster: ProfiledCluster) -> None:
    cluster, typing = _small(small_cluster)
    slo = read_slo()
    found, again = (slo_rates(cluster, typing, slo, seed=3) for _ in range(2))
    assert found.to_json() == again.to_json()
    assert SloRates.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()
    most = service_rates(cluster, found.configs, np.array([[8.0, 6.0], [60.0, 20.0]]))
    assert (found.rates["interactive"] <= found.rates["batch"]).all()
    assert (found.rates["batch"] <= most * 1.001).all()
    for name in found.rates:
        shares = found.shares(cluster, found.configs[::-1], name)[::-1]
        assert shares == pytest.approx(found.rates[name] / most)


def test_rates_are_found_for_any_pool_of_the_profile_and_no_other(
    small_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    cluster, typing = _small(small_cluster)
    slo, path = read_slo(), tmp_path / "rates.json"
    path.write_text(json.dumps(slo_rates(cluster, typing, slo).to_json()))
    (tmp_path / "another.json").write_text(
        json.dumps(
            slo_rates(cluster, WorkloadTyping(typing.types[:1]), slo).to_json() | {"digest": ""}
        )
    )
    larger = replace(cluster, spec=replace(cluster.spec, num_devices=64, devices_per_node=8))
    for pool in (cluster, larger):
        assert find_slo_rates(pool, slo, tmp_path).typing == typing
    slower = replace(cluster, profile=replace(cluster.profile, link_bytes_per_s=1.0))
    fewer = replace(cluster, spec=replace(cluster.spec, max_num_seqs=1))
    other_targets = slo.model_copy(update={"attainment": 0.5})
    for args in ((slower, slo), (fewer, slo), (cluster, other_targets)):
        with pytest.raises(InvalidRequestError, match=r"make them with python -m envs\.slo_rates"):
            find_slo_rates(*args, tmp_path)
    path.write_text("{}")
    with pytest.raises(InvalidRequestError, match="these are no SLO rates"):
        find_slo_rates(cluster, slo, tmp_path)


@pytest.mark.parametrize(
    "path",
    sorted(p for p in PROFILES.glob("*.json") if "residuals" not in p.name),
    ids=lambda p: p.stem,
)
def test_shipped_rates_are_those_of_shipped_profiles(path: Path) -> None:
    """One of each file is simulated again: the surrogate may have changed too."""
    cluster, slo = load_profiled_cluster(path), read_slo()
    found = find_slo_rates(cluster, slo)
    made = SloRates.from_json(json.loads((SLO_RATES / path.name).read_text()))
    assert found.to_json() == made.to_json()
    centres_now = centres(default_typing(cluster))
    assert centres(found.typing) == pytest.approx(centres_now)
    parallel, last = found.configs[-1], found.typing.types[-1]
    lengths = np.array([last.prompt_tokens, last.output_tokens])
    replica = LoneReplica(cluster, parallel, lengths, seed=0)
    for name, rates in found.rates.items():
        rate = replica.highest_rate(slo.spec(cluster.profile.device, name), slo.attainment)
        assert rates[-1, -1] == pytest.approx(rate, rel=0.02)
