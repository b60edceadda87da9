"""What logs say about one policy: estimates, diagnostics, what was served and would have been."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster
from envs.logged import LoggedRun, Part, logged_run, read_parts
from envs.logged_replay import replay_logged, replay_policy, seconds_of_switches
from envs.offline.course import (
    Course,
    Switch,
    Watched,
    WorstBlock,
    ended_of_log,
    ledger_of_keys,
    worst_block,
)
from envs.offline.target import Target, load_target
from envs.recalibration import Recalibration, Signals, pace_of, recalibrate
from envs.serving_env import ServingEnv
from policies.ope import diagnose, estimate
from policies.ope_data import Floats, Ints, Overlap, decide_on, generator_refusal
from policies.ope_estimators import DEFAULT_ESTIMATOR, ESTIMATORS, Evidence, OpeConfig
from policies.ope_interval import Estimate
from policies.ope_replay import Calibration, ModelRun

Report = Callable[[str], None]
SAMPLED_RUNS = 3  # of the model under a target that draws
DRAWN_MODELS = 3  # that the log allows as well, for the model's error


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of some logs."""

    logs: tuple[Path, ...]
    policy: str  # a rule, FOLDER or FOLDER:MEMBER
    profile: Path | None = None
    sampled: bool = False  # whether the policy would draw; else it does what is most probable
    estimator: str = DEFAULT_ESTIMATOR
    effect_s: float = 600.0
    block_s: float = 1200.0
    level: float = 0.95
    draws: int = 200
    seed: int = 0
    recalibrate: bool = True  # whether the profile is first set right by the log

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise InvalidRequestError(
                f"no estimator {self.estimator!r}; expected one of {', '.join(ESTIMATORS)}."
            )

    def config(self, grid_s: float) -> OpeConfig:
        """In decisions."""
        window, block = (max(1, round(s / grid_s)) for s in (self.effect_s, self.block_s))
        return OpeConfig(window, block, self.draws, self.level)


@dataclass(frozen=True, slots=True)
class Findings:
    """The answer. Rewards are per decision; times `per_request` they are J, the mean utility of a
    request, from -1 to 1."""

    question: Question
    behaviour: str  # names of the policies that ran
    run: LoggedRun
    estimates: tuple[Estimate, ...]
    overlap: Overlap | None
    calibration: Calibration | None
    recalibration: Recalibration | None  # None: the model is as profiled
    per_request: float
    generator_refusal: str
    logged: Course
    modelled: Course  # the log's decisions in the model
    target: Course  # the policy in the model
    worst: WorstBlock | None
    forecast: ForecastCheck

    @property
    def main(self) -> Estimate:
        return next(e for e in self.estimates if e.estimator == self.question.estimator)

    @property
    def verdict(self) -> str:
        """One sentence."""
        name, ran, main = self.question.policy, self.behaviour, self.main
        if main.gain is None:
            return f"These logs cannot say what {name} would have done: {main.refusal}"
        gain = f"J {self.per_request * main.gain:+.4f} per request over {ran}"
        if main.gain_interval is None:
            return f"{name} would have had {gain}, without an interval: {main.note}."
        low, high = (self.per_request * g for g in main.gain_interval)
        told = f"{gain} ({self.question.level:.0%} interval {low:+.4f} to {high:+.4f})"
        if low > 0:
            return f"{name} would have done better than what ran: {told}."
        if high < 0:
            return f"{name} would have done worse than what ran: {told}."
        return f"No difference between {name} and what ran is shown: {told}."

    def to_json(self) -> dict[str, Any]:
        """Infinite and absent numbers are null."""
        decisions = self.run.decisions
        return {
            "verdict": self.verdict,
            "logs": [str(path) for path in self.question.logs],
            "policy": self.question.policy,
            "behaviour": self.behaviour,
            "decisions": len(decisions),
            "hours": round(self.logged.hours, 4),
            "estimator": self.question.estimator,
            "gain_j": _scaled(self.main.gain, self.per_request),
            "gain_j_interval": _pair(self.main.gain_interval, self.per_request),
            "logged_j": _scaled(float(decisions.reward.mean()), self.per_request),
            "reward_to_j": round(self.per_request, 6),
            "estimates": {e.estimator: _estimate(e) for e in self.estimates},
            "overlap": self.overlap
            and asdict(self.overlap) | {"effective_windows": self.overlap.effective_windows},
            "calibration": self.calibration and asdict(self.calibration),
            "recalibration": self.recalibration and self.recalibration.to_json(),
            "generator_refusal": self.generator_refusal,
            "switches_per_hour": {
                "logged": round(self.logged.switches_per_hour, 4),
                "policy": round(self.target.switches_per_hour, 4),
            },
            "worst_block": self.worst and asdict(self.worst),
            "forecast_coverage_q90": _scaled(self.forecast.coverage_q90, 1.0),
            "deterministic": not self.question.sampled,
            "skipped": list(self.run.skipped),
        }


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else round(value * factor, 6)


def _pair(values: tuple[float, float] | None, factor: float) -> list[float | None] | None:
    return None if values is None else [_scaled(v, factor) for v in values]


def _estimate(found: Estimate) -> dict[str, Any]:
    return asdict(found) | {
        "value": _scaled(found.value, 1.0),
        "gain": _scaled(found.gain, 1.0),
        "value_interval": _pair(found.value_interval, 1.0),
        "gain_interval": _pair(found.gain_interval, 1.0),
    }


# --------------------------------------------------------------------------------------
# From logs to findings


def find(question: Question, report: Report = lambda what: None) -> Findings:
    """Raises InvalidRequestError and CheckpointError in one sentence."""
    report("reading logs")
    parts, skipped = read_parts(question.logs)
    target = load_target(question.policy, question.profile, question.sampled, parts)
    run = logged_run(parts, skipped, target.reward)
    config, replays = question.config(run.grid_s), [_PartReplay(target, part) for part in parts]
    recalibration = None
    if question.recalibrate:
        report(f"fitting the model to {len(run.decisions)} decisions")
        keys = [str(d["deployment_key"]) for part in parts for d, _ in part.steps]
        recalibration = recalibrate(
            target.pipeline.cluster,
            lambda cluster: _in_model(replays, cluster),
            keys,
            _as_logged(run),
            config.window,
        )
    report(f"replaying {len(run.decisions)} decisions in the model")
    cluster = recalibration.cluster if recalibration else target.pipeline.cluster
    replayed = [_replayed(replay, cluster, question) for replay in replays]
    evidence = Evidence(
        run.decisions,
        decide_on(target.policy, run.observations, run.decisions.segment, target.generator),
        _joined([r.logged for r in replayed]),
        tuple(_joined(list(runs)) for runs in zip(*(r.target for r in replayed), strict=True)),
        _drawn(replays, recalibration, question) if recalibration else (),
    )
    report("estimating")
    estimates = tuple(
        estimate(name, evidence, config, np.random.default_rng(question.seed))
        for name in ESTIMATORS
    )
    overlap, calibration = diagnose(evidence, config)
    return _findings(
        question, target, run, evidence, replayed, estimates, overlap, calibration, recalibration
    )


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A part in the model: rows of its decisions, and the whole courses."""

    logged: ModelRun
    target: tuple[ModelRun, ...]
    courses: tuple[Course, Course]  # as logged, and the first one under the target


@dataclass(frozen=True, slots=True)
class _PartReplay:
    """A part of a log, to be run in models of the system."""

    target: Target
    part: Part

    @property
    def rows(self) -> Ints:
        """Interval of each decision, from the part's start on."""
        grid_s = self.target.pipeline.config.grid_s
        at_s = np.array([float(d["at_s"]) for d, _ in self.part.steps])
        found = np.round((at_s - self.part.traffic.start_s) / grid_s).astype(np.int64)
        return np.clip(found, 0, self._number - 1)

    @property
    def _number(self) -> int:
        grid_s = self.target.pipeline.config.grid_s
        return max(1, round(self.part.traffic.trace.duration_s / grid_s))

    def as_logged(self, cluster: ProfiledCluster) -> tuple[ModelRun, Course, Signals]:
        """Rows of the decisions, the whole course, and the signals of the rows, with the decisions
        as logged."""
        rows, switches = self.rows, [""] * self._number
        for (decision, _), row in zip(self.part.steps, rows.tolist(), strict=True):
            if decision["executed_key"] != decision["deployment_key"]:
                switches[row] = str(decision["executed_key"])
        env, watched = self.target.model(self.part, cluster), Watched(self.target.reward.slo)
        run = replay_logged(env, switches, watched)
        env.close()
        found, course = _rows(run, rows), _course("log, in the model", run, watched, env)
        return found, course, Signals(found.reward, watched.pace()[rows], seconds_of_switches(env))

    def under_target(
        self, cluster: ProfiledCluster, rng: np.random.Generator, sampled: bool
    ) -> tuple[ModelRun, Course]:
        """Rows of the decisions, and the whole course, under the policy."""
        env, watched = self.target.model(self.part, cluster), Watched(self.target.reward.slo)
        run = replay_policy(env, self.target.policy, rng, not sampled, watched)
        env.close()
        return _rows(run, self.rows), _course(self.target.name, run, watched, env)


def _replayed(replay: _PartReplay, cluster: ProfiledCluster, question: Question) -> _Replayed:
    logged, course, _ = replay.as_logged(cluster)
    number = SAMPLED_RUNS if question.sampled else 1
    streams = (np.random.default_rng((question.seed, i)) for i in range(number))
    runs = [replay.under_target(cluster, rng, question.sampled) for rng in streams]
    return _Replayed(logged, tuple(run for run, _ in runs), (course, runs[0][1]))


def _as_logged(run: LoggedRun) -> Signals:
    """Of all decisions."""
    pace = [pace_of(part.intervals[index].tpot_s) for part in run.parts for _, index in part.steps]
    switch_s = [duration_s for part in run.parts for duration_s in part.switch_s]
    return Signals(run.decisions.reward, np.array(pace), np.array(switch_s, np.float64))


def _in_model(replays: Sequence[_PartReplay], cluster: ProfiledCluster) -> Signals:
    found = [replay.as_logged(cluster)[2] for replay in replays]
    return Signals(
        np.concatenate([signals.reward for signals in found]),
        np.concatenate([signals.pace for signals in found]),
        np.concatenate([signals.switch_s for signals in found]),
    )


def _drawn(
    replays: Sequence[_PartReplay], found: Recalibration, question: Question
) -> tuple[tuple[ModelRun, ModelRun], ...]:
    """Log and target in other models that the log allows."""
    pairs = []
    for number in range(DRAWN_MODELS):
        rng = np.random.default_rng((question.seed, SAMPLED_RUNS + number))
        cluster = found.draw(rng)
        logged = _joined([r.as_logged(cluster)[0] for r in replays])
        wanted = _joined([r.under_target(cluster, rng, question.sampled)[0] for r in replays])
        pairs.append((logged, wanted))
    return tuple(pairs)


def _rows(run: ModelRun, rows: Any) -> ModelRun:
    keys = tuple(run.keys[row] for row in rows.tolist())
    return ModelRun(run.reward[rows], keys, run.features[rows])


def _joined(runs: Sequence[ModelRun]) -> ModelRun:
    return ModelRun(
        np.concatenate([run.reward for run in runs]),
        tuple(key for run in runs for key in run.keys),
        np.concatenate([run.features for run in runs]),
    )


def _course(name: str, run: ModelRun, watched: Watched, env: ServingEnv) -> Course:
    at_s = env.grid_s * np.arange(len(run.reward), dtype=np.float64)
    arrived, keys = np.array(watched.arrived, np.float64), run.keys
    ledger = ledger_of_keys(at_s.tolist(), keys)
    return Course(name, at_s, keys, run.reward, arrived, *watched.ended(), env.grid_s, ledger)


def _findings(
    question: Question,
    target: Target,
    run: LoggedRun,
    evidence: Evidence,
    replayed: Sequence[_Replayed],
    estimates: tuple[Estimate, ...],
    overlap: Overlap | None,
    calibration: Calibration | None,
    recalibration: Recalibration | None,
) -> Findings:
    logged = course_of_log(run, target)
    mean_arrived = float(logged.arrived.mean())
    scale = target.reward.scale_requests
    gains = evidence.replay.target_reward - evidence.replay.logged.reward
    reward = run.decisions.reward
    return Findings(
        question,
        ", ".join(sorted({str(d["policy"]) for part in run.parts for d, _ in part.steps})),
        run,
        estimates,
        overlap,
        calibration,
        recalibration,
        scale / max(mean_arrived, 1e-9),
        generator_refusal(run.decisions, evidence.target),
        logged,
        join_courses([r.courses[0] for r in replayed]),
        join_courses([r.courses[1] for r in replayed]),
        worst_block(reward + gains, reward, logged.arrived, run.grid_s, scale),
        check_forecasts(run.parts),
    )


def join_courses(courses: Sequence[Course]) -> Course:
    """One after another, without the time between them."""
    if len(courses) == 1:
        return courses[0]
    offsets = np.cumsum([0.0, *(len(c.at_s) * c.grid_s for c in courses[:-1])]).tolist()

    def joined(name: str, shifted: bool = False) -> Floats:
        return np.concatenate(
            [
                getattr(c, name) + (o if shifted else 0.0)
                for c, o in zip(courses, offsets, strict=True)
            ]
        )

    return Course(
        courses[0].name,
        joined("at_s", True),
        tuple(key for c in courses for key in c.keys),
        joined("reward"),
        joined("arrived"),
        joined("ended_s", True),
        joined("latency_s"),
        joined("met"),
        courses[0].grid_s,
        tuple(
            replace(s, at_s=s.at_s + o)
            for c, o in zip(courses, offsets, strict=True)
            for s in c.switches
        ),
    )


def course_of_log(run: LoggedRun, target: Target) -> Course:
    """As it was, one row per usable decision."""
    return join_courses([_logged_course(part, run, target, first) for part, first in _firsts(run)])


def _firsts(run: LoggedRun) -> list[tuple[Part, int]]:
    """Each part with the number of its first decision."""
    sizes = [len(part.steps) for part in run.parts]
    return list(zip(run.parts, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))


def _logged_course(part: Part, run: LoggedRun, target: Target, first: int) -> Course:
    start_s = part.traffic.start_s
    used = [part.intervals[index] for _, index in part.steps]
    outcomes = [o for interval in part.intervals for o in interval.outcomes]
    return Course(
        "as logged",
        np.array([float(d["at_s"]) - start_s for d, _ in part.steps]),
        tuple(str(d["deployment_key"]) for d, _ in part.steps),
        run.decisions.reward[first : first + len(part.steps)],
        np.array([len(i.arrivals) for i in used], np.float64),
        *ended_of_log(outcomes, target.reward.slo, start_s),
        run.grid_s,
        tuple(_switch(d, start_s) for d, _ in part.steps if _switches(d)),
    )


def _switches(decision: Mapping[str, Any]) -> bool:
    is_active = decision.get("mode", "active") == "active"
    return is_active and bool(decision["executed_key"] != decision["deployment_key"])


def _switch(decision: Mapping[str, Any], start_s: float) -> Switch:
    after = str(decision["executed_key"])
    expected = [c["switch_s"] for c in decision["candidates"] if c["key"] == after]
    return Switch(
        float(decision["at_s"]) - start_s,
        str(decision["deployment_key"]),
        after,
        f"{decision['policy']}: {decision.get('reason', '')}",
        float(expected[0]) if expected else None,
        float(decision["propensity"]) if "propensity" in decision else None,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ForecastCheck:
    """What was expected and what came, per usable decision: requests per second of all types."""

    at_s: Floats  # [T]
    expected: Floats  # [T] sums of the types' medians
    actual: Floats  # [T]
    coverage_q90: float | None  # share of (decision, type) that stayed within q90; None: not logged


def check_forecasts(parts: Sequence[Part]) -> ForecastCheck:
    """Of the next interval, whose rates the next decision tells."""
    rows, within, offset_s = [], [], 0.0
    for part in parts:
        following = {index: decision for decision, index in part.steps}
        for decision, index in part.steps:
            told, after = decision.get("forecast"), following.get(index + 1)
            if told and after and after.get("rates"):
                actual = np.array(after["rates"][0])
                within += (actual <= np.array(told["q90"]) + 1e-9).tolist()
                at_s = float(decision["at_s"]) - part.traffic.start_s + offset_s
                rows.append((at_s, sum(told["q50"]), float(actual.sum())))
        offset_s += part.traffic.trace.duration_s
    at, expected, came = np.array(rows, np.float64).reshape(-1, 3).T
    return ForecastCheck(at, expected, came, float(np.mean(within)) if within else None)
