"""`python -m envs.soak.controller`: `python -m controller` with a short grid and a policy that
switches often and misbehaves when a file says so. A real controller in all else.

Its own options are the first four; all others are the controller's. What it keeps in memory is
bounded more tightly than in production, so that the bounds are reached within minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller import __main__, app, loop
from controller.build import build_pipeline
from controller.decision import DecisionConfig, DecisionPipeline
from controller.roster import LoadedPolicy, PolicyInfo
from engine.cluster import WorkloadType, WorkloadTyping
from engine.profile import ProfiledCluster
from policies.base import Observation

TYPING = WorkloadTyping((WorkloadType("short", 64, 48), WorkloadType("long", 700, 160)), (0.5, 0.5))
KEEP_SHARE = 0.7  # of decisions that don't switch though they could
RAISE, HANG = "raise", "hang"
HANG_S = 1.5
NUM_RECORDS, NUM_EXPLAINED = 150, 50


class RestlessPolicy:
    """Any legal candidate, keep more often; raises or hangs while `faults` says so."""

    name = "restless"

    def __init__(self, faults: Path) -> None:
        self._faults = faults

    def reset(self) -> None:
        """Nothing is remembered."""

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        fault = self._faults.read_text() if self._faults.exists() else ""
        if fault == RAISE:
            raise RuntimeError("made to fail")
        if fault == HANG:
            time.sleep(HANG_S)
        legal = np.asarray(observation.mask, np.float64)
        legal[0] = 0.0
        if not legal.any():
            return np.asarray(np.eye(1, len(legal))[0])
        shared = (1.0 - KEEP_SHARE) * legal / legal.sum()
        shared[0] = KEEP_SHARE
        return np.asarray(shared)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m envs.soak.controller", description=__doc__)
    parser.add_argument("--grid-s", type=float, default=0.5)
    parser.add_argument("--dwell-s", type=float, default=3.0)
    parser.add_argument("--stale-s", type=float, default=2.0)
    parser.add_argument("--faults", type=Path, required=True, help="'raise', 'hang' or nothing")
    args, others = parser.parse_known_args(argv)
    config = DecisionConfig(
        grid_s=args.grid_s,
        min_dwell_s=args.dwell_s,
        switches_per_hour=600.0,
        stale_after_s=args.stale_s,
        max_candidates=8,
        min_headroom=0.2,
        min_coverage=0.2,
        max_capacity_change=1.0,
        clearly_worse=100.0,
    )

    def pipeline(manifest: dict[str, Any], cluster: ProfiledCluster) -> DecisionPipeline:
        return build_pipeline(cluster, TYPING, config, "ewma2")

    def policy(*_: Any) -> LoadedPolicy:
        return LoadedPolicy(PolicyInfo("restless", "rule"), RestlessPolicy(args.faults))

    vars(app).update(_pipeline=pipeline, _policy=policy)
    vars(loop).update(NUM_RECORDS_KEPT=NUM_RECORDS, NUM_EXPLAINED_KEPT=NUM_EXPLAINED)
    return __main__.main(["run", *others])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
