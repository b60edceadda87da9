"""The named errors of Tidewright. No imports; `engine.wire` maps each to one gRPC status."""


class TidewrightError(Exception):
    """Base of every error a caller may want to catch by name."""


class InvalidRequestError(TidewrightError):
    """The caller's input is wrong; the message says what was given, expected, and to change.

    `param` names the field at fault and `code` the kind of fault, where there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class InfeasibleError(TidewrightError):
    """A deployment or request does not fit: devices, memory, heads or layers."""


class CheckpointError(TidewrightError):
    """A model or policy checkpoint is incomplete, corrupt, or of another kind than expected."""


class UngatedPolicyError(TidewrightError):
    """A policy may not decide: no gate has passed exactly its files."""


class StaleEpochError(TidewrightError):
    """A plan or message refers to a deployment generation that is no longer current."""


class SwitchInProgressError(TidewrightError):
    """A second switch was asked for while one runs."""


class OverloadedError(TidewrightError):
    """The bounded request queue is full, or a caller's rate is spent; retry later.

    `retry_s` says after how many seconds, where that is known.
    """

    def __init__(self, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class UnauthenticatedError(TidewrightError):
    """The caller gave no token, or one that nobody has."""


class PermissionDeniedError(TidewrightError):
    """The caller is known and may not do that: its role is too low."""


class UnavailableError(TidewrightError):
    """The engine, a replica or a worker is gone or does not answer in time."""


class NotFoundError(TidewrightError):
    """A ticket, request, policy or file with that name does not exist."""
