"""What is done between updates: curves and logs, choice of the best policy, saves, a clean stop."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

Point = tuple[int, float]


class Interrupt(BaseCallback):
    """Ctrl-C ends training at the next decision, so that no update is left half done; a second one
    ends it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set = False

    def _on_step(self) -> bool:
        return not self.is_set

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals reach the main thread alone; elsewhere nothing is listened for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


class Curve(BaseCallback):
    """Mean episode reward (unscaled) at the end of each rollout, and the terms of the reward that
    environments tell as `info["reward_terms"]`; says how far training is."""

    def __init__(self, report: Callable[[int], None] | None, points: Iterable[Point] = ()) -> None:
        super().__init__()
        self.points = list(points)
        self._report = report
        self._terms: defaultdict[str, list[float]] = defaultdict(list)
        self._started_s, self._first = 0.0, 0

    def _on_training_start(self) -> None:
        self._started_s, self._first = time.perf_counter(), self.num_timesteps

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            for name, value in info.get("reward_terms", {}).items():
                self._terms[name].append(float(value))
        return True

    def _on_rollout_end(self) -> None:
        log, episodes = self.logger.record, self.model.ep_info_buffer or ()
        for name, values in self._terms.items():
            log(f"reward/{name}", float(np.mean(values)))
        self._terms.clear()
        done = [episode["r"] for episode in episodes]
        if done:
            self.points.append((self.num_timesteps, float(np.mean(done))))
            log("charts/episodic_return", self.points[-1][1])
            log("charts/episodic_length", float(np.mean([e["l"] for e in episodes])))
        passed_s = max(time.perf_counter() - self._started_s, 1e-9)
        log("charts/SPS", int((self.num_timesteps - self._first) / passed_s))
        if self._report is not None:
            self._report(self.num_timesteps)


class Selection(BaseCallback):
    """Scores the policy before the first update and then each `eval_freq` decisions, between
    updates; keeps the best, on a tie the last. Stops when `patience` scores gained nothing, or
    when `scored`, told of each, says False."""

    def __init__(
        self,
        validate: Callable[[], float] | None,
        keep: Callable[[], None],
        eval_freq: int,
        patience: int,
        scored: Callable[[int, float], bool] | None,
        points: Iterable[Point] = (),
    ) -> None:
        super().__init__()
        self.points = list(points)
        self.stopped = False
        self._validate, self._keep, self._scored = validate, keep, scored
        self._freq, self._patience = eval_freq, patience

    def _on_step(self) -> bool:
        return not self.stopped

    def _on_rollout_start(self) -> None:
        if not self.points or self.num_timesteps - self.points[-1][0] >= self._freq:
            self._score()

    def finish(self) -> None:
        """Scores the policy that training ends with."""
        if not self.stopped and (not self.points or self.points[-1][0] < self.num_timesteps):
            self._score()

    def _score(self) -> None:
        if self._validate is None:
            return
        score, before = self._validate(), [value for _, value in self.points]
        self.points.append((self.num_timesteps, score))
        self.logger.record("eval/mean_reward", score)
        self.logger.dump(self.num_timesteps)
        if not before or score >= max(before):
            self._keep()
        pruned = self._scored is not None and not self._scored(self.num_timesteps, score)
        self.stopped = pruned or self._out_of_patience()

    def _out_of_patience(self) -> bool:
        values = [value for _, value in self.points]
        since = len(values) - 1 - values.index(max(values))
        return 0 < self._patience <= since


class Saver(BaseCallback):
    """Calls `save` each `save_freq` decisions, between updates."""

    def __init__(self, save: Callable[[], None], save_freq: int) -> None:
        super().__init__()
        self._save, self._freq, self._last = save, save_freq, 0

    def _on_training_start(self) -> None:
        self._last = self.num_timesteps

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._freq and self.num_timesteps - self._last >= self._freq:
            self._last = self.num_timesteps
            self._save()
