"""Errors as google.rpc.Status, which clients of any language can take apart.

The detail is an ErrorInfo with the class name as its reason, a BadRequest where a field is at
fault, and a RetryInfo where it is known when to try again. It travels in the trailing metadata key
that gRPC keeps for it.
"""

from __future__ import annotations

import re

from google.rpc import code_pb2, error_details_pb2, status_pb2

from engine.errors import InvalidRequestError, OverloadedError, TidewrightError
from engine.wire import name_of, status_of

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "tidewright"


def details_of(error: TidewrightError) -> bytes:
    """A serialised google.rpc.Status."""
    code = code_pb2.Code.Value(status_of(error).name)
    status = status_pb2.Status(code=code, message=str(error))
    reason = re.sub(r"(?<!^)(?=[A-Z])", "_", name_of(error).removesuffix("Error")).upper()
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    if isinstance(error, InvalidRequestError) and error.param:
        bad = error_details_pb2.BadRequest()
        bad.field_violations.add(field=error.param, description=str(error))
        status.details.add().Pack(bad)
    if isinstance(error, OverloadedError) and error.retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMicroseconds(round(error.retry_s * 1e6))
        status.details.add().Pack(retry)
    return bytes(status.SerializeToString())
