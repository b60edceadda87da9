"""Switchback experiments: two policies take turns on the running system, in randomised blocks.

Time is cut into blocks of 20 to 30 minutes, each given to policy A or B by chance. What a block
leaves behind still acts in the next, so the first minutes of each block, the burn-in, are not
counted (Bojinov, Simchi-Levi and Zhao 2023). The test asks how often another draw of the same plan
would have shown a difference as large, if the policies were alike: exact in blocks, whatever the
traffic did. Pure numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequestError

Floats = NDArray[np.float64]
ARMS = ("A", "B")
MIN_BLOCKS = 6  # below it no p-value can be under 0.05: 2 / C(6, 3) = 0.1, and 0.029 for 8
EXACT = 20_000  # assignments up to which all are counted instead of drawn


@dataclass(frozen=True, slots=True)
class SwitchbackConfig:
    """Seconds unless said otherwise."""

    num_blocks: int = 24
    shortest_s: float = 1200.0
    longest_s: float = 1800.0
    burn_in_s: float = 600.0  # of each block, not counted: the effect window of a decision
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_blocks < MIN_BLOCKS or self.num_blocks % 2:
            raise InvalidRequestError(
                f"a switchback needs an even number of at least {MIN_BLOCKS} blocks, got "
                f"{self.num_blocks}."
            )
        if not 0 <= self.burn_in_s < self.shortest_s <= self.longest_s:
            raise InvalidRequestError(
                "a switchback needs 0 <= burn-in < shortest <= longest block, got "
                f"{self.burn_in_s:g}, {self.shortest_s:g} and {self.longest_s:g} s."
            )


@dataclass(frozen=True, slots=True)
class Block:
    """One policy's turn, in seconds since the experiment began."""

    begin_s: float
    count_from_s: float  # after the burn-in
    end_s: float
    arm: str  # of ARMS


@dataclass(frozen=True, slots=True)
class Plan:
    """Who has which turn. Blocks come in pairs, one of each policy, in an order drawn by chance,
    so that slow changes of traffic meet both alike."""

    config: SwitchbackConfig
    blocks: tuple[Block, ...]

    @property
    def duration_s(self) -> float:
        return self.blocks[-1].end_s

    def arm_at(self, at_s: float) -> str:
        """Whose turn it is. Raises InvalidRequestError outside the experiment."""
        for block in self.blocks:
            if block.begin_s <= at_s < block.end_s:
                return block.arm
        raise InvalidRequestError(
            f"{at_s:g} s is not in the experiment, which lasts from 0 to {self.duration_s:g} s."
        )

    def to_json(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "blocks": [asdict(b) for b in self.blocks]}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Plan:
        """Raises InvalidRequestError for what `to_json` did not write."""
        try:
            blocks = tuple(Block(**b) for b in told["blocks"])
            found = cls(SwitchbackConfig(**told["config"]), blocks)
        except (KeyError, TypeError) as error:
            raise InvalidRequestError(
                f"this is no switchback plan ({type(error).__name__}: {error}); give the file that "
                "`switchback plan` wrote."
            ) from error
        if plan(found.config) != found:
            raise InvalidRequestError(
                "the plan's blocks are not those that its seed draws: it was changed after it was "
                "made, so the test of it would mean nothing; plan again."
            )
        return found


def plan(config: SwitchbackConfig) -> Plan:
    """The same for the same config."""
    rng = np.random.default_rng(config.seed)
    lengths = rng.uniform(config.shortest_s, config.longest_s, config.num_blocks).round()
    first = rng.integers(0, 2, config.num_blocks // 2)
    ends = np.cumsum(lengths)
    blocks = []
    for i, (end_s, length_s) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        begin_s = end_s - length_s
        arm = ARMS[int(first[i // 2]) ^ (i % 2)]
        blocks.append(Block(begin_s, begin_s + config.burn_in_s, end_s, arm))
    return Plan(config, tuple(blocks))


# --------------------------------------------------------------------------------------
# Analysis


@dataclass(frozen=True, slots=True)
class SwitchbackResult:
    """Mean reward per interval of B less that of A."""

    difference: float
    interval: tuple[float, float]  # all differences that the test does not reject
    p_value: float  # two-sided
    mean_a: float
    mean_b: float
    num_blocks: int
    num_intervals: int  # counted
    num_discarded: int  # in burn-ins, or outside the experiment

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def block_means(plan: Plan, at_s: Floats, reward: Floats, grid_s: float) -> tuple[Floats, int]:
    """[B] mean reward of each block's counted intervals, and how many intervals that were.

    at_s [T]: when each interval begins, in seconds since the experiment began; an interval counts
    when all of it is in a block after its burn-in. Raises InvalidRequestError when a block has
    none.
    """
    means, counted = [], 0
    for number, block in enumerate(plan.blocks, start=1):
        inside = (at_s >= block.count_from_s) & (at_s + grid_s <= block.end_s + 1e-6)
        if not inside.any():
            raise InvalidRequestError(
                f"block {number} of {len(plan.blocks)} ({block.count_from_s:g} to {block.end_s:g} "
                "s) has no logged interval: give the logs of the whole experiment."
            )
        means.append(float(reward[inside].mean()))
        counted += int(inside.sum())
    return np.array(means), counted


def pair_differences(plan: Plan, means: Floats) -> Floats:
    """[P] B less A of each pair of blocks."""
    signs = np.array([1.0 if block.arm == "B" else -1.0 for block in plan.blocks])
    return np.asarray((signs * means).reshape(-1, 2).sum(axis=1))


def randomisation_p(differences: Floats, rng: np.random.Generator, shift: float = 0.0) -> float:
    """How often pairs whose order was drawn again differ at least as much, if B gave A's rewards
    plus `shift`: over all orders when there are few, else over EXACT draws."""
    centred = differences - shift
    signs = _orders(len(centred), rng)
    found = np.abs(signs @ centred)
    extreme = found >= abs(float(centred.sum())) - 1e-12
    exact = 2 ** len(centred) <= EXACT
    return float(extreme.mean()) if exact else float((extreme.sum() + 1) / (len(signs) + 1))


def _orders(number: int, rng: np.random.Generator) -> Floats:
    """[orders, P] of +1 and -1."""
    if 2**number <= EXACT:
        bits = (np.arange(2**number)[:, None] >> np.arange(number)) & 1
        return np.where(bits == 1, -1.0, 1.0)
    return np.where(rng.random((EXACT, number)) < 0.5, -1.0, 1.0)


def accepted(differences: Floats, seed: int, level: float) -> tuple[float, float]:
    """The shifts that the test does not reject: its interval, by bisection on either side."""

    def kept(shift: float) -> bool:
        return randomisation_p(differences, np.random.default_rng(seed), shift) > 1.0 - level

    middle = float(differences.mean())
    reach = 4.0 * float(np.ptp(differences)) + 1e-9

    def edge(sign: float) -> float:
        inner, outer = 0.0, reach
        if kept(middle + sign * outer):
            return sign * math.inf
        for _ in range(40):
            between = (inner + outer) / 2
            inner, outer = (between, outer) if kept(middle + sign * between) else (inner, between)
        return middle + sign * inner

    return edge(-1.0), edge(1.0)


def analyse(
    plan: Plan, at_s: Floats, reward: Floats, grid_s: float, level: float = 0.95
) -> SwitchbackResult:
    """Of the logged intervals of a whole experiment; see `block_means`. Raises
    InvalidRequestError."""
    means, counted = block_means(plan, at_s, reward, grid_s)
    differences = pair_differences(plan, means)
    seed = plan.config.seed + 1
    is_b = np.array([block.arm == "B" for block in plan.blocks])
    return SwitchbackResult(
        difference=float(differences.mean()),
        interval=accepted(differences, seed, level),
        p_value=randomisation_p(differences, np.random.default_rng(seed)),
        mean_a=float(means[~is_b].mean()),
        mean_b=float(means[is_b].mean()),
        num_blocks=len(plan.blocks),
        num_intervals=counted,
        num_discarded=len(at_s) - counted,
    )


def detectable(plan: Plan, spread: float, level: float = 0.95, power: float = 0.8) -> float:
    """The difference that an experiment finds with that power, when block means of one policy vary
    by `spread` within a pair (by the normal approximation)."""
    normal, pairs = NormalDist(), len(plan.blocks) / 2
    quantiles = normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(power)
    return float(quantiles * spread * math.sqrt(2.0 / pairs))


def blocks_needed(difference: float, spread: float, level: float = 0.95, power: float = 0.8) -> int:
    """Blocks, an even number, after which that difference is found; the inverse of `detectable`."""
    if not difference > 0 or not spread > 0:
        raise InvalidRequestError(
            f"difference and spread must be positive, got {difference:g} and {spread:g}."
        )
    normal = NormalDist()
    quantiles = normal.inv_cdf(0.5 + level / 2) + normal.inv_cdf(power)
    return 2 * max(math.ceil(2.0 * (quantiles * spread / difference) ** 2), MIN_BLOCKS // 2)


def dumps(found: Plan) -> str:
    """A plan as a file."""
    return json.dumps(found.to_json(), indent=1) + "\n"


def loads(text: str) -> Plan:
    """Raises InvalidRequestError."""
    try:
        told = json.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"this is no switchback plan: not JSON ({error}).") from error
    if not isinstance(told, dict):
        raise InvalidRequestError("this is no switchback plan: it must be a JSON object.")
    return Plan.from_json(told)


def sign_of(result: SwitchbackResult, names: Sequence[str] = ARMS) -> str:
    """The verdict in a sentence."""
    low, high = result.interval
    better, sure = names[int(result.difference > 0)], low > 0 or high < 0
    told = (
        f"{names[1]} less {names[0]}: {result.difference:+.4f} per interval "
        f"(95 %: {low:+.4f} to {high:+.4f}), p = {result.p_value:.3g}, {result.num_blocks} blocks"
    )
    return f"{told}; {better} is better." if sure else f"{told}; no difference is shown."
