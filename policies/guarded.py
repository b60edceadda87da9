"""A learned policy that acts only where it is sure, and leaves everything else to a rule.

Several policies that were trained alike but for their seeds stand for what is not known: a row that
enough of them prefer to the rule's by a margin is taken, even where their favourites differ; else
the rule decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError
from policies.base import Observation, Policy
from policies.baselines import one_hot

Floats = NDArray[np.float64]
LEAST = 1e-12  # probability that counts in place of zero


@dataclass(frozen=True, slots=True)
class GuardedConfig:
    """When the members may overrule the rule."""

    margin: float = 0.5  # ln of how many times as probable as the rule's row theirs must be
    agreement: float = 1.0  # share of the members that must prefer the same row to the rule's

    def __post_init__(self) -> None:
        if self.margin < 0 or not 0.5 < self.agreement <= 1:
            raise InvalidRequestError(
                "a guarded policy needs a margin of at least 0 and an agreement above 0.5 and up "
                f"to 1, got {self.margin} and {self.agreement}."
            )

    @property
    def never_overrules(self) -> bool:
        """Whether no probability can be so much larger than another that counts."""
        return self.margin >= -math.log(LEAST)


class GuardedPolicy:
    """`members` overrule `rule` where they are sure. All see the same observation and mask."""

    def __init__(
        self,
        members: Sequence[Policy],
        rule: Policy,
        config: GuardedConfig | None = None,
        name: str = "guarded",
    ) -> None:
        assert members, "at least one member"
        self.members, self.rule, self.name = tuple(members), rule, name
        self.config = config or GuardedConfig()

    def reset(self) -> None:
        for policy in (*self.members, self.rule):
            policy.reset()

    def probabilities(self, observation: Observation) -> Floats:
        """[K] float64; see `policies.base.Policy`."""
        by_rule = self.rule.probabilities(observation)
        logs = np.log([np.maximum(m.probabilities(observation), LEAST) for m in self.members])
        chosen = self._chosen(logs, int(np.argmax(by_rule)))
        return by_rule if chosen is None else one_hot(observation, chosen)

    def _chosen(self, logs: Floats, by_rule: int) -> int | None:
        """The likeliest of the rows that enough members prefer to the rule's by the margin; None:
        there is none. [M, K]"""
        gains = logs - logs[:, by_rule, None]
        enough = (gains > self.config.margin).mean(axis=0) >= self.config.agreement
        return int(np.where(enough, logs.mean(axis=0), -np.inf).argmax()) if enough.any() else None
