"""What of a controller outlives it, decided here; the rest starts fresh.

After every tick and every operation the decision log gets a `state` record. The next life reads the
end of the log, and its first tick is the one after the last.

| survives | from |
|---|---|
| mode, policy, policies to roll back to | `state`, unless started with other arguments |
| holds, bans, an undo that is due, circuit breaker | `state`; time has passed for them |
| dwell, budget of switches, last switch | `state`; switches since, from the engine's tickets |
| switch watched, switches cancelled, drift known, canary, its block and its draws | `state` |
| place in the engine's events, and in the count of ticks | the last `interval` and tick |
| rates, lengths, latencies, forecasts | the `interval` records, observed again |
| records that WatchDecisions has still to give, resume tokens | `decision` and `tick` records |
| answers to idempotency keys | `answer` records |

Fresh are: counters (of this process), what `Explain` knows (the log has it), sessions of `Decide`
(their callers send what happened), shadows (from the arguments), the retraining trigger, and the
seeds, since no two lives may draw alike. A tick that was cut short between its records costs what
happened in it to the watch and the canary. When the engine was started again meanwhile, the first
snapshot shows it, and the loop does what it does whenever that happens.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.log_records import REQUEST_FIELDS
from controller.loop import ControlLoop, Seen
from controller.operations import Operations
from controller.past_ticks import past_ticks
from controller.records import Mode
from controller.roster import LoadedPolicy
from engine.cluster import Arrival, ClusterEvent, EventKind, RequestOutcome, RequestStatus
from engine.errors import TidewrightError

logger = logging.getLogger(__name__)
TAIL_BYTES = 8 << 20  # of the log
MAX_RECALLED = 3  # policies to roll back to
UNSEEN = 1000  # revisions that a life may have told of after its last record


@dataclass(frozen=True, slots=True)
class Keeper:
    """Writes the records. With the loop's `turn` held, but for `answer`, which takes it."""

    loop: ControlLoop
    operations: Operations
    arguments: Mapping[str, str]  # of the process, that `state` may differ from
    wall: Callable[[], float] = time.time

    def keep(self) -> None:
        self.loop.log.append("state", self.state())

    def state(self) -> dict[str, Any]:
        loop, canary = self.loop, self.loop.trials.canary
        return {
            "lineage": loop.lineage,
            "clock_s": loop.clock(),
            "wall_s": self.wall(),
            "revision": loop.revision,
            "arguments": dict(self.arguments),
            "mode": loop.mode,
            "policy": loop.active.name,
            "before": [p.info.name for p in self.operations.before[-MAX_RECALLED:]],
            "generator": loop.pipeline.config_hash,
            "pipeline": loop.pipeline.saved(),
            "oversight": loop.oversight.saved(),
            "canary": None if canary is None else canary.saved(),
        }

    def answer(self, key: str, asked: str, answer: bytes) -> None:
        told = {"key": key, "asked": asked, "answer": base64.b64encode(answer).decode()}
        with self.loop.turn:
            self.loop.log.append("answer", told)


def resume(keeper: Keeper, records: Sequence[Mapping[str, Any]]) -> bool:
    """Go on from the end of a log, oldest record first; False: there is nothing to go on from.

    Before the first tick. What can't be taken up, such as a policy that is gone, is in the notes
    of the first tick.
    """
    states = [r for r in records if r["record"] == "state"]
    if not states:
        return False
    state, loop = states[-1], keeper.loop
    passed_s = max(0.0, keeper.wall() - state["wall_s"])
    shift_s = loop.clock() - passed_s - state["clock_s"]
    loop.lineage, loop.revision = state["lineage"], state["revision"] + UNSEEN
    _observe_again(loop, [r for r in records if r["record"] == "interval"], state)
    loop.pipeline.restore(state["pipeline"])
    loop.oversight.restore(state["oversight"], shift_s)
    for record in records[records.index(state) :]:
        if record["record"] == "decision":  # it may have been carried out
            loop.oversight.drift.expect(record["decision_id"])
    loop.records.extend(past_ticks(records, [t.name for t in loop.pipeline.typing.types]))
    loop.next_seq = 1 + max((r["seq"] for r in records if "seq" in r), default=0)
    for record in records:
        if record["record"] == "answer":
            told = base64.b64decode(record["answer"])
            keeper.operations.idempotency.recall(record["key"], record["asked"], told)
    _take_up(keeper, state)
    return True


def _take_up(keeper: Keeper, state: Mapping[str, Any]) -> None:
    """What operators said, where the process was not told otherwise since."""
    loop, operations, before = keeper.loop, keeper.operations, state["arguments"]
    if before.get("mode") == keeper.arguments["mode"]:
        loop.mode = Mode(state["mode"])
    if before.get("policy") == keeper.arguments["policy"]:
        operations.before = [p for p in map(_loaded(keeper), state["before"]) if p is not None]
        if state["policy"] != loop.active.name:
            active = _loaded(keeper)(state["policy"])
            if active is not None:
                operations.decide_by(active)
    canary = state["canary"]
    loaded = _loaded(keeper)(canary["name"]) if canary is not None else None
    if loaded is not None:
        loop.trials.restore_canary(loaded, canary)


def _loaded(keeper: Keeper) -> Callable[[str], LoadedPolicy | None]:
    def load(name: str) -> LoadedPolicy | None:
        try:
            return keeper.operations.roster.load(name)
        except TidewrightError as error:
            keeper.loop.note(f"not resumed: policy {name}: {error}")
            return None

    return load


# ------------------------------------------------------------------------------ traffic


def _observe_again(
    loop: ControlLoop, intervals: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> None:
    """Monitor, predictor and watch see the logged traffic; the engine's events go on after it."""
    intervals = [r for r in intervals if "next_cursor" in r]
    if not intervals:
        return
    pipeline, watch, last = loop.pipeline, loop.oversight.watch, intervals[-1]
    loop.cursor = int(last["next_cursor"])
    loop.seen = Seen(last["to_s"], last["epoch"], last["num_arrived"])
    if state["generator"] != pipeline.config_hash:
        loop.note("not resumed: rates, since the settings of the decisions are others now")
        pipeline.reset(last["to_s"])
        return
    to_s = intervals[0]["from_s"]
    pipeline.reset(to_s)
    for record in intervals:
        if record["from_s"] < to_s:  # the engine was started again
            pipeline.reset(record["from_s"])
            watch.reset()
        to_s = record["to_s"]
        events = _events(record)
        pipeline.observe(events, record["num_events_lost"])
        pipeline.take_interval(to_s)
        outcomes = (e.outcome for e in events if e.outcome is not None)
        arrivals = (e.arrival.arrival_s for e in events if e.arrival is not None)
        watch.recall(outcomes, arrivals)


def _events(record: Mapping[str, Any]) -> list[ClusterEvent]:
    """What the monitor needs of them; arrivals are logged without the request's name, and rows of
    earlier versions may lack the last fields."""
    arrivals = (Arrival("", *told) for told in record["arrivals"])
    status = REQUEST_FIELDS.index("status")
    outcomes = (
        RequestOutcome(
            **dict(zip(REQUEST_FIELDS, told, strict=False))
            | {"status": RequestStatus(told[status])}
        )
        for told in record["requests"]
    )
    return [
        *(ClusterEvent(0, a.arrival_s, EventKind.ARRIVED, arrival=a) for a in arrivals),
        *(ClusterEvent(0, o.finish_s, EventKind.ENDED, outcome=o) for o in outcomes),
    ]
