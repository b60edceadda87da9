"""Nothing that a client may send crashes the control service or gets past its gate.

The default run is short; `make fuzz` draws many more (marked slow).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fuzzed import messages, near
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served

from controller.access import AccessFile, issue_token
from controller.gate import Gate
from controller.roles import CONTROL, METHODS, Role
from controller.security import Security
from engine.profile import ProfiledCluster
from engine.wire import STATUS_OF, to_proto
from protos import control_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ControlService"]
DOCUMENTED = {grpc.StatusCode.OK, *STATUS_OF.values()}
STREAM_ENDS = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
MANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
WAIT_S, STREAM_S = 20.0, 0.05


class Target:
    """A guarded service, callers by role, and what was seen of it."""

    def __init__(self, cluster: ProfiledCluster, folder: Path) -> None:
        path = folder / "access"
        self.tokens: dict[Role, str | None] = {Role.ANYONE: None} | {
            role: issue_token(path, role.name.lower(), role.name.lower())
            for role in (Role.READ, Role.OPERATE, Role.ADMIN)
        }
        self.served = Served(cluster, security=Security(Gate(AccessFile(path))))
        self.served.step()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.served.port}")

    def send(
        self, name: str, raw: bytes, role: Role = Role.ADMIN, is_wrong: bool = False
    ) -> grpc.StatusCode:
        """The status, which must be one that docs/control-api.md names. A stream that need not end
        at once gets a short deadline."""
        is_stream = SERVICE.methods_by_name[name].server_streaming
        code, why = self._send(name, raw, role, STREAM_S if is_stream and not is_wrong else WAIT_S)
        assert code in DOCUMENTED | (STREAM_ENDS if is_stream else set()), f"{name}: {code} {why}"
        return code

    def _send(
        self, name: str, raw: bytes, role: Role, timeout_s: float
    ) -> tuple[grpc.StatusCode, str]:
        token, path = self.tokens[role], f"/{CONTROL}/{name}"
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        try:
            if SERVICE.methods_by_name[name].server_streaming:
                stream = self.channel.unary_stream(path)(raw, timeout=timeout_s, metadata=metadata)
                next(stream, None)
                stream.cancel()
            else:
                self.channel.unary_unary(path)(raw, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    def still_serves(self) -> None:
        """Also ticks go on, after whatever was done to the loop."""
        self.served.step()
        assert self.served.loop.records[-1].status in ("decided", "observed")
        assert self.send("GetState", b"", Role.READ) is grpc.StatusCode.OK

    def close(self) -> None:
        self.channel.close()
        self.served.close()


@pytest.fixture(scope="module")
def target(
    synthetic_cluster: ProfiledCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    found = Target(synthetic_cluster, tmp_path_factory.mktemp("fuzz"))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def right(target: Target) -> dict[str, Any]:
    """A message of each method that it answers with OK, or would but for the state it is in."""
    batch, snapshot = target.served.cluster.events(0), target.served.cluster.snapshot()
    asked = pb.DecideRequest(session="right")
    to_proto(snapshot, asked.snapshot)
    for event in batch.events[:6]:
        to_proto(event, asked.events.add())
    return {
        "GetState": pb.GetStateRequest(),
        "WatchState": pb.WatchStateRequest(),
        "WatchDecisions": pb.WatchDecisionsRequest(from_seq=1),
        "Explain": pb.ExplainRequest(),
        "ProposeSwitch": pb.ProposeSwitchRequest(target_key="2xtp2pp1", dry_run=True),
        "ApplySwitch": pb.ApplySwitchRequest(
            target_key="2xtp2pp1", expected_epoch=0, idempotency_key="a"
        ),
        "CancelSwitch": pb.CancelSwitchRequest(idempotency_key="c"),
        "Hold": pb.HoldRequest(duration_s=1.0, reason="fuzz"),
        "Resume": pb.ResumeRequest(),
        "SetMode": pb.SetModeRequest(mode=pb.MODE_ACTIVE),
        "GetForecast": pb.GetForecastRequest(),
        "GetPlan": pb.GetPlanRequest(demand=[pb.TypeDemand(type="short", rate_per_s=1.0)]),
        "ListPolicies": pb.ListPoliciesRequest(),
        "LoadPolicy": pb.LoadPolicyRequest(name="keep"),
        "Rollback": pb.RollbackRequest(),
        "SetCanary": pb.SetCanaryRequest(name="myopic", fraction=0.5),
        "Decide": asked,
        "ReportMetrics": pb.ReportMetricsRequest(session="right", events=asked.events),
    }


def fuzz_one(target: Target, right: dict[str, Any], name: str, examples: int, how: Any) -> None:
    descriptor = SERVICE.methods_by_name[name].input_type
    anything = st.one_of(messages(descriptor), near(right[name]))
    needed = METHODS[f"{CONTROL}/{name}"].role

    @settings(max_examples=examples, **how)
    @given(anything, st.sampled_from(list(target.tokens)))
    def run(message: Any, role: Role) -> None:
        code = target.send(name, message.SerializeToString(), role, role < needed)
        assert (code in REFUSED) == (role < needed)

    run()
    target.still_serves()


def fuzz_bytes(target: Target, name: str, examples: int, how: Any) -> None:
    @settings(max_examples=examples, **how)
    @given(st.binary(max_size=300), st.sampled_from([Role.ANYONE, Role.ADMIN]))
    def run(raw: bytes, role: Role) -> None:
        is_message = parses(name, raw)
        code = target.send(name, raw, role, role is Role.ANYONE or not is_message)
        if role is Role.ANYONE:
            assert code in REFUSED
        elif not is_message:
            assert code is grpc.StatusCode.INVALID_ARGUMENT

    run()
    target.still_serves()


def parses(name: str, raw: bytes) -> bool:
    try:
        GetMessageClass(SERVICE.methods_by_name[name].input_type).FromString(raw)
    except Exception:
        return False
    return True


def fuzz_other_services(target: Target, examples: int, how: Any) -> None:
    """Health and reflection, which are another's code behind the same gate."""
    token = target.tokens[Role.READ]
    others = sorted(set(METHODS) - {f"{CONTROL}/{name}" for name in SERVICE.methods_by_name})
    allowed = DOCUMENTED | {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED}

    @settings(max_examples=examples, **how)
    @given(st.sampled_from(others), st.binary(max_size=60))
    def run(path: str, raw: bytes) -> None:
        channel = target.channel
        kind = {"Watch": channel.unary_stream, "ServerReflectionInfo": channel.stream_stream}
        open_call = kind.get(path.rpartition("/")[2], channel.unary_unary)
        is_many = path.endswith("Info")
        metadata = (("authorization", f"Bearer {token}"),)
        code = grpc.StatusCode.OK
        try:
            found = open_call(f"/{path}")(
                iter([raw]) if is_many else raw, timeout=0.2, metadata=metadata
            )
            if not isinstance(found, bytes):
                next(found, None)
                found.cancel()
        except grpc.RpcError as error:
            code = error.code()
        assert code in allowed, f"{path} {raw!r}"

    run()
    target.still_serves()


def fuzz_tokens(target: Target, examples: int, how: Any) -> None:
    """Whatever is said in place of a token, even one with a letter off."""
    good = str(target.tokens[Role.ADMIN])
    printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
    near_good = st.integers(0, len(good) - 1).map(
        lambda i: good[:i] + ("A" if good[i] != "A" else "B") + good[i + 1 :]
    )

    @settings(max_examples=examples, **how)
    @given(st.sampled_from(["", "Bearer ", "bearer ", "Basic "]), st.one_of(printable, near_good))
    def run(scheme: str, said: str) -> None:
        with pytest.raises(grpc.RpcError) as error:
            target.channel.unary_unary(f"/{CONTROL}/GetState")(
                b"", timeout=WAIT_S, metadata=(("authorization", scheme + said),)
            )
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run()


def fuzz_socket(target: Target, examples: int, how: Any) -> None:
    """Raw bytes on the port, also after a good beginning of HTTP/2."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    begun = preface + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty SETTINGS

    @settings(max_examples=examples, **how)
    @given(st.sampled_from([b"", preface, begun]), st.binary(max_size=500))
    def run(begin: bytes, raw: bytes) -> None:
        with socket.create_connection(("127.0.0.1", target.served.port), timeout=10) as plain:
            plain.sendall(begin + raw)

    run()
    target.still_serves()


NAMES = sorted(SERVICE.methods_by_name)


@pytest.mark.parametrize("name", NAMES)
def test_any_message_is_answered_or_refused(
    target: Target, right: dict[str, Any], name: str
) -> None:
    fuzz_one(target, right, name, 25, QUICK)


@pytest.mark.parametrize("name", ["Decide", "Hold", "WatchDecisions"])
def test_bytes_that_are_no_message_are_refused(target: Target, name: str) -> None:
    fuzz_bytes(target, name, 25, QUICK)


def test_bytes_on_the_port_and_at_other_services_do_no_harm(target: Target) -> None:
    fuzz_socket(target, 40, QUICK)
    fuzz_other_services(target, 25, QUICK)


def test_nothing_passes_for_a_token(target: Target) -> None:
    fuzz_tokens(target, 50, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_many_messages_and_bytes(target: Target, right: dict[str, Any], name: str) -> None:
    fuzz_one(target, right, name, 3000 if name in ("Decide", "ReportMetrics") else 1000, MANY)
    fuzz_bytes(target, name, 1000, MANY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_bytes_on_the_port_and_at_other_services(target: Target) -> None:
    fuzz_socket(target, 5000, MANY)
    fuzz_other_services(target, 1000, MANY)
    fuzz_tokens(target, 2000, MANY)
