"""Why a decision was made, and why not another candidate, in words and in figures. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from controller.guardrails import RULE
from controller.records import CandidateView, TickRecord, TickStatus
from policies.base import Observation, ObservationSpec


@dataclass(frozen=True, slots=True)
class CandidateExplanation:
    """One candidate; `features` as the policy saw them, by name."""

    candidate: CandidateView
    is_chosen: bool
    is_executed: bool
    why: str
    features: dict[str, float]


@dataclass(frozen=True, slots=True)
class Explanation:
    record: TickRecord
    summary: str
    candidates: tuple[CandidateExplanation, ...]
    state_features: dict[str, float]


def meaning(rule: str) -> str:
    """The rule with what it means; an infeasible plan says itself why."""
    return f"{rule}: {RULE[rule].meaning}" if rule in RULE else rule


def summary(record: TickRecord) -> str:
    """One sentence."""
    if record.status is not TickStatus.DECIDED:
        return f"nothing was decided ({record.status}): {record.reason or 'the mode is off'}"
    kept = record.executed_key == record.deployment_key
    did = f"keep {record.executed_key}" if kept else f"switch to {record.executed_key}"
    said = f"{record.policy} decided to {did} (probability {record.propensity:.2f})"
    if record.vetoes:
        said = f"{record.policy} chose {record.chosen_key or 'no candidate'}; it was vetoed, "
        said += f"{meaning(record.vetoes[0])}, so {record.executed_key} is kept"
    return f"{said}; {record.reason}"


def explain(record: TickRecord, observation: Observation, spec: ObservationSpec) -> Explanation:
    """Of one tick that saw the engine."""
    rows = enumerate(record.candidates)
    return Explanation(
        record,
        summary(record),
        tuple(_explain(record, i, view, observation, spec) for i, view in rows),
        dict(zip(spec.state_features, observation.state.tolist(), strict=True)),
    )


def _explain(
    record: TickRecord,
    row: int,
    view: CandidateView,
    observation: Observation,
    spec: ObservationSpec,
) -> CandidateExplanation:
    decided = record.status is TickStatus.DECIDED
    is_chosen = decided and row == record.action
    is_executed = decided and view.key == record.executed_key
    values = observation.candidates[row].tolist()
    features = dict(zip(spec.candidate_features, values, strict=True))
    why = _why(record, view, is_chosen, is_executed)
    return CandidateExplanation(view, is_chosen, is_executed, why, features)


def _why(record: TickRecord, view: CandidateView, is_chosen: bool, is_executed: bool) -> str:
    if is_executed and not is_chosen:
        return "kept, because what was chosen is vetoed"
    if is_executed:
        return f"chosen: {record.reason}"
    if not view.legal:
        return f"not legal, {meaning(view.mask_reason)}"
    if view.probability is None:
        return "legal; nothing was decided, so no policy was asked about it"
    if is_chosen:
        return f"chosen and vetoed, {meaning(record.vetoes[0])}" if record.vetoes else "chosen"
    best = max(c.probability or 0.0 for c in record.candidates if c.legal)
    return f"legal, with probability {view.probability:.3f}; the highest is {best:.3f}"
