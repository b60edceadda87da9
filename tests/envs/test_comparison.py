"""Policies side by side on the surrogate and on a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

import evaluate
from envs.comparison import Comparison
from policies.evaluation import Score

DEMO = Path(__file__).parents[2] / "policies" / "artifacts" / "demo"


def ranks() -> set[int]:
    """Children of fork servers, which themselves stay for later engines."""
    servers = psutil.Process().children()
    return {rank.pid for server in servers for rank in server.children(recursive=True)}


def scored(policy: str, reward: float, latency_s: float) -> Score:
    return Score(policy, latency_s, 0, 0, 0, 1, reward, 0, 0, 1, 0, 0)


def test_contrasts_by_hand() -> None:
    """Of three pairs one ties in reward on the surrogate, and one has the other sign in latency."""
    simulated = (scored("a", 0.5, 1.0), scored("b", 0.5, 2.0), scored("c", 0.7, 3.0))
    real = (scored("a", 0.4, 1.0), scored("b", 0.3, 2.0), scored("c", 0.6, 1.5))
    found = Comparison(simulated, simulated, "4xtp1pp1", real).to_json()
    assert found["contrast"] == {
        "mean_reward": {"pairs": 2, "alike": 2},
        "latency_s": {"pairs": 3, "alike": 2},
    }
    assert found["engine"]["c"]["latency_s"] == 1.5
    assert "engine" not in Comparison(simulated, simulated, "4xtp1pp1").to_json()


def test_policies_are_judged_on_a_real_engine(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each policy has an engine of its own, which is gone afterwards; all meet the same traffic."""
    before = ranks()
    out, engine = tmp_path / "found.json", ["--env", "tidewright/Engine-v0"]
    engine += ["--env-kwargs", f"model:{tiny_model_dir}"]
    traffic = ["--windows", "1", "--window-s", "3", "--load", "0.1", "--no-progress"]
    assert evaluate.main(["--policy", str(DEMO), *traffic, *engine, "--json", str(out)]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert "on the surrogate" in printed
    assert "on the engine" in printed
    assert found["engine"].keys() == found["policies"].keys() == {*found["engine"]}
    arrived = {
        score["finished"] + score["unfinished"] + score["rejected"]
        for where in ("engine", "policies")
        for score in found[where].values()
    }
    assert len(arrived) == 1
    assert min(arrived) > 0
    assert any(score["finished"] for score in found["engine"].values())
    assert ranks() <= before
