"""Policies of a folder: checkpoints, artifacts, and what else lies there."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.build import pipeline_from_facts
from controller.roster import RULES, PolicyRoster
from engine.config import load_config
from engine.errors import CheckpointError, NotFoundError
from envs.shipping import ship_seeds
from envs.study.config import DEFAULT_STUDY, StudyConfig
from policies.checkpoint import add_facts, load_manifest
from policies.guarded import GuardedPolicy

DEMO = DEFAULT_STUDY.parents[1] / "policies" / "artifacts" / "demo" / "seed0"


@pytest.fixture
def roster(tmp_path: Path) -> PolicyRoster:
    study: StudyConfig = load_config(StudyConfig, DEFAULT_STUDY, {})
    ship_seeds({"seed0": DEMO}, tmp_path / "pool", study)
    add_facts(tmp_path / "pool" / "seed0", {"expected": {"forecast_error": {"mean": 1, "std": 2}}})
    (tmp_path / "notes").mkdir()
    return PolicyRoster(pipeline_from_facts(load_manifest(DEMO)), tmp_path, (DEMO,))


def test_rules_first_then_what_the_folder_holds(roster: PolicyRoster) -> None:
    assert [info.name for info in roster.infos()] == [*RULES, "pool", DEMO.name]
    assert all(info.is_compatible for info in roster.infos())


def test_an_artifact_gives_its_default_or_one_by_name(roster: PolicyRoster) -> None:
    default = roster.load("pool")
    assert default.policy.name == "hysteresis"
    assert default.expected["forecast_error"].mean == 1.0
    guarded = roster.load("pool/guarded")
    assert isinstance(guarded.policy, GuardedPolicy)
    assert guarded.info.name == "pool/guarded"
    with pytest.raises(CheckpointError, match="has no policy 'seed9'"):
        roster.load("pool/seed9")
    with pytest.raises(NotFoundError, match="there are keep, myopic, hysteresis, pool, seed0"):
        roster.load("notes")
