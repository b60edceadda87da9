"""PolicyServer: asks the policy within a deadline; on any failure, the fall-back rule.

A policy that raises, is late, or answers with something that is no distribution over legal rows
never stops the loop: the rule decides, and the reason is recorded and counted.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import Observation, Policy, choose

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ActResult:
    """A distribution over candidate rows, the row taken, and who decided why."""

    probabilities: NDArray[np.float64]
    action: int
    policy: str
    reason: str  # "policy", or why the fall-back decided


def check_distribution(probabilities: NDArray[np.float64], observation: Observation) -> str:
    """Empty when it is a distribution over legal rows, else what is wrong with it."""
    if probabilities.shape != observation.mask.shape:
        return f"shape {probabilities.shape}, expected {observation.mask.shape}"
    if not np.all(np.isfinite(probabilities)):
        return "not finite"
    if np.any(probabilities < 0) or abs(float(probabilities.sum()) - 1.0) > 1e-6:
        return "not a distribution"
    if np.any(probabilities[~observation.mask] > 0):
        return "probability on a masked candidate"
    return ""


class PolicyServer:
    """Owns one worker thread. `close` gives it up (a hung policy's thread is a daemon's)."""

    def __init__(
        self, policy: Policy, fallback: Policy, deadline_s: float, deterministic: bool
    ) -> None:
        self.policy, self._fallback = policy, fallback
        self._deadline_s, self._deterministic = deadline_s, deterministic
        self._pool = ThreadPoolExecutor(1, "policy")
        self.num_fallbacks = 0

    def act(self, observation: Observation, rng: np.random.Generator) -> ActResult:
        """Never raises while the fall-back rule does not."""
        try:
            future = self._pool.submit(self.policy.probabilities, observation)
            probabilities = np.asarray(future.result(self._deadline_s), np.float64)
            problem = check_distribution(probabilities, observation)
        except TimeoutError:
            problem = f"no answer within {self._deadline_s} s"
            self._replace_pool()
        except Exception as error:
            logger.exception("policy %s failed", self.policy.name)
            problem = f"{type(error).__name__}: {error}"
        name, reason = self.policy.name, "policy"
        if problem:
            self.num_fallbacks += 1
            name, reason = self._fallback.name, f"fallback: {self.policy.name} {problem}"
            probabilities = self._fallback.probabilities(observation)
        action = choose(probabilities, rng, self._deterministic)
        return ActResult(probabilities, action, name, reason)

    def _replace_pool(self) -> None:
        """The late policy keeps its thread; the next decision gets a new one."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = ThreadPoolExecutor(1, "policy")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
