"""The doors, end to end on a small experiment: train, then judge on a trace; bad input."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import evaluate
import train
from envs.experiment_config import read_config
from policies.checkpoint import load_manifest, load_policy

ROOT = Path(__file__).parents[2]
CONFIG = f"""
profile: {ROOT}/configs/profiles/tiny_llama_cpu4.json
workload: {{length_factor: 0.125, load: [0.2, 0.4], num_types: 3}}
env: {{num_envs: 4, episode_s: 120.0}}
ppo: {{n_timesteps: 256, n_steps: 32, batch_size: 64, n_epochs: 2, hidden_size: 8}}
evaluation: {{num_windows: 1, window_s: 60.0}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "micro.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run_dir(config: Path) -> Path:
    out = config.parent / "run"
    arguments = ["--config", str(config), "--seed", "5", "--out", str(out), "--no-progress"]
    assert train.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days, one request in ten seconds on average."""
    rng = np.random.default_rng(0)
    arrival_s = np.sort(rng.uniform(0, 172_800, 17_280))
    rows = [f"{t:.3f},{rng.integers(50, 3000)},{rng.integers(1, 300)}" for t in arrival_s]
    path = tmp_path_factory.mktemp("trace") / "trace.csv.gz"
    path.write_bytes(
        gzip.compress("\n".join(["timestamp_s,input_tokens,output_tokens", *rows]).encode())
    )
    return path


def test_training_leaves_checkpoint_logs_and_result(run_dir: Path) -> None:
    manifest = load_manifest(run_dir / "policy")
    assert manifest["seed"] == 5
    assert manifest["num_timesteps"] == manifest["training"]["n_timesteps"] == 256
    assert manifest["config"]["workload"]["num_types"] == 3
    assert len(manifest["typing"]["types"]) == 3
    assert load_policy(run_dir / "policy").spec.hash == manifest["spec_hash"]
    assert list((run_dir / "tensorboard").glob("**/events.*"))
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result["policies"]) == {"keep", "static", "myopic", "hysteresis", "ppo"}
    assert result["policies"]["keep"]["finished"] > 0
    assert len(result["statics"]) >= 3
    best = result["policies"]["static"]["mean_reward"]
    assert best == pytest.approx(max(reward for reward, _ in result["statics"].values()), abs=1e-6)


def test_same_seed_same_policy(config: Path, run_dir: Path) -> None:
    again = config.parent / "again"
    arguments = ["--config", str(config), "--seed", "5", "--out", str(again), "--no-progress"]
    assert train.main(arguments) == 0
    for name in ("policy.safetensors", "optimizer.safetensors"):
        first, second = (folder / "policy" / name for folder in (run_dir, again))
        assert first.read_bytes() == second.read_bytes()
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (run_dir, again))
    assert one["policies"] == two["policies"]


def test_it_goes_on_from_a_run_under_another_folder(
    config: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--conf-file", str(config), "-f", str(tmp_path), "-n", "384", "--no-progress"]
    arguments += ["-i", str(run_dir / "last"), "--eval-freq", "128", "--eval-episodes", "1"]
    arguments += ["-tb", str(tmp_path / "tb"), "--seed", "5", "--save-freq", "64"]
    assert train.main(arguments) == 0
    out = tmp_path / "micro-seed5"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads((out / "result.json").read_text())
    assert found["num_timesteps"] == 384
    curve = load_manifest(out / "last")["validation_curve"]
    assert [at for at, _ in curve] == [256, 384]
    assert found["best_validation"] == max(value for _, value in curve)
    assert list((tmp_path / "tb").glob("**/events.*"))
    assert train.main([*arguments, "--resume"]) == 2
    assert "trained for 384 decisions already" in capsys.readouterr().err


def test_a_configuration_may_be_keyed_by_environment(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(config.read_text())
    path = tmp_path / "ppo.yml"
    path.write_text(yaml.safe_dump({"tidewright/Surrogate-v0": values}))
    assert read_config(path, {}) == read_config(config, {})
    arguments = ["--config", str(path), "--env", "tidewright/Engine-v0", "--out", str(tmp_path)]
    assert train.main(arguments) == 2
    assert "settings for tidewright/Surrogate-v0, none for tidewright/Engine-v0" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], "nothing to resume"),
        (["-i", "nowhere"], "no policy checkpoint at nowhere"),
        (["--eval-freq", "-1"], "eval_freq"),
        (["--env", "tidewright/Engine-v0", "--env-kwargs", "colour:red"], "colour"),
        (["--seeds", "0"], "number of seeds must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str],
    words: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(["--config", str(config), "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_evaluation_on_a_trace(
    run_dir: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--policy", str(run_dir / "policy"), "--trace", str(trace), "--days", "2"]
    arguments += ["--load", "0.3", "--windows", "2", "--window-s", "60", "--no-progress"]
    assert evaluate.main([*arguments, "--json", str(run_dir / "scores.json")]) == 0
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    assert found == json.loads((run_dir / "scores.json").read_text())
    assert found["days"] == [2, 2]
    assert found["rate_per_s"] == pytest.approx(0.3 * found["capacity_per_s"], abs=1e-5)
    scores = found["policies"]
    arrived = {s["finished"] + s["unfinished"] + s["rejected"] for s in scores.values()}
    assert len(arrived) == 1  # the same windows for all
    assert arrived.pop() == pytest.approx(120 * found["rate_per_s"], rel=0.25)
    assert "days 2-2" in output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("colour: red", "unknown key 'colour' in"),
        ("ppo: {n_step: 3}", "unknown key 'ppo.n_step' in"),
        ("ppo: {n_steps: many}", "ppo.n_steps in"),
        ("cloning: {expert: oracle}", "cloning.expert in"),
        ("cloning: {num_decisions: -1}", "num_decisions >= 0"),
        ("ppo: {kl_prior_coef: 0.1}", "there is no prior"),
        ("decision: {grid_s: -1}", "grid_s"),
        ("workload: {trace: nowhere.csv}", "trace nowhere.csv cannot be read"),
        ("profile: nowhere.json", "profile nowhere.json cannot be read"),
        ("predictor: oracle", "predictor 'oracle' is not known"),
        ("- a list", "must hold keys and values"),
        ("a: {b", "is not YAML"),
    ],
)
def test_bad_configuration_is_one_sentence(
    change: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(change)
    assert train.main(["--config", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "nowhere.csv"], "cannot be read"),
        (["--days", "eight"], "days 'eight' are not understood"),
        (["--days", "2-9"], "days 2-9 are not in the trace, which has 2"),
        (["--load", "-1"], "load must be positive"),
        (["--initial", "9xtp1pp1"], "needs 9 devices"),
        (["--initial", "3 replicas"], "not understood"),
        (["--windows", "0"], "at least one window"),
        (["--windows", "100"], "do not fit"),
        (["--length-factor", "0"], "length_factor"),
    ],
)
def test_bad_evaluation_is_one_sentence(
    arguments: list[str],
    words: str,
    run_dir: Path,
    trace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--policy", str(run_dir / "policy"), "--trace", str(trace), *arguments]
    assert evaluate.main(given) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_malformed_row_and_missing_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("timestamp_s,input_tokens,output_tokens\n0.0,10,5\n1.0,ten,5\n")
    assert evaluate.main(["--policy", str(run_dir / "policy"), "--trace", str(bad)]) == 2
    assert "line 3, column input_tokens: got 'ten'" in capsys.readouterr().err
    assert evaluate.main(["--policy", str(tmp_path / "none")]) == 2
    assert "no policy checkpoint" in capsys.readouterr().err
