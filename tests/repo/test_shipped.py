"""What is shipped can be used as it is: policies decide, profiles load."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.build import load_profiled_cluster, pipeline_from_facts
from engine.cluster import dense_deployment, parse_deployment_key
from envs.surrogate.cluster import SurrogateCluster
from policies.checkpoint import load_manifest, load_policy

ROOT = Path(__file__).parents[2]
POLICIES = sorted(ROOT.glob("policies/artifacts/*/manifest.json"))
PROFILES = sorted(p for p in ROOT.glob("configs/profiles/*.json") if "residuals" not in p.name)


@pytest.mark.parametrize("manifest", POLICIES, ids=lambda p: p.parent.name)
def test_a_shipped_policy_decides_on_the_pool_it_was_trained_for(manifest: Path) -> None:
    facts = load_manifest(manifest.parent)
    pipeline = pipeline_from_facts(facts)
    policy = load_policy(manifest.parent, pipeline.observation_spec.hash)
    initial = dense_deployment(parse_deployment_key(facts["default_deployment"]))
    cluster = SurrogateCluster(pipeline.cluster, initial)
    pipeline.reset(0.0)
    prepared = pipeline.prepare(cluster.snapshot())
    probabilities = policy.probabilities(prepared.observation)
    assert probabilities.sum() == pytest.approx(1.0)
    assert not probabilities[~prepared.observation.mask].any()


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_a_shipped_profile_can_be_served_from(path: Path) -> None:
    profiled = load_profiled_cluster(path)
    for parallel in profiled.profile.configs:
        assert profiled.profile.step_model(parallel).step_s(1, 1, 16) > 0.0
