"""Messages of any descriptor, drawn by hypothesis: wrong numbers, odd text, deep and missing parts.

Whole, wild messages are refused at their first field; to get further in, `near` changes a few
fields of a message that is right.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

Field = FieldDescriptor
MAX_ITEMS = 3
BITS = {
    Field.TYPE_INT32: (-(2**31), 2**31 - 1),
    Field.TYPE_INT64: (-(2**63), 2**63 - 1),
    Field.TYPE_UINT32: (0, 2**32 - 1),
    Field.TYPE_UINT64: (0, 2**64 - 1),
}


def texts() -> st.SearchStrategy[str]:
    """Keys of deployments and what looks like them, names, and any text there is."""
    known = ["", "4xtp1pp1", "2xtp2pp1", "1xtp9pp9", "0xtp0pp0", "keep", "short", "../first"]
    long = st.just("x" * 5000)
    return st.one_of(st.sampled_from(known), st.text(max_size=20), long)


def doubles() -> st.SearchStrategy[float]:
    odd = [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 1.0]
    return st.one_of(st.sampled_from(odd), st.floats())


def scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type in BITS:
        low, high = BITS[field.type]
        edges = [n for n in (low, -1, 0, 1, 2, high) if low <= n <= high]
        return st.one_of(st.sampled_from(edges), st.integers(low, high))
    if field.type == Field.TYPE_BOOL:
        return st.booleans()
    if field.type == Field.TYPE_STRING:
        return texts()
    if field.type == Field.TYPE_BYTES:
        return st.binary(max_size=40)
    if field.type == Field.TYPE_ENUM:
        numbers = [value.number for value in field.enum_type.values]
        return st.sampled_from([*numbers, 99, -1])
    assert field.type == Field.TYPE_DOUBLE, field.full_name
    return doubles()


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 6) -> Message:
    """Any message of that kind."""
    message: Any = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.booleans()):
            fill(draw, message, field, depth)
    return message


def fill(draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int) -> None:
    """Draw one field anew."""
    message.ClearField(field.name)
    if field.message_type is None:
        kind = scalar(field)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(kind, max_size=MAX_ITEMS)))
        else:
            setattr(message, field.name, draw(kind))
    elif depth > 0:
        inner = messages(field.message_type, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(inner, max_size=MAX_ITEMS)))
        else:
            getattr(message, field.name).CopyFrom(draw(inner))


def _parts(message: Message) -> list[Message]:
    """The message and all messages in it."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            inner = list(value) if field.is_repeated else [value]
            for part in inner:
                found += _parts(part)
    return found


@st.composite
def near(draw: st.DrawFn, right: Message) -> Message:
    """The message with up to three of its fields, however deep, drawn anew or left out."""
    message: Any = type(right)()
    message.CopyFrom(right)
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(_parts(message)))
        if part.DESCRIPTOR.fields:
            field = draw(st.sampled_from(list(part.DESCRIPTOR.fields)))
            fill(draw, part, field, depth=2)
    return message
