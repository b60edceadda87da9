"""MaskablePPO with the losses of this project: forced states, a prior, a baseline of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import (
    MaskableRolloutBuffer,
    MaskableRolloutBufferSamples,
)
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn.functional import mse_loss

from policies.base import ObservationSpec
from policies.networks import CandidatePolicy, Network
from policies.ppo import PpoConfig

ILLEGAL = -1e8  # a logit whose softmax is exactly zero, and finite, so that 0 * log 0 is 0
Losses = dict[str, Tensor]


def masked_log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities [B, K] over rows where mask [B, K] is True."""
    return torch.log_softmax(torch.where(mask, logits, ILLEGAL), dim=-1)


class GroupedRolloutBuffer(MaskableRolloutBuffer):
    """Advantages by group: `group_size` environments in a row, which meet identical arrivals.

    The mean advantage of the *others* at a step tells how lucky the traffic was and nothing of
    one's own action: subtracting it leaves the gradient's mean alone and takes out the variance of
    the input (Mao et al. 2019, arXiv 1807.02264, section 4.2). With `scale_groups` each group is
    then divided by its own spread over the rollout (as Shao et al. 2024 do per question, arXiv
    2402.03300), so that a quiet hour teaches as much as one in which queues run full. Targets of
    the value stay as they are.
    """

    def __init__(
        self, *args: Any, group_size: int = 1, scale_groups: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        assert self.n_envs % group_size == 0, (self.n_envs, group_size)
        self.group_size, self.scale_groups = group_size, scale_groups

    def compute_returns_and_advantage(self, last_values: Tensor, dones: Any) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        grouped = self.advantages.reshape(self.buffer_size, -1, self.group_size)
        if self.group_size > 1:
            others = grouped.sum(axis=-1, keepdims=True) - grouped
            grouped = grouped - others / (self.group_size - 1)
        if self.scale_groups:
            grouped = grouped / (grouped.std(axis=(0, 2), keepdims=True) + 1e-8)
        self.advantages = grouped.reshape(self.advantages.shape)


class CandidatePPO(MaskablePPO):
    """PPO by a `PpoConfig`, on an already normalised VecEnv.

    `prior`: a network that is never trained; set it before `learn`, where `kl_prior_coef` asks for
    one. CPU alone: a network of this size is faster there.
    """

    policy: CandidatePolicy
    prior: Network | None

    def __init__(
        self,
        venv: VecEnv,
        config: PpoConfig,
        spec: ObservationSpec,
        seed: int,
        log_dir: Path | None,
    ) -> None:
        rate = config.learning_rate
        self.config, self.prior = config, None
        super().__init__(
            CandidatePolicy,
            venv,
            # the last rollout may end past n_timesteps
            learning_rate=(lambda left: rate * max(left, 0.0)) if config.lr_decay else rate,
            n_steps=config.n_steps,
            batch_size=min(config.batch_size, config.n_steps * venv.num_envs),
            n_epochs=config.n_epochs,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip_range,
            ent_coef=config.ent_coef,
            vf_coef=config.vf_coef,
            max_grad_norm=config.max_grad_norm,
            target_kl=config.target_kl,
            rollout_buffer_class=GroupedRolloutBuffer,
            rollout_buffer_kwargs={
                "group_size": config.group_size,
                "scale_groups": config.scale_groups,
            },
            tensorboard_log=None if log_dir is None else str(log_dir),
            policy_kwargs={"spec": spec, "network": config.network},
            seed=seed,
            device="cpu",
        )

    # ---------------------------------------------------------------- the updates of a rollout

    def train(self) -> None:
        """Clipped surrogate, entropy and KL to the prior on states where there is a choice, and
        the value's error on all; see `PpoConfig` for the weights."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        seen: list[Losses] = []
        for _ in range(self.n_epochs):
            near = all(self._update(losses) for losses in self._batches(seen))
            self._n_updates += 1
            if not near:
                break
        self._log(seen)

    def _batches(self, seen: list[Losses]) -> Iterator[Losses]:
        for batch in self.rollout_buffer.get(self.batch_size):
            losses = self.losses(batch)
            seen.append({name: value.detach() for name, value in losses.items()})
            yield losses

    def _update(self, losses: Losses) -> bool:
        """One step of Adam; False, and no step, where the policy has moved too far already."""
        moved = losses.get("approx_kl")
        if self.target_kl is not None and moved is not None and moved > 1.5 * self.target_kl:
            return False
        optimizer = self.policy.optimizer
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        optimizer.step()
        return True

    def losses(self, batch: MaskableRolloutBufferSamples) -> Losses:
        """Scalars; those of the actor are missing where no state of the batch has a choice."""
        values = self.policy.network.forward_critic(batch.observations).flatten()
        found = {"value_loss": mse_loss(values, batch.returns)}
        found["loss"] = self.vf_coef * found["value_loss"]
        mask = batch.action_masks > 0.5
        acting = self._acting(mask)
        if acting.any():
            found |= self._actor_losses(batch, mask, acting)
            found["loss"] = found["loss"] + found["actor_loss"]
        return found

    def _acting(self, mask: Tensor) -> Tensor:
        """[B] True where the actor learns."""
        warm_at = self.config.critic_warmup * self.n_steps * self.n_envs
        if self.num_timesteps <= warm_at:
            return torch.zeros(len(mask), dtype=torch.bool)
        least = 1 if self.config.skip_forced else 0
        return mask.sum(dim=1) > least

    def _actor_losses(
        self, batch: MaskableRolloutBufferSamples, mask: Tensor, acting: Tensor
    ) -> Losses:
        flat, mask = batch.observations[acting], mask[acting]
        log_p = masked_log_softmax(self.policy.network.forward_actor(flat), mask)
        action = batch.actions[acting].long().reshape(-1, 1)
        log_ratio = log_p.gather(1, action).flatten() - batch.old_log_prob[acting]
        ratio, clip = log_ratio.exp(), self.config.clip_range
        advantage = batch.advantages[acting]
        if len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
        found = {
            "policy_loss": -torch.min(advantage * ratio, advantage * clipped).mean(),
            "entropy": -(log_p.exp() * log_p).sum(dim=1).mean(),
            "approx_kl": (ratio - 1.0 - log_ratio).detach().mean(),  # Schulman 2020's k3
            "clipfrac": ((ratio - 1.0).abs() > clip).float().mean(),
        }
        found["actor_loss"] = found["policy_loss"] - self.ent_coef * found["entropy"]
        if self.prior is not None:
            found["kl_prior"] = self._kl_prior(self.prior, flat, mask, log_p)
            weight = self.kl_prior_coef
            found["actor_loss"] = found["actor_loss"] + weight * found["kl_prior"]
        return found

    @property
    def kl_prior_coef(self) -> float:
        """The weight at this point of the run."""
        left = max(self._current_progress_remaining, 0.0) if self.config.kl_prior_decay else 1.0
        return self.config.kl_prior_coef * left

    @staticmethod
    def _kl_prior(prior: Network, flat: Tensor, mask: Tensor, log_p: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = masked_log_softmax(prior.forward_actor(flat), mask)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()

    # ---------------------------------------------------------------- logs

    def _log(self, seen: list[Losses]) -> None:
        """Means over the updates, under the tags of Stable-Baselines3 and of CleanRL."""
        names = {name for losses in seen for name in losses}
        mean = {n: float(torch.stack([s[n] for s in seen if n in s]).mean()) for n in names}
        buffer = self.rollout_buffer
        mean["explained_variance"] = float(
            explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        )
        for name, value in mean.items():
            self.logger.record(f"losses/{name}", value)
        sb3 = {
            "policy_loss": "policy_gradient_loss",
            "value_loss": "value_loss",
            "approx_kl": "approx_kl",
            "clipfrac": "clip_fraction",
            "loss": "loss",
            "explained_variance": "explained_variance",
        }
        for name in sb3.keys() & mean.keys():
            self.logger.record(f"train/{sb3[name]}", mean[name])
        if "entropy" in mean:
            self.logger.record("train/entropy_loss", -mean["entropy"])
        left = self._current_progress_remaining
        self.logger.record("train/clip_range", self.config.clip_range)
        self.logger.record("charts/learning_rate", self.lr_schedule(left))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def frozen(network: Network) -> Network:
    """The network, never to be trained again."""
    return network.eval().requires_grad_(False)
