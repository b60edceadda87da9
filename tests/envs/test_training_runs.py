"""Runs from a configuration to a folder: cloned, chosen, gone on with; seeds and studies."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from engine.errors import InvalidRequestError
from envs.build import DEFAULT_PROFILE
from envs.experiment import build_evaluation, build_experiment
from envs.experiment_config import ENGINE, ExperimentConfig, read_config
from envs.fleet import run_seeds
from envs.search import SearchOptions, optimize
from envs.training import Run, RunOptions, build_validator, run_training
from policies.baselines import KeepPolicy
from policies.checkpoint import load_manifest, load_policy
from policies.evaluation import score

CONFIG = f"""
profile: {DEFAULT_PROFILE}
workload: {{length_factor: 0.125, load: [0.05, 0.1], num_types: 3}}
env: {{num_envs: 4, episode_s: 120.0}}
ppo: {{n_timesteps: 256, n_steps: 16, batch_size: 32, n_epochs: 2, hidden_size: 8}}
evaluation: {{num_windows: 1, window_s: 60.0, eval_freq: 128}}
"""
ALL = {
    "cloning.num_decisions": 20,
    "cloning.epochs": 2,
    "ppo.kl_prior_coef": 0.1,
    "ppo.group_size": 2,
    "ppo.critic_warmup": 1,
    "evaluation.patience": 3,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def config(path: Path) -> ExperimentConfig:
    return read_config(path, {})


def run(config: ExperimentConfig, out: Path, **options: object) -> Run:
    return run_training(config, RunOptions(out, compare=False, **options))  # type: ignore[arg-type]


def weights(folder: Path) -> bytes:
    return (folder / "policy.safetensors").read_bytes()


@pytest.fixture(scope="module")
def everything(path: Path) -> Path:
    """The folder of a run with every ingredient."""
    out = path.parent / "everything"
    run(read_config(path, ALL), out)
    return out


def test_every_ingredient_together_leaves_a_whole_folder(everything: Path) -> None:
    result = json.loads((everything / "result.json").read_text())
    assert result["num_timesteps"] == 256
    assert result["cloning"]["num_decisions"] == 16
    assert result["cloning"]["num_held_out"] == 4
    assert (everything / "learning_curve.png").stat().st_size > 1000
    assert (everything / "demonstrations.safetensors").is_file()
    assert load_manifest(everything / "prior")["cloning"] == result["cloning"]
    last = load_manifest(everything / "last")
    assert [at for at, _ in last["validation_curve"]] == [0, 128, 256]
    assert max(value for _, value in last["validation_curve"]) == result["best_validation"]
    best = load_manifest(everything / "policy")
    assert best["validation_curve"][-1][1] == result["best_validation"]
    assert last["training"]["kl_prior_coef"] == 0.1
    assert last["normalizer"] == load_manifest(everything / "prior")["normalizer"]


def test_the_same_seed_gives_the_same_weights(path: Path, everything: Path, tmp_path: Path) -> None:
    run(read_config(path, ALL), tmp_path)
    for name in ("policy", "last", "prior"):
        assert weights(tmp_path / name) == weights(everything / name)


def test_each_ingredient_can_be_switched_off(path: Path, tmp_path: Path) -> None:
    """And each makes a difference."""
    short = ALL | {"ppo.n_timesteps": 192, "evaluation.eval_freq": 0}
    changes = {
        "none": {},
        "cloning": {"cloning.num_decisions": 0, "ppo.kl_prior_coef": 0.0},
        "prior": {"ppo.kl_prior_coef": 0.0},
        "groups": {"ppo.group_size": 1},
        "warmup": {"ppo.critic_warmup": 0},
        "forced": {"ppo.skip_forced": False},
    }
    for name, off in changes.items():
        run(read_config(path, short | off), tmp_path / name)
    assert len({weights(tmp_path / name / "last") for name in changes}) == len(changes)


def test_validation_is_the_mean_reward_of_the_plain_path(path: Path) -> None:
    """The fast path over columns, and evaluation with an object per request."""
    experiment = build_experiment(read_config(path, {"env.initial": "2xtp1pp2"}))
    windows = experiment.selection_windows()
    plain = build_evaluation(experiment.pipeline(), windows, experiment.reward, "2xtp1pp2")
    expected = score("keep", plain.run(KeepPolicy())).mean_reward
    assert build_validator(experiment)(KeepPolicy()) == pytest.approx(expected, rel=1e-9)
    assert windows[0] != experiment.validation_windows()[0]


def test_an_interrupted_run_goes_on(path: Path, tmp_path: Path) -> None:
    config = read_config(path, ALL)

    def interrupt(num_timesteps: int, score: float) -> bool:
        if num_timesteps == 128:
            os.kill(os.getpid(), signal.SIGINT)
        return True

    first = run_training(config, RunOptions(tmp_path, compare=False), interrupt)
    assert first.interrupted
    assert 128 <= first.state.num_timesteps < 192
    prior = weights(tmp_path / "prior")
    second = run(config, tmp_path, resume=True)
    assert not second.interrupted
    assert second.state.num_timesteps >= 256
    assert [at for at, _ in second.state.validation_curve][:2] == [0, 128]
    assert weights(tmp_path / "prior") == prior  # the same prior, not what was learned since
    assert second.summary["cloning"] is not None
    with pytest.raises(InvalidRequestError, match="decisions already"):
        run(config, tmp_path, resume=True)
    with pytest.raises(InvalidRequestError, match="nothing to resume"):
        run(config, tmp_path / "elsewhere", resume=True)


def test_a_trained_agent_is_gone_on_with_under_another_number_of_rows(
    path: Path, everything: Path, tmp_path: Path
) -> None:
    trained = load_policy(everything / "last")
    rows = trained.spec.max_candidates + 3
    changes = {"ppo.n_timesteps": 384, "decision.max_candidates": rows}
    found = run(read_config(path, changes), tmp_path, trained_agent=everything / "last")
    assert found.state.num_timesteps == 384
    assert found.state.policy.spec.max_candidates == rows
    assert [at for at, _ in found.state.validation_curve] == [256, 384]  # none of the other run's
    assert weights(tmp_path / "prior") == weights(everything / "last")


def test_seeds_are_what_they_are_alone(config: ExperimentConfig, tmp_path: Path) -> None:
    options = RunOptions(tmp_path / "both", compare=False)
    summary, interrupted = run_seeds(config, options, 2, None)
    assert not interrupted
    assert [one["seed"] for one in summary["seeds"]] == [0, 1]
    assert (tmp_path / "both" / "learning_curve.png").is_file()
    run(config.model_copy(update={"seed": 1}), tmp_path / "one")
    assert weights(tmp_path / "both" / "seed1" / "last") == weights(tmp_path / "one" / "last")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_gives_the_same_per_seed(config: ExperimentConfig, tmp_path: Path) -> None:
    here, there = (RunOptions(tmp_path / name, compare=False) for name in ("here", "there"))
    run_seeds(config, here, 2, None)
    run_seeds(config, there, 2, "local")
    for seed in ("seed0", "seed1"):
        assert weights(here.out / seed / "last") == weights(there.out / seed / "last")
    summary, _ = optimize(config, there, SearchOptions(n_trials=2, pruner="none"), "local")
    assert [state for state, _ in summary["trials"].values()] == ["complete"] * 2


def test_a_study_goes_on_where_it_was(config: ExperimentConfig, tmp_path: Path) -> None:
    options = RunOptions(tmp_path)
    short = config.model_copy(update={"ppo": dataclasses.replace(config.ppo, n_timesteps=128)})
    first, _ = optimize(short, options, SearchOptions(n_trials=1), None)
    assert list(first["trials"]) == [0]
    second, interrupted = optimize(short, options, SearchOptions(n_trials=2), None)
    assert not interrupted
    assert list(second["trials"]) == [0, 1]
    assert second["trials"][0] == first["trials"][0]
    assert second["best"]["score"] == max(value for _, value in second["trials"].values())
    settings = json.loads((tmp_path / "best.json").read_text())
    assert settings == second["best"]["ppo"]
    dataclasses.replace(short.ppo, **settings)  # fields of PpoConfig, as they are
    trained = load_manifest(tmp_path / "trial0" / "last")["training"]
    later = load_manifest(tmp_path / "trial1" / "last")["training"]
    assert trained["learning_rate"] != later["learning_rate"]  # the sampler did not start anew


def test_it_trains_on_the_real_engine(path: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """One environment in real time, whatever the configuration says for the surrogate."""
    real_time = {
        "decision.grid_s": 0.25,
        "env.episode_s": 5.0,  # one engine for all of it
        "env.initial": "4xtp1pp1",
        "workload.load": [0.02, 0.02],
        "ppo.n_timesteps": 4,
        "ppo.n_steps": 4,
        "ppo.group_size": 2,
    }
    config = read_config(path, real_time, ENGINE)
    options = {"model": str(tiny_model_dir)}
    found = run(config, tmp_path, env_id=ENGINE, engine=options)
    assert found.state.num_timesteps == 4
    assert load_policy(tmp_path / "policy").spec.grid_s == 0.25
