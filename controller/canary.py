"""A policy on trial: it decides in randomised blocks of time, and a sequential test ends it. Pure.

Blocks are 20 to 30 minutes, since single ticks would carry over: what one policy leaves, the other
has to live with. The first minutes of a block are not counted for the same reason. Which arm
decides in a block is drawn with the fraction asked for, whatever the traffic does, so that

    D = A (g - c) / p - (1 - A) (g - c) / (1 - p)

has the difference of the arms as its mean, with A = 1 for the canary, p its fraction, g the block's
goodput in [0, 1] and c any value known before the block (here the mean of the blocks before, which
takes out the level that both share). Against "the canary is no worse than by `tolerance`" the test
bets on -(D + tolerance): the product of 1 + stake * payoff is an e-process, and by Ville's
inequality it exceeds 1 / alpha with a probability of at most alpha, at whatever time one looks
(Waudby-Smith and Ramdas, arXiv 2010.09686).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from controller.switch_watch import is_good
from engine.cluster import ClusterEvent, SloSpec
from engine.errors import InvalidRequestError

ACTIVE, CANARY = "active", "canary"
BOLDNESS = 0.8  # of the largest stake that cannot lose everything


@dataclass(frozen=True, slots=True)
class CanaryConfig:
    """Seconds unless said otherwise."""

    fraction: float = 0.5  # of the blocks that the canary decides in
    min_block_s: float = 1200.0
    max_block_s: float = 1800.0
    burn_in_s: float = 300.0  # at the start of a block, not counted
    tolerance: float = 0.02  # of goodput, that counts as no worse
    threshold: float = 20.0  # of the e-process: 1 / alpha
    stop_drop: float = 0.4  # below the mean of the active blocks: ended without waiting for more
    min_requests: int = 20  # for a block to count
    max_failures: int = 3  # of the policy: no valid answer in time

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise InvalidRequestError(
                f"the canary's fraction is {self.fraction}; expected more than 0 and less than 1, "
                "such as 0.2: both policies must decide in some blocks.",
                "fraction",
            )


@dataclass(frozen=True, slots=True)
class Block:
    """One that is over and counted."""

    arm: str
    goodput: float
    num_requests: int


@dataclass(slots=True)
class Bets:
    """The e-process, and what its payoffs were so far."""

    fraction: float
    tolerance: float
    evidence: float = 1.0
    num: int = 0
    total: float = 0.0  # of payoffs
    squares: float = 0.0

    def bet(self, is_canary: bool, goodput: float, level: float) -> float:
        """One block; `level` is what was expected before it. Returns the payoff."""
        p, above = self.fraction, goodput - level
        difference = above / p if is_canary else -above / (1.0 - p)
        payoff = -(difference + self.tolerance)
        self.evidence *= 1.0 + self._stake() * payoff
        self.num, self.total = self.num + 1, self.total + payoff
        self.squares += payoff * payoff
        return payoff

    def _stake(self) -> float:
        """From the payoffs before alone; no payoff can be below -limit."""
        limit = 1.0 / min(self.fraction, 1.0 - self.fraction) + self.tolerance
        if self.num < 2:
            return 0.25 * BOLDNESS / limit
        mean, mean_square = self.total / self.num, self.squares / self.num
        return min(max(mean / (mean_square + 1e-9), 0.0), BOLDNESS / limit)


class Canary:
    """Of one policy. Times are the cluster's; `rng` draws arms and lengths."""

    def __init__(
        self, name: str, config: CanaryConfig, slo: SloSpec, now_s: float, rng: np.random.Generator
    ) -> None:
        self.name, self.config, self._slo, self._rng = name, config, slo, rng
        self.blocks: list[Block] = []
        self._bets = Bets(config.fraction, config.tolerance)
        self._num_failures = 0
        self._begin(now_s)

    @property
    def evidence(self) -> float:
        return self._bets.evidence

    def goodput(self, arm: str) -> float:
        """Mean over the arm's blocks; NaN before any."""
        found = [b.goodput for b in self.blocks if b.arm == arm]
        return float(np.mean(found)) if found else float("nan")

    def restarted(self, now_s: float) -> None:
        """The engine was: the block at hand is not counted."""
        self._begin(now_s)

    def saved(self) -> dict[str, Any]:
        """What `restore` takes, the generator's state included; times are the cluster's."""
        return {
            "name": self.name,
            "config": asdict(self.config),
            "slo": asdict(self._slo),
            "blocks": [asdict(b) for b in self.blocks],
            "bets": asdict(self._bets),
            "num_failures": self._num_failures,
            "arm": self.arm,
            "counts_from_s": self._counts_from_s,
            "ends_s": self._ends_s,
            "num_good": self._num_good,
            "num": self._num,
            "rng": self._rng.bit_generator.state,
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Canary:
        rng = np.random.default_rng()
        rng.bit_generator.state = saved["rng"]
        found = cls(
            saved["name"], CanaryConfig(**saved["config"]), SloSpec(**saved["slo"]), 0.0, rng
        )
        found.blocks = [Block(**b) for b in saved["blocks"]]
        found._bets, found._num_failures = Bets(**saved["bets"]), saved["num_failures"]
        found.arm, found._ends_s = saved["arm"], saved["ends_s"]
        found._counts_from_s = saved["counts_from_s"]
        found._num_good, found._num = saved["num_good"], saved["num"]
        rng.bit_generator.state = saved["rng"]
        return found

    def _begin(self, now_s: float) -> None:
        config = self.config
        self.arm = CANARY if self._rng.random() < config.fraction else ACTIVE
        self._counts_from_s = now_s + config.burn_in_s
        self._ends_s = now_s + self._rng.uniform(config.min_block_s, config.max_block_s)
        self._num_good, self._num = 0, 0

    def failed(self, problem: str) -> str:
        """The canary gave no valid answer; says why it ends, if it does."""
        self._num_failures += 1
        if self._num_failures < self.config.max_failures:
            return ""
        return f"{self._num_failures} failures, the last: {problem}"

    def observe(self, now_s: float, events: Iterable[ClusterEvent]) -> str:
        """One tick's events; says why the canary ends, if it does. Afterwards `arm` decides."""
        for event in events:
            outcome = event.outcome
            if outcome is not None and outcome.arrival_s >= self._counts_from_s:
                self._num += 1
                self._num_good += is_good(self._slo, outcome)
        if now_s < self._ends_s:
            return ""
        verdict = self._close() if self._num >= self.config.min_requests else ""
        self._begin(now_s)
        return verdict

    def _close(self) -> str:
        block = Block(self.arm, self._num_good / self._num, self._num)
        active, is_canary = self.goodput(ACTIVE), block.arm == CANARY
        if self.blocks:
            level = float(np.mean([b.goodput for b in self.blocks]))
            self._bets.bet(is_canary, block.goodput, level)
        self.blocks.append(block)
        if is_canary and block.goodput < active - self.config.stop_drop:
            return f"goodput {block.goodput:.2f} in a block, {active:.2f} without it"
        if self.evidence >= self.config.threshold:
            return (
                f"evidence {self.evidence:.0f} that it is worse: goodput "
                f"{self.goodput(CANARY):.2f} against {self.goodput(ACTIVE):.2f}"
            )
        return ""
