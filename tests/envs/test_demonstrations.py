"""Experts in training episodes: what is kept, in how many processes, in which file."""

from pathlib import Path

import numpy as np
import pytest

from engine.errors import InvalidRequestError
from envs.build import DEFAULT_PROFILE
from envs.demonstrations import Rollouts, collect, demonstrations
from envs.experiment import Experiment, build_env, build_experiment
from envs.experiment_config import read_config
from policies.cloning import CloningConfig, Demonstrations
from policies.mpc import MpcConfig

CONFIG = f"""
profile: {DEFAULT_PROFILE}
workload: {{length_factor: 0.125, load: [0.05, 0.1], num_types: 3}}
env: {{num_envs: 2, episode_s: 300.0}}
"""
MPC = CloningConfig(expert="mpc", num_decisions=12, mpc=MpcConfig(60.0, num_futures=1))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(CONFIG)
    return build_experiment(read_config(path, {}))


def same(one: Demonstrations, two: Demonstrations) -> bool:
    names = ("flat", "mask", "costs")
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in names)


def test_mpc_s_costs_are_kept_where_there_is_a_choice(experiment: Experiment) -> None:
    found = collect(experiment, MPC)
    spec = experiment.pipeline().observation_spec
    assert found.flat.shape == (12, spec.flat_size)
    assert (found.mask.sum(axis=1) > 1).all()
    assert np.isinf(found.costs[~found.mask]).all()
    assert found.costs[:, 0] == pytest.approx(0.99)  # keep, less the margin a switch must gain
    assert np.isfinite(found.costs[found.mask]).mean() > 0.9
    assert len(np.unique(found.costs[np.isfinite(found.costs)])) > 12
    assert same(found, collect(experiment, MPC))


def test_a_rule_s_costs_are_those_it_estimates(experiment: Experiment) -> None:
    found = collect(experiment, CloningConfig(num_decisions=30, noise=0.3))
    np.testing.assert_array_equal(np.isfinite(found.costs), found.mask)
    assert (found.costs[:, 0] == 1.0).all()  # keep's own
    assert len(np.unique(found.flat[:, 0])) > 1


ROLLOUTS = CloningConfig("rollouts", "costs", 12, noise=0.5, mpc=MpcConfig(60.0))


def test_rollouts_cost_what_requests_come_to(experiment: Experiment) -> None:
    found = collect(experiment, ROLLOUTS)
    known = found.costs[np.isfinite(found.costs)]
    assert ((known >= 0.0) & (known <= 2.0)).all()  # from all at a worth of 1 to all at -1
    assert np.isinf(found.costs[~found.mask]).all()
    assert np.isfinite(found.costs[found.mask]).mean() > 0.9
    assert same(found, collect(experiment, ROLLOUTS))


def test_what_is_kept_costs_what_the_episode_then_does(experiment: Experiment) -> None:
    """An episode of as many seconds as the rollout looks ahead, kept: the same requests, the same
    worth."""
    env = build_env(experiment)
    env.reset(seed=3)
    assert env.prepared is not None
    cost = Rollouts(env, horizon_s=env.trace.duration_s).costs(env.prepared.observation)[0]
    worth = 0.0
    while not env.is_over:
        worth += env.step(0)[1]
    worth += env.ledger.open_worth(env.end_s)
    config = env.ledger.config
    assert cost == pytest.approx(1.0 - worth * config.scale_requests / len(env.trace), abs=1e-9)


@pytest.mark.slow
def test_processes_change_nothing(experiment: Experiment) -> None:
    alone = CloningConfig(num_decisions=30)
    two = CloningConfig(num_decisions=30, num_processes=2)
    assert same(collect(experiment, alone), collect(experiment, two))


def test_files_are_reused_and_others_refused(experiment: Experiment, tmp_path: Path) -> None:
    path, config = tmp_path / "decisions.safetensors", CloningConfig(num_decisions=10)
    first = demonstrations(experiment, config, path)
    written = path.stat().st_mtime_ns
    calls: list[int] = []
    assert same(first, demonstrations(experiment, config, path, calls.append))
    assert not calls  # nothing was collected
    assert path.stat().st_mtime_ns == written
    more = CloningConfig(num_decisions=11)
    with pytest.raises(InvalidRequestError, match="made with another num_decisions"):
        demonstrations(experiment, more, path)
