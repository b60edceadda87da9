"""What engine process, leaders and followers say to one another: typed msgpack, never pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.cluster import ParallelConfig, Transfer
from engine.request import SamplingParams, StepInput, StepOutput, TokenLogprobs


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True, frozen=True):
    """Base of all messages; the tag is the class name."""


class SequenceState(msgspec.Struct, array_like=True, frozen=True):
    """A sequence on its way: everything a leader needs to go on with it, token for token."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    block_table: list[int] = []
    num_cached_tokens: int = 0
    pending_logprobs: list[TokenLogprobs] = []  # of a prompt whose prefill has begun


class RankSpec(msgspec.Struct, array_like=True, frozen=True):
    """One rank of one replica, as the worker that is to run it must know it."""

    replica_id: int
    parallel: ParallelConfig
    rank: int
    num_blocks: int
    nonce: str  # makes group and socket names unique, also when a replica id is used again


class KvMove(msgspec.Struct, array_like=True, frozen=True):
    """Copy of KV blocks between two ranks. Layers and heads are local to either rank."""

    src: int
    dst: int
    src_replica: int
    dst_replica: int
    src_blocks: list[int]
    dst_blocks: list[int]
    src_layers: tuple[int, int]
    dst_layers: tuple[int, int]
    src_heads: tuple[int, int]
    dst_heads: tuple[int, int]


class TokenUpdate(msgspec.Struct, array_like=True, frozen=True):
    """The index-th output token of a request; `finish_reason` is "", "stop" or "length".

    `logprobs` holds the token's own last, on the first token after those of the prompt; the two
    counts are given with the first and the last token, the wait before the first step with the
    first.
    """

    request_id: str
    index: int
    token_id: int
    finish_reason: str = ""
    logprobs: list[TokenLogprobs] = []
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache had
    queue_s: float | None = None  # from submission to its first step; None: not measured


# Engine -> worker: calls, each answered by one Reply with the same call_id.


class HostStore(Message, frozen=True):
    """Host the rendezvous store of a group; the reply's endpoint is its address."""

    call_id: int
    name: str


class BuildRank(Message, frozen=True):
    """Build a rank beside whatever runs: groups, modules, weight storage. `store` is the address
    of its groups' store, empty for a rank alone. A bare one has only the weights whose very
    interval is held here. The reply's endpoint takes the rank's inputs."""

    call_id: int
    spec: RankSpec
    from_disk: bool
    store: str = ""
    is_bare: bool = False


class OpenTransfer(Message, frozen=True):
    """Join the transfer group of a switch. `devices` are its members in rank order."""

    call_id: int
    nonce: str
    devices: list[int]
    store: str = ""


class Abandon(Message, frozen=True):
    """Wait no longer for ranks that are to meet at this store: one of them is lost."""

    call_id: int
    store: str


class MoveWeights(Message, frozen=True):
    """Execute this device's part of the weight transfers, in the order given. They are a stretch
    of the plan's, from `first_index` on."""

    call_id: int
    transfers: list[Transfer]
    dst_replicas: list[int]  # replica that receives, per transfer
    src_replicas: dict[int, int] = {}  # new replica on each device, which may forward what it got
    first_index: int = 0


class BindRank(Message, frozen=True):
    """All weights are there: bind them to the modules."""

    call_id: int
    replica_id: int


class MoveKv(Message, frozen=True):
    """Execute this device's part of the KV copies, in the order given. The last ones are made
    while their sequences stand still, as fast as can be."""

    call_id: int
    moves: list[KvMove]
    is_last: bool = False


class SizeKv(Message, frozen=True):
    """Give a rank that stands still a KV cache of so many blocks, empty, in place of the one it
    has; with 0 that is dropped. A leader's sequences start over from their tokens."""

    call_id: int
    replica_id: int
    num_blocks: int


class MakeShards(Message, frozen=True):
    """Of a switch in place: storage for these shards of a new rank, filled from what is held here.
    Shards `parked` of the old rank go to host memory before; it cannot serve any more."""

    call_id: int
    replica_id: int
    tensors: list[str]
    parked: list[str] = []


class FreeShards(Message, frozen=True):
    """Of a switch in place: drop these shards of an old rank, which cannot serve any more."""

    call_id: int
    replica_id: int
    tensors: list[str]


class Activate(Message, frozen=True):
    """From now on this rank serves. Followers are activated before their leader. `peers` are the
    input endpoints of the replica's ranks, in rank order."""

    call_id: int
    replica_id: int
    peers: list[str] = []


class TakeSequences(Message, frozen=True):
    """Leader: the reply carries all sequences as they stand, and they run on. The blocks of their
    computed tokens keep their content until the next such call, `Quiesce` and `Resume`."""

    call_id: int
    replica_id: int


class Quiesce(Message, frozen=True):
    """Leader: stop at a step boundary with nothing in flight; the reply carries all sequences."""

    call_id: int
    replica_id: int


class Resume(Message, frozen=True):
    """Leader: a switch was rolled back; serve on, and forget sequences imported for it."""

    call_id: int
    replica_id: int


class LimitBlocks(Message, frozen=True):
    """Leader: keep at most so many KV blocks in use, while a switch needs the memory; None ends
    that."""

    call_id: int
    replica_id: int
    max_used: int | None


class ImportSequences(Message, frozen=True):
    """Leader: reserve blocks for exactly these sequences about to arrive, as they are now. The
    reply has a table for each, empty where no room was left, and the blocks of them that hold
    nothing yet."""

    call_id: int
    replica_id: int
    sequences: list[SequenceState]


class AdoptSequences(Message, frozen=True):
    """Leader: commit. Imported sequences run; `recompute` ones start over from their tokens."""

    call_id: int
    replica_id: int
    recompute: list[SequenceState]


class ReleaseRank(Message, frozen=True):
    """Drop a rank: its groups, KV and the weights no other rank here shares."""

    call_id: int
    replica_id: int


class CloseTransfer(Message, frozen=True):
    call_id: int


# Engine -> worker: one-way.


class Submit(Message, frozen=True):
    replica_id: int
    sequence: SequenceState


class Abort(Message, frozen=True):
    replica_id: int
    request_id: str


class Shutdown(Message, frozen=True):
    pass


# Worker -> engine.


class Hello(Message, frozen=True):
    device: int
    pid: int


class Reply(Message, frozen=True):
    """Outcome of a call: `error` is empty on success. A stale call was refused: its switch is over,
    a later one has been heard of."""

    call_id: int
    error: str = ""
    sequences: list[SequenceState] = []
    block_tables: list[list[int]] = []
    blocks_to_fill: list[int] = []
    checksums: list[tuple[int, int]] = []  # (index in the transfer list, checksum)
    sent_bytes: int = 0
    endpoint: str = ""
    is_stale: bool = False


class Beat(Message, frozen=True):
    """A sign of life, from a thread of its own: a long step is no silence."""


class LeaderStats(msgspec.Struct, array_like=True, frozen=True):
    """Load of a leader's replica, sent with tokens and with every heartbeat."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_prompt_tokens: int = 0
    running_context_tokens: int = 0
    kv_blocks_used: int = 0
    num_preemptions_total: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up, in total
    prefix_cache_hits: int = 0


class StepReport(Message, frozen=True):
    """One step of a replica, as its leader saw it; seconds on its machine's monotonic clock.

    `started_s` is when it could be scheduled: when the step before it ended, if there was more to
    do then. So the time of a step holds all that a replica does between two steps, too.
    """

    started_s: float
    ended_s: float
    tokens: int
    decoding: int  # sequences that decode, one token each; the others prefill
    sequences: int
    context_tokens: int  # sum over sequences, after the step
    pairs: float  # sum over sequences of `engine.profile.attention_pairs`
    others_at_start: int  # steps in flight beside it
    others_at_end: int


class Tokens(Message, frozen=True):
    """Tokens of one step of a replica (none in a heartbeat, nor a step)."""

    replica_id: int
    updates: list[TokenUpdate]
    stats: LeaderStats
    step: StepReport | None = None


class RankFailed(Message, frozen=True):
    """A rank broke (a peer of its groups died, or a step raised); it is dropped."""

    device: int
    replica_id: int
    error: str


Call = (
    HostStore
    | BuildRank
    | OpenTransfer
    | MoveWeights
    | BindRank
    | MoveKv
    | SizeKv
    | Abandon
    | MakeShards
    | FreeShards
    | Activate
    | TakeSequences
    | Quiesce
    | Resume
    | LimitBlocks
    | ImportSequences
    | AdoptSequences
    | ReleaseRank
    | CloseTransfer
)
ToWorker = Call | Submit | Abort | Shutdown
ToEngine = Hello | Reply | Tokens | RankFailed | Beat
MIGRATION_CALLS = (
    HostStore,
    BuildRank,
    OpenTransfer,
    MoveWeights,
    BindRank,
    MoveKv,
    MakeShards,
    FreeShards,
    CloseTransfer,
)
UNDO_CALLS = (Resume, ReleaseRank)  # a worker that leaves one of these unanswered is given up

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_to_worker: Any = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_engine: Any = msgspec.msgpack.Decoder(ToEngine).decode
decode_step: Any = msgspec.msgpack.Decoder(StepInput).decode
decode_output: Any = msgspec.msgpack.Decoder(StepOutput).decode
