"""The table of rights is complete, and says of each method what its messages say."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from controller.roles import CONTROL, METHODS, Role, parse_role
from protos import control_pb2

SERVED = (control_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"]


def test_every_method_that_is_served_has_a_role_and_nothing_else_has() -> None:
    served = {
        f"{service.full_name}/{method}"
        for file in SERVED
        for service in file.services_by_name.values()
        for method in service.methods_by_name
    }
    assert set(METHODS) == served
    assert SERVICE.full_name == CONTROL


def test_what_takes_an_idempotency_key_changes_something_and_is_audited() -> None:
    changing = {
        name
        for name, m in SERVICE.methods_by_name.items()
        if "idempotency_key" in m.input_type.fields_by_name
    }
    assert len(changing) == 9
    for name in SERVICE.methods_by_name:
        method = METHODS[f"{CONTROL}/{name}"]
        assert method.is_audited == (name in changing), name
        assert method.role >= (Role.OPERATE if name in changing else Role.READ), name


def test_health_alone_is_for_anyone() -> None:
    free = {path for path, method in METHODS.items() if method.role is Role.ANYONE}
    assert free == {f"grpc.health.v1.Health/{name}" for name in ("Check", "List", "Watch")}
    assert parse_role("anyone") is None
