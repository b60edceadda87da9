"""Behaviour cloning: a network that does what an expert does, as the start and prior of PPO.

What the expert said is kept as a cost per row, so that the network learns from near ties too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from engine.errors import InvalidRequestError
from policies.base import Floats, Mask, ObservationSpec
from policies.baselines import KEEP_ROW
from policies.learner import masked_log_softmax
from policies.mpc import MpcConfig
from policies.networks import Network, build_network
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoConfig, PpoPolicy

MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm


@dataclass(frozen=True, slots=True)
class CloningConfig:
    """Imitation before reinforcement. With num_decisions 0 there is none."""

    expert: Literal["mpc", "hysteresis", "rollouts"] = "hysteresis"  # rollouts: what each row came
    # to on the traffic that followed, in utility; learn its costs, never its choice, which knows
    # what nobody could
    learn: Literal["choice", "costs"] = "choice"  # costs: what is least in the mean of alike states
    num_decisions: int = 0  # of the expert, with more than one legal row
    epochs: int = 20  # passes over them
    batch_size: int = 256
    learning_rate: float = 1e-3  # of Adam
    temperature: float = 0.01  # of targets, in units of cost; 0: the expert's row alone
    noise: float = 0.1  # share of decisions that are executed at random: states off its path
    held_out: float = 0.2  # share of decisions, the last ones, that is not learned from
    seed: int = 0  # of the decisions, which runs that differ in their own seed may share
    num_processes: int = 1  # that collect; the decisions are the same
    file: str = ""  # of decisions: read where it exists, else written; empty: in the run's folder
    mpc: MpcConfig = field(default_factory=MpcConfig)  # its `decisions` has no meaning here

    def __post_init__(self) -> None:
        if self.learn == "choice" and self.expert == "rollouts":
            raise InvalidRequestError(
                "cloning.expert 'rollouts' knows the traffic to come, and who copies its choices "
                "learns what cannot be seen; set cloning.learn to 'costs'."
            )
        if self.learn == "costs" and self.temperature <= 0:
            raise InvalidRequestError(
                f"cloning.learn 'costs' needs a temperature above 0, got {self.temperature}."
            )
        shares = (self.noise, self.held_out)
        if self.num_decisions < 0 or self.epochs < 1 or not all(0.0 <= s < 1.0 for s in shares):
            raise InvalidRequestError(
                f"cloning needs num_decisions >= 0, epochs >= 1 and noise and held_out in [0, 1), "
                f"got {self.num_decisions}, {self.epochs}, {self.noise} and {self.held_out}."
            )


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """N decisions of an expert, in order of time within episodes."""

    flat: Floats  # [N, flat_size], raw
    mask: Mask  # [N, K]
    costs: Floats  # [N, K] the least is the expert's row; inf where illegal or never considered

    def __len__(self) -> int:
        return len(self.flat)

    @property
    def rows(self) -> NDArray[np.int64]:
        """[N] what the expert does."""
        rows: NDArray[np.int64] = np.argmin(self.costs, axis=1)
        return rows

    def targets(self, temperature: float) -> Floats:
        """[N, K] softmax of -costs / temperature; at 0 all on the expert's row."""
        if temperature == 0.0:
            return np.eye(self.mask.shape[1], dtype=np.float32)[self.rows]
        least = self.costs.min(axis=1, keepdims=True)
        weights = np.exp((least - self.costs) / temperature)
        share: Floats = weights / weights.sum(axis=1, keepdims=True)
        return share

    @property
    def extra(self) -> Floats:
        """[N, K] what each row costs more than keep; 0 where that is not known."""
        found: Floats = np.where(np.isfinite(self.costs), self.costs - self.costs[:, :1], 0.0)
        return found

    def part(self, which: slice) -> Demonstrations:
        return Demonstrations(self.flat[which], self.mask[which], self.costs[which])

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        """Safetensors, with facts of how they came about in its header."""
        tensors = {"flat": self.flat, "mask": self.mask, "costs": self.costs}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, dict(facts))

    @classmethod
    def load(cls, path: Path, facts: Mapping[str, str]) -> Demonstrations:
        """Raises InvalidRequestError: not such a file, or one that came about otherwise."""
        try:
            with safe_open(path, "numpy") as file:
                found = file.metadata() or {}
            tensors = load_file(path)
            demonstrations = cls(tensors["flat"], tensors["mask"], tensors["costs"])
        except (OSError, KeyError, SafetensorError) as error:
            raise InvalidRequestError(
                f"{path} holds no decisions of an expert ({error}); delete it, or name another "
                "file as cloning.file."
            ) from error
        other = sorted(name for name in facts if found.get(name) != facts[name])
        if other:
            raise InvalidRequestError(
                f"the decisions in {path} were made with another {', '.join(other)}; delete the "
                "file, or name another as cloning.file."
            )
        return demonstrations


@dataclass(frozen=True, slots=True)
class CloningReport:
    """How well the network does what the expert does, on decisions that it has not learned from."""

    num_decisions: int  # learned from
    num_held_out: int
    accuracy: float  # share of decisions at which the most probable row is the expert's
    keep_share: float  # the accuracy of always keeping
    switch_accuracy: float  # of the expert's switches alone; nan: there are none
    regret: float  # mean cost of the network's row over the expert's, in shares of keep's; inf
    # rows, which the expert never considered, do not count

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        return {n: None if v != v else round(v, 6) for n, v in values.items()}


def clone(
    spec: ObservationSpec,
    config: CloningConfig,
    ppo: PpoConfig,
    demonstrations: Demonstrations,
    seed: int,
) -> tuple[PpoPolicy, CloningReport]:
    """A policy whose actor imitates; its critic is as it was born. Raises InvalidRequestError."""
    num_held_out = int(len(demonstrations) * config.held_out)
    split = len(demonstrations) - num_held_out
    if split < 1:
        raise InvalidRequestError(
            f"cloning has {len(demonstrations)} decisions, of which {num_held_out} are held out; "
            "set a larger cloning.num_decisions."
        )
    known, held_out = demonstrations.part(slice(split)), demonstrations.part(slice(split, None))
    torch.manual_seed(seed)
    network, normalizer = build_network(spec, ppo.network), ObservationNormalizer(spec)
    normalizer.update(known.flat)
    _fit(network, normalizer, known, config, seed)
    policy = PpoPolicy(spec, network, ppo.network, normalizer)
    return policy, _report(policy, held_out if num_held_out else known, len(known))


def _fit(
    network: Network,
    normalizer: ObservationNormalizer,
    known: Demonstrations,
    config: CloningConfig,
    seed: int,
) -> None:
    """By Adam with a rate that falls linearly to zero.

    To copy choices: cross-entropy. To learn costs c: the cost expected under the policy less
    temperature times its entropy, whose least is at softmax(-E[c] / temperature). It is linear in
    c, so that what is noise in a cost averages out; and unlike squared errors, which those of a
    few overloaded decisions rule, it counts a decision by what the choice is worth.
    """
    flat = torch.from_numpy(normalizer.normalise(known.flat))
    by_costs = config.learn == "costs"
    legal = torch.from_numpy(np.isfinite(known.costs) if by_costs else known.mask)
    wanted = torch.from_numpy(known.extra if by_costs else known.targets(config.temperature))
    adam = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    batches = list(_batches(len(known), config, torch.Generator().manual_seed(seed)))
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, len(batches))
    for batch in batches:
        log_p = masked_log_softmax(network.forward_actor(flat[batch]), legal[batch])
        if by_costs:
            each = log_p.exp() * (wanted[batch] / config.temperature + log_p)
        else:
            each = -wanted[batch] * log_p
        adam.zero_grad()
        each.sum(dim=1).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        adam.step()
        falling.step()


def _batches(number: int, config: CloningConfig, random: torch.Generator) -> Iterator[Tensor]:
    for _ in range(config.epochs):
        yield from torch.randperm(number, generator=random).split(config.batch_size)


def _report(policy: PpoPolicy, seen: Demonstrations, num_learned: int) -> CloningReport:
    flat = torch.from_numpy(policy.normalizer.normalise(seen.flat))
    with torch.no_grad():
        logits = policy.network.forward_actor(flat).numpy()
    chosen, expert = np.where(seen.mask, logits, -np.inf).argmax(axis=1), seen.rows
    right, switches = chosen == expert, expert != KEEP_ROW
    index = np.arange(len(seen))
    extra = seen.costs[index, chosen].astype(np.float64) - seen.costs[index, expert]
    return CloningReport(
        num_decisions=num_learned,
        num_held_out=len(seen),
        accuracy=float(right.mean()),
        keep_share=float((expert == KEEP_ROW).mean()),
        switch_accuracy=float(right[switches].mean()) if switches.any() else float("nan"),
        regret=float(extra[np.isfinite(extra)].mean()),
    )
