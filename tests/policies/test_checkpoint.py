"""A checkpoint gives the same probabilities back, or one clear sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError
from policies.base import Observation, ObservationSpec
from policies.checkpoint import load_manifest, load_optimizer, load_policy, save_checkpoint
from policies.inference import NetworkConfig, TrainedPolicy
from policies.networks import CandidateNetwork
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy
from policies.trained import load_trained

SPEC = ObservationSpec(("rate", "queue"), ("is_keep", "headroom"), 3, 15.0)


Load = Callable[..., TrainedPolicy]
LOADERS = pytest.mark.parametrize("load", [load_policy, load_trained])


def trained() -> tuple[PpoPolicy, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = CandidateNetwork(SPEC, NetworkConfig(hidden_size=8))
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    flat = torch.randn(6, SPEC.flat_size)
    logits, value = network(flat)
    (logits.square().mean() + value.square().mean()).backward()
    adam.step()
    normalizer = ObservationNormalizer(SPEC)
    normalizer.update(np.random.default_rng(0).random((9, SPEC.flat_size), np.float32))
    return PpoPolicy(SPEC, network, NetworkConfig(hidden_size=8), normalizer), adam


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    policy, adam = trained()
    return save_checkpoint(tmp_path / "run", policy, adam.state_dict(), {"seed": 7})


def observations() -> list[Observation]:
    rng = np.random.default_rng(2)
    mask = np.array([True, True, False])
    return [
        Observation(
            rng.random(2, np.float32), rng.random((3, 2), np.float32), mask, ("a", "b", "c")
        )
        for _ in range(5)
    ]


def test_round_trip_is_exact(folder: Path) -> None:
    policy, adam = trained()
    loaded, decides = load_policy(folder, SPEC.hash), load_trained(folder, SPEC.hash)
    for observation in observations():
        wanted = policy.probabilities(observation)
        np.testing.assert_array_equal(loaded.probabilities(observation), wanted)
        np.testing.assert_array_equal(decides.probabilities(observation), wanted)
    assert load_manifest(folder)["seed"] == 7
    fresh = torch.optim.Adam(loaded.network.parameters(), lr=1.0)
    fresh.load_state_dict(load_optimizer(folder))
    assert fresh.param_groups[0]["lr"] == 1e-2
    for mine, theirs in zip(fresh.state.values(), adam.state.values(), strict=True):
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])
        assert mine["step"] == theirs["step"] == 1


def test_saving_again_replaces_and_leaves_no_rubbish(folder: Path) -> None:
    policy, adam = trained()
    save_checkpoint(folder, policy, adam.state_dict(), {"seed": 8})
    assert load_manifest(folder)["seed"] == 8
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


def test_a_failed_save_leaves_the_old_checkpoint(folder: Path) -> None:
    policy, adam = trained()
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(folder, policy, adam.state_dict(), {"seed": float("nan")})
    assert load_manifest(folder)["seed"] == 7
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


@LOADERS
def test_missing_folder(load: Load, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no policy checkpoint at .*nowhere"):
        load(tmp_path / "nowhere")


@LOADERS
@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors"])
def test_missing_file(load: Load, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(folder) if name.startswith("policy") else load_optimizer(folder)


@LOADERS
def test_truncated_file(load: Load, folder: Path) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)


@LOADERS
def test_other_observation(load: Load, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"trained on observation {SPEC.hash}"):
        load(folder, "0123456789abcdef")


@LOADERS
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, "has schema 99"),
        ({"spec_hash": "x"}, "its own manifest"),
        ({"network": {"width": 3}}, "malformed"),
        ({"network": {"hidden_size": 4}}, "does not fit"),
    ],
)
def test_changed_manifest(load: Load, folder: Path, change: dict[str, object], words: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@LOADERS
def test_incomplete_and_broken_manifest(load: Load, folder: Path) -> None:
    path = folder / "manifest.json"
    full = json.loads(path.read_text())
    del full["normalizer"]
    path.write_text(json.dumps(full))
    with pytest.raises(CheckpointError, match="lacks normalizer"):
        load(folder)
    path.write_text('{"schema": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder)
