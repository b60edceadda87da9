"""The forward pass in numpy is that of torch."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.base import Observation, ObservationSpec
from policies.checkpoint import load_policy
from policies.inference import NetworkConfig, masked_softmax
from policies.networks import Network, actor_in, build_network
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy
from policies.trained import load_trained

SHIPPED = Path(__file__).parents[2] / "policies" / "artifacts" / "h100-16"
SPEC = ObservationSpec(("rate", "queue", "kv"), ("is_keep", "headroom", "switch_s"), 5, 15.0)


def config(kind: str) -> NetworkConfig:
    return NetworkConfig(hidden_size=16, kind=kind)  # type: ignore[arg-type]


def network(kind: str, seed: int) -> Network:
    """With random biases too, and logits that differ."""
    torch.manual_seed(seed)
    found = build_network(SPEC, config(kind))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def by_torch(net: Network, flat: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = net.forward_actor(torch.from_numpy(flat[None]))[0].numpy()
    return found


@pytest.mark.parametrize("kind", ["candidates", "mlp"])
def test_logits_are_those_of_torch_while_the_network_learns(kind: str) -> None:
    rng, net = np.random.default_rng(0), network(kind, 0)
    actor, adam = actor_in(net, config(kind)), torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(20):
        flat = rng.normal(size=SPEC.flat_size).astype(np.float32)
        np.testing.assert_allclose(actor(flat), by_torch(net, flat), atol=1e-5)
        adam.zero_grad()
        net.forward_actor(torch.from_numpy(flat[None])).square().sum().backward()
        adam.step()


@pytest.mark.parametrize("member", range(5))
def test_shipped_members_choose_the_same_rows_with_the_same_probabilities(member: int) -> None:
    policy, rng = load_policy(SHIPPED / f"seed{member}"), np.random.default_rng(member)
    decides = load_trained(SHIPPED / f"seed{member}", policy.spec.hash)
    spec, moments = policy.spec, policy.normalizer
    for _ in range(100):
        filled = int(rng.integers(2, spec.max_candidates + 1))
        rows = np.zeros((spec.max_candidates, len(spec.candidate_features)), np.float32)
        spread = np.sqrt(moments.candidates.variance), np.sqrt(moments.state.variance)
        rows[:filled] = rng.normal(moments.candidates.mean, spread[0], (filled, rows.shape[1]))
        state = rng.normal(moments.state.mean, spread[1]).astype(np.float32)
        keys = tuple(f"{i + 1}xtp1pp1" for i in range(filled))
        given = Observation(state, rows, np.arange(spec.max_candidates) < filled, keys)
        logits = by_torch(policy.network, moments.normalise(given.flat()))
        wanted = masked_softmax(logits.astype(np.float64), given.mask)
        found = policy.probabilities(given)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert found.argmax() == wanted.argmax()
        np.testing.assert_array_equal(decides.probabilities(given), found)


def test_copies_choose_alike() -> None:
    net = network("candidates", 1)
    policy = PpoPolicy(SPEC, net, NetworkConfig(hidden_size=16), ObservationNormalizer(SPEC))
    rows = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    given = Observation(np.zeros(3, np.float32), rows, np.ones(5, np.bool_), tuple("abcde"))
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert (other.probabilities(given) == policy.probabilities(given)).all()
