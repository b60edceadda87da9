"""What holds for the HTTP front as over gRPC: what is audited, and keys that count once."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import httpx
from watched import Watched

from controller.audit import AuditLog
from controller.gate import Gate
from controller.service import start_grpc
from engine.profile import ProfiledCluster
from protos import control_pb2, control_pb2_grpc

JSON = {"content-type": "application/json"}


def test_what_a_foreign_page_asked_for_is_audited_as_that(
    synthetic_cluster: ProfiledCluster, tmp_path: Path
) -> None:
    audit = tmp_path / "audit.jsonl"
    gate = Gate(audit=AuditLog(audit))
    found = Watched(synthetic_cluster, gate=gate)
    cases = (
        ({"origin": "http://attacker.example"}, 403, "ForeignPageError", "attacker.example"),
        ({"sec-fetch-site": "cross-site"}, 403, "ForeignPageError", "another web page asked"),
        ({"x-tidewright-token": "old"}, 403, "ForeignPageError", "page_token of /api/session"),
        ({"content-type": "text/plain"}, 415, "UnsupportedContentError", "application/json"),
        ({"content-length": "70000"}, 413, "TooLargeError", "more than 65536 bytes"),
    )
    try:
        with httpx.Client(base_url=found.base, timeout=20, trust_env=False) as client:
            page = {"x-tidewright-token": client.get("/api/session").json()["page_token"]}
            for wrong, status, code, part in cases:
                body = b" " * 70_000 if status == 413 else b"{}"
                told = client.post("/api/resume", content=body, headers=JSON | page | wrong)
                assert (told.status_code, told.json()["error"]["code"]) == (status, code)
                assert part in told.json()["error"]["message"]
    finally:
        found.close()
        gate.audit.close()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    calls = [line for line in lines if line["record"] == "call"]
    assert [c["status"] for c in calls] == [*["PERMISSION_DENIED"] * 3, *["INVALID_ARGUMENT"] * 2]
    assert all(case[3] in c["why"] for case, c in zip(cases, calls, strict=True))
    assert gate.counted()["Resume", "PERMISSION_DENIED"] == 3


def test_a_key_counts_for_both_fronts(synthetic_cluster: ProfiledCluster, tmp_path: Path) -> None:
    found = Watched(synthetic_cluster)
    server, port = found._run(
        start_grpc(found.loop, found.operations, found.sessions, "127.0.0.1", 0)
    )
    try:
        fields = {"duration_s": 60.0, "reason": "first", "idempotency_key": "hold-1"}
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            stub.Hold(control_pb2.HoldRequest(**fields), timeout=10)
            found.operations.resume()
            with httpx.Client(base_url=found.base, timeout=20, trust_env=False) as client:
                page = {"x-tidewright-token": client.get("/api/session").json()["page_token"]}
                told = client.post("/api/hold", json=fields, headers=JSON | page)
                assert told.json()["hold"]["reason"] == "first"
                assert not found.loop.oversight.holds(found.loop.clock())  # not done again
                other = client.post("/api/mode", headers=JSON | page, json={
                    "mode": "MODE_OFF", "idempotency_key": "hold-1"})  # fmt: skip
                assert "was used for another request" in other.json()["error"]["message"]
    finally:
        found._run(server.stop(0))
        found.close()
