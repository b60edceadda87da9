from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STATUS_UNSPECIFIED: _ClassVar[RequestStatus]
    REQUEST_STATUS_FINISHED: _ClassVar[RequestStatus]
    REQUEST_STATUS_REJECTED: _ClassVar[RequestStatus]
    REQUEST_STATUS_CANCELLED: _ClassVar[RequestStatus]
    REQUEST_STATUS_FAILED: _ClassVar[RequestStatus]

class SwitchPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SWITCH_PHASE_UNSPECIFIED: _ClassVar[SwitchPhase]
    SWITCH_PHASE_PREPARE: _ClassVar[SwitchPhase]
    SWITCH_PHASE_TRANSFER: _ClassVar[SwitchPhase]
    SWITCH_PHASE_VERIFY: _ClassVar[SwitchPhase]
    SWITCH_PHASE_COMMIT: _ClassVar[SwitchPhase]
    SWITCH_PHASE_RELEASE: _ClassVar[SwitchPhase]
    SWITCH_PHASE_DONE: _ClassVar[SwitchPhase]
    SWITCH_PHASE_ROLLED_BACK: _ClassVar[SwitchPhase]
    SWITCH_PHASE_CANCELLED: _ClassVar[SwitchPhase]

class SwitchMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SWITCH_MODE_UNSPECIFIED: _ClassVar[SwitchMode]
    SWITCH_MODE_LIVE: _ClassVar[SwitchMode]
    SWITCH_MODE_IN_PLACE: _ClassVar[SwitchMode]

class Binding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BINDING_UNSPECIFIED: _ClassVar[Binding]
    BINDING_DRAIN: _ClassVar[Binding]
    BINDING_MIGRATE: _ClassVar[Binding]
    BINDING_RECOMPUTE: _ClassVar[Binding]

class EventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EVENT_KIND_UNSPECIFIED: _ClassVar[EventKind]
    EVENT_KIND_ARRIVED: _ClassVar[EventKind]
    EVENT_KIND_ENDED: _ClassVar[EventKind]
    EVENT_KIND_SWITCH: _ClassVar[EventKind]
    EVENT_KIND_DEVICE_LOST: _ClassVar[EventKind]
    EVENT_KIND_DEVICE_JOINED: _ClassVar[EventKind]
REQUEST_STATUS_UNSPECIFIED: RequestStatus
REQUEST_STATUS_FINISHED: RequestStatus
REQUEST_STATUS_REJECTED: RequestStatus
REQUEST_STATUS_CANCELLED: RequestStatus
REQUEST_STATUS_FAILED: RequestStatus
SWITCH_PHASE_UNSPECIFIED: SwitchPhase
SWITCH_PHASE_PREPARE: SwitchPhase
SWITCH_PHASE_TRANSFER: SwitchPhase
SWITCH_PHASE_VERIFY: SwitchPhase
SWITCH_PHASE_COMMIT: SwitchPhase
SWITCH_PHASE_RELEASE: SwitchPhase
SWITCH_PHASE_DONE: SwitchPhase
SWITCH_PHASE_ROLLED_BACK: SwitchPhase
SWITCH_PHASE_CANCELLED: SwitchPhase
SWITCH_MODE_UNSPECIFIED: SwitchMode
SWITCH_MODE_LIVE: SwitchMode
SWITCH_MODE_IN_PLACE: SwitchMode
BINDING_UNSPECIFIED: Binding
BINDING_DRAIN: Binding
BINDING_MIGRATE: Binding
BINDING_RECOMPUTE: Binding
EVENT_KIND_UNSPECIFIED: EventKind
EVENT_KIND_ARRIVED: EventKind
EVENT_KIND_ENDED: EventKind
EVENT_KIND_SWITCH: EventKind
EVENT_KIND_DEVICE_LOST: EventKind
EVENT_KIND_DEVICE_JOINED: EventKind

class ParallelConfig(_message.Message):
    __slots__ = ("tp", "pp")
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    tp: int
    pp: int
    def __init__(self, tp: _Optional[int] = ..., pp: _Optional[int] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, devices: _Optional[_Iterable[int]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "parallel", "placement")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    replica_id: int
    parallel: ParallelConfig
    placement: Placement
    def __init__(self, replica_id: _Optional[int] = ..., parallel: _Optional[_Union[ParallelConfig, _Mapping]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ...) -> None: ...

class Deployment(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "role", "layer", "tp_dim")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TP_DIM_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    role: str
    layer: int
    tp_dim: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., role: _Optional[str] = ..., layer: _Optional[int] = ..., tp_dim: _Optional[int] = ...) -> None: ...

class ModelSpec(_message.Message):
    __slots__ = ("name", "num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "max_model_len", "dtype_bytes", "tensors")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, name: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., dtype_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class ClusterSpec(_message.Message):
    __slots__ = ("num_devices", "devices_per_node", "device_memory_bytes", "link_bytes_per_s", "block_size", "model", "max_num_seqs", "max_num_batched_tokens", "switch_headroom_bytes")
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SWITCH_HEADROOM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_devices: int
    devices_per_node: int
    device_memory_bytes: int
    link_bytes_per_s: float
    block_size: int
    model: ModelSpec
    max_num_seqs: int
    max_num_batched_tokens: int
    switch_headroom_bytes: int
    def __init__(self, num_devices: _Optional[int] = ..., devices_per_node: _Optional[int] = ..., device_memory_bytes: _Optional[int] = ..., link_bytes_per_s: _Optional[float] = ..., block_size: _Optional[int] = ..., model: _Optional[_Union[ModelSpec, _Mapping]] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., switch_headroom_bytes: _Optional[int] = ...) -> None: ...

class RequestOutcome(_message.Message):
    __slots__ = ("request_id", "status", "arrival_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens", "replica_id", "longest_gap_s", "num_preemptions", "num_moves", "request_class", "client_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    FINISH_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    LONGEST_GAP_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    status: RequestStatus
    arrival_s: float
    first_token_s: float
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    replica_id: int
    longest_gap_s: float
    num_preemptions: int
    num_moves: int
    request_class: str
    client_id: str
    def __init__(self, request_id: _Optional[str] = ..., status: _Optional[_Union[RequestStatus, str]] = ..., arrival_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., finish_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., replica_id: _Optional[int] = ..., longest_gap_s: _Optional[float] = ..., num_preemptions: _Optional[int] = ..., num_moves: _Optional[int] = ..., request_class: _Optional[str] = ..., client_id: _Optional[str] = ...) -> None: ...

class MatrixRow(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("replica_ids", "weights", "prompt_edges", "posterior")
    REPLICA_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_EDGES_FIELD_NUMBER: _ClassVar[int]
    POSTERIOR_FIELD_NUMBER: _ClassVar[int]
    replica_ids: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedCompositeFieldContainer[MatrixRow]
    prompt_edges: _containers.RepeatedScalarFieldContainer[int]
    posterior: _containers.RepeatedCompositeFieldContainer[MatrixRow]
    def __init__(self, replica_ids: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[_Union[MatrixRow, _Mapping]]] = ..., prompt_edges: _Optional[_Iterable[int]] = ..., posterior: _Optional[_Iterable[_Union[MatrixRow, _Mapping]]] = ...) -> None: ...

class ReplicaStats(_message.Message):
    __slots__ = ("replica_id", "measured_at_s", "num_running", "num_waiting", "waiting_prompt_tokens", "running_context_tokens", "kv_blocks_total", "kv_blocks_used", "generated_tokens_total", "num_preemptions_total", "alive")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    MEASURED_AT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
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
    alive: bool
    def __init__(self, replica_id: _Optional[int] = ..., measured_at_s: _Optional[float] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., running_context_tokens: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., num_preemptions_total: _Optional[int] = ..., alive: _Optional[bool] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("tensor", "dim", "start", "stop", "src", "dst", "nbytes")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SRC_FIELD_NUMBER: _ClassVar[int]
    DST_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    dim: int
    start: int
    stop: int
    src: int
    dst: int
    nbytes: int
    def __init__(self, tensor: _Optional[str] = ..., dim: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., src: _Optional[int] = ..., dst: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class KvCostParams(_message.Message):
    __slots__ = ("link_bytes_per_s", "prefill_tokens_per_s", "decode_step_s")
    LINK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    link_bytes_per_s: float
    prefill_tokens_per_s: float
    decode_step_s: float
    def __init__(self, link_bytes_per_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_s: _Optional[float] = ...) -> None: ...

class SwitchPlan(_message.Message):
    __slots__ = ("target", "expected_epoch", "transfers", "kv", "weight_bytes", "lower_bound_bytes", "predicted_s", "lower_bound_s", "mode", "decision_id", "mode_reason")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_S_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_REASON_FIELD_NUMBER: _ClassVar[int]
    target: Deployment
    expected_epoch: int
    transfers: _containers.RepeatedCompositeFieldContainer[Transfer]
    kv: KvCostParams
    weight_bytes: int
    lower_bound_bytes: int
    predicted_s: float
    lower_bound_s: float
    mode: SwitchMode
    decision_id: str
    mode_reason: str
    def __init__(self, target: _Optional[_Union[Deployment, _Mapping]] = ..., expected_epoch: _Optional[int] = ..., transfers: _Optional[_Iterable[_Union[Transfer, _Mapping]]] = ..., kv: _Optional[_Union[KvCostParams, _Mapping]] = ..., weight_bytes: _Optional[int] = ..., lower_bound_bytes: _Optional[int] = ..., predicted_s: _Optional[float] = ..., lower_bound_s: _Optional[float] = ..., mode: _Optional[_Union[SwitchMode, str]] = ..., decision_id: _Optional[str] = ..., mode_reason: _Optional[str] = ...) -> None: ...

class BoundSequence(_message.Message):
    __slots__ = ("request_id", "binding", "drain_s", "migrate_s", "recompute_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    MIGRATE_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    binding: Binding
    drain_s: float
    migrate_s: float
    recompute_s: float
    def __init__(self, request_id: _Optional[str] = ..., binding: _Optional[_Union[Binding, str]] = ..., drain_s: _Optional[float] = ..., migrate_s: _Optional[float] = ..., recompute_s: _Optional[float] = ...) -> None: ...

class PhaseDuration(_message.Message):
    __slots__ = ("phase", "duration_s")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    phase: str
    duration_s: float
    def __init__(self, phase: _Optional[str] = ..., duration_s: _Optional[float] = ...) -> None: ...

class SwitchTicket(_message.Message):
    __slots__ = ("ticket_id", "phase", "from_key", "to_key", "from_epoch", "started_s", "updated_s", "decision_id", "reason", "weight_bytes", "kv_bytes", "num_migrated", "num_recomputed", "num_drained", "pause_s", "phase_s", "mode", "planned_bytes", "moved_bytes", "lower_bound_bytes", "predicted_s", "lower_bound_s", "num_kv_rounds", "bindings")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    FROM_KEY_FIELD_NUMBER: _ClassVar[int]
    TO_KEY_FIELD_NUMBER: _ClassVar[int]
    FROM_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STARTED_S_FIELD_NUMBER: _ClassVar[int]
    UPDATED_S_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_MIGRATED_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAINED_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    PHASE_S_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_S_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BINDINGS_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    phase: SwitchPhase
    from_key: str
    to_key: str
    from_epoch: int
    started_s: float
    updated_s: float
    decision_id: str
    reason: str
    weight_bytes: int
    kv_bytes: int
    num_migrated: int
    num_recomputed: int
    num_drained: int
    pause_s: float
    phase_s: _containers.RepeatedCompositeFieldContainer[PhaseDuration]
    mode: SwitchMode
    planned_bytes: int
    moved_bytes: int
    lower_bound_bytes: int
    predicted_s: float
    lower_bound_s: float
    num_kv_rounds: int
    bindings: _containers.RepeatedCompositeFieldContainer[BoundSequence]
    def __init__(self, ticket_id: _Optional[str] = ..., phase: _Optional[_Union[SwitchPhase, str]] = ..., from_key: _Optional[str] = ..., to_key: _Optional[str] = ..., from_epoch: _Optional[int] = ..., started_s: _Optional[float] = ..., updated_s: _Optional[float] = ..., decision_id: _Optional[str] = ..., reason: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., num_migrated: _Optional[int] = ..., num_recomputed: _Optional[int] = ..., num_drained: _Optional[int] = ..., pause_s: _Optional[float] = ..., phase_s: _Optional[_Iterable[_Union[PhaseDuration, _Mapping]]] = ..., mode: _Optional[_Union[SwitchMode, str]] = ..., planned_bytes: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., lower_bound_bytes: _Optional[int] = ..., predicted_s: _Optional[float] = ..., lower_bound_s: _Optional[float] = ..., num_kv_rounds: _Optional[int] = ..., bindings: _Optional[_Iterable[_Union[BoundSequence, _Mapping]]] = ...) -> None: ...

class ClusterSnapshot(_message.Message):
    __slots__ = ("now_s", "epoch", "deployment", "routing", "replicas", "switch", "dead_devices", "num_arrived", "num_finished", "num_rejected", "num_queued_unrouted")
    NOW_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SWITCH_FIELD_NUMBER: _ClassVar[int]
    DEAD_DEVICES_FIELD_NUMBER: _ClassVar[int]
    NUM_ARRIVED_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_UNROUTED_FIELD_NUMBER: _ClassVar[int]
    now_s: float
    epoch: int
    deployment: Deployment
    routing: Routing
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStats]
    switch: SwitchTicket
    dead_devices: _containers.RepeatedScalarFieldContainer[int]
    num_arrived: int
    num_finished: int
    num_rejected: int
    num_queued_unrouted: int
    def __init__(self, now_s: _Optional[float] = ..., epoch: _Optional[int] = ..., deployment: _Optional[_Union[Deployment, _Mapping]] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStats, _Mapping]]] = ..., switch: _Optional[_Union[SwitchTicket, _Mapping]] = ..., dead_devices: _Optional[_Iterable[int]] = ..., num_arrived: _Optional[int] = ..., num_finished: _Optional[int] = ..., num_rejected: _Optional[int] = ..., num_queued_unrouted: _Optional[int] = ...) -> None: ...

class Arrival(_message.Message):
    __slots__ = ("request_id", "arrival_s", "prompt_tokens", "request_class", "client_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    arrival_s: float
    prompt_tokens: int
    request_class: str
    client_id: str
    def __init__(self, request_id: _Optional[str] = ..., arrival_s: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., request_class: _Optional[str] = ..., client_id: _Optional[str] = ...) -> None: ...

class ClusterEvent(_message.Message):
    __slots__ = ("seq", "at_s", "kind", "arrival", "outcome", "ticket", "device")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    at_s: float
    kind: EventKind
    arrival: Arrival
    outcome: RequestOutcome
    ticket: SwitchTicket
    device: int
    def __init__(self, seq: _Optional[int] = ..., at_s: _Optional[float] = ..., kind: _Optional[_Union[EventKind, str]] = ..., arrival: _Optional[_Union[Arrival, _Mapping]] = ..., outcome: _Optional[_Union[RequestOutcome, _Mapping]] = ..., ticket: _Optional[_Union[SwitchTicket, _Mapping]] = ..., device: _Optional[int] = ...) -> None: ...

class EventBatch(_message.Message):
    __slots__ = ("events", "next_cursor", "num_lost")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[ClusterEvent]
    next_cursor: int
    num_lost: int
    def __init__(self, events: _Optional[_Iterable[_Union[ClusterEvent, _Mapping]]] = ..., next_cursor: _Optional[int] = ..., num_lost: _Optional[int] = ...) -> None: ...
