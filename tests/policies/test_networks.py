"""The network treats candidates as a set, and the normaliser's numbers are numpy's."""

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError, InvalidRequestError
from policies.base import Observation, ObservationSpec
from policies.inference import NetworkConfig, masked_softmax
from policies.networks import CandidateNetwork, build_network
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy

SPEC = ObservationSpec(("rate", "queue"), ("is_keep", "headroom", "switch_s"), 5, 15.0)


def observation(rng: np.random.Generator, num_filled: int = 4) -> Observation:
    rows = np.zeros((SPEC.max_candidates, 3), np.float32)
    rows[:num_filled] = rng.normal(size=(num_filled, 3))
    mask = np.arange(SPEC.max_candidates) < num_filled
    keys = tuple(f"{i + 1}xtp1pp1" for i in range(num_filled))
    return Observation(rng.normal(size=2).astype(np.float32), rows, mask, keys)


def policy(seed: int = 0, spec: ObservationSpec = SPEC) -> PpoPolicy:
    torch.manual_seed(seed)
    network = CandidateNetwork(spec, NetworkConfig())
    with torch.no_grad():  # large logits, so that equality says something
        network.logit.weight.mul_(100)
    normalizer = ObservationNormalizer(spec)
    batch = np.random.default_rng(1).normal(2.0, 3.0, (64, spec.flat_size)).astype(np.float32)
    batch[:, -spec.max_candidates :] = 1.0
    normalizer.update(batch)
    return PpoPolicy(spec, network, NetworkConfig(), normalizer)


def test_permuting_rows_permutes_probabilities_and_leaves_the_value() -> None:
    rng = np.random.default_rng(0)
    trained, given = policy(), observation(rng, num_filled=4)
    order = np.array([2, 0, 3, 1, 4])
    keys = tuple(given.keys[i] for i in order[:4])
    shuffled = Observation(given.state, given.candidates[order], given.mask[order], keys)
    before, after = trained.probabilities(given), trained.probabilities(shuffled)
    np.testing.assert_allclose(after, before[order], atol=1e-6)
    assert before[:4].max() - before[:4].min() > 0.05
    assert trained.value(shuffled) == pytest.approx(trained.value(given), abs=1e-5)


def plainly(network: CandidateNetwork, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and values of one observation after the other, all rows through the layers as they
    stand."""
    logits, values = torch.zeros(len(flat), SPEC.max_candidates), torch.zeros(len(flat), 1)
    for b, each in enumerate(flat):
        state, rest = each[:2], each[2:]
        rows, valid = rest[:-5].reshape(5, 3), rest[-5:] > 0.5
        found = []
        for encoder in (network.actor, network.critic):
            embedding = encoder.state(state)
            both = torch.cat([rows, embedding.expand(5, -1)], dim=-1)
            found.append((embedding, encoder.rows(both)))
        (_, acting), (embedding, valued) = found
        logits[b] = ((network.logit(acting) + network.direct(rows))[:, 0]).where(valid, 0.0)
        pooled = [valued[valid].mean(dim=0), valued[valid].amax(dim=0)]
        values[b] = network.value(torch.cat([embedding, *pooled]))
    return logits, values


def test_looking_at_valid_rows_alone_gives_what_all_give_and_its_gradients() -> None:
    rng, network = np.random.default_rng(5), policy().network
    assert isinstance(network, CandidateNetwork)
    given = [observation(rng, num_filled=n).flat() for n in (1, 3, 5, 2)]
    flat = torch.from_numpy(np.stack(given))
    flat[1, -5:] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])  # not the first ones
    sides = []
    for found in (network(flat), plainly(network, flat)):
        network.zero_grad()
        (found[0].square().sum() + found[1].square().sum()).backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
        sides.append([*(each.detach() for each in found), *gradients])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    logits, values = network(torch.zeros(1, SPEC.flat_size))
    assert not logits.any()
    assert torch.isfinite(values).all()


def test_weights_do_not_depend_on_the_number_of_rows() -> None:
    small = policy()
    grown = small.with_max_candidates(9)
    assert grown.spec == ObservationSpec(SPEC.state_features, SPEC.candidate_features, 9, 15.0)
    given = observation(np.random.default_rng(3))
    rows = np.vstack([given.candidates, np.zeros((4, 3), np.float32)])
    padded = Observation(given.state, rows, np.append(given.mask, [False] * 4), given.keys)
    np.testing.assert_allclose(
        grown.probabilities(padded)[:5], small.probabilities(given), atol=1e-6
    )
    assert grown.value(padded) == pytest.approx(small.value(given), abs=1e-5)


def test_a_network_without_that_is_refused() -> None:
    plain = NetworkConfig(hidden_size=4, kind="mlp")
    trained = PpoPolicy(SPEC, build_network(SPEC, plain), plain, ObservationNormalizer(SPEC))
    with pytest.raises(InvalidRequestError, match="has weights for 5 rows, not 9"):
        trained.with_max_candidates(9)


def test_masked_rows_have_probability_zero() -> None:
    given = observation(np.random.default_rng(4))
    mask = np.array([True, False, True, False, False])
    given = Observation(given.state, given.candidates, mask, given.keys)
    probabilities = policy().probabilities(given)
    assert (probabilities[~mask] == 0.0).all()
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert (probabilities[mask] > 0).all()


def test_softmax_by_hand() -> None:
    logits = np.log(np.array([1.0, 3.0, 100.0]))
    np.testing.assert_allclose(
        masked_softmax(logits, np.array([True, True, False])), [0.25, 0.75, 0.0]
    )


def test_an_untrained_network_prefers_keep() -> None:
    rng, keeps = np.random.default_rng(5), []
    network = CandidateNetwork(SPEC, NetworkConfig(keep_weight=1.0))
    normalizer = ObservationNormalizer(SPEC)
    given = []
    for _ in range(50):
        one = observation(rng)
        rows = one.candidates.copy()
        rows[:, 0] = 0.0
        rows[0, 0] = 1.0
        given.append(Observation(one.state, rows, one.mask, one.keys))
    normalizer.update(np.stack([o.flat() for o in given]))
    fresh = PpoPolicy(SPEC, network, NetworkConfig(), normalizer)
    keeps = [fresh.probabilities(o)[0] for o in given]
    assert min(keeps) > 0.5


def test_statistics_are_numpy_s_over_valid_rows_only() -> None:
    rng = np.random.default_rng(6)
    normalizer = ObservationNormalizer(SPEC)
    given = [observation(rng, num_filled=int(n)) for n in rng.integers(1, 6, 40)]
    flats = np.stack([o.flat() for o in given])
    for start in (0, 7, 30):  # unequal batches
        normalizer.update(flats[start : {0: 7, 7: 30, 30: 40}[start]])
    rows = np.concatenate([o.candidates[: len(o.keys)] for o in given])
    states = np.stack([o.state for o in given])
    np.testing.assert_allclose(normalizer.candidates.mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(normalizer.candidates.variance, rows.var(0), atol=1e-6)
    np.testing.assert_allclose(normalizer.state.variance, states.var(0), atol=1e-6)
    scaled = normalizer.normalise(flats)
    np.testing.assert_allclose(
        scaled[0, :2], (states[0] - states.mean(0)) / states.std(0), atol=1e-5
    )
    unused = scaled[:, 2:17].reshape(-1, 5, 3)[flats[:, 17:] < 0.5]
    assert (unused == 0).all()
    np.testing.assert_array_equal(normalizer.normalise(flats[3]), scaled[3])


def test_constant_features_are_centred_not_blown_up() -> None:
    normalizer = ObservationNormalizer(SPEC)
    flat = np.ones((10, SPEC.flat_size), np.float32)
    normalizer.update(flat)
    assert (normalizer.normalise(flat)[:, :17] == 0).all()
    assert np.abs(normalizer.normalise(flat + 1e-3)[:, :17]).max() < 2e-3


def test_statistics_of_another_size_are_refused() -> None:
    other = ObservationSpec(("rate",), ("is_keep",), 5, 15.0)
    with pytest.raises(CheckpointError, match="cover 2 features, expected 1"):
        ObservationNormalizer.from_json(ObservationNormalizer(SPEC).to_json(), other)
