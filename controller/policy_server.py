"""PolicyServer: asks the policy within a deadline; on any failure, the fall-back rule. When the
circuit breaker says so, the rule or the safe plan alone. Rules of the fall-back's kind are trusted
as it is: they are asked at once, and by no other thread.

A policy that raises, is late, or answers with something that is no distribution over legal rows
never stops the loop: the rule decides, and the reason is recorded and counted.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controller.breaker import Actor
from policies.base import Observation, Policy, choose
from policies.baselines import KeepPolicy
from policies.exploration import Exploration

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
SUM_TOLERANCE = 1e-6  # of a softmax in float32; the generator's own is tighter
KEEP = 0


@dataclass(frozen=True, slots=True)
class ActResult:
    """A distribution over candidate rows, the row taken, and who decided why."""

    probabilities: Floats
    action: int
    policy: str
    reason: str  # "policy", or why another decided
    failure: str = ""  # what the one that should have decided did wrong


@dataclass(frozen=True, slots=True)
class _Question:
    policy: Policy
    observation: Observation
    answer: Future[Floats]


def check_distribution(probabilities: Floats, observation: Observation) -> str:
    """Empty when it is a distribution over legal rows, else what is wrong with it."""
    if probabilities.shape != observation.mask.shape:
        return f"shape {probabilities.shape}, expected {observation.mask.shape}"
    given = probabilities.tolist()  # few: lists are faster
    if not all(map(math.isfinite, given)):
        return "not finite"
    if min(given) < 0 or abs(sum(given) - 1.0) > SUM_TOLERANCE:
        return "not a distribution"
    if any(p > 0 and not legal for p, legal in zip(given, observation.mask.tolist(), strict=True)):
        return "probability on a masked candidate"
    return ""


class PolicyServer:
    """Owns one daemon thread that alone calls policies under a deadline, so a late call and the
    next never overlap, and a policy that hangs for ever does not keep the process from ending."""

    def __init__(
        self,
        policy: Policy,
        fallback: Policy,
        deadline_s: float,
        deterministic: bool,
        safe: Policy | None = None,
        exploration: Exploration | None = None,
    ) -> None:
        self.policy, self._fallback, self._safe = policy, fallback, safe or KeepPolicy()
        self._deadline_s, self.deterministic = deadline_s, deterministic
        self._exploration = exploration
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.num_fallbacks = 0

    def act(
        self,
        observation: Observation,
        rng: np.random.Generator,
        actor: Actor = Actor.POLICY,
        policy: Policy | None = None,
    ) -> ActResult:
        """Never raises: when the rule fails too, the answer is keep. `policy` takes the place of
        the active one this time. Only what a policy wants is explored around."""
        probabilities, name, reason, failure = self._answer(
            observation, actor, policy or self.policy
        )
        deterministic = self.deterministic
        if self._exploration is not None and not failure and actor is Actor.POLICY:
            probabilities, deterministic = self._exploration.mix(probabilities, observation), False
        probabilities = probabilities / probabilities.sum()
        action = choose(probabilities, rng, deterministic)
        return ActResult(probabilities, action, name, reason, failure)

    def _answer(
        self, observation: Observation, actor: Actor, policy: Policy
    ) -> tuple[Floats, str, str, str]:
        """Of `ActResult`: probabilities, policy, reason and failure."""
        failure, name, reason = "", policy.name, "policy"
        if actor is Actor.POLICY:
            probabilities, failure = self.ask(policy, observation)
            if not failure:
                return probabilities, name, reason, ""
            self.num_fallbacks += 1
            failure, reason = f"{name} {failure}", f"fallback: {name} {failure}"
        else:
            reason = f"breaker: {actor} decides"
        rule = self._safe if actor is Actor.SAFE else self._fallback
        probabilities, problem = _evaluate(rule, observation)
        if problem:
            reason, failure = f"{reason}; {rule.name} {problem}", failure or problem
            probabilities = np.eye(1, len(observation.mask), KEEP)[0]
        return probabilities, "keep" if problem else rule.name, reason, failure

    def ask(self, policy: Policy, observation: Observation) -> tuple[Floats, str]:
        """A policy's answer and what is wrong with it. A question that is late is withdrawn
        unless the policy is at it already."""
        if self.answers_at_once(policy):
            return _evaluate(policy, observation)
        self._start()
        answer: Future[Floats] = Future()
        self._questions.put(_Question(policy, observation, answer))
        try:
            probabilities = answer.result(self._deadline_s)
            return probabilities, check_distribution(probabilities, observation)
        except TimeoutError:
            answer.cancel()
            return np.zeros(0), f"no answer within {self._deadline_s} s"
        except Exception as error:
            logger.exception("policy %s failed", policy.name)
            return np.zeros(0), f"{type(error).__name__}: {error}"

    def answers_at_once(self, policy: Policy) -> bool:
        """Whether it is a rule of the fall-back's kind."""
        return type(policy) is type(self._fallback)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_answer_all, args=(self._questions,), name="policy", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """The thread ends with the call it is at."""
        self._questions.put(None)


def _answer_all(questions: queue.SimpleQueue[_Question | None]) -> None:
    while (question := questions.get()) is not None:
        if question.answer.set_running_or_notify_cancel():
            try:
                found = question.policy.probabilities(question.observation)
                question.answer.set_result(np.asarray(found, np.float64))
            except Exception as error:
                question.answer.set_exception(error)


def _evaluate(policy: Policy, observation: Observation) -> tuple[Floats, str]:
    try:
        probabilities = np.asarray(policy.probabilities(observation), np.float64)
    except Exception as error:
        logger.exception("rule %s failed", policy.name)
        return np.zeros(0), f"{type(error).__name__}: {error}"
    return probabilities, check_distribution(probabilities, observation)
