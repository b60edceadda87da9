"""`python -m envs.soak`: a controller steers a surrogate for `--minutes`, a fault every so often.

Two controllers, both processes of `envs.soak.controller`: one is active, and is killed at times;
the other is advisory, is never killed, and its memory and descriptors must not grow. Time is not
sped up: ticks are 0.5 s apart in place of 15 s, so half an hour has as many as 15 hours, and dwell
and staleness are shortened alike. What is checked, at every tick, is in `envs.soak.checks`. The
last line is JSON; the exit status is 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from controller.build import load_profiled_cluster
from controller.control_channel import ClientAccess
from controller.remote import RemoteCluster
from engine.errors import UnavailableError
from engine.tokens import TokenFile, write_token
from envs.processes import ServerProcess, start_server
from envs.soak.checks import MAX_FD_GROWTH, MAX_RSS_GROWTH, FollowedLog, Footprint, Watch
from envs.soak.controller import HANG, RAISE
from envs.soak.engine import FaultyEngine

PROFILE = Path(__file__).parents[2] / "configs" / "profiles" / "tiny_llama_cpu4.json"
READY, READY_S = r"ready: grpc", 600.0
KINDS = ("blackout", "nan", "delay", "engine_restart", "exception", "time_out", "kill")
ENGINE_TIMEOUT_S, POLICY_DEADLINE_S = 1.0, 0.3


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """Seconds unless said otherwise."""

    duration_s: float = 1800.0
    every_s: float = 20.0  # a fault begins; it lasts 0.4 of that
    grid_s: float = 0.5
    rate_per_s: float = 6.0  # of requests
    seed: int = 0

    @property
    def dwell_s(self) -> float:
        return 6.0 * self.grid_s

    @property
    def stale_s(self) -> float:
        return 4.0 * self.grid_s


class Soak:
    """Owns the engine and both controllers."""

    def __init__(self, config: SoakConfig, folder: Path) -> None:
        self.config, self._folder = config, folder
        cluster = load_profiled_cluster(PROFILE)
        self._token_file = folder / "control-token"
        write_token(self._token_file)
        tokens = TokenFile(self._token_file, "--control-tokens")
        self.engine = FaultyEngine(
            cluster, "4xtp1pp1", config.rate_per_s, config.seed, 60.0, tokens
        )
        self._rng = np.random.default_rng(config.seed)
        self._policy_fault = folder / "fault"
        self._policy_fault.write_text("")
        self.counts: Counter[str] = Counter()
        self.restarts_s: list[float] = []
        self._starts = 0
        logs = (FollowedLog(folder / f"{name}.log") for name in ("steering", "watching"))
        self.log, self.watched_log = logs
        access = ClientAccess(token_file=self._token_file, prefix="engine-")
        self.remote = RemoteCluster(self.engine.target, access=access)
        self.watch = Watch(self.engine, self.log, config.dwell_s, config.stale_s, self.remote)
        self.footprints = {"soak": Footprint(os.getpid())}
        self.steering = self._controller("steering", "--mode", "active")
        self.watching = self._controller("watching", "--mode", "advisory", "--lease", "off")

    def _controller(self, name: str, *arguments: str) -> ServerProcess:
        config, self._starts = self.config, self._starts + 1
        own = ("--grid-s", config.grid_s, "--dwell-s", config.dwell_s, "--stale-s", config.stale_s)
        engine = ("--engine", self.engine.target, "--engine-token-file", self._token_file)
        given = ("--faults", self._policy_fault, *engine, "--rule", "keep")
        limits = ("--engine-timeout-s", ENGINE_TIMEOUT_S, "--policy-deadline-s", POLICY_DEADLINE_S)
        log = ("--log", self._folder / f"{name}.log", "--log-mb", 8, "--log-files", 3)
        rest = ("--grpc-port", 0, "--http-port", 0, "--no-deterministic", "--seed", config.seed)
        every = map(str, (*own, *given, *limits, *log, *rest, *arguments))
        stderr = self._folder / f"{name}-{self._starts}.txt"
        return start_server("controller", ["envs.soak.controller", *every], stderr)

    # ---------------------------------------------------------------- faults

    def inject(self, kind: str, until_s: float) -> None:
        """One fault, watched until it is over."""
        self.counts[kind] += 1
        faults = self.engine.faults
        match kind:
            case "blackout":
                faults.is_dark = True
            case "nan":
                faults.is_nan = True
            case "delay":
                faults.delay_s = float(self._rng.choice([0.3, 1.5])) * ENGINE_TIMEOUT_S
            case "engine_restart":
                self.engine.stop()
                self.watch.drained()
                time.sleep(self._rng.uniform(0.0, 2.0) * self.config.grid_s)
                self.engine.start()
            case "exception":
                self._policy_fault.write_text(RAISE)
            case "time_out":
                self._policy_fault.write_text(HANG)
            case "kill":
                self._kill()
        self.look_until(until_s)
        faults.is_dark, faults.is_nan, faults.delay_s = False, False, 0.0
        self._policy_fault.write_text("")

    def _kill(self) -> None:
        """Without warning, at any point of a tick; the next one is started at once."""
        time.sleep(self._rng.uniform(0.0, self.config.grid_s))
        begun_s = time.monotonic()
        self.steering.process.kill()
        self.steering.stop()
        self.steering = self._controller("steering", "--mode", "active")
        deadline_s = begun_s + READY_S
        while self.steering.lines.empty() and time.monotonic() < deadline_s:
            self.watch.look()  # the engine serves on meanwhile
            time.sleep(self.config.grid_s / 4)
        self.steering.wait_ready(READY, max(0.1, deadline_s - time.monotonic()))
        self.restarts_s.append(time.monotonic() - begun_s)

    def look_until(self, until_s: float) -> None:
        while True:
            self.watch.look()
            self.watched_log.follow()
            for footprint in self.footprints.values():
                footprint.sample()
            for process in (self.steering, self.watching):
                if process.process.poll() is not None:
                    raise UnavailableError(f"a controller ended: {process.last_words()}")
            if time.monotonic() >= until_s:
                return
            time.sleep(self.config.grid_s)

    def run(self, say: Callable[[str], None]) -> None:
        self.steering.wait_ready(READY, READY_S)
        self.watching.wait_ready(READY, READY_S)
        self.footprints["watching"] = Footprint(self.watching.process.pid)
        begun_s, every_s = time.monotonic(), self.config.every_s
        order: list[str] = []
        self.look_until(begun_s + 0.5 * every_s)
        number = 0
        while time.monotonic() - begun_s < self.config.duration_s:
            order = order or list(self._rng.permutation(KINDS))
            kind, at_s = str(order.pop()), time.monotonic()
            self.inject(kind, at_s + 0.4 * every_s)
            self.look_until(max(at_s + every_s, time.monotonic() + 0.4 * every_s))
            number += 1
            if number % 15 == 0:
                say(f"{time.monotonic() - begun_s:.0f} s: {dict(self.counts)}")
        self._end()

    def _end(self) -> None:
        for process in (self.steering, self.watching):
            process.stop()
        self.watch.look()
        self.watched_log.follow()
        self.engine.stop()
        self.watch.drained()
        self.engine.start()  # so that it can be closed as ever
        self._traces()

    def _traces(self) -> None:
        """A fault that left none was not injected."""
        expect, counts, log = self.watch.violations.expect, self.counts, self.log
        left = {
            "blackout": log.masked["stale_metrics"],
            "nan": log.masked["stale_metrics"],
            "exception": log.failures,
            "time_out": log.failures,
            "kill": int(len(log.lives) == 1 + counts["kill"]),
            "engine_restart": self.engine.num_lives - 1,
            "delay": 1,
        }
        for kind in counts:
            expect(left[kind] > 0, "faults leave traces", f"none of {kind}: {left}")
        torn = log.num_torn
        expect(
            torn <= counts["kill"], "log readable", f"{torn} torn records, {counts['kill']} kills"
        )
        other = self.watched_log
        problems = "; ".join(other.problems[:3])
        expect(not other.problems and not other.num_torn, "log readable", f"watching: {problems}")

    def close(self) -> None:
        for process in (self.steering, self.watching):
            process.stop()
        self.remote.close()
        self.engine.close()
        self.log.close()
        self.watched_log.close()


def report(soak: Soak, wall_s: float) -> dict[str, Any]:
    """Checks the footprints too."""
    watch, violations = soak.watch, soak.watch.violations
    growth = {}
    for name, footprint in soak.footprints.items():
        rss, fds = footprint.growth()
        growth[name] = {
            "rss_mb": round(footprint.rss_bytes[-1] / 1e6, 1),
            "rss_growth": round(rss, 4),
            "fds": footprint.fds[-1],
            "fds_growth": round(fds, 2),
        }
        if soak.config.duration_s >= 300:  # shorter, what fills up is still filling
            violations.expect(rss <= MAX_RSS_GROWTH, "memory flat", f"{name} grew by {rss:.1%}")
        violations.expect(fds <= MAX_FD_GROWTH, "descriptors flat", f"{name} grew by {fds:.1f}")
    restarts = np.array(soak.restarts_s or [0.0])
    return {
        "benchmark": "soak",
        "seconds": round(wall_s),
        "ticks": soak.log.next_seq - 1,
        "faults": dict(sorted(soak.counts.items())),
        "switches": watch.num_switches,
        "undone": watch.num_undone,
        "vetoes": dict(soak.log.masked.most_common()),
        "policy_failures": soak.log.failures,
        "ticks_without_decision": dict(soak.log.modes),
        "restart_s_median": round(float(np.median(restarts)), 2),
        "footprints": growth,
        "checks": dict(violations.checks),
        "violations": len(violations.found),
    }


def main() -> int:
    parser = argparse.ArgumentParser("python -m envs.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--grid-s", type=float, default=0.5, help="seconds between ticks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = SoakConfig(60.0 * args.minutes, args.every_s, args.grid_s, seed=args.seed)
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="tidewright-soak-") as folder:
        soak, begun_s = Soak(config, Path(folder)), time.monotonic()
        try:
            soak.run(console.print)
            told = report(soak, time.monotonic() - begun_s)
        finally:
            soak.close()
    table = Table("rule", "looked at", "did not hold")
    for rule, number in sorted(soak.watch.violations.checks.items()):
        broken = [v for v in soak.watch.violations.found if v.startswith(f"{rule}: ")]
        table.add_row(rule, str(number), str(len(broken)))
    console.print(table)
    for violation in soak.watch.violations.found[:20]:
        console.print(violation, style="red")
    print(json.dumps(told))
    return 1 if soak.watch.violations.found else 0


if __name__ == "__main__":
    sys.exit(main())
