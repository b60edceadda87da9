"""Methods of ControlService with plain data in place of messages: the same code as over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.protobuf.message_factory import GetMessageClass

from controller.json_messages import Told, asked, told
from controller.service import ControlService
from engine.errors import UnavailableError
from protos import control_pb2

_METHODS = control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods_by_name


async def call(
    service: ControlService, method: str, fields: Mapping[str, object], deadline_s: float
) -> Told:
    """The answer of a method that is no stream, with every field.

    Raises InvalidRequestError for fields that it does not have, UnavailableError when the deadline
    passes (what was asked may still be done: ask again with the same idempotency key), and what
    the method raises.
    """
    request = asked(fields, GetMessageClass(_METHODS[method].input_type)())
    try:
        return told(await asyncio.wait_for(getattr(service, method)(request, None), deadline_s))
    except TimeoutError as error:
        raise UnavailableError(
            f"{method} was not done within {deadline_s:g} s, since the controller waits for the "
            "engine; it may still be done. Look at the state before you ask again."
        ) from error
