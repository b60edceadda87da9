"""What PPO over candidate deployments is set with, and what comes of it: a trained policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from engine.errors import InvalidRequestError
from policies.base import Observation, ObservationSpec
from policies.inference import NetworkConfig, TrainedPolicy
from policies.networks import Network, actor_in, build_network
from policies.normalizer import ObservationNormalizer


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
    skip_forced: bool = True  # states with one legal row stay out of the actor's loss
    group_size: int = 1  # environments in a row that meet the same traffic; the mean advantage of
    # the others is subtracted from each one's: a baseline for what no policy decides; 1: none
    scale_groups: bool = False  # divide the advantages of each group by their own spread
    kl_prior_coef: float = (
        0.0  # weight of KL(policy || prior), the policy that training starts from
    )
    kl_prior_decay: bool = True  # that weight falls linearly to zero over the run
    critic_warmup: int = 0  # first rollouts that train the critic alone, for a start from a prior
    normalise_reward: bool = True  # divide by the running std of the discounted return
    network_kind: Literal["candidates", "mlp"] = "candidates"  # see NetworkConfig
    hidden_size: int = 64  # width of every layer
    keep_weight: float = 1.0  # initial preference for keep, see NetworkConfig

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(self.hidden_size, self.keep_weight, self.network_kind)


class PpoPolicy(TrainedPolicy):
    """With the network itself, which can be trained further."""

    def __init__(
        self,
        spec: ObservationSpec,
        network: Network,
        network_config: NetworkConfig,
        normalizer: ObservationNormalizer,
        name: str = "ppo",
    ) -> None:
        self.network = network.eval()
        actor = actor_in(network, network_config)
        super().__init__(spec, actor, network_config, normalizer, name)

    def with_max_candidates(self, number: int) -> PpoPolicy:
        """The same weights and statistics for another number of rows: neither depends on it.

        Raises InvalidRequestError for a network whose weights do.
        """
        if self.network_config.kind != "candidates":
            raise InvalidRequestError(
                f"a network of kind {self.network_config.kind!r} has weights for "
                f"{self.spec.max_candidates} rows, not {number}; train one of kind 'candidates'."
            )
        spec = replace(self.spec, max_candidates=number)
        network = build_network(spec, self.network_config)
        network.load_state_dict(self.network.state_dict())
        normalizer = ObservationNormalizer.from_json(self.normalizer.to_json(), spec)
        return PpoPolicy(spec, network, self.network_config, normalizer, self._name)

    def value(self, observation: Observation) -> float:
        """The critic's estimate, in the (normalised) reward's unit of the training run."""
        flat = torch.from_numpy(self.normalizer.normalise(observation.flat())[None])
        with torch.no_grad():
            return float(self.network.forward_critic(flat)[0, 0])
