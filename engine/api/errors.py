"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}}, and a status."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engine.errors import (
    InfeasibleError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TidewrightError,
    UnauthenticatedError,
    UnavailableError,
)

RETRY_AFTER_S = 1
_STATUS: tuple[tuple[type[TidewrightError], int], ...] = (
    (InvalidRequestError, 400),
    (InfeasibleError, 400),
    (UnauthenticatedError, 401),
    (NotFoundError, 404),
    (OverloadedError, 429),
    (UnavailableError, 503),
)


def error_json(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "api_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: TidewrightError) -> int:
    return next((code for kind, code in _STATUS if isinstance(error, kind)), 500)


def json_of(error: TidewrightError) -> dict[str, Any]:
    param = code = None
    if isinstance(error, InvalidRequestError):
        param, code = error.param, error.code
    elif isinstance(error, NotFoundError):
        param, code = "model", "model_not_found"
    elif isinstance(error, UnauthenticatedError):
        code = "invalid_api_key"
    elif isinstance(error, OverloadedError):
        code = "rate_limit_exceeded"
    return error_json(str(error), status_of(error), param, code)


async def on_tidewright_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TidewrightError)
    status = status_of(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 401:
        headers = {"www-authenticate": "Bearer"}
    return JSONResponse(json_of(error), status, headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: unknown paths, wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    code: str | None = None
    match error.status_code:
        case 404:
            message, code = f"there is no {where}; the API is under /v1.", "unknown_url"
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message, code = f"{where} is not allowed; use {allowed}.", "method_not_allowed"
        case _:
            message = error.detail
    return JSONResponse(
        error_json(message, error.status_code, code=code), error.status_code, error.headers
    )


async def on_bug(request: Request, error: Exception) -> Response:
    """A bug of ours: Starlette logs it; the client gets the shape that it can read."""
    return JSONResponse(error_json("internal error; see the engine's log.", 500), 500)
