"""MaskablePPO over candidate deployments: hyper-parameters, training, and the trained policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor

from policies.base import Floats, Observation, ObservationSpec
from policies.networks import CandidateNetwork, CandidatePolicy, NetworkConfig
from policies.normalizer import ObservationNormalizer, RunningMoments

REWARD_CLIP = 10.0  # standard deviations of the discounted return


@dataclass(frozen=True, slots=True)
class PpoConfig:
    """Hyper-parameters of training. Every one is stored in the checkpoint."""

    n_timesteps: int = 200_000  # decisions in total, over all environments
    n_steps: int = 128  # decisions per environment and rollout
    batch_size: int = 1024  # decisions per gradient step
    n_epochs: int = 5  # passes over each rollout
    learning_rate: float = 5e-4  # of Adam, at the start
    lr_decay: bool = True  # fall linearly to zero over the run
    gamma: float = 0.985  # discount per decision; 15 s grid: a horizon of about 17 minutes
    gae_lambda: float = 0.95  # bias/variance of the advantage (Schulman et al. 2016)
    clip_range: float = 0.2  # trust region of the probability ratio (Schulman et al. 2017)
    ent_coef: float = 0.003  # entropy bonus; keeps exploring among near-equal candidates
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients are scaled down to this norm
    target_kl: float | None = 0.03  # stop a rollout's updates beyond 1.5 times this KL
    group_size: int = 1  # environments in a row that meet the same traffic; their mean reward at
    # each decision is subtracted: a baseline for what no policy decides (Mao et al. 2019, 4.2)
    normalise_reward: bool = True  # divide by the running std of the discounted return
    hidden_size: int = 64  # width of every layer
    keep_weight: float = 1.0  # initial preference for keep, see NetworkConfig

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(self.hidden_size, self.keep_weight)


class PpoPolicy:
    """A trained network as a `Policy`: normalise, score, masked softmax."""

    def __init__(
        self,
        spec: ObservationSpec,
        network: CandidateNetwork,
        network_config: NetworkConfig,
        normalizer: ObservationNormalizer,
        name: str = "ppo",
    ) -> None:
        self.spec, self.network, self.network_config = spec, network.eval(), network_config
        self.normalizer, self._name = normalizer, name

    @property
    def name(self) -> str:
        return self._name

    def reset(self) -> None:
        """Nothing to clear: history is part of the observation."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """[K] float64; see `policies.base.Policy`."""
        assert observation.mask.any(), "no legal candidate; keep must always be legal"
        flat = torch.from_numpy(self.normalizer.normalise(observation.flat())[None])
        with torch.no_grad():
            logits = self.network.forward_actor(flat)[0].numpy().astype(np.float64)
        return masked_softmax(logits, observation.mask)

    def value(self, observation: Observation) -> float:
        """The critic's estimate, in the (normalised) reward's unit of the training run."""
        flat = torch.from_numpy(self.normalizer.normalise(observation.flat())[None])
        with torch.no_grad():
            return float(self.network.forward_critic(flat)[0, 0])


def masked_softmax(logits: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Softmax over the rows where mask is True, exactly zero elsewhere."""
    weights = np.where(mask, np.exp(logits - logits[mask].max()), 0.0)
    share: NDArray[np.float64] = weights / weights.sum()
    return share


class NormalizedVecEnv(VecEnvWrapper):
    """Normalises observations (and rewards) and learns the statistics while it does so."""

    def __init__(self, venv: VecEnv, normalizer: ObservationNormalizer, config: PpoConfig) -> None:
        super().__init__(venv)
        assert venv.num_envs % config.group_size == 0, (venv.num_envs, config.group_size)
        self._normalizer, self._config = normalizer, config
        self._returns = np.zeros(venv.num_envs)
        self._moments = RunningMoments(1)

    def reset(self) -> Floats:
        return self._observe(np.asarray(self.venv.reset(), np.float32))

    def step_wait(self) -> tuple[Floats, Any, Any, list[dict[str, Any]]]:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if info.get("terminal_observation") is not None:
                last = np.asarray(info["terminal_observation"], np.float32)
                info["terminal_observation"] = self._normalizer.normalise(last)
        scaled = self._relative(rewards)
        if self._config.normalise_reward:
            scaled = self._scale(scaled, dones)
        return self._observe(np.asarray(observations, np.float32)), scaled, dones, infos

    def _observe(self, flat: Floats) -> Floats:
        self._normalizer.update(flat)
        return self._normalizer.normalise(flat)

    def _relative(self, rewards: Any) -> Any:
        if self._config.group_size == 1:
            return rewards
        groups = np.asarray(rewards).reshape(-1, self._config.group_size)
        return (groups - groups.mean(axis=1, keepdims=True)).ravel()

    def _scale(self, rewards: Any, dones: Any) -> Any:
        """Rewards over the std of the running discounted return; the mean is left alone."""
        self._returns = self._returns * self._config.gamma + rewards
        self._moments.update(self._returns[:, None])
        self._returns[np.asarray(dones, bool)] = 0.0
        std = float(np.sqrt(self._moments.variance[0] + 1e-8))
        return np.clip(rewards / std, -REWARD_CLIP, REWARD_CLIP).astype(np.float32)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run leaves: the policy, Adam's state, and how it went."""

    policy: PpoPolicy
    optimizer_state: dict[str, Any]  # torch.optim state_dict
    num_timesteps: int
    wall_s: float
    interrupted: bool
    reward_curve: tuple[tuple[int, float], ...]  # (decisions, mean episode reward), each rollout


class _Curve(BaseCallback):
    """Mean episode reward (unscaled) at the end of each rollout; tells `report` how far it is."""

    def __init__(self, report: Callable[[int], None] | None) -> None:
        super().__init__()
        self.points: list[tuple[int, float]] = []
        self._report = report

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        done = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        if done:
            self.points.append((self.num_timesteps, float(np.mean(done))))
        if self._report is not None:
            self._report(self.num_timesteps)


def build_model(
    venv: VecEnv, config: PpoConfig, spec: ObservationSpec, seed: int, log_dir: Path | None
) -> MaskablePPO:
    """MaskablePPO with `CandidatePolicy` on an already normalised VecEnv."""
    rate = config.learning_rate
    return MaskablePPO(
        CandidatePolicy,
        venv,
        learning_rate=(lambda left: rate * left) if config.lr_decay else rate,
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
        tensorboard_log=None if log_dir is None else str(log_dir),
        policy_kwargs={"spec": spec, "network": config.network},
        seed=seed,
        device="cpu",
    )


def train(
    venv: VecEnv,
    config: PpoConfig,
    spec: ObservationSpec,
    seed: int,
    *,
    log_dir: Path | None = None,
    progress: bool = False,
    report: Callable[[int], None] | None = None,
    callbacks: Sequence[BaseCallback] = (),
) -> TrainingResult:
    """Train on `venv` (raw flat observations, `action_masks` per environment).

    TensorBoard events go to log_dir. An interrupt (Ctrl-C) ends training early and keeps what was
    learned. The caller owns and closes `venv`.
    """
    torch.set_num_threads(1)
    normalizer, curve = ObservationNormalizer(spec), _Curve(report)
    normalised = NormalizedVecEnv(VecMonitor(venv), normalizer, config)
    model = build_model(normalised, config, spec, seed, log_dir)
    started, interrupted = time.perf_counter(), False
    try:
        model.learn(
            config.n_timesteps,
            callback=[curve, *callbacks],
            tb_log_name="ppo",
            progress_bar=progress,
        )
    except KeyboardInterrupt:
        interrupted = True
    assert isinstance(model.policy, CandidatePolicy)
    return TrainingResult(
        policy=PpoPolicy(spec, model.policy.network, config.network, normalizer),
        optimizer_state=model.policy.optimizer.state_dict(),
        num_timesteps=int(model.num_timesteps),
        wall_s=time.perf_counter() - started,
        interrupted=interrupted,
        reward_curve=tuple(curve.points),
    )
