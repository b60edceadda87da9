"""The committed stubs are what the .proto files generate."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_stubs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", "-I.", *outputs, *protos]) == 0
    fresh = {p.name: p.read_text() for p in (tmp_path / "protos").iterdir()}
    kept = {p.name: p.read_text() for p in (ROOT / "protos").glob("*_pb2*") if p.is_file()}
    assert fresh == kept, "run `make protos`"


def test_pins_agree_with_what_is_installed() -> None:
    """Stubs check versions when imported; `make setup` installs exactly the pinned ones."""
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    for name in ("grpcio", "grpcio-tools", "protobuf", "numpy"):
        assert version(name) == pins[name]
    assert not [line for line in lines if "+" in line or "/" in line]
