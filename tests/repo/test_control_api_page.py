"""docs/control-api.md is what `make protos` makes of protos/control.proto."""

from __future__ import annotations

import re

from engine.wire import STATUS_OF
from protos import control_pb2
from protos.api_page import FIRST, PAGE, text


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == text(), "run `make protos`"


def test_every_method_and_message_says_what_it_is() -> None:
    sections = re.split(r"^### ", text(), flags=re.MULTILINE)[1:]
    said = {s.splitlines()[0]: s.splitlines()[2:3] for s in sections}
    for method in control_pb2.DESCRIPTOR.services_by_name["ControlService"].methods_by_name:
        assert said[method][0].endswith("."), method


def test_the_table_of_errors_is_that_of_the_wire() -> None:
    rows = re.findall(r"^\| (\w+Error) \| `(\w+)` \|$", FIRST.read_text(), re.MULTILINE)
    assert rows == [(kind.__name__, status.name) for kind, status in STATUS_OF.items()]
