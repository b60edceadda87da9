"""Nothing unauthorised passes, over a real channel: every method, by every role."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import Served

from controller.access import AccessFile, issue_token
from controller.audit import AuditLog
from controller.decision_log import read_log
from controller.gate import Gate
from controller.rate_limits import RateLimits
from controller.roles import CONTROL, METHODS, Role
from controller.security import Security
from engine.errors import PermissionDeniedError, UnauthenticatedError
from engine.profile import ProfiledCluster
from engine.wire import error_of
from protos import control_pb2 as pb

WAIT_S = 10.0
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Guarded:
    """A service with an access file of one token per role, and an audit log."""

    def __init__(self, cluster: ProfiledCluster, folder: Path) -> None:
        self.access, self.log = folder / "access", folder / "audit.jsonl"
        self.tokens = {
            role: issue_token(self.access, f"the_{role.name.lower()}", role.name.lower())
            for role in (Role.READ, Role.OPERATE, Role.ADMIN)
        }
        self.limits, self.now_s = RateLimits(1.0, 10_000), 0.0
        access = AccessFile(self.access)
        gate = Gate(access, self.limits, AuditLog(self.log), lambda: self.now_s)
        self.security = Security(gate)
        self.served = Served(cluster, security=self.security)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.served.port}")

    def call(self, method: str, raw: bytes = b"", token: str | None = None, wait: float = 2) -> Any:
        """The status of a method, its first answer in case of a stream."""
        is_stream = method.endswith(("/WatchState", "/WatchDecisions", "Health/Watch"))
        kind = "unary_stream" if is_stream else "unary_unary"
        if method.endswith("ServerReflectionInfo"):
            kind = "stream_stream"
        sent: Any = iter([raw]) if kind == "stream_stream" else raw
        metadata = () if token is None else (("authorization", token),)
        try:
            answer = getattr(self.channel, kind)(f"/{method}")(
                sent, timeout=wait, metadata=metadata
            )
            if kind != "unary_unary":
                next(answer, None)
                answer.cancel()
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    def close(self) -> None:
        self.channel.close()
        self.served.close()
        self.security.close()


@pytest.fixture(scope="module")
def guarded(
    synthetic_cluster: ProfiledCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    found = Guarded(synthetic_cluster, tmp_path_factory.mktemp("guarded"))
    found.served.step()
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_is_for_those_with_its_role(guarded: Guarded, method: str) -> None:
    needed = METHODS[method].role
    raw = b""
    if method.endswith("WatchDecisions"):
        raw = pb.WatchDecisionsRequest(from_seq=1).SerializeToString()
    for token in (None, "Bearer wrong", "Basic YTpi", "", "Bearer ", "bearer"):
        code = guarded.call(method, raw, token)
        assert (code is grpc.StatusCode.UNAUTHENTICATED) == (needed is not Role.ANYONE), token
    for role, token in guarded.tokens.items():
        code = guarded.call(method, raw, f"Bearer {token}")
        assert (code is grpc.StatusCode.PERMISSION_DENIED) == (role < needed), role
        assert code is not grpc.StatusCode.UNAUTHENTICATED


def test_refused_calls_do_nothing(guarded: Guarded) -> None:
    before = guarded.served.loop.revision
    request = pb.HoldRequest(duration_s=60.0, reason="x").SerializeToString()
    for token in (None, "Bearer wrong", f"Bearer {guarded.tokens[Role.READ]}"):
        assert guarded.call(f"{CONTROL}/Hold", request, token) in REFUSED
    assert guarded.served.loop.revision == before


def test_other_fronts_may_ask_for_a_role_by_name(guarded: Guarded) -> None:
    gate, token = guarded.security.gate, guarded.tokens[Role.OPERATE]
    allowed = {role: gate.allows(role, token) for role in ("read", "operate", "admin", "boss")}
    assert allowed == {"read": True, "operate": True, "admin": False, "boss": False}
    assert not gate.allows("read", "")
    assert not gate.allows("read", "wrong")
    assert Gate().allows("admin", "")  # without an access file, whoever reaches the port


def test_two_tokens_are_none(guarded: Guarded) -> None:
    good = ("authorization", f"Bearer {guarded.tokens[Role.ADMIN]}")
    with pytest.raises(grpc.RpcError) as error:
        guarded.served.stub.GetState(
            pb.GetStateRequest(), timeout=WAIT_S, metadata=(good, ("authorization", "Bearer x"))
        )
    assert isinstance(error_of(error.value), UnauthenticatedError)


def test_errors_say_what_is_needed(guarded: Guarded) -> None:
    metadata = (("authorization", f"Bearer {guarded.tokens[Role.READ]}"),)
    with pytest.raises(grpc.RpcError) as error:
        guarded.served.stub.Resume(pb.ResumeRequest(), timeout=WAIT_S, metadata=metadata)
    found = error_of(error.value)
    assert isinstance(found, PermissionDeniedError)
    assert str(found) == "Resume needs the role operate; the_read has read."


def test_a_stream_ends_when_its_token_is_taken_back(guarded: Guarded) -> None:
    token = issue_token(guarded.access, "leaver", "read")
    metadata = (("authorization", f"Bearer {token}"),)
    stream = guarded.served.stub.WatchState(
        pb.WatchStateRequest(), timeout=WAIT_S, metadata=metadata
    )
    next(stream)
    lines = guarded.access.read_text().splitlines(keepends=True)
    guarded.access.write_text("".join(line for line in lines if "leaver" not in line))
    guarded.served.loop.tell()
    with pytest.raises(grpc.RpcError) as error:
        next(stream)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_health_is_watched_without_a_token(guarded: Guarded) -> None:
    stream = health_pb2_grpc.HealthStub(guarded.channel).Watch(
        health_pb2.HealthCheckRequest(service=CONTROL), timeout=WAIT_S
    )
    assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
    stream.cancel()


# ---------------------------------------------------------------- limits


def test_a_caller_that_is_too_fast_is_told_when_to_try_again(
    synthetic_cluster: ProfiledCluster,
) -> None:
    now_s = 0.0
    security = Security(Gate(limits=RateLimits(0.5, 2), clock=lambda: now_s))
    served = Served(synthetic_cluster, security=security)
    try:
        served.state()
        served.state()
        with pytest.raises(grpc.RpcError) as error:
            served.state()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(error.value.trailing_metadata())
        status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
        retry = error_details_pb2.RetryInfo()
        assert [detail.Unpack(retry) for detail in status.details] == [False, True]
        assert retry.retry_delay.ToMilliseconds() == 2000
        now_s = 2.0
        served.state()
        assert security.gate.counted() == {
            ("GetState", "OK"): 3,
            ("GetState", "RESOURCE_EXHAUSTED"): 1,
        }
    finally:
        served.close()


def test_a_caller_has_only_so_many_streams(synthetic_cluster: ProfiledCluster) -> None:
    served = Served(synthetic_cluster, security=Security(Gate(max_streams=2)))
    gate = served.security.gate
    try:
        streams = [served.stub.WatchState(pb.WatchStateRequest(), timeout=WAIT_S) for _ in range(2)]
        for stream in streams:
            next(stream)
        assert gate.num_streams == 2
        with pytest.raises(grpc.RpcError) as error:
            next(served.stub.WatchState(pb.WatchStateRequest(), timeout=WAIT_S))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        served.state()  # calls go on
        streams[0].cancel()
        deadline_s = time.monotonic() + WAIT_S
        while gate.num_streams == 2:  # until the server has noticed
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        next(served.stub.WatchState(pb.WatchStateRequest(), timeout=WAIT_S))
    finally:
        served.close()


def test_guessing_tokens_is_slowed_down_and_hinders_nobody_else(guarded: Guarded) -> None:
    guarded.security.gate._limits = RateLimits(1.0, 3)
    try:
        codes = [guarded.call(f"{CONTROL}/GetState", b"", f"Bearer {i}") for i in range(5)]
        assert (
            codes
            == [grpc.StatusCode.UNAUTHENTICATED] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        )
        good = f"Bearer {guarded.tokens[Role.READ]}"
        assert guarded.call(f"{CONTROL}/GetState", b"", good) is grpc.StatusCode.OK
    finally:
        guarded.security.gate._limits = guarded.limits


def test_a_request_that_is_too_large_or_no_message_is_refused(guarded: Guarded) -> None:
    token = f"Bearer {guarded.tokens[Role.ADMIN]}"
    large = pb.HoldRequest(duration_s=1.0, reason="x" * 70_000).SerializeToString()
    for raw in (large, b"\xff\xff\xff"):
        code = guarded.call(f"{CONTROL}/Hold", raw, token)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert guarded.call(f"{CONTROL}/Hold", b"\xff\xff\xff") is grpc.StatusCode.UNAUTHENTICATED


# ---------------------------------------------------------------- the audit log


def test_every_mutating_call_is_in_the_audit_log_and_no_token_is(guarded: Guarded) -> None:
    start = len(read_log(guarded.log).records)
    hold = pb.HoldRequest(duration_s=60.0, reason="night", idempotency_key="k1")
    operate, read = (f"Bearer {guarded.tokens[r]}" for r in (Role.OPERATE, Role.READ))
    guarded.call(f"{CONTROL}/Hold", hold.SerializeToString(), operate)
    guarded.call(f"{CONTROL}/Hold", pb.HoldRequest(duration_s=-1.0).SerializeToString(), operate)
    guarded.call(f"{CONTROL}/SetMode", b"", read)
    guarded.call(f"{CONTROL}/Resume")
    guarded.call(f"{CONTROL}/GetState", b"", read)
    guarded.call(f"{CONTROL}/Resume", b"", operate)
    contents = read_log(guarded.log)
    assert contents.skipped == ()
    calls = contents.records[start:]
    told = [(r["caller"], r["role"], r["method"].rpartition("/")[2], r["status"]) for r in calls]
    assert told == [
        ("the_operate", "operate", "Hold", "OK"),
        ("the_operate", "operate", "Hold", "INVALID_ARGUMENT"),
        ("the_read", "read", "SetMode", "PERMISSION_DENIED"),
        ("", "", "Resume", "UNAUTHENTICATED"),
        ("the_operate", "operate", "Resume", "OK"),
    ]
    expected = {"duration_s": 60.0, "reason": "night", "idempotency_key": "k1"}
    assert calls[0]["request"] == expected
    assert calls[0]["peer"] == "127.0.0.1"
    assert "a hold of -1 s" in calls[1]["why"]
    text = guarded.log.read_text()
    assert not [token for token in guarded.tokens.values() if token in text]


def test_the_audit_log_is_put_aside_at_its_size(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, max_bytes=2000, max_files=3)
    for number in range(40):
        log.append({"caller": "alice", "method": f"m{number}"})
    log.close()
    assert {p.name for p in tmp_path.iterdir()} == {f"audit.jsonl{s}" for s in ("", ".1", ".2")}
    assert all(p.stat().st_size <= 2000 for p in tmp_path.iterdir())
    kept = [r["method"] for r in read_log(path).records if r["record"] == "call"]
    assert kept == [f"m{number}" for number in range(40 - len(kept), 40)]
    again = AuditLog(path)  # a new life goes on where the last one ended
    again.append({"caller": "bob", "method": "last"})
    again.close()
    assert [r["method"] for r in read_log(path).records if r["record"] == "call"] == [
        *kept,
        "last",
    ]
