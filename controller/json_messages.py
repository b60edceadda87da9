"""Messages of control.proto as plain data for JSON, with their field names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from engine.errors import InvalidRequestError

Told = dict[str, Any]  # a message as plain data, with the field names of its .proto file


def told(message: Any) -> Told:
    """Every field, also those at their default; 64-bit integers as numbers."""
    found: Told = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _with_integers(found, message.DESCRIPTOR)


def _with_integers(found: Told, descriptor: Any) -> Told:
    """protobuf's JSON has 64-bit integers as strings."""
    for name, value in found.items():
        field = descriptor.fields_by_name[name]
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for item in value if isinstance(value, list) else [value]:
                _with_integers(item, field.message_type)
        elif field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            found[name] = [int(v) for v in value] if isinstance(value, list) else int(value)
    return found


def asked(fields: Mapping[str, object], message: Any) -> Any:
    """Fills `message` from plain data; returns it. Raises InvalidRequestError."""
    assert isinstance(message, Message)
    try:
        return ParseDict(dict(fields), message)
    except (ParseError, TypeError, ValueError) as error:
        names = ", ".join(f.name for f in message.DESCRIPTOR.fields) or "no fields"
        why = " ".join(str(error).split())
        raise InvalidRequestError(
            f"{message.DESCRIPTOR.name} is not understood ({why}); expected {names}."
        ) from error
