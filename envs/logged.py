"""From decision logs to what off-policy evaluation works on.

Reads one or more logs of the controller (schemas 1 and 2, the last record may be torn), cuts them
into unbroken parts, and gives every decision that has a whole interval after it: candidates,
probabilities before guards, guard map, executed row, and the reward of that interval. What cannot
be used is told in `LoggedRun.skipped`.

What counts as the environment's doing: a decision that the fall-back rule, the circuit breaker or
an undo made in place of the policy sends every row to what was executed; a switch that the engine
refused or rolled back is still the action. In advisory mode nothing was executed: the policy that
ran kept, always. A deterministic controller did what was most probable, always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from controller.decision_log import read_log
from controller.log_records import REQUEST_FIELDS
from controller.observation import observation_spec
from engine.cluster import SwitchPhase, parse_deployment_key
from engine.errors import InvalidRequestError
from envs.logged_traffic import (
    LoggedInterval,
    LoggedTraffic,
    interval_rewards,
    logged_traffic,
    read_interval,
)
from envs.reward import RewardConfig
from policies.base import Observation, ObservationSpec
from policies.ope_data import TINY, LoggedDecisions, same_keys_once

IN_PLACE_OF_THE_POLICY = ("fallback:", "breaker:", "undo:")  # how such reasons begin
NO_PROBABILITIES = "it has no probabilities"
LONGEST = 1.5  # intervals that the one after a decision may last


@dataclass(frozen=True, slots=True)
class Part:
    """An unbroken stretch of a log: one controller, one engine, no events lost."""

    name: str  # file and number
    header: dict[str, Any]
    steps: tuple[tuple[dict[str, Any], int], ...]  # decision, and its interval's index
    intervals: tuple[LoggedInterval, ...]
    traffic: LoggedTraffic
    switch_s: tuple[float, ...] = ()  # of each switch that was done

    @property
    def spec(self) -> ObservationSpec:
        """Raises InvalidRequestError when the log has other features than this version."""
        decision = self.header["decision"]
        found = observation_spec(
            len(self.header["types"]), int(decision["max_candidates"]), float(decision["grid_s"])
        )
        versions = self.header.get("versions", {})
        given = versions.get("features", self.header.get("spec_hash", ""))
        if given != found.hash:
            raise InvalidRequestError(
                f"{self.name} was written with features {given}, this version has {found.hash}; "
                "read it with the version that wrote it."
            )
        return found

    @property
    def generator(self) -> str:
        """Version of what proposed and masked the candidates."""
        versions = self.header.get("versions", {})
        return str(versions.get("generator", self.header.get("pipeline_hash", "")))


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """All usable decisions of some logs."""

    decisions: LoggedDecisions
    observations: tuple[Observation, ...]  # [T]
    parts: tuple[Part, ...]
    grid_s: float
    skipped: tuple[str, ...]  # sentences


def read_logs(paths: Sequence[Path], reward: RewardConfig) -> LoggedRun:
    """Raises InvalidRequestError when there is nothing to evaluate, saying what is missing."""
    return logged_run(*read_parts(paths), reward)


def read_parts(paths: Sequence[Path]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The unbroken parts with decisions, and sentences on what was skipped. Raises
    InvalidRequestError when there are none, or when they are not alike."""
    skipped: list[str] = []
    parts = tuple(part for path in paths for part in _parts(path, skipped) if part.steps)
    if not parts:
        names = ", ".join(map(str, paths)) or "no file"
        bare = sum(sentence.endswith(NO_PROBABILITIES) for sentence in skipped)
        lacking = f" ({bare} decisions have no probabilities of what was chosen)" if bare else ""
        raise InvalidRequestError(
            f"{names}: no decision with a whole interval after it{lacking}; give logs of a "
            "controller that ran in active or advisory mode for more than one interval."
        )
    specs, generators = {part.spec for part in parts}, {part.generator for part in parts}
    if len(specs) > 1 or len(generators) > 1:
        raise InvalidRequestError(
            f"these logs are of {len(generators)} candidate generators and {len(specs)} feature "
            "specifications; evaluate those of each apart."
        )
    return parts, tuple(skipped)


def logged_run(parts: Sequence[Part], skipped: Sequence[str], reward: RewardConfig) -> LoggedRun:
    """What `read_parts` gave, as decisions with rewards."""
    spec = parts[0].spec
    observations = [observation_of(spec, d) for part in parts for d, _ in part.steps]
    decisions = _decisions(parts, observations, reward, parts[0].generator)
    return LoggedRun(decisions, tuple(observations), tuple(parts), spec.grid_s, tuple(skipped))


# --------------------------------------------------------------------------------------
# Cutting into parts


@dataclass
class _Cutter:
    """Collects records until something breaks them off."""

    name: str
    skipped: list[str]
    header: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    intervals: list[LoggedInterval] = field(default_factory=list)
    steps: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    pending: dict[str, Any] | None = None
    started: dict[str, bool] = field(default_factory=dict)  # decision id -> whether its switch was
    switch_s: list[float] = field(default_factory=list)

    def take(self, record: dict[str, Any]) -> Iterator[Part]:
        kind = record["record"]
        if kind == "header":
            if record.get("life", "") != self.header.get("life") or "life" not in record:
                yield from self.cut()
                self.header = record
        elif kind == "interval":
            yield from self._take_interval(record)
        elif kind == "decision":
            self._drop_pending("another decision came first")
            self._note_devices(record)
            if "probabilities" not in record:
                self._skip(record, NO_PROBABILITIES)
            else:
                self.pending = record
        elif kind == "switch":
            self.started[str(record.get("decision_id", ""))] = record.get("event") == "started"
        elif kind == "outcome" and record["ticket"]["phase"] == SwitchPhase.DONE:
            self._take_seconds(float(record["duration_s"]))

    def _take_seconds(self, duration_s: float) -> None:
        if not 0 < duration_s < inf:
            raise ValueError(f"a switch took {duration_s} s; expected a finite number above 0.")
        self.switch_s.append(duration_s)

    def _take_interval(self, record: dict[str, Any]) -> Iterator[Part]:
        interval = read_interval(record, self.header.get("request_fields", REQUEST_FIELDS))
        lost = int(record.get("num_events_lost", 0))
        if self.intervals and interval.to_s < self.intervals[-1].to_s:
            yield from self.cut("the engine was started again")
        elif lost and self.intervals:
            yield from self.cut(f"{lost} events were lost")
        elif self.intervals and interval.from_s > self.intervals[-1].to_s:
            yield from self.cut("an interval is missing")
        self.intervals.append(self._with_switch(interval))
        if self.pending is None:
            return
        longest_s = LONGEST * float(self.header["decision"]["grid_s"])
        if interval.to_s - float(self.pending["at_s"]) > longest_s:
            self._drop_pending(f"the interval after it is longer than {longest_s:g} s")
        else:
            self.steps.append((self.pending, len(self.intervals) - 1))
            self.pending = None

    def _with_switch(self, interval: LoggedInterval) -> LoggedInterval:
        """With the bytes of the switch decided on before it."""
        decision = self.pending
        if decision is None:
            return interval
        plan = decision.get("plan")
        is_active = decision.get("mode", "active") == "active"
        started = self.started.get(str(decision.get("decision_id", "")), is_active)
        return replace(interval, switched_bytes=plan["weight_bytes"] if plan and started else 0)

    def _note_devices(self, decision: dict[str, Any]) -> None:
        """A decision shows what was in use when the interval before it ended."""
        if self.intervals:
            used = parse_deployment_key(decision["deployment_key"])
            number = sum(c.num_devices for c in used)
            self.intervals[-1] = replace(self.intervals[-1], num_devices=number)

    def _skip(self, record: dict[str, Any], why: str) -> None:
        self.skipped.append(f"{self.name}: decision at {float(record['at_s']):g} s: {why}")

    def _drop_pending(self, why: str) -> None:
        if self.pending is not None:
            self._skip(self.pending, why)
            self.pending = None

    def cut(self, why: str = "the log ends") -> Iterator[Part]:
        """The part so far, and a fresh start."""
        self._drop_pending(why)
        if self.intervals:
            self.number += 1
            name, intervals = f"{self.name} part {self.number}", tuple(self.intervals)
            traffic = logged_traffic(intervals)
            steps, switch_s = tuple(self.steps), tuple(self.switch_s)
            yield Part(name, self.header, steps, intervals, traffic, switch_s)
        self.intervals, self.steps, self.started, self.switch_s = [], [], {}, []


def _parts(path: Path, skipped: list[str]) -> Iterator[Part]:
    """Raises InvalidRequestError for a file that cannot be read."""
    try:
        contents = read_log(path)
    except OSError as error:
        raise InvalidRequestError(f"log {path} cannot be read: {error.strerror}.") from error
    skipped += [f"{e.file}: line {e.line}: {e.reason}" for e in contents.skipped]
    cutter = _Cutter(path.name, skipped)
    for record in contents.records:
        if record["record"] != "header" and "decision" not in cutter.header:
            skipped.append(f"{path.name}: a {record['record']} without a header before it")
            continue
        try:
            yield from cutter.take(record)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            skipped.append(f"{path.name}: a {record['record']} that is not understood: {what}")
    yield from cutter.cut()


# --------------------------------------------------------------------------------------
# Decisions


def observation_of(spec: ObservationSpec, decision: dict[str, Any]) -> Observation:
    """What the policy saw."""
    flat = np.array(decision["observation"], np.float32)
    num_state, width = len(spec.state_features), len(spec.candidate_features)
    rows = flat[num_state : num_state + spec.max_candidates * width]
    return Observation(
        flat[:num_state],
        rows.reshape(spec.max_candidates, width),
        np.array(decision["mask"], np.bool_),
        tuple(str(c["key"]) for c in decision["candidates"]),
    )


def _executed(part: Part, decision: dict[str, Any], keys: Sequence[str]) -> tuple[Any, Any, int]:
    """Behaviour [K], guard map [K] and executed row of a decision."""
    behaviour = np.array(decision["probabilities"], np.float64)
    rows, action = len(behaviour), int(decision["action"])
    if "guard_map" in decision:
        guard_map = np.array(decision["guard_map"], np.int64)
    else:
        reasons = decision["mask_reasons"]
        vetoed = [row >= len(reasons) or bool(reasons[row]) for row in range(rows)]
        guard_map = np.where(vetoed, 0, np.arange(rows))
    executed = keys.index(str(decision["executed_key"]))
    guard_map = same_keys_once(keys, guard_map)
    if guard_map[action] != executed:  # it turned out infeasible when it was planned
        guard_map[action] = executed
    if part.header.get("deterministic"):
        behaviour = np.eye(rows)[action]
    if decision.get("mode", "active") != "active":
        behaviour, executed = np.eye(rows)[0], 0
    elif str(decision.get("reason", "")).startswith(IN_PLACE_OF_THE_POLICY):
        guard_map = np.full(rows, executed, np.int64)
    return behaviour, guard_map, executed


def _decisions(
    parts: Sequence[Part],
    observations: Sequence[Observation],
    reward: RewardConfig,
    generator: str,
) -> LoggedDecisions:
    found: list[tuple[Any, Any, int]] = []
    at_s: list[float] = []
    rewards: list[float] = []
    segment: list[int] = []
    number, keys = -1, [o.keys for o in observations]
    for part in parts:
        worth = interval_rewards(part.intervals, part.traffic, reward)
        last = -2
        for decision, index in part.steps:
            number += index != last + 1
            found.append(_executed(part, decision, keys[len(found)]))
            at_s.append(float(decision["at_s"]))
            rewards.append(worth[index])
            segment.append(number)
            last = index
    behaviour, guard_map, executed = (np.array(c) for c in zip(*found, strict=True))
    behaviour = np.where(behaviour < TINY, 0.0, behaviour)
    return LoggedDecisions(
        at_s=np.array(at_s),
        keys=tuple(keys),
        behaviour=behaviour / behaviour.sum(axis=1, keepdims=True),
        guard_map=guard_map,
        executed=executed,
        reward=np.array(rewards),
        features=np.array([row_features(o) for o in observations]),
        segment=np.array(segment),
        generator=generator,
    )


def row_features(observation: Observation) -> Any:
    """[K, S + C] the state beside each candidate row."""
    rows = observation.candidates.astype(np.float64)
    state = np.broadcast_to(
        observation.state.astype(np.float64), (len(rows), len(observation.state))
    )
    return np.hstack([state, rows])
