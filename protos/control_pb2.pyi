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
    __slots__ = ("mode", "policy", "uptime_s", "grid_s", "engine_available", "epoch", "deployment", "deployment_key", "last_tick", "switches", "counters", "next_seq", "holds", "actor", "breaker", "breaker_reason", "policy_digest", "canary", "shadows", "num_log_records_lost", "retraining")
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
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    BREAKER_REASON_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOG_RECORDS_LOST_FIELD_NUMBER: _ClassVar[int]
    RETRAINING_FIELD_NUMBER: _ClassVar[int]
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
    holds: _containers.RepeatedCompositeFieldContainer[HoldView]
    actor: str
    breaker: str
    breaker_reason: str
    policy_digest: str
    canary: CanaryView
    shadows: _containers.RepeatedScalarFieldContainer[str]
    num_log_records_lost: int
    retraining: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., policy: _Optional[str] = ..., uptime_s: _Optional[float] = ..., grid_s: _Optional[float] = ..., engine_available: _Optional[bool] = ..., epoch: _Optional[int] = ..., deployment: _Optional[_Union[_deployment_pb2.Deployment, _Mapping]] = ..., deployment_key: _Optional[str] = ..., last_tick: _Optional[_Union[TickRecord, _Mapping]] = ..., switches: _Optional[_Iterable[_Union[_deployment_pb2.SwitchTicket, _Mapping]]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., next_seq: _Optional[int] = ..., holds: _Optional[_Iterable[_Union[HoldView, _Mapping]]] = ..., actor: _Optional[str] = ..., breaker: _Optional[str] = ..., breaker_reason: _Optional[str] = ..., policy_digest: _Optional[str] = ..., canary: _Optional[_Union[CanaryView, _Mapping]] = ..., shadows: _Optional[_Iterable[str]] = ..., num_log_records_lost: _Optional[int] = ..., retraining: _Optional[_Iterable[str]] = ...) -> None: ...

class HoldView(_message.Message):
    __slots__ = ("rule", "reason", "remaining_s")
    RULE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    rule: str
    reason: str
    remaining_s: float
    def __init__(self, rule: _Optional[str] = ..., reason: _Optional[str] = ..., remaining_s: _Optional[float] = ...) -> None: ...

class WatchStateRequest(_message.Message):
    __slots__ = ("resume_token",)
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    resume_token: str
    def __init__(self, resume_token: _Optional[str] = ...) -> None: ...

class WatchStateResponse(_message.Message):
    __slots__ = ("state", "resume_token")
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    state: GetStateResponse
    resume_token: str
    def __init__(self, state: _Optional[_Union[GetStateResponse, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class WatchDecisionsRequest(_message.Message):
    __slots__ = ("from_seq", "resume_token")
    FROM_SEQ_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    from_seq: int
    resume_token: str
    def __init__(self, from_seq: _Optional[int] = ..., resume_token: _Optional[str] = ...) -> None: ...

class WatchDecisionsResponse(_message.Message):
    __slots__ = ("record", "num_lost", "resume_token")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    record: TickRecord
    num_lost: int
    resume_token: str
    def __init__(self, record: _Optional[_Union[TickRecord, _Mapping]] = ..., num_lost: _Optional[int] = ..., resume_token: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("seq", "decision_id", "candidate_key")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_KEY_FIELD_NUMBER: _ClassVar[int]
    seq: int
    decision_id: str
    candidate_key: str
    def __init__(self, seq: _Optional[int] = ..., decision_id: _Optional[str] = ..., candidate_key: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("record", "summary", "candidates", "state_features")
    class StateFeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    STATE_FEATURES_FIELD_NUMBER: _ClassVar[int]
    record: TickRecord
    summary: str
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateExplanation]
    state_features: _containers.ScalarMap[str, float]
    def __init__(self, record: _Optional[_Union[TickRecord, _Mapping]] = ..., summary: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[CandidateExplanation, _Mapping]]] = ..., state_features: _Optional[_Mapping[str, float]] = ...) -> None: ...

class CandidateExplanation(_message.Message):
    __slots__ = ("candidate", "is_chosen", "is_executed", "why", "features")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    IS_CHOSEN_FIELD_NUMBER: _ClassVar[int]
    IS_EXECUTED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    candidate: CandidateView
    is_chosen: bool
    is_executed: bool
    why: str
    features: _containers.ScalarMap[str, float]
    def __init__(self, candidate: _Optional[_Union[CandidateView, _Mapping]] = ..., is_chosen: _Optional[bool] = ..., is_executed: _Optional[bool] = ..., why: _Optional[str] = ..., features: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ProposeSwitchRequest(_message.Message):
    __slots__ = ("target_key", "dry_run", "idempotency_key")
    TARGET_KEY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    target_key: str
    dry_run: bool
    idempotency_key: str
    def __init__(self, target_key: _Optional[str] = ..., dry_run: _Optional[bool] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("mode", "idempotency_key")
    MODE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    idempotency_key: str
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class SetModeResponse(_message.Message):
    __slots__ = ("mode", "previous")
    MODE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    previous: Mode
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., previous: _Optional[_Union[Mode, str]] = ...) -> None: ...

class ApplySwitchRequest(_message.Message):
    __slots__ = ("target_key", "expected_epoch", "idempotency_key")
    TARGET_KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    target_key: str
    expected_epoch: int
    idempotency_key: str
    def __init__(self, target_key: _Optional[str] = ..., expected_epoch: _Optional[int] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class ApplySwitchResponse(_message.Message):
    __slots__ = ("applied", "vetoes", "target_key", "decision_id", "ticket")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    VETOES_FIELD_NUMBER: _ClassVar[int]
    TARGET_KEY_FIELD_NUMBER: _ClassVar[int]
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    vetoes: _containers.RepeatedScalarFieldContainer[str]
    target_key: str
    decision_id: str
    ticket: _deployment_pb2.SwitchTicket
    def __init__(self, applied: _Optional[bool] = ..., vetoes: _Optional[_Iterable[str]] = ..., target_key: _Optional[str] = ..., decision_id: _Optional[str] = ..., ticket: _Optional[_Union[_deployment_pb2.SwitchTicket, _Mapping]] = ...) -> None: ...

class CancelSwitchRequest(_message.Message):
    __slots__ = ("ticket_id", "idempotency_key")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    idempotency_key: str
    def __init__(self, ticket_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class CancelSwitchResponse(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: _deployment_pb2.SwitchTicket
    def __init__(self, ticket: _Optional[_Union[_deployment_pb2.SwitchTicket, _Mapping]] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("duration_s", "reason", "idempotency_key")
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    duration_s: float
    reason: str
    idempotency_key: str
    def __init__(self, duration_s: _Optional[float] = ..., reason: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ("hold",)
    HOLD_FIELD_NUMBER: _ClassVar[int]
    hold: HoldView
    def __init__(self, hold: _Optional[_Union[HoldView, _Mapping]] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("idempotency_key",)
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    idempotency_key: str
    def __init__(self, idempotency_key: _Optional[str] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("ended",)
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ended: _containers.RepeatedCompositeFieldContainer[HoldView]
    def __init__(self, ended: _Optional[_Iterable[_Union[HoldView, _Mapping]]] = ...) -> None: ...

class GetForecastRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetForecastResponse(_message.Message):
    __slots__ = ("at_s", "grid_s", "predictor", "horizons")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    GRID_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_FIELD_NUMBER: _ClassVar[int]
    HORIZONS_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    grid_s: float
    predictor: str
    horizons: _containers.RepeatedCompositeFieldContainer[HorizonForecast]
    def __init__(self, at_s: _Optional[float] = ..., grid_s: _Optional[float] = ..., predictor: _Optional[str] = ..., horizons: _Optional[_Iterable[_Union[HorizonForecast, _Mapping]]] = ...) -> None: ...

class HorizonForecast(_message.Message):
    __slots__ = ("ahead", "is_drifting", "types")
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    IS_DRIFTING_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    ahead: int
    is_drifting: bool
    types: _containers.RepeatedCompositeFieldContainer[TypeForecast]
    def __init__(self, ahead: _Optional[int] = ..., is_drifting: _Optional[bool] = ..., types: _Optional[_Iterable[_Union[TypeForecast, _Mapping]]] = ...) -> None: ...

class TypeForecast(_message.Message):
    __slots__ = ("type", "mean_per_s", "p50_per_s", "p90_per_s", "relative_error")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MEAN_PER_S_FIELD_NUMBER: _ClassVar[int]
    P50_PER_S_FIELD_NUMBER: _ClassVar[int]
    P90_PER_S_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    type: str
    mean_per_s: float
    p50_per_s: float
    p90_per_s: float
    relative_error: float
    def __init__(self, type: _Optional[str] = ..., mean_per_s: _Optional[float] = ..., p50_per_s: _Optional[float] = ..., p90_per_s: _Optional[float] = ..., relative_error: _Optional[float] = ...) -> None: ...

class GetPlanRequest(_message.Message):
    __slots__ = ("demand",)
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    demand: _containers.RepeatedCompositeFieldContainer[TypeDemand]
    def __init__(self, demand: _Optional[_Iterable[_Union[TypeDemand, _Mapping]]] = ...) -> None: ...

class TypeDemand(_message.Message):
    __slots__ = ("type", "rate_per_s")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    RATE_PER_S_FIELD_NUMBER: _ClassVar[int]
    type: str
    rate_per_s: float
    def __init__(self, type: _Optional[str] = ..., rate_per_s: _Optional[float] = ...) -> None: ...

class GetPlanResponse(_message.Message):
    __slots__ = ("deployment_key", "deployments")
    DEPLOYMENT_KEY_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENTS_FIELD_NUMBER: _ClassVar[int]
    deployment_key: str
    deployments: _containers.RepeatedCompositeFieldContainer[DeploymentEstimate]
    def __init__(self, deployment_key: _Optional[str] = ..., deployments: _Optional[_Iterable[_Union[DeploymentEstimate, _Mapping]]] = ...) -> None: ...

class DeploymentEstimate(_message.Message):
    __slots__ = ("key", "origin", "headroom", "latency_s", "weight_bytes", "switch_s", "num_devices", "kv_capacity_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    HEADROOM_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SWITCH_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: str
    origin: str
    headroom: float
    latency_s: float
    weight_bytes: int
    switch_s: float
    num_devices: int
    kv_capacity_tokens: int
    def __init__(self, key: _Optional[str] = ..., origin: _Optional[str] = ..., headroom: _Optional[float] = ..., latency_s: _Optional[float] = ..., weight_bytes: _Optional[int] = ..., switch_s: _Optional[float] = ..., num_devices: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ...) -> None: ...

class PolicyView(_message.Message):
    __slots__ = ("name", "kind", "digest", "is_active", "is_compatible", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IS_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    IS_COMPATIBLE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    digest: str
    is_active: bool
    is_compatible: bool
    problem: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., digest: _Optional[str] = ..., is_active: _Optional[bool] = ..., is_compatible: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyView]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicyView, _Mapping]]] = ...) -> None: ...

class LoadPolicyRequest(_message.Message):
    __slots__ = ("name", "idempotency_key")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    name: str
    idempotency_key: str
    def __init__(self, name: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class LoadPolicyResponse(_message.Message):
    __slots__ = ("policy", "previous")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyView
    previous: PolicyView
    def __init__(self, policy: _Optional[_Union[PolicyView, _Mapping]] = ..., previous: _Optional[_Union[PolicyView, _Mapping]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("idempotency_key",)
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    idempotency_key: str
    def __init__(self, idempotency_key: _Optional[str] = ...) -> None: ...

class RollbackResponse(_message.Message):
    __slots__ = ("policy", "previous")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    policy: PolicyView
    previous: PolicyView
    def __init__(self, policy: _Optional[_Union[PolicyView, _Mapping]] = ..., previous: _Optional[_Union[PolicyView, _Mapping]] = ...) -> None: ...

class SetCanaryRequest(_message.Message):
    __slots__ = ("name", "fraction", "idempotency_key")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    name: str
    fraction: float
    idempotency_key: str
    def __init__(self, name: _Optional[str] = ..., fraction: _Optional[float] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class SetCanaryResponse(_message.Message):
    __slots__ = ("canary",)
    CANARY_FIELD_NUMBER: _ClassVar[int]
    canary: CanaryView
    def __init__(self, canary: _Optional[_Union[CanaryView, _Mapping]] = ...) -> None: ...

class CanaryView(_message.Message):
    __slots__ = ("name", "fraction", "arm", "num_active_blocks", "num_canary_blocks", "active_goodput", "canary_goodput", "evidence", "threshold")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    ARM_FIELD_NUMBER: _ClassVar[int]
    NUM_ACTIVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANARY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_GOODPUT_FIELD_NUMBER: _ClassVar[int]
    CANARY_GOODPUT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    name: str
    fraction: float
    arm: str
    num_active_blocks: int
    num_canary_blocks: int
    active_goodput: float
    canary_goodput: float
    evidence: float
    threshold: float
    def __init__(self, name: _Optional[str] = ..., fraction: _Optional[float] = ..., arm: _Optional[str] = ..., num_active_blocks: _Optional[int] = ..., num_canary_blocks: _Optional[int] = ..., active_goodput: _Optional[float] = ..., canary_goodput: _Optional[float] = ..., evidence: _Optional[float] = ..., threshold: _Optional[float] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("session", "snapshot", "events", "num_events_lost", "seed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVENTS_LOST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    session: str
    snapshot: _deployment_pb2.ClusterSnapshot
    events: _containers.RepeatedCompositeFieldContainer[_deployment_pb2.ClusterEvent]
    num_events_lost: int
    seed: int
    def __init__(self, session: _Optional[str] = ..., snapshot: _Optional[_Union[_deployment_pb2.ClusterSnapshot, _Mapping]] = ..., events: _Optional[_Iterable[_Union[_deployment_pb2.ClusterEvent, _Mapping]]] = ..., num_events_lost: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class DecideResponse(_message.Message):
    __slots__ = ("decision_id", "chosen_key", "executed_key", "propensity", "policy", "reason", "vetoes", "candidates", "rates", "plan", "routing")
    DECISION_ID_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_KEY_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_KEY_FIELD_NUMBER: _ClassVar[int]
    PROPENSITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VETOES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    decision_id: str
    chosen_key: str
    executed_key: str
    propensity: float
    policy: str
    reason: str
    vetoes: _containers.RepeatedScalarFieldContainer[str]
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateView]
    rates: _containers.RepeatedCompositeFieldContainer[TypeRate]
    plan: _deployment_pb2.SwitchPlan
    routing: _deployment_pb2.Routing
    def __init__(self, decision_id: _Optional[str] = ..., chosen_key: _Optional[str] = ..., executed_key: _Optional[str] = ..., propensity: _Optional[float] = ..., policy: _Optional[str] = ..., reason: _Optional[str] = ..., vetoes: _Optional[_Iterable[str]] = ..., candidates: _Optional[_Iterable[_Union[CandidateView, _Mapping]]] = ..., rates: _Optional[_Iterable[_Union[TypeRate, _Mapping]]] = ..., plan: _Optional[_Union[_deployment_pb2.SwitchPlan, _Mapping]] = ..., routing: _Optional[_Union[_deployment_pb2.Routing, _Mapping]] = ...) -> None: ...

class ReportMetricsRequest(_message.Message):
    __slots__ = ("session", "events", "num_events_lost")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVENTS_LOST_FIELD_NUMBER: _ClassVar[int]
    session: str
    events: _containers.RepeatedCompositeFieldContainer[_deployment_pb2.ClusterEvent]
    num_events_lost: int
    def __init__(self, session: _Optional[str] = ..., events: _Optional[_Iterable[_Union[_deployment_pb2.ClusterEvent, _Mapping]]] = ..., num_events_lost: _Optional[int] = ...) -> None: ...

class ReportMetricsResponse(_message.Message):
    __slots__ = ("num_events",)
    NUM_EVENTS_FIELD_NUMBER: _ClassVar[int]
    num_events: int
    def __init__(self, num_events: _Optional[int] = ...) -> None: ...
