"""A shipped policy decides as its file says, or gives one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from policies.artifact import (
    FILE,
    GUARDED,
    HYSTERESIS,
    Artifact,
    is_artifact,
    load_shipped,
    manifest_of,
    read_artifact,
    write_artifact,
)
from policies.base import Observation, ObservationSpec
from policies.baselines import HysteresisConfig
from policies.checkpoint import save_checkpoint
from policies.guarded import GuardedConfig, GuardedPolicy
from policies.inference import NetworkConfig
from policies.networks import CandidateNetwork
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy

SPEC = ObservationSpec(("rate",), ("is_keep", "log_latency", "switch_s"), 3, 15.0)
SEEN = Observation(
    np.zeros(1, np.float32),
    np.array([[1, 1.0, 0], [0, 0.5, 1.0], [0, 2.0, 1.0]], np.float32),
    np.ones(3, np.bool_),
    ("a", "b", "c"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = NetworkConfig(hidden_size=8)
    for seed in range(2):
        torch.manual_seed(seed)
        policy = PpoPolicy(
            SPEC, CandidateNetwork(SPEC, config), config, ObservationNormalizer(SPEC)
        )
        adam = torch.optim.Adam(policy.network.parameters())
        save_checkpoint(tmp_path / f"seed{seed}", policy, adam.state_dict(), {"seed": seed})
    rule = HysteresisConfig(120.0, 1, 1.0)
    artifact = Artifact(HYSTERESIS, ("seed0", "seed1"), rule, GuardedConfig(margin=0.3))
    write_artifact(tmp_path, artifact)
    return tmp_path


def test_what_is_written_is_read_again(folder: Path) -> None:
    found = read_artifact(folder)
    assert found.members == ("seed0", "seed1")
    assert found.hysteresis == HysteresisConfig(120.0, 1, 1.0)
    assert found.guarded == GuardedConfig(margin=0.3)
    assert is_artifact(folder)
    assert not is_artifact(folder / "seed0")
    assert manifest_of(folder) == manifest_of(folder / "seed0")


def test_the_default_decides_unless_another_is_named(folder: Path) -> None:
    rule = load_shipped(folder, SPEC.hash)
    assert rule.name == "hysteresis"
    assert rule.probabilities(SEEN).tolist() == [0.0, 1.0, 0.0]  # its settings: at the first tick
    guarded = load_shipped(folder, SPEC.hash, GUARDED)
    assert isinstance(guarded, GuardedPolicy)
    assert len(guarded.members) == 2
    alone, single = load_shipped(folder, None, "seed1"), load_shipped(folder / "seed1")
    np.testing.assert_array_equal(alone.probabilities(SEEN), single.probabilities(SEEN))


def test_unknown_names_and_other_observations_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no policy 'seed7'; it has guarded, hysteresis"):
        load_shipped(folder, None, "seed7")
    with pytest.raises(CheckpointError, match="single checkpoint"):
        load_shipped(folder / "seed0", None, GUARDED)
    with pytest.raises(CheckpointError, match="was trained on observation"):
        load_shipped(folder, "0123", GUARDED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "this version reads schema 1"),
        ({"default": "luck"}, "needs a default of guarded or hysteresis"),
        ({"members": []}, "at least one member"),
        ({"guarded": {"margin": -1}}, "cannot be read"),
        ({"more": 1}, "more that is not known"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(
    folder: Path, change: dict[str, object], message: str
) -> None:
    path = folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_shipped(folder)


def test_a_torn_file_is_refused(folder: Path) -> None:
    (folder / FILE).write_text('{"schema": 1, "def')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_artifact(folder)
