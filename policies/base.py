"""What a policy sees and gives: `Observation`, `ObservationSpec`, the `Policy` protocol; and what
one that looks ahead is handed: the `Simulator` protocol.

Pure numpy. The same values are built in training and in production by `controller.observation`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engine.cluster import ClusterSnapshot, Routing, SwitchPlan

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Seconds = NDArray[np.float64]
Counts = NDArray[np.int64]
LengthSampler = Callable[[Counts, Counts], Counts]
"""(prompt tokens, output tokens so far) of live requests -> output tokens at which each ends, more
than it has; [L] each."""


@dataclass(frozen=True, slots=True)
class ObservationSpec:
    """Names and order of features. Its hash is stored in every checkpoint and checked on load."""

    state_features: tuple[str, ...]
    candidate_features: tuple[str, ...]
    max_candidates: int  # rows, keep included
    grid_s: float
    version: int = 1

    @property
    def flat_size(self) -> int:
        """state, then candidate rows, then the validity (1/0) of each row."""
        return len(self.state_features) + self.max_candidates * (len(self.candidate_features) + 1)

    @property
    def hash(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Observation:
    """One decision's input. Rows past the last candidate are zero and masked."""

    state: Floats  # [S]
    candidates: Floats  # [K, C]; row 0 is keep
    mask: Mask  # [K]; True = legal
    keys: tuple[str, ...]  # Candidate.key of each filled row

    def flat(self) -> Floats:
        """[flat_size]: state, candidate rows, row validity. The mask is passed apart."""
        valid = np.zeros(len(self.candidates), np.float32)
        valid[: len(self.keys)] = 1.0
        flat = np.concatenate([self.state, self.candidates.ravel(), valid])
        return flat.astype(np.float32, copy=False)


class Policy(Protocol):
    """Maps an observation to a distribution over its rows. Stateless between calls but for what
    `reset` clears, so that the same observation sequence gives the same distributions."""

    @property
    def name(self) -> str: ...

    def reset(self) -> None: ...

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """[K] float64, sums to 1, zero wherever the mask is False."""
        ...


def choose(
    probabilities: NDArray[np.float64], rng: np.random.Generator, deterministic: bool
) -> int:
    """Index of the action: the most probable one, or drawn."""
    if deterministic:
        return int(probabilities.argmax())
    return int(rng.choice(len(probabilities), p=probabilities))


# --------------------------------------------------------------------------------------
# Looking ahead


@dataclass(frozen=True, slots=True)
class TrafficColumns:
    """A arrivals and E ended requests, each in order of time.

    `index` numbers requests by arrival, from 0.
    """

    arrival_s: Seconds  # [A]
    arrival_prompt_tokens: Counts  # [A]
    index: Counts  # [E]
    finished: NDArray[np.bool_]  # [E]; else rejected
    ended_arrival_s: Seconds  # [E]
    first_token_s: Seconds  # [E]
    finish_s: Seconds  # [E]
    prompt_tokens: Counts  # [E]
    output_tokens: Counts  # [E]

    def to_dict(self) -> dict[str, NDArray[Any]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def join(cls, parts: list[TrafficColumns]) -> TrafficColumns:
        """One span after another."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass(frozen=True, slots=True)
class Future:
    """N requests to come, in order of arrival."""

    arrival_s: Seconds  # [N]
    prompt_tokens: Counts  # [N]
    output_tokens: Counts  # [N]


@dataclass(frozen=True, slots=True)
class Rollout:
    """What happened in a stretch of simulated time, and the state at its end."""

    traffic: TrafficColumns
    snapshot: ClusterSnapshot


class Simulator(Protocol):
    """A cluster at one instant whose futures can be tried out: for model-predictive control, the
    oracle and estimators that use a model.

    Fork it, roll the fork out, and fork that again where choices branch. What it returns is the
    same for equal states, futures and choices.
    """

    def snapshot(self) -> ClusterSnapshot: ...

    def fork(self, lengths: LengthSampler | None = None) -> Self:
        """An independent copy, also in the middle of a switch.

        With `lengths` the output lengths of live requests are drawn anew, as nobody knows them;
        without, the copy knows them, as only an oracle may.
        """
        ...

    def rollout(
        self,
        until_s: float,
        future: Future | None = None,
        plan: SwitchPlan | None = None,
        routing: Routing | None = None,
    ) -> Rollout:
        """Go on to `until_s`, after starting the switch `plan` and setting `routing`, if given.

        `future` takes the place of all that was submitted and has not arrived; None keeps that.
        Raises what `Cluster.apply` and `Cluster.set_routing` raise.
        """
        ...


class Outlook(Protocol):
    """The decision at hand, and what may come of it."""

    def simulator(self) -> Simulator:
        """The cluster as it is now; each call gives a copy of its own."""
        ...

    def plan(self, row: int) -> SwitchPlan | None:
        """How that row of the observation would be reached; None: it is kept, or cannot be."""
        ...

    def futures(self, horizon_s: float, number: int) -> Sequence[Future]:
        """Requests of the next seconds: the true ones, or as many draws as asked for."""
        ...


def request_seconds(before: ClusterSnapshot, after: Rollout) -> float:
    """The time that all requests together were in the system between two snapshots: by Little's
    law what mean latency is made of."""
    end_s, traffic = after.snapshot.now_s, after.traffic
    present = before.num_arrived - before.num_finished - before.num_rejected
    stayed_s = present * (end_s - before.now_s)
    arrived_s = float((end_s - traffic.arrival_s).sum())
    return stayed_s + arrived_s - float((end_s - traffic.finish_s).sum())
