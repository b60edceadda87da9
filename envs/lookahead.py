"""What lies ahead in an environment over the surrogate, for policies that look ahead.

`EnvOutlook` hands out copies of the cluster and futures: the trace's own for an oracle, or draws
from the forecast, with output lengths of requests that have finished lately.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from controller.workload import assign
from engine.cluster import SwitchPlan
from engine.errors import InfeasibleError
from envs.serving_env import ServingEnv
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import Trace
from policies.base import Counts, Future, TrafficColumns

MEMORY = 4096  # requests whose lengths are remembered


def future_of(trace: Trace, start_s: float, from_s: float, to_s: float) -> Future:
    """The trace's arrivals in (from_s, to_s] on a clock on which it begins at start_s."""
    arrival_s = trace.arrival_s + start_s
    due = slice(*np.searchsorted(arrival_s, (from_s, to_s), side="right").tolist())
    return Future(arrival_s[due], trace.prompt_tokens[due], trace.output_tokens[due])


class EnvOutlook:
    """An `Outlook` on one environment in columns, at whatever decision it is.

    `clairvoyant`: futures and the lengths of live requests are the true ones. Else the controller's
    forecast is all that is known, taken to hold over the horizon.
    """

    def __init__(self, env: ServingEnv, clairvoyant: bool, seed: int = 0) -> None:
        assert env.parts.columns, "an environment in columns"
        self._env, self._clairvoyant = env, clairvoyant
        self._rng = np.random.default_rng(seed)
        self._prompt, self._output = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def observe(self, traffic: TrafficColumns) -> None:
        """The requests that ended in an interval; each once."""
        done = traffic.finished
        self._prompt = np.concatenate([self._prompt, traffic.prompt_tokens[done]])[-MEMORY:]
        self._output = np.concatenate([self._output, traffic.output_tokens[done]])[-MEMORY:]

    def simulator(self) -> SurrogateCluster:
        cluster = self._env.cluster
        assert isinstance(cluster, SurrogateCluster), "only the surrogate can be forked"
        return cluster.fork() if self._clairvoyant else cluster.fork(self._draw_lengths)

    def plan(self, row: int) -> SwitchPlan | None:
        prepared = self._env.prepared
        assert prepared is not None, "reset first"
        if not row:
            return None
        try:
            return self._env.pipeline.plan(prepared, row, f"try-{row}")
        except InfeasibleError:
            return None

    def futures(self, horizon_s: float, number: int) -> Sequence[Future]:
        prepared = self._env.prepared
        assert prepared is not None, "reset first"
        now_s = prepared.at_s
        if self._clairvoyant:
            return [future_of(self._env.trace, self._env.start_s, now_s, now_s + horizon_s)]
        return [self._draw(now_s, horizon_s) for _ in range(number)]

    def _draw(self, now_s: float, horizon_s: float) -> Future:
        """Poisson arrivals at the mean forecast; lengths of finished requests of the type."""
        prepared, typing = self._env.prepared, self._env.pipeline.typing
        assert prepared is not None
        prompt, output = self._prompt, self._output
        types = assign(typing, prompt, output)
        state, parts = prepared.monitor_state, []
        for j, rate in enumerate(prepared.forecast.mean):
            count = int(self._rng.poisson(rate * horizon_s))
            known = np.flatnonzero(types == j)
            if len(known):
                chosen = self._rng.choice(known, count)
                prompts, outputs = prompt[chosen], output[chosen]
            else:
                mean = (state.prompt_tokens[j], state.output_tokens[j])
                prompts, outputs = (np.full(count, max(1, round(m)), np.int64) for m in mean)
            parts.append((now_s + self._rng.uniform(0.0, horizon_s, count), prompts, outputs))
        arrival_s, prompts, outputs = (np.concatenate(c) for c in zip(*parts, strict=True))
        order = np.argsort(arrival_s, kind="stable")
        return Future(arrival_s[order], prompts[order], outputs[order])

    def _draw_lengths(self, prompt_tokens: Counts, so_far: Counts) -> Counts:
        """Those of finished requests that were longer than a request is already."""
        known = np.sort(self._output)
        first = np.searchsorted(known, so_far, side="right")
        chosen = first + (self._rng.random(len(first)) * (len(known) - first)).astype(np.int64)
        found = np.append(known, 0)[np.minimum(chosen, len(known))]
        return np.where(first < len(known), found, so_far + 1)
