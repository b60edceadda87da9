"""The network: one shared scorer over candidate rows, so K is a fact of the data, not of weights.

Shapes: B observations, K candidate rows of which V in all are valid, S state features, C candidate
features, H hidden units.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from torch.nn.functional import linear

from policies.base import ObservationSpec
from policies.inference import Actor, NetworkConfig, build_actor
from policies.normalizer import FlatLayout

KEEP_FEATURE = "is_keep"


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Orthogonal weights, zero bias (as SB3 and Engstrom et al. 2020 start PPO)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ValidRows:
    """The valid rows of [B, K] ones, one after the other: most observations have few of them, so
    that nothing is computed for the others."""

    def __init__(self, valid: Tensor) -> None:
        self._shape = valid.shape
        self._at = (valid.reshape(-1) > 0.5).nonzero().flatten()

    def of(self, rows: Tensor) -> Tensor:
        """[B, K, F] -> [V, F]."""
        return rows.reshape(-1, rows.shape[-1]).index_select(0, self._at)

    def repeat(self, each: Tensor) -> Tensor:
        """What belongs to an observation for each of its rows: [B, F] -> [V, F]."""
        return each.index_select(0, self._at // self._shape[1])

    def spread(self, found: Tensor) -> Tensor:
        """[V, F] -> [B, K, F], zero where there is no row."""
        size, width = self._shape.numel(), found.shape[-1]
        spread = found.new_zeros(size, width).index_copy(0, self._at, found)
        return spread.reshape(*self._shape, width)


class RowEncoder(nn.Module):
    """State [B, S] and rows [B, K, C] -> state embedding [B, H] and embeddings [V, H] of the valid
    rows."""

    def __init__(self, layout: FlatLayout, hidden: int) -> None:
        super().__init__()
        gain = float(np.sqrt(2))
        self.state = nn.Sequential(_linear(layout.num_state, hidden, gain), nn.Tanh())
        self.rows = nn.Sequential(
            _linear(layout.num_features + hidden, hidden, gain),
            nn.Tanh(),
            _linear(hidden, hidden, gain),
            nn.Tanh(),
        )

    def forward(self, state: Tensor, rows: Tensor, valid: ValidRows) -> tuple[Tensor, Tensor]:
        embedding, width = self.state(state), rows.shape[-1]
        first = cast(nn.Linear, self.rows[0])  # of a row and the embedding: each for itself
        of_state = linear(embedding, first.weight[:, width:], first.bias)
        both = linear(valid.of(rows), first.weight[:, :width]) + valid.repeat(of_state)
        return embedding, self.rows[1:](both)


def pool(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean and max over valid rows: [B, K, H], [B, K] -> [B, 2H]. Blind to the order of rows."""
    weight = valid.unsqueeze(-1)
    mean = (rows * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
    top = rows.masked_fill(weight < 0.5, -1.0).amax(dim=1)  # tanh rows are never below -1
    return torch.cat([mean, top], dim=-1)


class CandidateNetwork(nn.Module):
    """Flat observation [B, flat_size] -> logits [B, K] and value [B, 1].

    Actor and critic have encoders of their own; every weight is independent of K.
    """

    def __init__(self, spec: ObservationSpec, config: NetworkConfig) -> None:
        super().__init__()
        self.layout, hidden = FlatLayout.of(spec), config.hidden_size
        self.actor = RowEncoder(self.layout, hidden)
        self.critic = RowEncoder(self.layout, hidden)
        self.logit = _linear(hidden, 1, gain=0.01)
        self.direct = nn.Linear(self.layout.num_features, 1, bias=False)
        self.value = nn.Sequential(
            _linear(3 * hidden, hidden, float(np.sqrt(2))), nn.Tanh(), _linear(hidden, 1, gain=1.0)
        )
        nn.init.zeros_(self.direct.weight)
        if KEEP_FEATURE in spec.candidate_features:
            column = spec.candidate_features.index(KEEP_FEATURE)
            nn.init.constant_(self.direct.weight[:, column], config.keep_weight)
        self.latent_dim_pi, self.latent_dim_vf = self.layout.num_rows, 1  # what SB3 asks for

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = self.layout
        rows = flat[:, at.num_state : at.rows_end].reshape(-1, at.num_rows, at.num_features)
        return flat[:, : at.num_state], rows, flat[:, at.rows_end :]

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(flat), self.forward_critic(flat)

    def forward_actor(self, flat: Tensor) -> Tensor:
        """Logits [B, K], zero where there is no row; the caller masks them."""
        state, rows, valid = self._split(flat)
        there = ValidRows(valid)
        _, embedded = self.actor(state, rows, there)
        return there.spread(self.logit(embedded) + self.direct(there.of(rows))).squeeze(-1)

    def forward_critic(self, flat: Tensor) -> Tensor:
        """Value [B, 1]."""
        state, rows, valid = self._split(flat)
        there = ValidRows(valid)
        embedding, embedded = self.critic(state, rows, there)
        pooled = pool(there.spread(embedded), valid)
        value: Tensor = self.value(torch.cat([embedding, pooled], dim=-1))
        return value


class PlainNetwork(nn.Module):
    """The same in and out as `CandidateNetwork`, of two layers each: weights depend on K."""

    def __init__(self, spec: ObservationSpec, config: NetworkConfig) -> None:
        super().__init__()
        self.layout, hidden = FlatLayout.of(spec), config.hidden_size
        self.actor = _two_layers(spec.flat_size, hidden, self.layout.num_rows, gain=0.01)
        self.critic = _two_layers(spec.flat_size, hidden, 1, gain=1.0)
        with torch.no_grad():
            cast(nn.Linear, self.actor[-1]).bias[0] = config.keep_weight
        self.latent_dim_pi, self.latent_dim_vf = self.layout.num_rows, 1

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(flat), self.forward_critic(flat)

    def forward_actor(self, flat: Tensor) -> Tensor:
        """Logits [B, K]; the caller masks them."""
        logits: Tensor = self.actor(flat)
        return logits

    def forward_critic(self, flat: Tensor) -> Tensor:
        """Value [B, 1]."""
        value: Tensor = self.critic(flat)
        return value


def _two_layers(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    wide = float(np.sqrt(2))
    return nn.Sequential(
        _linear(inputs, hidden, wide),
        nn.Tanh(),
        _linear(hidden, hidden, wide),
        nn.Tanh(),
        _linear(hidden, outputs, gain),
    )


Network = CandidateNetwork | PlainNetwork


def build_network(spec: ObservationSpec, config: NetworkConfig) -> Network:
    """The network that the config names."""
    return (CandidateNetwork if config.kind == "candidates" else PlainNetwork)(spec, config)


def actor_in(network: Network, config: NetworkConfig) -> Actor:
    """The forward pass of one on the CPU in numpy, on views of its weights."""
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return build_actor(config, network.layout, weights)


class CandidatePolicy(MaskableActorCriticPolicy):
    """A network as sb3-contrib wants it: action and value nets are identities."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        spec: ObservationSpec,
        network: NetworkConfig,
        **kwargs: Any,
    ) -> None:
        self.spec, self.network_config = spec, network
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    @property
    def network(self) -> Network:
        assert isinstance(self.mlp_extractor, CandidateNetwork | PlainNetwork)
        return self.mlp_extractor

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = build_network(self.spec, self.network_config)  # type: ignore[assignment]
        self.action_net, self.value_net = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=1e-5)
