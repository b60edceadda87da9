"""The grpcurl examples of the API page work, by reflection, and by grpcurl where it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from engine.profile import ProfiledCluster
from tests.controller.served import Served

PAGE = Path(__file__).parents[2] / "docs" / "control-api.md"
EXAMPLES = re.findall(r"^grpcurl .*$", PAGE.read_text(), re.MULTILINE)
HOST = "localhost:50052"


@pytest.fixture(scope="module")
def served(synthetic_cluster: ProfiledCluster) -> Iterator[Served]:
    made = Served(synthetic_cluster)
    try:
        for _ in range(3):
            made.step()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pool(served: Served) -> Iterator[DescriptorPool]:
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        yield DescriptorPool(ProtoReflectionDescriptorDatabase(channel))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_runs(line: str, served: Served, pool: DescriptorPool) -> None:
    words = shlex.split(line)
    address = words.index(HOST)
    data = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    assert words[words.index("-max-time") + 1].isdecimal(), "calls need a deadline"
    if words[address + 1] == "list":
        return
    if words[address + 1] == "describe":
        assert pool.FindServiceByName(words[address + 2]).methods
        return
    service, _, name = words[address + 1].rpartition("/")
    method: Any = pool.FindServiceByName(service).FindMethodByName(name)
    request = json_format.ParseDict(data, GetMessageClass(method.input_type)())
    answer = GetMessageClass(method.output_type)
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(f"/{service}/{name}", type(request).SerializeToString, answer.FromString)
        reply = call(request, timeout=10)
        if method.server_streaming:
            first = next(reply)
            reply.cancel()
            reply = first
    assert reply.ByteSize() > 0 or name == "Resume"


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="grpcurl is not installed")
@pytest.mark.parametrize("line", [e for e in EXAMPLES if "/Watch" not in e])
def test_grpcurl_runs_an_example(line: str, served: Served) -> None:
    words = shlex.split(line.replace(HOST, f"127.0.0.1:{served.port}"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
