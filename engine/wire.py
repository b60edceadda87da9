"""protobuf <-> the vocabulary, and the one table exception <-> gRPC status.

The messages of deployment.proto mirror the dataclasses of engine/cluster.py field by field, so
both directions follow from the dataclasses' own type hints. What comes in is validated: wrong or
missing values raise InvalidRequestError.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import grpc
from google.protobuf.message import Message

from engine import errors
from engine.cluster import Deployment
from engine.errors import InvalidRequestError, TidewrightError
from protos import deployment_pb2 as pb

T = TypeVar("T")
ERROR_KEY = "tidewright-error"  # trailing metadata: the exception's class name

STATUS_OF: dict[type[TidewrightError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InfeasibleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CheckpointError: grpc.StatusCode.DATA_LOSS,
    errors.UngatedPolicyError: grpc.StatusCode.FAILED_PRECONDITION,
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

_PLAIN = frozenset((int, float, str, bool))
_NAMES: dict[type, tuple[str, ...]] = {}  # of a dataclass's fields
_NUMBERS: dict[tuple[type, str], int] = {}  # of enum members in the protocol


def to_proto(value: Any, message: Message) -> Any:
    """Fill `message` from a dataclass with the same field names; returns the message."""
    kind = type(value)
    names = _NAMES.get(kind)
    if names is None:
        names = _NAMES[kind] = tuple(field.name for field in dataclasses.fields(value))
    for name in names:
        item = getattr(value, name)
        if type(item) in _PLAIN:
            setattr(message, name, item)
        elif item is not None:
            _set(message, name, item)
    return message


def _set(message: Message, name: str, item: Any) -> None:
    if type(item) is tuple:
        _extend(getattr(message, name), item)
    elif isinstance(item, StrEnum):
        setattr(message, name, _number(message, name, item))
    elif type(item) in _NAMES or dataclasses.is_dataclass(item):
        target = getattr(message, name)
        target.SetInParent()
        to_proto(item, target)
    elif isinstance(item, Sequence) and not isinstance(item, str):
        _extend(getattr(message, name), item)
    else:
        setattr(message, name, item)


def _number(message: Message, name: str, item: StrEnum) -> int:
    member = (type(item), item.name)
    if member not in _NUMBERS:
        enum: Any = message.DESCRIPTOR.fields_by_name[name].enum_type
        _NUMBERS[member] = enum.values_by_name[_enum_prefix(type(item)) + item.name].number
    return _NUMBERS[member]


def _extend(repeated: Any, items: Any) -> None:
    """Items of one kind."""
    if not items:
        return
    first = items[0]
    if type(first) in _PLAIN:
        repeated.extend(items)
    elif type(first) in _NAMES or dataclasses.is_dataclass(first):
        for item in items:
            to_proto(item, repeated.add())
    elif not isinstance(first, tuple):
        repeated.extend(items)
    elif len(first) == 2 and isinstance(first[0], str):
        for phase, duration_s in items:
            repeated.add(phase=phase, duration_s=duration_s)
    else:
        for item in items:
            repeated.add().values.extend(item)


def _enum_prefix(kind: type[StrEnum]) -> str:
    """SwitchPhase -> SWITCH_PHASE_"""
    words = "".join(f"_{c}" if c.isupper() else c for c in kind.__name__).lstrip("_")
    return f"{words.upper()}_"


# -------------------------------------------------------------------------------- in

Reader = Callable[[Any], Any]  # a message -> the value of one field, or the values of several
_READERS: dict[Any, Reader] = {}  # by dataclass: of all its fields, in their order


def from_proto(kind: type[T], message: Any) -> T:
    """A dataclass of type `kind` from a message with the same field names.

    Raises InvalidRequestError when a message field is missing, an enum is unspecified, or the
    dataclass itself refuses the values.
    """
    read = _READERS.get(kind)
    if read is None:
        read = _READERS[kind] = _reader_of(kind, message)
    values = read(message)
    try:
        return kind(*values)
    except (TidewrightError, ValueError) as error:
        raise InvalidRequestError(f"{kind.__name__}: {error}") from error


def _reader_of(kind: Any, message: Any) -> Reader:
    parts = tuple(_readers(kind, message))
    if len(parts) == 1 and parts[0][0]:
        return parts[0][1]

    def read_all(message: Any) -> list[Any]:
        values: list[Any] = []
        for is_run, read in parts:
            if is_run:
                values += read(message)
            else:
                values.append(read(message))
        return values

    return read_all


def _readers(kind: Any, message: Any) -> Iterator[tuple[bool, Reader]]:
    """Whether each reads a run of several fields. Neighbours that a message gives just as they are
    wanted, plain and always there, are read at once."""
    hints = get_type_hints(kind)

    def is_plain(name: str) -> bool:
        return hints[name] in _PLAIN and type(getattr(message, name)) is hints[name]

    for plain, run in groupby(hints, is_plain):
        names = tuple(run)
        if plain:
            yield len(names) > 1, attrgetter(*names)
        else:
            for name in names:
                yield False, _reader(name, hints[name], f"{kind.__name__}.{name}")


def _reader(name: str, hint: Any, where: str) -> Reader:
    """How a field with that type is read; found once per dataclass."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = _reader(name, next(a for a in get_args(hint) if a is not type(None)), where)
        return lambda message: inner(message) if message.HasField(name) else None
    if get_origin(hint) in (tuple, Sequence):
        return _items_reader(name, get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_reader(hint, name, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _message_reader(hint, name, where)
    get = attrgetter(name)
    return lambda message: hint(get(message))


def _items_reader(name: str, hint: Any) -> Reader:
    get = attrgetter(name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return lambda message: tuple([from_proto(hint, item) for item in get(message)])
    if get_origin(hint) is tuple:
        return lambda message: tuple(map(_item, get(message)))
    return lambda message: tuple(get(message))


def _item(item: Any) -> Any:
    if isinstance(item, pb.PhaseDuration):
        return (item.phase, item.duration_s)
    return tuple(item.values) if isinstance(item, pb.MatrixRow) else item


def _message_reader(kind: Any, name: str, where: str) -> Reader:
    def read(message: Any) -> Any:
        if not message.HasField(name):
            raise InvalidRequestError(f"{where} is missing; it must be given.")
        part = getattr(message, name)
        return (
            _deployment(part.SerializeToString()) if kind is Deployment else from_proto(kind, part)
        )

    return read


@lru_cache(maxsize=64)
def _deployment(told: bytes) -> Deployment:
    """The same object for the same message: deployments are told again and again, and what is
    known of one is found again by whoever knows it."""
    return from_proto(Deployment, pb.Deployment.FromString(told))


def _enum_reader(kind: type[StrEnum], name: str, where: str) -> Reader:
    prefix, known = _enum_prefix(kind), dict[int, StrEnum]()

    def read(message: Any) -> StrEnum:
        number = getattr(message, name)
        if number not in known:
            by_number = message.DESCRIPTOR.fields_by_name[name].enum_type.values_by_number
            value = by_number.get(number)
            label = "" if value is None else value.name.removeprefix(prefix)
            if label not in kind.__members__:
                raise InvalidRequestError(
                    f"{where} is {number}; expected one of {', '.join(kind.__members__)}."
                )
            known[number] = kind[label]
        return known[number]

    return read
