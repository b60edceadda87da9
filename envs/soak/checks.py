"""What must hold at every tick of the soak, and what each fault must have left behind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from controller.decision_log import LogReader
from controller.remote import RemoteCluster
from engine.errors import UnavailableError
from envs.soak.engine import Asked, FaultyEngine

LATE_S = 2.5  # from a snapshot to the switch asked for on it, on a loaded machine
TOLERANCE_S = 0.05  # of dwell: two clocks
MAX_RSS_GROWTH = 0.10  # of the mean of the last third over that of the first
MAX_FD_GROWTH = 1.5  # descriptors, likewise


@dataclass
class Violations:
    """What did not hold, and how often each was looked at."""

    found: list[str] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)

    def expect(self, holds: bool, rule: str, problem: str) -> None:
        self.checks[rule] += 1
        if not holds:
            self.found.append(f"{rule}: {problem}")


class FollowedLog:
    """A decision log while it is written and rotated; nothing of it is kept but ids and counts."""

    def __init__(self, path: Path) -> None:
        self._path, self._reader = path, LogReader()
        self._file: BinaryIO | None = None
        self._rest, self._number = b"", 0
        self.decided: dict[str, str] = {}  # decision id -> who decided
        self.kinds: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()  # reasons, by decisions
        self.failures = 0
        self.next_seq, self.problems = 1, list[str]()
        self._decided_seq = 0  # of the tick before, which may have lost the engine since
        self.num_torn, self.modes, self.lives = 0, Counter[str](), set[str]()

    def follow(self) -> None:
        """Everything that was written since."""
        while self._open():
            assert self._file is not None
            data = self._rest + self._file.read()
            *lines, self._rest = data.split(b"\n")
            for line in lines:
                self._number += 1
                self._reader.take(self._path.name, self._number, line + b"\n")
            if os.fstat(self._file.fileno()).st_ino == self._path.stat().st_ino:
                break
            self._file.close()  # it was put aside, and is read to its end
            self._file, self._number = None, 0
        for record in self._reader.records:
            self._take(record)
        for skipped in self._reader.skipped:
            if skipped.reason.startswith("not JSON"):
                self.num_torn += 1
            else:
                self.problems.append(f"{skipped.file}:{skipped.line} {skipped.reason}")
        self._reader.records.clear()
        self._reader.skipped.clear()

    def _open(self) -> bool:
        if self._file is None and self._path.exists():
            self._file = self._path.open("rb")
        return self._file is not None

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["record"]
        self.kinds[kind] += 1
        if kind in ("decision", "tick"):
            lost_engine = kind == "tick" and record["seq"] == self._decided_seq
            if record["seq"] != self.next_seq and not lost_engine:
                self.problems.append(f"tick {record['seq']} follows {self.next_seq - 1}")
            self.next_seq = record["seq"] + 1
            self._decided_seq = record["seq"] if kind == "decision" else 0
        if kind == "header":
            self.lives.add(record["life"])
        if kind == "decision":
            self.decided[record["decision_id"]] = record["policy"]
            self.failures += bool(record["failure"])
            self.masked.update({r for r in record["mask_reasons"] if r})
        if kind == "tick":
            self.modes[record["status"]] += 1
        if kind == "operation" and "reason" in record:
            self.problems.append(f"operation nobody asked for: {record}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Watch:
    """The rules of one soak, looked at again and again."""

    engine: FaultyEngine
    log: FollowedLog
    dwell_s: float
    stale_s: float
    remote: RemoteCluster
    violations: Violations = field(default_factory=Violations)
    num_undone: int = 0
    num_switches: int = 0
    num_terms: int = 0
    _epoch: int = 0
    _term: int = 0
    _life: int = 0

    def look(self) -> None:
        """Once per tick."""
        asked = [self.engine.asked.popleft() for _ in range(len(self.engine.asked))]
        self.log.follow()  # after, since a decision is logged before it is carried out
        for switch in asked:
            self._judge(switch)
        problems, self.log.problems = self.log.problems, []
        self.violations.expect(not problems, "log readable", "; ".join(problems[:3]))
        truth, life = self.engine.truth(), self.engine.num_lives
        if life != self._life:
            self._epoch, self._term, self._life = 0, 0, life
        self.violations.expect(
            truth.epoch >= self._epoch, "epoch", f"fell from {self._epoch} to {truth.epoch}"
        )
        self._epoch = truth.epoch
        self._look_at_term()
        self.violations.expect(
            truth.num_rejected == 0, "no request refused", f"{truth.num_rejected} were"
        )

    def _look_at_term(self) -> None:
        """Of the controllers that the engine has heard of."""
        try:
            term = self.remote.highest_term()
        except UnavailableError:  # the engine answers late
            return
        self.violations.expect(term >= self._term, "term", f"fell from {self._term} to {term}")
        self.num_terms += term > self._term
        self._term = term

    def _judge(self, switch: Asked) -> None:
        expect, who = self.violations.expect, self.log.decided.get(switch.decision_id)
        self.num_switches += 1
        expect(who is not None, "decision logged", f"{switch.decision_id} is not in the log")
        expect(not switch.is_second, "one switch", f"{switch.decision_id} while another ran")
        is_undo = who == "undo"  # which waives dwell
        self.num_undone += is_undo
        kept = is_undo or switch.since_last_s >= self.dwell_s - TOLERANCE_S
        expect(kept, "dwell", f"{switch.decision_id} {switch.since_last_s:.2f} s after the last")
        fresh = switch.age_s <= self.stale_s + LATE_S
        expect(fresh, "fresh metrics", f"{switch.decision_id} on figures {switch.age_s:.1f} s old")

    def drained(self) -> None:
        """With the engine stopped: all that arrived in this life can still end, and does."""
        surrogate = self.engine.runtime.surrogate
        surrogate.advance(surrogate.snapshot().now_s + 3600.0)
        surrogate.check_integrity()
        last = surrogate.snapshot()
        lost = last.num_arrived - last.num_finished - last.num_rejected
        sent = self.engine.runtime.num_sent
        self.violations.expect(
            lost == 0 and last.num_arrived == sent,
            "no request lost",
            f"{sent} sent, {last.num_arrived} arrived, {last.num_finished} finished",
        )


@dataclass
class Footprint:
    """Memory and descriptors of one process over time."""

    pid: int
    rss_bytes: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def sample(self) -> None:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        self.rss_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.fds.append(len(os.listdir(f"/proc/{self.pid}/fd")))

    def growth(self) -> tuple[float, float]:
        """Of RSS as a share, of descriptors in number: last third over first, after a warm-up."""
        rss, fds = (_thirds(series) for series in (self.rss_bytes, self.fds))
        return rss[1] / rss[0] - 1.0, fds[1] - fds[0]


def _thirds(series: Sequence[int]) -> tuple[float, float]:
    """Means of the first and of the last third, without the first tenth of all."""
    kept = series[len(series) // 10 :]
    third = max(1, len(kept) // 3)
    return float(np.mean(kept[:third])), float(np.mean(kept[-third:]))
