"""ServingEnv: the decision pipeline of production, stepped over any `Drivable` cluster.

One step is one decision: resolve and apply it, let `grid_s` seconds of traffic pass, observe,
prepare the next. Episodes end by truncation alone; serving has no terminal state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import gymnasium
import numpy as np

from controller.decision import DecisionPipeline, PreparedDecision
from controller.observation import FEATURE_LIMIT
from engine.cluster import (
    ClusterEvent,
    ClusterSnapshot,
    Decision,
    Drivable,
    SwitchTicket,
)
from engine.errors import (
    InfeasibleError,
    InvalidRequestError,
    StaleEpochError,
    SwitchInProgressError,
)
from envs.columns import ColumnLedger, ColumnTraffic
from envs.render import Frame, draw, show_text
from envs.reward import RewardConfig, RewardTerms
from envs.scenarios import DeviceFailure, Disturbances, FailureDrivable
from envs.traffic_feed import EventTraffic, IntervalCounts, TrafficFeed
from envs.workload import Trace
from policies.base import Floats, Mask, Observation, ObservationSpec
from policies.evaluation import EpisodeRecord

TERMS = tuple(field.name for field in fields(RewardTerms))
MakeTrace = Callable[[np.random.Generator], Trace]
MakeCluster = Callable[[np.random.Generator], Drivable]
MakeDisturbances = Callable[[np.random.Generator, float], Disturbances]


def undisturbed(rng: np.random.Generator, duration_s: float) -> Disturbances:
    """Nothing happens but traffic."""
    return Disturbances()


@dataclass(frozen=True, slots=True)
class EnvParts:
    """What an environment is made of. The pipeline is owned by the environment."""

    pipeline: DecisionPipeline
    make_cluster: MakeCluster  # a fresh cluster per episode; the environment closes it
    make_trace: MakeTrace  # the traffic of an episode; its duration is the episode's
    reward: RewardConfig
    columns: bool = False  # the fast path: make_cluster gives a `ColumnDrivable`
    make_disturbances: MakeDisturbances = undisturbed  # of an episode of that many seconds


def spaces_of(
    spec: ObservationSpec,
) -> tuple[gymnasium.spaces.Space[Floats], gymnasium.spaces.Discrete]:
    """Of observations, and of actions."""
    limit, shape = FEATURE_LIMIT, (spec.flat_size,)
    observations: Any = gymnasium.spaces.Box(-limit, limit, shape, np.float32)
    return observations, gymnasium.spaces.Discrete(spec.max_candidates)


class ServingEnv(gymnasium.Env[Floats, np.int64]):
    """Observation: `Observation.flat()`, float32. Action: a candidate row; 0 keeps.

    `action_masks()` [max_candidates] tells which rows are legal; an illegal choice is turned into
    keep by the guardrails, as in production. `info` after a step: `outcomes` (requests ended in
    the interval; on the fast path `traffic`, in columns), `decision`, `ticket` (of the switch
    applied, else None), `arrived`, `reward_terms` (they add up to the reward), `at_s`.
    It is also the `DecisionEnv` that evaluation runs: `start`, `decide`, `record`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (gymnasium's own form)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,  # decisions per second of a film
    }

    def __init__(self, parts: EnvParts, render_mode: str | None = None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InvalidRequestError(
                f"render_mode is {render_mode!r}; expected one of "
                f"{', '.join(self.metadata['render_modes'])}, or none."
            )
        self.parts, self.pipeline, self.render_mode = parts, parts.pipeline, render_mode
        spec = self.pipeline.observation_spec
        self.observation_space, self.action_space = spaces_of(spec)
        self.grid_s = spec.grid_s
        self.cluster: Drivable | None = None
        self.prepared: PreparedDecision | None = None

    # ---------------------------------------------------------------- gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        """A new window of traffic on a new cluster; deterministic by seed on the surrogate."""
        super().reset(seed=seed)
        self.close()
        self.trace = trace = self.parts.make_trace(self.np_random)
        self.cluster = self.parts.make_cluster(self.np_random)
        snapshot = self.cluster.snapshot()
        self.start_s = snapshot.now_s
        self._num_steps, self._num_intervals = 0, max(1, round(trace.duration_s / self.grid_s))
        self._disturb(self.cluster, trace.duration_s)
        self._cursor = self.cluster.events(0).next_cursor
        feed = ColumnTraffic if self.parts.columns else EventTraffic
        self._feed: TrafficFeed = feed(
            self.cluster, self.pipeline, trace, self.start_s, self.parts.reward
        )
        self._num_arrived = 0
        self._rewards: list[float] = []
        self._tickets: dict[str, SwitchTicket] = {}
        self._seen = snapshot
        self.pipeline.reset(snapshot.now_s)
        self.prepared = self.pipeline.prepare(snapshot)
        return self.prepared.observation.flat(), {"at_s": snapshot.now_s}

    def step(
        self, action: np.int64 | int, probabilities: Any = None, policy_name: str = ""
    ) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """One decision and the `grid_s` seconds after it."""
        assert self.cluster is not None, "reset first"
        assert self.prepared is not None
        decision = self.pipeline.resolve(self.prepared, int(action), probabilities, policy_name)
        ticket = self._apply(self.cluster, decision)
        self._num_steps += 1
        self._num_arrived = self._feed.submit_until(self.end_s)
        self.cluster.advance(self.end_s)
        self._feed.observe(self._take_events(self.cluster))
        snapshot = self.cluster.snapshot()
        moved = decision.plan.weight_bytes if decision.plan is not None and ticket else 0
        device_s = self.grid_s * len(snapshot.deployment.devices)
        terms = self._feed.settle(snapshot.now_s, moved, device_s)
        reward = terms.total
        self._rewards.append(reward)
        self.prepared = self.pipeline.prepare(self._as_seen(snapshot))
        info = self._feed.interval_info() | {
            "decision": decision,
            "ticket": ticket,
            "arrived": self._num_arrived,
            "reward_terms": {name: getattr(terms, name) for name in TERMS},
            "at_s": snapshot.now_s,
        }
        return self.prepared.observation.flat(), reward, False, self.is_over, info

    @property
    def ledger(self) -> ColumnLedger:
        """Of the requests so far; of an environment in columns."""
        assert isinstance(self._feed, ColumnTraffic), "an environment in columns"
        return self._feed.ledger

    @property
    def is_over(self) -> bool:
        """Whether the episode has passed; it is truncated then."""
        return self._num_steps >= self._num_intervals

    @property
    def end_s(self) -> float:
        """When the last interval begun ends, on the cluster's clock."""
        return self.start_s + self._num_steps * self.grid_s

    @property
    def tickets(self) -> tuple[SwitchTicket, ...]:
        """The latest ticket of each switch of the episode."""
        return tuple(self._tickets.values())

    def action_masks(self) -> Mask:
        """[max_candidates] True where a row may be chosen; row 0 (keep) always may."""
        assert self.prepared is not None, "reset first"
        return self.prepared.observation.mask

    def render(self) -> Any:
        """Deployment, load, routing and switch, and what the last interval came to: text ("ansi")
        or uint8 [height, width, 3] ("rgb_array")."""
        assert self.prepared is not None, "reset first"
        if self.render_mode is None:
            raise InvalidRequestError(
                "render_mode is not set; make the environment with render_mode='ansi' or "
                "'rgb_array'."
            )
        reward = self._rewards[-1] if self._rewards else 0.0
        snapshot, spec = self.prepared.snapshot, self.pipeline.cluster.spec
        counts = IntervalCounts()
        if self._rewards:
            counts = self._feed.counts(self._num_arrived, self.parts.reward.slo)
        frame = Frame(snapshot, spec, counts, self.grid_s, self.start_s, reward)
        return show_text(frame) if self.render_mode == "ansi" else draw(frame)

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.close()
            self.cluster = None

    # ---------------------------------------------------------------- an interval

    def _apply(self, cluster: Drivable, decision: Decision) -> SwitchTicket | None:
        """Start the decided switch, else set the best routing for what is there.

        A live engine may have moved on since the snapshot; then nothing is done this time.
        """
        assert self.prepared is not None
        try:
            if not self.prepared.snapshot.switch_in_flight:
                cluster.set_routing(self.pipeline.routing_for(self.prepared))
            if decision.plan is None:
                return None
            return cluster.apply(decision.plan)
        except (InfeasibleError, StaleEpochError, SwitchInProgressError):
            return None

    def _disturb(self, cluster: Drivable, duration_s: float) -> None:
        """Draw what disturbs the episode, and hand failures over to the cluster."""
        drawn = self.parts.make_disturbances(self.np_random, duration_s)
        self._stale = drawn.stale
        if not drawn.failures:
            return
        if not isinstance(cluster, FailureDrivable):
            raise InvalidRequestError(
                f"{type(cluster).__name__} cannot be told to lose devices; set the scenario's "
                "failure_gap_s to [0, 0]."
            )
        start_s = self.start_s
        cluster.schedule_failures(
            [
                DeviceFailure(f.at_s + start_s, f.device, f.back_at_s + start_s)
                for f in drawn.failures
            ]
        )

    def _as_seen(self, snapshot: ClusterSnapshot) -> ClusterSnapshot:
        """The snapshot; in a stale span the last one before it, at the present time."""
        if any(span.covers(snapshot.now_s - self.start_s) for span in self._stale):
            return replace(self._seen, now_s=snapshot.now_s)
        self._seen = snapshot
        return snapshot

    def _take_events(self, cluster: Drivable) -> tuple[ClusterEvent, ...]:
        batch = cluster.events(self._cursor)
        assert not batch.num_lost, "the event log is shorter than one interval"
        self._cursor = batch.next_cursor
        for event in batch.events:
            if event.ticket is not None:
                self._tickets[event.ticket.ticket_id] = event.ticket
        return batch.events

    # ---------------------------------------------------------------- evaluation

    def start(self) -> Observation:
        """`reset` for `policies.evaluation`; seed 0."""
        self.reset(seed=0)
        assert self.prepared is not None
        return self.prepared.observation

    def decide(self, action: int) -> tuple[Observation, bool]:
        _, _, _, truncated, _ = self.step(action)
        assert self.prepared is not None
        return self.prepared.observation, truncated

    def record(self) -> EpisodeRecord:
        """What the episode has left so far."""
        feed = self._feed
        assert isinstance(feed, EventTraffic), "columns keep no outcomes; build without them"
        done = [t for t in self.tickets if t.phase.is_terminal]
        return EpisodeRecord(
            outcomes=tuple(feed.outcomes),
            unfinished_arrivals_s=tuple(feed.open_arrivals_s.values()),
            end_s=self.end_s,
            rewards=tuple(self._rewards),
            num_switches=len(self._tickets),
            switch_s=sum(t.duration_s for t in done),
            num_slo_met=sum(self.parts.reward.slo.is_met_by(o) for o in feed.outcomes),
        )
