"""One decision, from a snapshot to what is to be done: the same for the loop and for `Decide`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from controller.decision import DecisionPipeline, PreparedDecision
from controller.policy_server import ActResult
from engine.cluster import Decision


class Decided(NamedTuple):
    prepared: PreparedDecision
    act: ActResult
    decision: Decision


def decide(
    pipeline: DecisionPipeline,
    prepared: PreparedDecision,
    ask: Callable[[PreparedDecision], ActResult],
) -> Decided:
    """`ask` gives a distribution over the rows and the row taken; what becomes of it is reviewed
    and planned."""
    act = ask(prepared)
    pipeline.mark("act")
    decision = pipeline.resolve(prepared, act.action, act.probabilities, act.policy)
    return Decided(prepared, act, decision)
