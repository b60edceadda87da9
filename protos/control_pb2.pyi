from protos import deployment_pb2 as _deployment_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_ACTIVE: _ClassVar[Mode]
    MODE_ADVISORY: _ClassVar[Mode]
    MODE_OFF: _ClassVar[Mode]

class TickStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TICK_STATUS_UNSPECIFIED: _ClassVar[TickStatus]
    TICK_STATUS_DECIDED: _ClassVar[TickStatus]
    TICK_STATUS_OBSERVED: _ClassVar[TickStatus]
    TICK_STATUS_UNAVAILABLE: _ClassVar[TickStatus]
    TICK_STATUS_FAILED: _ClassVar[TickStatus]
MODE_UNSPECIFIED: Mode
MODE_ACTIVE: Mode
MODE_ADVISORY: Mode
MODE_OFF: Mode
TICK_STATUS_UNSPECIFIED: TickStatus
TICK_STATUS_DECIDED: TickStatus
TICK_STATUS_OBSERVED: TickStatus
TICK_STATUS_UNAVAILABLE: TickStatus
TICK_STATUS_FAILED: TickStatus

class TypeRate(_message.Message):
    __slots__ = ("type", "forecast_p50_per_s", "forecast_p90_per_s", "actual_per_s")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FORECAST_P50_PER_S_FIELD_NUMBER: _ClassVar[int]
    FORECAST_P90_PER_S_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_PER_S_FIELD_NUMBER: _ClassVar[int]
    type: str
    forecast_p50_per_s: float
    forecast_p90_per_s: float
    actual_per_s: float
    def __init__(self, type: _Optional[str] = ..., forecast_p50_per_s: _Optional[float] = ..., forecast_p90_per_s: _Optional[float] = ..., actual_per_s: _Optional[float] = ...) -> None: ...

class CandidateView(_message.Message):
    __slots__ = ("key", "origin", "legal", "mask_reason", "probability", "headroom", "predicted_switch_s", "weight_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LEGAL_FIELD_NUMBER: _ClassVar[int]
    MASK_REASON_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    HEADROOM_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_SWITCH_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: str
    origin: str
    legal: bool
    mask_reason: str
    probability: float
    headroom: float
    predicted_switch_s: float
    weight_bytes: int
    def __init__(self, key: _Optional[str] = ..., origin: _Optional[str] = ..., legal: _Optional[bool] = ..., mask_reason: _Optional[str] = ..., probability: _Optional[float] = ..., headroom: _Optional[float] = ..., predicted_switch_s: _Optional[float] = ..., weight_bytes: _Optional[int] = ...) -> None: ...

class TickRecord(_message.Message):
    __slots__ = ("seq", "at_s", "status", "mode", "decision_id", "candidates", "action", "chosen_key", "executed_key", "propensity", "policy", "reason", "vetoes", "ticket", "rates", "epoch", "deployment_key", "num_waiting", "num_running", "tick_s", "notes", "arm")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_KEY_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_KEY_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VETOES_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TICK_S_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    seq: int
    at_s: float
    status: TickStatus
    mode: Mode
    decision_id: str
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateView]
    action: int
    chosen_key: str
    executed_key: str
    propensity: float
    policy: str
    reason: str
    vetoes: _containers.RepeatedScalarFieldContainer[str]
    ticket: _deployment_pb2.SwitchTicket
    rates: _containers.RepeatedCompositeFieldContainer[TypeRate]
    epoch: int
    deployment_key: str
    num_waiting: int
    num_running: int
    tick_s: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    arm: str
    def __init__(self, seq: _Optional[int] = ..., at_s: _Optional[float] = ..., status: _Optional[_Union[TickStatus, str]] = ..., mode: _Optional[_Union[Mode, str]] = ..., decision_id: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[CandidateView, _Mapping]]] = ..., action: _Optional[int] = ..., chosen_key: _Optional[str] = ..., executed_key: _Optional[str] = ..., propensity: _Optional[float] = ..., policy: _Optional[str] = ..., reason: _Optional[str] = ..., vetoes: _Optional[_Iterable[str]] = ..., ticket: _Optional[_Union[_deployment_pb2.SwitchTicket, _Mapping]] = ..., rates: _Optional[_Iterable[_Union[TypeRate, _Mapping]]] = ..., epoch: _Optional[int] = ..., deployment_key: _Optional[str] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., tick_s: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., arm: _Optional[str] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("num_ticks", "num_decisions", "num_switches_started", "num_switches_done", "num_switches_failed", "num_vetoed", "num_unavailable", "num_failed", "num_fallbacks", "num_late", "num_restarts", "num_events_lost", "num_drifts", "num_undone", "num_timeouts")
    NUM_TICKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECISIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_SWITCHES_STARTED_FIELD_NUMBER: _ClassVar[int]
    NUM_SWITCHES_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_SWITCHES_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_VETOED_FIELD_NUMBER: _ClassVar[int]
    NUM_UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVENTS_LOST_FIELD_NUMBER: _ClassVar[int]
    NUM_DRIFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNDONE_FIELD_NUMBER: _ClassVar[int]
    NUM_TIMEOUTS_FIELD_NUMBER: _ClassVar[int]
    num_ticks: int
    num_decisions: int
    num_switches_started: int
    num_switches_done: int
    num_switches_failed: int
    num_vetoed: int
    num_unavailable: int
    num_failed: int
    num_fallbacks: int
    num_late: int
    num_restarts: int
    num_events_lost: int
    num_drifts: int
    num_undone: int
    num_timeouts: int
    def __init__(self, num_ticks: _Optional[int] = ..., num_decisions: _Optional[int] = ..., num_switches_started: _Optional[int] = ..., num_switches_done: _Optional[int] = ..., num_switches_failed: _Optional[int] = ..., num_vetoed: _Optional[int] = ..., num_unavailable: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_fallbacks: _Optional[int] = ..., num_late: _Optional[int] = ..., num_restarts: _Optional[int] = ..., num_events_lost: _Optional[int] = ..., num_drifts: _Optional[int] = ..., num_undone: _Optional[int] = ..., num_timeouts: _Optional[int] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("mode", "policy", "uptime_s", "grid_s", "engine_available", "epoch", "deployment", "deployment_key", "last_tick", "switches", "counters", "next_seq")
    MODE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    GRID_S_FIELD_NUMBER: _ClassVar[int]
    ENGINE_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_KEY_FIELD_NUMBER: _ClassVar[int]
    LAST_TICK_FIELD_NUMBER: _ClassVar[int]
    SWITCHES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    policy: str
    uptime_s: float
    grid_s: float
    engine_available: bool
    epoch: int
    deployment: _deployment_pb2.Deployment
    deployment_key: str
    last_tick: TickRecord
    switches: _containers.RepeatedCompositeFieldContainer[_deployment_pb2.SwitchTicket]
    counters: Counters
    next_seq: int
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., policy: _Optional[str] = ..., uptime_s: _Optional[float] = ..., grid_s: _Optional[float] = ..., engine_available: _Optional[bool] = ..., epoch: _Optional[int] = ..., deployment: _Optional[_Union[_deployment_pb2.Deployment, _Mapping]] = ..., deployment_key: _Optional[str] = ..., last_tick: _Optional[_Union[TickRecord, _Mapping]] = ..., switches: _Optional[_Iterable[_Union[_deployment_pb2.SwitchTicket, _Mapping]]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., next_seq: _Optional[int] = ...) -> None: ...

class WatchDecisionsRequest(_message.Message):
    __slots__ = ("from_seq",)
    FROM_SEQ_FIELD_NUMBER: _ClassVar[int]
    from_seq: int
    def __init__(self, from_seq: _Optional[int] = ...) -> None: ...

class WatchDecisionsResponse(_message.Message):
    __slots__ = ("record", "num_lost")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    record: TickRecord
    num_lost: int
    def __init__(self, record: _Optional[_Union[TickRecord, _Mapping]] = ..., num_lost: _Optional[int] = ...) -> None: ...

class ProposeSwitchRequest(_message.Message):
    __slots__ = ("target_key", "dry_run")
    TARGET_KEY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    target_key: str
    dry_run: bool
    def __init__(self, target_key: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ProposeSwitchResponse(_message.Message):
    __slots__ = ("accepted", "applied", "vetoes", "target_key", "weight_bytes", "lower_bound_bytes", "predicted_s", "num_transfers", "expected_epoch", "target", "ticket", "decision_id")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    VETOES_FIELD_NUMBER: _ClassVar[int]
    TARGET_KEY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOWER_BOUND_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    applied: bool
    vetoes: _containers.RepeatedScalarFieldContainer[str]
    target_key: str
    weight_bytes: int
    lower_bound_bytes: int
    predicted_s: float
    num_transfers: int
    expected_epoch: int
    target: _deployment_pb2.Deployment
    ticket: _deployment_pb2.SwitchTicket
    decision_id: str
    def __init__(self, accepted: _Optional[bool] = ..., applied: _Optional[bool] = ..., vetoes: _Optional[_Iterable[str]] = ..., target_key: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., lower_bound_bytes: _Optional[int] = ..., predicted_s: _Optional[float] = ..., num_transfers: _Optional[int] = ..., expected_epoch: _Optional[int] = ..., target: _Optional[_Union[_deployment_pb2.Deployment, _Mapping]] = ..., ticket: _Optional[_Union[_deployment_pb2.SwitchTicket, _Mapping]] = ..., decision_id: _Optional[str] = ...) -> None: ...

class SetModeRequest(_message.Message):
    __slots__ = ("mode",)
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ...) -> None: ...

class SetModeResponse(_message.Message):
    __slots__ = ("mode", "previous")
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    previous: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., previous: _Optional[_Union[Mode, str]] = ...) -> None: ...
