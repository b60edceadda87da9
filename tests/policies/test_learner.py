"""The learner's losses and its buffer: by hand, and against sb3-contrib's own."""

import dataclasses

import numpy as np
import pytest
import torch
from pick_the_best import SPEC, PickTheBest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import (
    MaskableRolloutBuffer,
    MaskableRolloutBufferSamples,
)
from stable_baselines3.common.vec_env import VecMonitor

from policies.learner import CandidatePPO, GroupedRolloutBuffer, masked_log_softmax
from policies.networks import CandidateNetwork, CandidatePolicy
from policies.normalized_venv import NormalizedVecEnv
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoConfig

CONFIG = PpoConfig(n_timesteps=1024, n_steps=16, batch_size=64, n_epochs=3, hidden_size=8)


def learner(config: PpoConfig = CONFIG, seed: int = 0) -> CandidatePPO:
    venv = NormalizedVecEnv(VecMonitor(PickTheBest(16, seed)), ObservationNormalizer(SPEC), config)
    model = CandidatePPO(venv, config, SPEC, seed, None)
    model.num_timesteps = 1
    return model


def batch(num_free: int, num_forced: int, seed: int = 0) -> MaskableRolloutBufferSamples:
    """Free states, then forced ones."""
    rng = np.random.default_rng(seed)
    number = num_free + num_forced
    mask = np.ones((number, 4), np.float32)
    mask[:, 3] = 0.0
    mask[num_free:, 1:] = 0.0
    action = np.where(np.arange(number) < num_free, rng.integers(0, 3, number), 0)
    columns = [
        rng.normal(size=(number, SPEC.flat_size)),
        action[:, None],
        rng.normal(size=number),
        np.where(np.arange(number) < num_free, np.log(rng.uniform(0.2, 0.5, number)), 0.0),
        rng.normal(size=number),
        rng.normal(size=number),
        mask,
    ]
    return MaskableRolloutBufferSamples(*(torch.tensor(c, dtype=torch.float32) for c in columns))


def test_masked_log_softmax_by_hand() -> None:
    logits, mask = torch.tensor([[0.0, np.log(3.0), 50.0]]), torch.tensor([[True, True, False]])
    np.testing.assert_allclose(
        masked_log_softmax(logits, mask).exp(), [[0.25, 0.75, 0.0]], rtol=1e-6
    )


def test_forced_states_stay_out_of_the_actor_loss_and_in_the_value_loss() -> None:
    model, mixed = learner(), batch(12, 20)
    free = MaskableRolloutBufferSamples(*(column[:12] for column in mixed))
    found, alone = model.losses(mixed), model.losses(free)
    for name in ("policy_loss", "entropy", "approx_kl", "clipfrac", "actor_loss"):
        assert float(found[name].detach()) == pytest.approx(float(alone[name].detach()), rel=1e-5)
    values = model.policy.network.forward_critic(mixed.observations).flatten()
    error = (values - mixed.returns).square().mean()
    assert float(found["value_loss"].detach()) == pytest.approx(float(error.detach()), rel=1e-5)
    everywhere = learner(dataclasses.replace(CONFIG, skip_forced=False)).losses(mixed)
    assert float(everywhere["entropy"].detach()) == pytest.approx(
        float(found["entropy"].detach()) * 12 / 32, rel=1e-5
    )  # a forced state has none


@pytest.mark.parametrize(("num_free", "num_forced"), [(0, 8), (1, 7)])
def test_batches_with_no_choice_or_one(num_free: int, num_forced: int) -> None:
    model = learner()
    losses = model.losses(batch(num_free, num_forced))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    gradients = [p.grad for p in model.policy.network.actor.parameters()]
    assert all(g is None for g in gradients) == (num_free == 0)
    assert ("policy_loss" in losses) == (num_free > 0)


def test_the_critic_is_warmed_up_alone() -> None:
    model = learner(dataclasses.replace(CONFIG, critic_warmup=2))
    size = CONFIG.n_steps * 16
    for num_timesteps, acts in ((size, False), (2 * size, False), (3 * size, True)):
        model.num_timesteps = num_timesteps
        assert ("policy_loss" in model.losses(batch(8, 8))) == acts


def test_it_learns_what_sb3_contrib_learns() -> None:
    """With nothing of this project's own, the weights after eight updates are MaskablePPO's."""
    config = dataclasses.replace(
        CONFIG, skip_forced=False, n_timesteps=2048, lr_decay=False, target_kl=None
    )
    ours = learner(config, seed=3)
    before = {k: v.clone() for k, v in ours.policy.state_dict().items()}
    ours.learn(config.n_timesteps)
    venv = NormalizedVecEnv(VecMonitor(PickTheBest(16, 3)), ObservationNormalizer(SPEC), config)
    names = ("learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda")
    names += ("clip_range", "ent_coef", "vf_coef", "max_grad_norm", "target_kl")
    theirs = MaskablePPO(
        CandidatePolicy,
        venv,
        policy_kwargs={"spec": SPEC, "network": config.network},
        seed=3,
        device="cpu",
        **{name: getattr(config, name) for name in names},
    )
    theirs.learn(config.n_timesteps)
    moved = 0.0
    for name, weight in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], weight, atol=2e-4, rtol=0.0)
        moved = max(moved, float((weight - before[name]).abs().max()))
    assert moved > 5e-3


# ---------------------------------------------------------------- the prior


def test_divergence_from_the_prior_is_torch_s() -> None:
    model, given = learner(dataclasses.replace(CONFIG, kl_prior_coef=0.5)), batch(6, 3)
    torch.manual_seed(5)
    prior = CandidateNetwork(SPEC, CONFIG.network)
    with torch.no_grad():
        prior.logit.weight.mul_(300)
    model.prior = prior
    losses = model.losses(given)
    free, legal = given.observations[:6], given.action_masks[:6] > 0.5
    logits = [n.forward_actor(free)[:, :3] for n in (model.policy.network, prior)]
    assert not legal[:, 3].any()
    pi, q = (torch.distributions.Categorical(logits=each) for each in logits)
    expected = float(torch.distributions.kl_divergence(pi, q).mean().detach())
    assert expected > 0.01
    assert float(losses["kl_prior"].detach()) == pytest.approx(expected, rel=1e-4)
    parts = losses["policy_loss"] - CONFIG.ent_coef * losses["entropy"] + 0.5 * expected
    assert float(losses["actor_loss"].detach()) == pytest.approx(float(parts.detach()), rel=1e-4)
    losses["loss"].backward()
    assert all(p.grad is None for p in prior.parameters())
    model.prior = model.policy.network
    assert float(model.losses(given)["kl_prior"].detach()) == pytest.approx(0.0, abs=1e-7)


def test_the_prior_s_weight_falls_with_the_run() -> None:
    config = dataclasses.replace(CONFIG, kl_prior_coef=0.4)
    falling, steady = learner(config), learner(dataclasses.replace(config, kl_prior_decay=False))
    for model in (falling, steady):
        model._update_current_progress_remaining(256, 1024)
    assert falling.kl_prior_coef == pytest.approx(0.3)
    assert steady.kl_prior_coef == pytest.approx(0.4)


# ---------------------------------------------------------------- the buffer


def filled(kind: type[MaskableRolloutBuffer], **options: int) -> MaskableRolloutBuffer:
    """Two steps of four environments; gamma = lambda = 0.5, all values 1 and 1 after the end."""
    env = PickTheBest(4, 0)
    buffer = kind(
        2,
        env.observation_space,
        env.action_space,
        "cpu",
        gamma=0.5,
        gae_lambda=0.5,
        n_envs=4,
        **options,
    )
    ones = torch.ones(4)
    for rewards in ([1.0, 2.0, 3.0, 4.0], [8.0, 0.0, 2.0, 6.0]):
        buffer.add(
            np.zeros((4, SPEC.flat_size)),
            np.zeros(4),
            np.array(rewards),
            np.zeros(4),
            ones,
            ones,
            action_masks=np.ones((4, 4)),
        )
    buffer.compute_returns_and_advantage(ones, np.zeros(4))
    return buffer


def test_advantages_of_the_others_by_hand() -> None:
    """delta = r + 0.5 - 1; A_1 = delta_1; A_0 = delta_0 + 0.25 A_1."""
    last = np.array([7.5, -0.5, 1.5, 5.5])
    first = np.array([0.5, 1.5, 2.5, 3.5]) + 0.25 * last
    plain = filled(GroupedRolloutBuffer)
    np.testing.assert_allclose(plain.advantages, [first, last])
    pairs = filled(GroupedRolloutBuffer, group_size=2)
    np.testing.assert_allclose(pairs.advantages[1], [8.0, -8.0, -4.0, 4.0])
    np.testing.assert_allclose(pairs.advantages[0], first - first[[1, 0, 3, 2]])
    four = filled(GroupedRolloutBuffer, group_size=4)
    others = [(last.sum() - own) / 3 for own in last]
    np.testing.assert_allclose(four.advantages[1], last - others, rtol=1e-6)
    scaled = filled(GroupedRolloutBuffer, group_size=2, scale_groups=True)
    for group in (slice(0, 2), slice(2, 4)):
        spread = pairs.advantages[:, group].std()
        np.testing.assert_allclose(
            scaled.advantages[:, group], pairs.advantages[:, group] / spread, rtol=1e-5
        )
    for buffer in (plain, pairs, four, scaled):
        np.testing.assert_array_equal(buffer.returns, filled(MaskableRolloutBuffer).returns)
