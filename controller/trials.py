"""Policies on trial beside the active one: shadows, which are asked and decide nothing, and one
canary. Each has a policy server of its own, so that one that hangs delays nobody else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controller.breaker import Actor
from controller.canary import CANARY, Canary, CanaryConfig
from controller.policy_server import ActResult, PolicyServer
from controller.roster import LoadedPolicy
from engine.cluster import ClusterEvent, SloSpec
from policies.base import Observation, Policy
from policies.exploration import Exploration


class Trials:
    """Owned by one loop, which alone calls it, with its turn held."""

    def __init__(
        self,
        rule: Policy,
        deadline_s: float,
        deterministic: bool,
        seeds: tuple[int, ...] = (0,),
        exploration: Exploration | None = None,
    ) -> None:
        self._rule, self._deadline_s, self._deterministic = rule, deadline_s, deterministic
        self._seeds, self._num_canaries = seeds, 0
        self._exploration = exploration
        self._shadows: dict[str, PolicyServer] = {}
        self.canary: Canary | None = None
        self._canary_server: PolicyServer | None = None

    def _server(self, loaded: LoadedPolicy) -> PolicyServer:
        return PolicyServer(
            loaded.policy,
            self._rule,
            self._deadline_s,
            self._deterministic,
            exploration=self._exploration,
        )

    # ---------------------------------------------------------------- shadows

    @property
    def shadows(self) -> tuple[str, ...]:
        return tuple(self._shadows)

    def add_shadow(self, loaded: LoadedPolicy) -> None:
        self._shadows[loaded.info.name] = self._server(loaded)

    def ask_shadows(self, observation: Observation) -> dict[str, dict[str, Any]]:
        """Per shadow its distribution over the same rows and the most probable candidate, or what
        went wrong."""
        told: dict[str, dict[str, Any]] = {}
        for name, server in self._shadows.items():
            probabilities, problem = server.ask(server.policy, observation)
            if problem:
                told[name] = {"problem": problem}
                continue
            row = int(np.argmax(probabilities))
            told[name] = {"probabilities": probabilities, "key": observation.keys[row]}
        return told

    # ---------------------------------------------------------------- canary

    def begin_canary(
        self, loaded: LoadedPolicy, config: CanaryConfig, slo: SloSpec, now_s: float
    ) -> None:
        """Takes the place of one that is under way."""
        self.end_canary()
        self._num_canaries += 1
        rng = np.random.default_rng((*self._seeds, self._num_canaries))
        self.canary = Canary(loaded.info.name, config, slo, now_s, rng)
        self._canary_server = self._server(loaded)

    def end_canary(self) -> None:
        if self._canary_server is not None:
            self._canary_server.close()
        self.canary, self._canary_server = None, None

    def restore_canary(self, loaded: LoadedPolicy, saved: Mapping[str, Any]) -> None:
        """As `Canary.saved` told, in the middle of its block."""
        self.canary, self._canary_server = Canary.restore(saved), self._server(loaded)

    @property
    def arm(self) -> str:
        """That decides now; empty without a canary."""
        return self.canary.arm if self.canary is not None else ""

    def act(self, observation: Observation, rng: np.random.Generator) -> ActResult | None:
        """The canary's decision; None when it is not its turn."""
        if self._canary_server is None or self.arm != CANARY:
            return None
        return self._canary_server.act(observation, rng, Actor.POLICY)

    def observe(self, now_s: float, events: Sequence[ClusterEvent]) -> str:
        """Says why the canary is rolled back, if it is."""
        return self._ended(self.canary.observe(now_s, events) if self.canary else "")

    def failed(self, problem: str) -> str:
        """The canary gave no valid answer; says why it is rolled back, if it is."""
        return self._ended(self.canary.failed(problem) if self.canary else "")

    def _ended(self, why: str) -> str:
        if not why or self.canary is None:
            return ""
        name = self.canary.name
        self.end_canary()
        return f"canary {name} is rolled back: {why}"

    def restarted(self, now_s: float) -> None:
        if self.canary is not None:
            self.canary.restarted(now_s)

    def close(self) -> None:
        self.end_canary()
        for server in self._shadows.values():
            server.close()
