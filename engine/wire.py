"""protobuf <-> the vocabulary, and the one table exception <-> gRPC status.

The messages of deployment.proto mirror the dataclasses of engine/cluster.py field by field, so
both directions follow from the dataclasses' own type hints. What comes in is validated: wrong or
missing values raise InvalidRequestError.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import grpc
from google.protobuf.message import Message

from engine import errors
from engine.errors import InvalidRequestError, TidewrightError
from protos import deployment_pb2 as pb

T = TypeVar("T")
ERROR_KEY = "tidewright-error"  # trailing metadata: the exception's class name

STATUS_OF: dict[type[TidewrightError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InfeasibleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError: grpc.StatusCode.DATA_LOSS,
    errors.StaleEpochError: grpc.StatusCode.ABORTED,
    errors.SwitchInProgressError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
}


def status_of(error: TidewrightError) -> grpc.StatusCode:
    """Of the nearest class in the table that it is an instance of."""
    kind = _known_kind(error)
    return grpc.StatusCode.INTERNAL if kind is None else STATUS_OF[kind]


def name_of(error: TidewrightError) -> str:
    """The name that goes into the trailing metadata: of that class, which clients know."""
    return (_known_kind(error) or type(error)).__name__


def _known_kind(error: TidewrightError) -> type[TidewrightError] | None:
    return next((kind for kind in type(error).__mro__ if kind in STATUS_OF), None)


def error_of(call_error: grpc.RpcError) -> TidewrightError:
    """The exception a server raised, rebuilt on the client's side."""
    code, details = call_error.code(), call_error.details() or ""
    named = dict(call_error.trailing_metadata() or ()).get(ERROR_KEY)
    by_name = {kind.__name__: kind for kind in STATUS_OF}
    if named in by_name:
        return by_name[named](details)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return errors.UnavailableError(f"the server does not answer ({code.name}): {details}")
    return TidewrightError(f"{code.name}: {details}")


# -------------------------------------------------------------------------------- out


def to_proto(value: Any, message: Message) -> Any:
    """Fill `message` from a dataclass with the same field names; returns the message."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item is None:
            continue
        _set(message, field.name, item)
    return message


def _set(message: Message, name: str, item: Any) -> None:
    if isinstance(item, StrEnum):
        prefix = _enum_prefix(type(item))
        enum: Any = message.DESCRIPTOR.fields_by_name[name].enum_type
        setattr(message, name, enum.values_by_name[prefix + item.name].number)
    elif dataclasses.is_dataclass(item):
        target = getattr(message, name)
        target.SetInParent()
        to_proto(item, target)
    elif isinstance(item, Sequence) and not isinstance(item, str):
        _extend(getattr(message, name), item)
    else:
        setattr(message, name, item)


def _extend(repeated: Any, items: Any) -> None:
    for item in items:
        if dataclasses.is_dataclass(item):
            to_proto(item, repeated.add())
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            repeated.add(phase=item[0], duration_s=item[1])
        elif isinstance(item, tuple):
            repeated.add(values=item)
        else:
            repeated.append(item)


def _enum_prefix(kind: type[StrEnum]) -> str:
    """SwitchPhase -> SWITCH_PHASE_"""
    words = "".join(f"_{c}" if c.isupper() else c for c in kind.__name__).lstrip("_")
    return f"{words.upper()}_"


# -------------------------------------------------------------------------------- in


def from_proto(kind: type[T], message: Any) -> T:
    """A dataclass of type `kind` from a message with the same field names.

    Raises InvalidRequestError when a message field is missing, an enum is unspecified, or the
    dataclass itself refuses the values.
    """
    values = {}
    for name, hint in _hints(kind).items():
        values[name] = _read(message, name, hint, f"{kind.__name__}.{name}")
    try:
        return kind(**values)
    except (TidewrightError, ValueError) as error:
        raise InvalidRequestError(f"{kind.__name__}: {error}") from error


_HINTS: dict[Any, dict[str, Any]] = {}  # by dataclass


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _read(message: Any, name: str, hint: Any, where: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if not message.HasField(name):
            return None
        hint = next(a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) in (tuple, Sequence):
        return tuple(_item(item, get_args(hint)[0], where) for item in getattr(message, name))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum(hint, message, name, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not message.HasField(name):
            raise InvalidRequestError(f"{where} is missing; it must be given.")
        return from_proto(hint, getattr(message, name))
    return hint(getattr(message, name))


def _item(item: Any, hint: Any, where: str) -> Any:
    if isinstance(item, pb.PhaseDuration):
        return (item.phase, item.duration_s)
    if isinstance(item, pb.MatrixRow):
        return tuple(item.values)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_proto(hint, item)
    return item


def _enum(kind: type[StrEnum], message: Any, name: str, where: str) -> StrEnum:
    number = getattr(message, name)
    value = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number.get(number)
    label = "" if value is None else value.name.removeprefix(_enum_prefix(kind))
    if label not in kind.__members__:
        raise InvalidRequestError(
            f"{where} is {number}; expected one of {', '.join(kind.__members__)}."
        )
    return kind[label]
