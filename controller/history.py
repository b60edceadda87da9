"""What the dashboard draws: a sample of every tick, and the engine between ticks, as plain data.

Every number is finite or None, so that JSON can carry it.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from controller.explanations import summary
from controller.guardrails import RULES
from controller.loop import ControlLoop
from controller.records import TickRecord, TickStatus
from engine.cluster import ClusterSnapshot, Deployment, ReplicaStats, SwitchTicket

MAX_SAMPLES = 1500  # six hours at the default grid
Plain = dict[str, Any]


def plain(value: Any) -> Any:
    """The same with None in place of what is no finite number."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
    return value


class History:
    """Of one loop, whose ticks it listens to; asked from any thread.

    `wall_clock` gives seconds since 1970: the engine's clock starts again with the engine.
    """

    def __init__(self, loop: ControlLoop, wall_clock: Callable[[], float] = time.time) -> None:
        self._loop, self.wall_clock = loop, wall_clock
        self._samples: deque[Plain] = deque(maxlen=MAX_SAMPLES)
        self._deployments: dict[int, Plain] = {}  # samples name them by number
        self._lock, self._last_seq, self._last_at_s = threading.Lock(), 0, -math.inf
        loop.listeners.append(self._on_change)

    @property
    def life(self) -> str:
        """Names this run of the controller."""
        return self._loop.log.life

    def _on_change(self) -> None:
        with self._lock:
            records = self._loop.records
            record = records[-1] if records else None
            if record is not None and record.seq > self._last_seq:
                self._last_seq = record.seq
                self._samples.append(plain(self._sample(record)))
                self._forget_deployments()

    def since(self, seq: int) -> Plain:
        """Samples of that tick and later ones, oldest first, with the deployments that they name
        by number."""
        with self._lock:
            newest = itertools.takewhile(lambda s: s["seq"] >= seq, reversed(self._samples))
            samples = list(newest)[::-1]
            named = {s["deployment"] for s in samples} - {None}
            return {"samples": samples, "deployments": {i: self._deployments[i] for i in named}}

    def _number(self, found: Deployment) -> int:
        last = next(reversed(self._deployments), -1)
        if (told := deployment(found)) != self._deployments.get(last):
            last += 1
            self._deployments[last] = told
        return last

    def _forget_deployments(self) -> None:
        oldest = next((s["deployment"] for s in self._samples if s["deployment"] is not None), 0)
        for number in [n for n in self._deployments if n < oldest]:
            del self._deployments[number]

    def _sample(self, record: TickRecord) -> Plain:
        """With the loop's tick just over, so that what was prepared is of that tick."""
        told: Plain = {
            name: getattr(record, name)
            for name in (
                *("seq", "at_s", "status", "mode", "decision_id", "chosen_key", "executed_key"),
                *("propensity", "policy", "reason", "vetoes", "notes", "arm", "deployment_key"),
                *("epoch", "tick_s"),
            )
        }
        told |= {
            "wall_s": self.wall_clock(),
            "summary": summary(record),
            "ticket_id": record.ticket.ticket_id if record.ticket is not None else "",
            "num_candidates": len(record.candidates),
        }
        seen = record.status in (TickStatus.DECIDED, TickStatus.OBSERVED)
        return told | (self._seen(record) if seen else {"deployment": None, "rates": []})

    def _seen(self, record: TickRecord) -> Plain:
        prepared, watch = self._loop.prepared, self._loop.oversight.watch
        assert prepared is not None
        snapshot, state = prepared.snapshot, prepared.monitor_state
        since_s, self._last_at_s = self._last_at_s, snapshot.now_s
        if since_s >= snapshot.now_s:  # the engine was started again
            since_s = -math.inf
        num_good, num_ended = watch.attainment(since_s)
        finished = state.num_finished_recent > 0
        return {
            "deployment": self._number(snapshot.deployment),
            "dead": snapshot.dead_devices,
            "num_waiting": record.num_waiting,
            "num_running": record.num_running,
            "kv_usage": state.kv_usage_max,
            "is_stale": state.is_stale,
            "num_good": num_good,
            "num_ended": num_ended,
            "latency_s": state.latency_s if finished else None,
            "ttft_s": state.ttft_s if finished else None,
            "tpot_s": state.tpot_s if finished else None,
            "rates": [
                [r.type, r.forecast_p50_per_s, r.forecast_p90_per_s, r.actual_per_s]
                for r in record.rates
            ],
        }

    def facts(self) -> Plain:
        """What holds for this run of the controller, and the targets in force."""
        pipeline, watch = self._loop.pipeline, self._loop.oversight.watch
        spec = pipeline.cluster.spec
        found = {
            "life": self.life,
            "wall_s": self.wall_clock(),
            "grid_s": pipeline.config.grid_s,
            "predictor": pipeline.predictor.name,
            "types": [asdict(t) for t in pipeline.typing.types],
            "model": spec.model.name,
            "num_devices": spec.num_devices,
            "devices_per_node": spec.devices_per_node,
            "slo": asdict(watch.targets) | {"is_given": watch.has_targets},
            "rules": {rule.name: rule.meaning for rule in RULES},
        }
        return dict(plain(found))


def deployment(found: Deployment) -> Plain:
    replicas = [
        [r.replica_id, r.parallel.tp, r.parallel.pp, list(r.placement.devices)]
        for r in found.replicas
    ]
    return {"key": found.key, "replicas": replicas}


def engine_view(snapshot: ClusterSnapshot, wall_s: float) -> Plain:
    """The engine at this moment: devices, load by replica, the switch in flight or the last."""
    found = {
        "wall_s": wall_s,
        "now_s": snapshot.now_s,
        "epoch": snapshot.epoch,
        "deployment": deployment(snapshot.deployment),
        "dead": snapshot.dead_devices,
        "num_queued_unrouted": snapshot.num_queued_unrouted,
        "replicas": [_load(s, snapshot.now_s) for s in snapshot.replicas],
        "switch": None if snapshot.switch is None else switch(snapshot.switch),
    }
    return dict(plain(found))


def _load(stats: ReplicaStats, now_s: float) -> Plain:
    total = stats.kv_blocks_total
    return {
        "id": stats.replica_id,
        "is_alive": stats.alive,
        "age_s": now_s - stats.measured_at_s,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "kv_usage": stats.kv_blocks_used / total if total > 0 else None,
    }


def switch(ticket: SwitchTicket) -> Plain:
    """Without the list of every request that it moves."""
    names = (
        *("ticket_id", "phase", "from_key", "to_key", "started_s", "duration_s", "decision_id"),
        *("reason", "mode", "planned_bytes", "moved_bytes", "predicted_s", "pause_s"),
        *("num_migrated", "num_recomputed", "num_drained", "num_kv_rounds"),
    )
    told = {name: getattr(ticket, name) for name in names}
    told |= {"phase_s": dict(ticket.phase_s), "is_over": ticket.phase.is_terminal}
    return dict(plain(told))
