"""Training environments of one group meet the same traffic; others do not."""

from pathlib import Path

import pytest

from controller.slo import read_slo
from engine.cluster import SloSpec
from engine.errors import InvalidRequestError
from envs.build import DEFAULT_PROFILE
from envs.experiment import Experiment, build_experiment, build_venv, git_revision
from envs.experiment_config import read_config
from envs.serving_env import ServingEnv

CONFIG = f"""
profile: {DEFAULT_PROFILE}
workload: {{length_factor: 0.125, load: [0.1, 0.6], num_types: 3}}
env: {{num_envs: 4, episode_s: 60.0, spread: 0.0, initial: 4xtp1pp1}}
ppo: {{group_size: 2}}
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(CONFIG)
    return build_experiment(read_config(path, {}))


def arrivals(env: ServingEnv) -> list[int]:
    env.reset()
    counts, done = [], False
    while not done:
        _, _, _, done, info = env.step(0)
        counts.append(int(info["arrived"]))
    return counts


def test_groups_share_their_traffic_in_every_episode(experiment: Experiment) -> None:
    venv = build_venv(experiment)
    first = [arrivals(env) for env in venv.envs]
    second = [arrivals(env) for env in venv.envs]
    assert first[0] == first[1] != first[2] == first[3]
    assert second[0] == second[1] != first[0]
    again = build_venv(experiment)
    assert [arrivals(env) for env in again.envs] == first


def test_default_deployment_is_always_a_candidate(experiment: Experiment) -> None:
    venv = build_venv(experiment)
    venv.reset()
    for env in venv.envs:
        assert env.prepared is not None
        assert experiment.default_key in {c.key for c in env.prepared.candidates}


def test_facts_build_the_same_pipeline(experiment: Experiment) -> None:
    from controller.build import pipeline_from_facts

    pipeline = pipeline_from_facts(experiment.facts())
    assert pipeline.observation_spec == experiment.pipeline().observation_spec
    assert pipeline.typing == experiment.typing
    assert pipeline.cluster == experiment.cluster
    assert pipeline.config == experiment.config.decision


def test_service_levels_by_class_or_in_seconds(experiment: Experiment, tmp_path: Path) -> None:
    assert experiment.reward.slo == read_slo().spec("cpu", "interactive")
    assert SloSpec(**experiment.facts()["slo"]) == experiment.reward.slo
    assert experiment.reward.utility == read_slo().utility.spec
    path = tmp_path / "micro.yaml"
    path.write_text(CONFIG)
    assert read_config(path, {"slo": "batch"}).slo == "batch"
    assert read_config(path, {"slo.ttft_s": 0.5, "slo.tpot_s": 0.1}).slo == SloSpec(0.5, 0.1)
    with pytest.raises(InvalidRequestError, match=r"unknown key 'slo\.tbt_s'"):
        read_config(path, {"slo.tbt_s": 0.5})


def test_groups_must_divide_the_environments(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("env: {num_envs: 6}\nppo: {group_size: 4}\n")
    with pytest.raises(InvalidRequestError, match="must be a multiple of"):
        read_config(path, {})


def test_the_revision_is_a_commit_or_nothing() -> None:
    found = git_revision()
    assert found == "" or len(found.rstrip("+")) == 40
