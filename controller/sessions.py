"""Decisions for other engines of the same kind: each session has a history of its own, and shares
the planner and the policy of the controller."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from controller.deciding import Decided, decide
from controller.decision import DecisionPipeline
from controller.policy_server import PolicyServer
from engine.cluster import ClusterEvent, ClusterSnapshot, RequestOutcome, Routing
from engine.errors import InvalidRequestError
from policies.base import Policy
from policies.baselines import HysteresisPolicy

MAX_SESSIONS = 64
MAX_NAME = 200  # characters
MAX_TIME_S, MAX_TOKENS = 1e12, 1e9  # of an event; more would drown all others
FEW_EVENTS = 16


@dataclass(slots=True)
class _Session:
    pipeline: DecisionPipeline
    source: Policy  # the controller's, of which the server asks a copy
    server: PolicyServer
    num_events: int = 0
    last: ClusterSnapshot | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sessions:
    """The longest unused is forgotten when there are too many."""

    def __init__(
        self, pipeline: DecisionPipeline, deadline_s: float, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self._pipeline, self._deadline_s, self._max = pipeline, deadline_s, max_sessions
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()
        self._undrawn = np.random.default_rng(0)  # for decisions that draw nothing
        # one thread: decisions are all processor time, and more of them would only take turns
        self.worker = ThreadPoolExecutor(1, "decide")

    def _session(self, name: str, policy: Policy) -> _Session:
        if not 0 < len(name) <= MAX_NAME:
            raise InvalidRequestError(
                f"the session's name has {len(name)} characters; expected 1 to {MAX_NAME}: name "
                "the engine, so that its history is found again.",
                "session",
            )
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = self._begin(policy)
                if len(self._sessions) > self._max:
                    self._sessions.popitem(last=False)[1].server.close()
            self._sessions.move_to_end(name)
        return session

    def _begin(self, policy: Policy) -> _Session:
        pipeline = self._pipeline.sibling()
        return _Session(pipeline, policy, self._server(pipeline, policy))

    def _server(self, pipeline: DecisionPipeline, policy: Policy) -> PolicyServer:
        rule, own = HysteresisPolicy(pipeline.observation_spec), copy.deepcopy(policy)
        own.reset()
        return PolicyServer(own, rule, self._deadline_s, deterministic=True)

    def is_brief(self, name: str, policy: Policy, snapshot: ClusterSnapshot, events: int) -> bool:
        """Whether `decide` takes about as long as it would to hand it to another thread: it waits
        for nobody, its policy is a rule, and its deployments are listed by now."""
        with self._lock:
            session = self._sessions.get(name)
        return (
            session is not None
            and session.last is not None
            and not session.lock.locked()
            and session.server.answers_at_once(policy)
            and session.pipeline.planner.is_quick
            and not snapshot.dead_devices
            and events <= FEW_EVENTS
        )

    def report(
        self, name: str, policy: Policy, events: Sequence[ClusterEvent], num_lost: int
    ) -> int:
        """Take in events; returns how many the session has. Raises InvalidRequestError for one
        that cannot have happened."""
        _check_events(events)
        session = self._session(name, policy)
        with session.lock:
            session.pipeline.observe(events, num_lost)
            session.num_events += len(events)
            return session.num_events

    def decide(
        self,
        name: str,
        policy: Policy,
        snapshot: ClusterSnapshot,
        events: Sequence[ClusterEvent],
        num_lost: int,
        seed: int | None,
    ) -> tuple[Decided, Routing]:
        """A decision, and the best routing for what is deployed. With a seed it is drawn. Raises
        InvalidRequestError for what cannot be."""
        if seed is not None and seed < 0:
            raise InvalidRequestError(f"the seed is {seed}; expected 0 or more.", "seed")
        _check_events(events)
        session = self._session(name, policy)
        with session.lock:
            if session.source is not policy:
                session.server.close()
                session.source = policy
                session.server = self._server(session.pipeline, policy)
            if session.last is not None and snapshot.now_s < session.last.now_s:
                raise InvalidRequestError(
                    f"the snapshot is of {snapshot.now_s} s, the one before of "
                    f"{session.last.now_s} s; send them in order, or begin another session when "
                    "the engine was started again.",
                    "snapshot",
                )
            pipeline, server = session.pipeline, session.server
            pipeline.observe(events, num_lost)
            session.num_events += len(events)
            session.last = snapshot
            server.deterministic = seed is None
            rng = self._undrawn if seed is None else np.random.default_rng(seed)
            prepared = pipeline.prepare(snapshot)
            decided = decide(pipeline, prepared, lambda p: server.act(p.observation, rng))
            return decided, pipeline.routing_for(prepared)

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)
        with self._lock:
            for session in self._sessions.values():
                session.server.close()
            self._sessions.clear()


def _check_events(events: Sequence[ClusterEvent]) -> None:
    """One that is no number would be in every rate of the session from then on."""
    for event in events:
        for told in (event.arrival, event.outcome):
            if told is None:
                continue
            times = [event.at_s, told.arrival_s]
            counts = [told.prompt_tokens]
            if isinstance(told, RequestOutcome):
                times += [told.finish_s, told.longest_gap_s, told.first_token_s or 0.0]
                counts.append(told.output_tokens)
            if not (
                all(abs(t) <= MAX_TIME_S for t in times)
                and 0 <= min(counts) <= max(counts) <= MAX_TOKENS
            ):
                raise InvalidRequestError(
                    f"event {event.seq} has times {times} and token counts {counts}; expected "
                    f"seconds up to {MAX_TIME_S:g}, and counts of 0 to {MAX_TOKENS:g}.",
                    "events",
                )
