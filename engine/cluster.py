"""The vocabulary of Tidewright and the `Cluster` protocol.

Frozen values only, standard library only. Every room speaks in these words; the surrogate, the
engine and the gRPC client all present themselves as a `Cluster`, and nothing that decides may
notice which of them it was given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from itertools import chain
from math import inf
from typing import Protocol, runtime_checkable

from engine.errors import InfeasibleError

# --------------------------------------------------------------------------------------
# Parallelism and deployments


@dataclass(frozen=True, slots=True, order=True)
class ParallelConfig:
    """How one model copy is split: tensor-parallel and pipeline-parallel degree.

    Ranks of a replica are numbered stage-major: rank = stage * tp + tp_rank. All slicing of
    layers, heads and columns is derived here and nowhere else.
    """

    tp: int
    pp: int

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise InfeasibleError(f"tp and pp must be at least 1, got tp={self.tp}, pp={self.pp}.")

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp

    @property
    def key(self) -> str:
        return f"tp{self.tp}pp{self.pp}"

    def stage_of(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank_of(self, rank: int) -> int:
        return rank % self.tp

    def layer_range(self, stage: int, num_layers: int) -> tuple[int, int]:
        """Layers [start, stop) of a stage; the first `num_layers % pp` stages take one more."""
        base, extra = divmod(num_layers, self.pp)
        start = stage * base + min(stage, extra)
        return start, start + base + (1 if stage < extra else 0)

    def shard_range(self, tp_rank: int, size: int) -> tuple[int, int]:
        """Interval [start, stop) of a dimension of `size` that tensor-parallel rank holds."""
        if size % self.tp:
            raise InfeasibleError(f"a dimension of {size} is not divisible by tp={self.tp}.")
        width = size // self.tp
        return tp_rank * width, (tp_rank + 1) * width

    def kv_head_range(self, tp_rank: int, num_kv_heads: int) -> tuple[int, int]:
        """KV heads [start, stop) of a tensor-parallel rank. With fewer heads than ranks, each head
        is held by tp / num_kv_heads neighbouring ranks: those whose query heads attend to it."""
        if self.tp <= num_kv_heads:
            return self.shard_range(tp_rank, num_kv_heads)
        if self.tp % num_kv_heads:
            raise InfeasibleError(
                f"{num_kv_heads} key/value heads cannot be replicated evenly over tp={self.tp}."
            )
        head = tp_rank // (self.tp // num_kv_heads)
        return head, head + 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Rank -> device of one replica."""

    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replica:
    """One model copy: its parallel configuration and the devices its ranks run on."""

    replica_id: int
    parallel: ParallelConfig
    placement: Placement

    def __post_init__(self) -> None:
        given = len(self.placement.devices)
        if given != self.parallel.num_devices:
            raise InfeasibleError(
                f"replica {self.replica_id} ({self.parallel.key}) needs "
                f"{self.parallel.num_devices} devices, its placement names {given}."
            )


_KEY_TERM = re.compile(r"^(\d+)xtp(\d+)pp(\d+)$")


def deployment_key(configs: Sequence[ParallelConfig]) -> str:
    """Canonical name of a multiset of replica configurations, e.g. ``1xtp2pp1+2xtp1pp1``."""
    return _deployment_key(tuple(configs))


@lru_cache(maxsize=65536)
def _deployment_key(configs: tuple[ParallelConfig, ...]) -> str:
    counts = Counter(configs)
    order = sorted(counts, key=lambda c: (-c.num_devices, -c.tp, c.pp))
    return "+".join(f"{counts[c]}x{c.key}" for c in order)


def parse_deployment_key(key: str) -> tuple[ParallelConfig, ...]:
    """Inverse of `deployment_key`, largest replica first. Raises InfeasibleError."""
    configs: list[ParallelConfig] = []
    for term in key.replace(" ", "").split("+"):
        match = _KEY_TERM.match(term)
        if match is None or int(match[1]) < 1:
            raise InfeasibleError(
                f"deployment {key!r} is not understood at {term!r}; expected terms such as "
                "'2xtp1pp1' joined by '+', for example '1xtp2pp1+2xtp1pp1'."
            )
        configs += [ParallelConfig(int(match[2]), int(match[3]))] * int(match[1])
    return tuple(sorted(configs, key=lambda c: (-c.num_devices, -c.tp, c.pp)))


@dataclass(frozen=True, slots=True)
class Deployment:
    """The replicas that serve the model, with their devices. Devices not named are idle."""

    replicas: tuple[Replica, ...]

    def __post_init__(self) -> None:
        devices = [d for r in self.replicas for d in r.placement.devices]
        if len(set(devices)) != len(devices):
            raise InfeasibleError(f"a device is used twice in deployment {self.key}: {devices}.")
        ids = [r.replica_id for r in self.replicas]
        if len(set(ids)) != len(ids):
            raise InfeasibleError(f"a replica id is used twice in deployment {self.key}: {ids}.")

    @property
    def configs(self) -> tuple[ParallelConfig, ...]:
        return tuple(r.parallel for r in self.replicas)

    @property
    def key(self) -> str:
        return deployment_key(self.configs)

    @property
    def devices(self) -> frozenset[int]:
        return frozenset(d for r in self.replicas for d in r.placement.devices)

    def replica(self, replica_id: int) -> Replica:
        for replica in self.replicas:
            if replica.replica_id == replica_id:
                return replica
        raise KeyError(replica_id)


def dense_deployment(configs: Sequence[ParallelConfig], first_replica_id: int = 0) -> Deployment:
    """Place configurations on devices 0, 1, 2, ... in the order given (no live state to keep)."""
    replicas, device = [], 0
    for index, parallel in enumerate(configs):
        devices = tuple(range(device, device + parallel.num_devices))
        replicas.append(Replica(first_replica_id + index, parallel, Placement(devices)))
        device += parallel.num_devices
    return Deployment(tuple(replicas))


# --------------------------------------------------------------------------------------
# The static facts of a cluster


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One checkpoint tensor as the planner sees it.

    `layer` is None for tensors outside the decoder layers; `role` is then "embed" (needed by the
    first stage), "head" (last stage, tp rank 0: the rank that samples), "embed+head" (both: tied
    embeddings) or "norm" (last stage, all ranks). In a layer it is "layer", or "kv" for a key or
    value projection, which is sliced by whole KV heads (see `ParallelConfig.kv_head_range`).
    `tp_dim` is the dimension that tensor parallelism slices, or None if replicated.
    """

    name: str
    shape: tuple[int, ...]
    role: str  # "layer", "kv", "embed", "norm", "head" or "embed+head"
    layer: int | None = None
    tp_dim: int | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What planning needs to know of a model. Bytes are derived from shapes and `dtype_bytes`."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int  # tokens
    dtype_bytes: int
    tensors: tuple[TensorSpec, ...] = ()

    def __hash__(self) -> int:  # equal specs hash alike; `tensors` is long and left to equality
        return hash((self.name, self.num_layers, self.hidden_size, self.dtype_bytes))

    def kv_bytes_per_token(self, num_layers: int, num_kv_heads: int) -> int:
        return 2 * num_layers * num_kv_heads * self.head_dim * self.dtype_bytes

    def kv_heads_per_rank(self, parallel: ParallelConfig) -> int:
        """KV heads in a rank's cache; one at least, held by several ranks when tp exceeds them."""
        return max(1, self.num_kv_heads // parallel.tp)

    def allows_tp(self, tp: int) -> bool:
        """Whether heads split evenly: tp divides the attention heads, and divides the KV heads or
        is a multiple of them (each is then replicated)."""
        kv = self.num_kv_heads
        return self.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)

    def check(self, parallel: ParallelConfig) -> None:
        """Raise InfeasibleError when heads or layers cannot be split like that."""
        if not self.allows_tp(parallel.tp):
            allowed = [tp for tp in range(1, self.num_heads + 1) if self.allows_tp(tp)]
            raise InfeasibleError(
                f"{self.name} has {self.num_heads} attention heads, which tp={parallel.tp} does "
                f"not divide; choose tp from {', '.join(map(str, allowed))}."
                if self.num_heads % parallel.tp
                else f"{self.name} has {self.num_kv_heads} key/value heads, which "
                f"tp={parallel.tp} neither divides nor is a multiple of; choose tp from "
                f"{', '.join(map(str, allowed))}."
            )
        if parallel.pp > self.num_layers:
            raise InfeasibleError(
                f"{self.name} has {self.num_layers} layers, pp={parallel.pp} needs at least one "
                "per stage; choose a smaller pp."
            )


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The static facts of a cluster: devices, memory, links, model, KV geometry."""

    num_devices: int
    devices_per_node: int
    device_memory_bytes: int  # for weights and KV cache together
    link_bytes_per_s: float  # per device and direction
    block_size: int  # tokens per KV block
    model: ModelSpec
    max_num_seqs: int
    max_num_batched_tokens: int
    # beside device_memory_bytes, for the second generation during a switch; None: as much again
    switch_headroom_bytes: int | None = None

    @property
    def switch_memory_bytes(self) -> int:
        """What both generations on a device may take during a switch."""
        headroom = self.switch_headroom_bytes
        return self.device_memory_bytes + (
            self.device_memory_bytes if headroom is None else headroom
        )

    def check(self, configs: Sequence[ParallelConfig]) -> None:
        """Raise InfeasibleError unless these replicas fit the devices and the model's heads."""
        if not configs:
            raise InfeasibleError("a deployment needs at least one replica, got none.")
        needed = sum(c.num_devices for c in configs)
        if needed > self.num_devices:
            raise InfeasibleError(
                f"deployment {deployment_key(configs)} needs {needed} devices, the cluster has "
                f"{self.num_devices}; use fewer or smaller replicas."
            )
        for parallel in set(configs):
            self.model.check(parallel)


# --------------------------------------------------------------------------------------
# Requests and routing


@dataclass(frozen=True, slots=True)
class WorkloadType:
    """A class of requests: the centre of a k-means cell on log lengths."""

    name: str
    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a trace knows it. `output_tokens` is when it will end: the engine or surrogate
    stops there, and nobody that routes or plans may read it before the request has finished."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    request_class: str = ""
    client_id: str = ""


class RequestStatus(StrEnum):
    FINISHED = "finished"
    REJECTED = "rejected"  # never admitted: too long, or queue full
    CANCELLED = "cancelled"  # by the client
    FAILED = "failed"  # lost by the engine; must never happen


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """How a request ended; exactly one per request. Times on the cluster's clock."""

    request_id: str
    status: RequestStatus
    arrival_s: float
    first_token_s: float | None
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    replica_id: int | None = None
    longest_gap_s: float = 0.0  # between two consecutive tokens
    num_preemptions: int = 0
    num_moves: int = 0  # switches it lived through by migration or recompute
    request_class: str = ""
    client_id: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.finish_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Routing:
    """Share of each workload type sent to each replica: weights[type][i] for replica_ids[i].

    Rows sum to 1. A request's type is not known at arrival; the router uses
    posterior[b][type] = P(type | prompt length in bucket b), where bucket b holds prompts of
    prompt_edges[b-1] < tokens <= prompt_edges[b] (the last bucket has no upper edge). With no
    rows, the router balances by present load alone, in proportion to device counts.
    """

    replica_ids: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    prompt_edges: tuple[int, ...] = ()
    posterior: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.replica_ids) for row in self.weights):
            raise ValueError(
                f"routing weights need {len(self.replica_ids)} columns, one per replica, got rows "
                f"of {sorted({len(row) for row in self.weights})}."
            )
        if self.weights and len(self.posterior) != len(self.prompt_edges) + 1:
            raise ValueError(
                f"{len(self.prompt_edges)} prompt edges make {len(self.prompt_edges) + 1} buckets, "
                f"the posterior has {len(self.posterior)} rows."
            )
        for name, rows in (("weights", self.weights), ("posterior", self.posterior)):
            shares = list(chain.from_iterable(rows))
            if shares and not (min(shares) >= 0 and sum(shares) < inf):  # nan has no sum below
                raise ValueError(f"routing {name} are {rows}; expected finite shares of 0 or more.")
        if min(self.prompt_edges, default=0) < 0:
            raise ValueError(f"prompt edges are {self.prompt_edges}; expected 0 or more.")


# --------------------------------------------------------------------------------------
# State


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """Load of one replica at `measured_at_s`; stale values must be visible as such."""

    replica_id: int
    measured_at_s: float
    num_running: int
    num_waiting: int
    waiting_prompt_tokens: int
    running_context_tokens: int
    kv_blocks_total: int
    kv_blocks_used: int
    generated_tokens_total: int
    num_preemptions_total: int
    alive: bool = True


class SwitchPhase(StrEnum):
    """Phases of a switch, in order; the last three are terminal."""

    PREPARE = "prepare"
    TRANSFER = "transfer"
    VERIFY = "verify"
    COMMIT = "commit"
    RELEASE = "release"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (SwitchPhase.DONE, SwitchPhase.ROLLED_BACK, SwitchPhase.CANCELLED)


class SwitchMode(StrEnum):
    LIVE = "live"
    IN_PLACE = "in_place"


HEAL_TIMEOUT_S = 60.0  # that requests wait at most, by default, while no replica is left
DISK = -1  # in place of a source device: the checkpoint, for what no device holds any more


@dataclass(frozen=True, slots=True)
class Transfer:
    """Interval [start, stop) of tensor `name` along `dim`, to be copied from src to dst device.

    `dim` is None for a whole (unsliced) tensor. `src` is `DISK`, or a device that holds the
    interval when the switch begins or has received it by an earlier transfer of the same plan.
    """

    tensor: str
    dim: int | None
    start: int
    stop: int
    src: int
    dst: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class KvCostParams:
    """From these the engine binds each running request to drain, migrate or recompute."""

    link_bytes_per_s: float
    prefill_tokens_per_s: float
    decode_step_s: float

    def __post_init__(self) -> None:
        for name in ("link_bytes_per_s", "prefill_tokens_per_s", "decode_step_s"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a finite number above 0."
                )


class Binding(StrEnum):
    """What becomes of a sequence whose replica goes."""

    DRAIN = "drain"  # it ends before the commit
    MIGRATE = "migrate"  # its KV moves
    RECOMPUTE = "recompute"  # its tokens are prefilled again


@dataclass(frozen=True, slots=True)
class BoundSequence:
    """How a request was bound at prepare, and the seconds that decided it; None: not possible."""

    request_id: str
    binding: Binding
    drain_s: float | None
    migrate_s: float | None
    recompute_s: float


@dataclass(frozen=True, slots=True)
class SwitchPlan:
    """What to switch to, and how. Made by `engine.migration.plan.plan_switch`, a pure function."""

    target: Deployment
    expected_epoch: int
    transfers: Sequence[Transfer]  # not to be changed; may be made when looked at
    kv: KvCostParams
    weight_bytes: int  # that cross a link
    lower_bound_bytes: int  # no placement can do with less
    predicted_s: float
    lower_bound_s: float
    mode: SwitchMode = SwitchMode.LIVE
    decision_id: str = ""  # of the policy decision that made it; empty when made by hand
    mode_reason: str = ""  # why not live; empty when it is

    def __post_init__(self) -> None:
        names = ("expected_epoch", "weight_bytes", "lower_bound_bytes", "predicted_s")
        for name in (*names, "lower_bound_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a finite number of 0 or more."
                )


@dataclass(frozen=True, slots=True)
class SwitchTicket:
    """Progress of one switch. Terminal tickets keep their figures."""

    ticket_id: str
    phase: SwitchPhase
    from_key: str
    to_key: str
    from_epoch: int
    started_s: float
    updated_s: float
    decision_id: str = ""
    reason: str = ""  # why it was rolled back or cancelled
    weight_bytes: int = 0
    kv_bytes: int = 0
    num_migrated: int = 0
    num_recomputed: int = 0
    num_drained: int = 0
    pause_s: float = 0.0  # how long the affected replicas stood still
    phase_s: tuple[tuple[str, float], ...] = ()  # seconds spent in each phase so far
    mode: SwitchMode = SwitchMode.LIVE
    planned_bytes: int = 0  # weights that the plan moves
    moved_bytes: int = 0  # weights and KV that have crossed a link so far, counted there
    lower_bound_bytes: int = 0  # these three as planned
    predicted_s: float = 0.0
    lower_bound_s: float = 0.0
    num_kv_rounds: int = 0  # copies of KV so far, the one in the final stop among them
    bindings: tuple[BoundSequence, ...] = ()  # of the requests on the replicas that go

    @property
    def duration_s(self) -> float:
        return self.updated_s - self.started_s


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """What a controller may know at `now_s`. Counters are cumulative since start."""

    now_s: float
    epoch: int  # of the current deployment; rises by one at each commit
    deployment: Deployment
    routing: Routing
    replicas: tuple[ReplicaStats, ...]
    switch: SwitchTicket | None  # the one in flight, else the last one, else None
    dead_devices: tuple[int, ...] = ()
    num_arrived: int = 0
    num_finished: int = 0
    num_rejected: int = 0
    num_queued_unrouted: int = 0  # held back by the engine, e.g. while their replica switches

    @property
    def kv_blocks_used(self) -> dict[int, int]:
        """By replica id, of those that have reported."""
        return {stats.replica_id: stats.kv_blocks_used for stats in self.replicas}

    @property
    def switch_in_flight(self) -> bool:
        return self.switch is not None and not self.switch.phase.is_terminal


# --------------------------------------------------------------------------------------
# Events


class EventKind(StrEnum):
    ARRIVED = "arrived"
    ENDED = "ended"
    SWITCH = "switch"
    DEVICE_LOST = "device_lost"
    DEVICE_JOINED = "device_joined"


LABEL_CHARS = 128  # at most, of a request's class or client


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a request when it arrives: never its output length."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    request_class: str = ""
    client_id: str = ""


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """One entry of the event log. Exactly the field that fits `kind` is set."""

    seq: int
    at_s: float
    kind: EventKind
    arrival: Arrival | None = None
    outcome: RequestOutcome | None = None
    ticket: SwitchTicket | None = None
    device: int | None = None


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events after a cursor. `num_lost` > 0 tells of a gap: the log no longer reaches back."""

    events: tuple[ClusterEvent, ...]
    next_cursor: int
    num_lost: int = 0


# --------------------------------------------------------------------------------------
# Decisions


@dataclass(frozen=True, slots=True)
class Candidate:
    """A deployment the policy may choose, identified by `key`, never by its index.

    Candidate 0 is always *keep*: the present configurations with no switch.
    """

    configs: tuple[ParallelConfig, ...]
    origin: str  # which rule proposed it: "keep", "optimum", "optimum_q90", "homogeneous", ...
    routing: tuple[tuple[float, ...], ...]  # [type][replica], in the order of `configs`
    headroom: float  # theta: served multiple of the median forecast
    headroom_q90: float
    latency_s: float  # planner's estimate of mean request latency at the median forecast
    kv_capacity_tokens: int
    weight_bytes: int  # that a switch to it moves
    switch_s: float  # predicted
    num_devices_changed: int

    @property
    def key(self) -> str:
        return deployment_key(self.configs)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller decided at one tick, and why."""

    decision_id: str
    at_s: float
    action: int  # index chosen by the policy among the tick's candidates
    chosen_key: str  # of that candidate
    executed_key: str  # after guardrails
    propensity: float  # probability of the executed key after the guard map
    policy: str
    reason: str
    vetoes: tuple[str, ...] = ()
    plan: SwitchPlan | None = None


# --------------------------------------------------------------------------------------
# The contract


@runtime_checkable
class Cluster(Protocol):
    """What a controller sees. Surrogate, engine facade and gRPC client all implement it."""

    @property
    def spec(self) -> ClusterSpec: ...

    def snapshot(self) -> ClusterSnapshot: ...

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        """Start a switch and return its ticket at once.

        Raises SwitchInProgressError, StaleEpochError (plan.expected_epoch is not current) or
        InfeasibleError (does not fit).
        """
        ...

    def ticket(self, ticket_id: str) -> SwitchTicket:
        """Raises NotFoundError."""
        ...

    def cancel(self, ticket_id: str) -> SwitchTicket:
        """Roll back before commit; a terminal or committed ticket is returned as it is."""
        ...

    def set_routing(self, routing: Routing) -> None:
        """Raises StaleEpochError when replica_ids are not those of the current deployment."""
        ...

    def events(self, cursor: int) -> EventBatch:
        """Events with seq >= cursor; start with 0."""
        ...


@runtime_checkable
class Drivable(Cluster, Protocol):
    """A cluster that an environment drives: it owns the traffic and the clock."""

    def submit(self, request: Request) -> None:
        """Hand over a request whose arrival_s is not before the present time."""
        ...

    def advance(self, until_s: float) -> None:
        """Wait until (engine) or compute up to (surrogate) `until_s` on the cluster's clock."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SloSpec:
    """Service-level objective of requests; zero means no opinion.

    The first token is due `ttft_s` plus `ttft_per_prompt_token_s` for each token of the prompt.
    """

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    ttft_per_prompt_token_s: float = 0.0

    def is_met_by(self, outcome: RequestOutcome) -> bool:
        """Whether a request finished with both its TTFT and its TPOT within the objective."""
        if outcome.status is not RequestStatus.FINISHED or outcome.ttft_s is None:
            return False
        due_s = self.ttft_s + self.ttft_per_prompt_token_s * outcome.prompt_tokens
        slow_start = 0 < due_s < outcome.ttft_s
        slow_tokens = outcome.tpot_s is not None and 0 < self.tpot_s < outcome.tpot_s
        return not (slow_start or slow_tokens)


NO_SLO = SloSpec()


@dataclass(frozen=True, slots=True)
class UtilitySpec:
    """What a request is worth, from -1 to 1: weights of its parts, and where the scale ends."""

    latency: float = 1.0  # weight of arrival to last token
    tpot: float = 0.0  # of the time per output token
    slo: float = 0.0  # of meeting the service-level objective
    worst_slowdown: float = 32.0  # time over its reference that is worth -1
    window_s: float = 60.0  # over which arrivals are counted, for the reference at their rate


@dataclass(frozen=True, slots=True)
class WorkloadTyping:
    """Frozen typing: k-means centres in (ln prompt, ln output), stored with the policy.

    `types[j]` is the centre in tokens. `prior[j]` is the share seen when fitted.
    """

    types: tuple[WorkloadType, ...]
    prior: tuple[float, ...] = field(default=())
