"""Cloning: targets by hand, a network that imitates, files that say how they came about."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pick_the_best import SPEC, PickTheBest

from engine.errors import InvalidRequestError
from policies.cloning import CloningConfig, Demonstrations, clone
from policies.networks import CandidateNetwork
from policies.ppo import PpoConfig

PPO = PpoConfig(hidden_size=16)
CONFIG = CloningConfig(num_decisions=2000, epochs=30, learning_rate=3e-3, temperature=0.1)


def of_the_best(number: int = 2000) -> Demonstrations:
    """An expert whose row is the legal one of largest worth, at a cost of minus that."""
    env = PickTheBest(number, seed=0)
    env.reset()
    worth = np.stack([o.candidates[:, 1] for o in env.now])
    costs = np.where(env.masks, -worth, np.inf).astype(np.float32)
    return Demonstrations(np.stack([o.flat() for o in env.now]), env.masks.copy(), costs)


def test_targets_by_hand() -> None:
    costs = np.array([[0.99, 0.9, np.inf], [0.0, np.inf, np.inf]], np.float32)
    given = Demonstrations(np.zeros((2, 3), np.float32), np.isfinite(costs), costs)
    assert given.rows.tolist() == [1, 0]
    share = np.exp(-0.09 / 0.03)  # keep's, to 1 of the best
    expected = [[share / (1 + share), 1 / (1 + share), 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(given.targets(0.03), expected, rtol=1e-5)
    np.testing.assert_array_equal(given.targets(0.0), [[0, 1, 0], [1, 0, 0]])


def test_a_clone_does_what_its_expert_does_on_states_it_has_not_seen() -> None:
    policy, report = clone(SPEC, CONFIG, PPO, of_the_best(), seed=0)
    assert (report.num_decisions, report.num_held_out) == (1600, 400)
    assert report.accuracy > 0.9
    assert report.switch_accuracy > 0.85
    assert 0.2 < report.keep_share < 0.4  # a third or so, of one of four rows masked
    assert 0.0 <= report.regret < 0.05
    exam = PickTheBest(400, seed=7)
    exam.reset()
    exam.step_async(np.array([int(policy.probabilities(o).argmax()) for o in exam.now]))
    assert exam.step_wait()[1].mean() > 0.85


def test_learning_costs_finds_what_is_best_in_the_mean() -> None:
    """One row gains 1 most of the time and loses 5 now and then: the cheapest is mostly that row,
    the cheapest in the mean is keep."""
    env = PickTheBest(1000, seed=0)
    env.reset()
    flat, rng = np.stack([o.flat() for o in env.now]), np.random.default_rng(0)
    mask = np.tile(np.array([True, True, False, False]), (1000, 1))
    costs = np.full(mask.shape, np.inf, np.float32)
    costs[:, 0], costs[:, 1] = 0.0, np.where(rng.random(1000) < 0.3, 5.0, -1.0)
    given = Demonstrations(flat, mask, costs)
    assert (given.rows == 1).mean() > 0.6
    settings = replace(CONFIG, learn="costs", temperature=1.0)
    policy, _ = clone(SPEC, settings, PPO, given, seed=0)
    with torch.no_grad():
        logits = policy.network.forward_actor(torch.from_numpy(policy.normalizer.normalise(flat)))
    gains = (logits[:, 1] - logits[:, 0]).numpy()
    assert gains.mean() == pytest.approx(-0.8, abs=0.3)  # 0.7 * 1 - 0.3 * 5, at temperature 1
    assert (gains < 0).mean() > 0.9


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"expert": "rollouts"}, "set cloning.learn to 'costs'"),
        ({"learn": "costs", "temperature": 0.0}, "needs a temperature above 0"),
    ],
)
def test_settings_that_would_teach_the_wrong_thing(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        CloningConfig(**wrong)


def test_the_critic_and_the_seed_s_start_are_left_alone() -> None:
    given = of_the_best(300)
    short = replace(CONFIG, epochs=1)
    policy, _ = clone(SPEC, short, PPO, given, seed=4)
    again, _ = clone(SPEC, short, PPO, given, seed=4)
    torch.manual_seed(4)
    fresh = CandidateNetwork(SPEC, PPO.network).state_dict()
    for name, weight in policy.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name])
        if name.startswith(("critic", "value")):
            assert torch.equal(weight, fresh[name])
    assert not torch.equal(policy.network.logit.weight, fresh["logit.weight"])
    np.testing.assert_allclose(
        policy.normalizer.state.mean, given.flat[:240, :1].mean(0), rtol=1e-6
    )


def test_files_say_how_they_came_about(tmp_path: Path) -> None:
    given, path = of_the_best(20), tmp_path / "new" / "decisions.safetensors"
    given.save(path, {"expert": "mpc", "seed": "1"})
    found = Demonstrations.load(path, {"expert": "mpc", "seed": "1"})
    for name in ("flat", "mask", "costs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    with pytest.raises(InvalidRequestError, match="made with another seed; delete the file"):
        Demonstrations.load(path, {"expert": "mpc", "seed": "2"})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InvalidRequestError, match="holds no decisions of an expert"):
        Demonstrations.load(path, {})


def test_too_little_to_learn_from() -> None:
    with pytest.raises(InvalidRequestError, match="set a larger"):
        clone(SPEC, CONFIG, PPO, of_the_best(20).part(slice(0)), seed=0)
    with pytest.raises(InvalidRequestError, match="held_out in"):
        CloningConfig(held_out=1.0)
