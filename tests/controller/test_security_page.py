"""docs/security.md and docs/metrics.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from controller.access import TOKEN_BYTES, parse_rights
from controller.audit import MAX_BYTES, MAX_FILES
from controller.config import ControllerConfig
from controller.gate import MAX_STREAMS
from controller.roles import METHODS, SMALL_BYTES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "security.md").read_text()


def test_the_table_of_roles_is_that_of_the_code() -> None:
    rows = dict(re.findall(r"^\| (anyone|read|operate|admin) \| (.+) \|$", PAGE, re.MULTILINE))
    found = {
        name.rpartition(" ")[2]: role
        for role, names in rows.items()
        for name in re.findall(r"`([\w ]+)`", names)
    }
    known = {path.rpartition("/")[2]: m.role.name.lower() for path, m in METHODS.items()}
    assert found == known


def test_defaults_and_limits_are_those_of_the_code() -> None:
    default = {n.replace("_", "-"): f.default for n, f in ControllerConfig.model_fields.items()}
    named = re.findall(r"`--([a-z-]+)`\s\((\d+)\)", PAGE)
    assert len(named) == 3
    assert [(n, float(v)) for n, v in named] == [(n, float(default[n])) for n, _ in named]
    assert f"{MAX_STREAMS} streams open at once" in PAGE
    assert f"{SMALL_BYTES >> 10} KiB" in PAGE
    assert f"{MAX_BYTES // 10**6} MB as `.1` to `.{MAX_FILES - 1}`" in PAGE
    assert f"a token of {TOKEN_BYTES} random bytes" in PAGE
    assert f"`--host {default['host']}`" in PAGE


def test_the_example_of_an_access_file_is_one() -> None:
    (example,) = re.findall(r"```\n(# name.*?)```", PAGE, re.DOTALL)
    assert [r.name for r in parse_rights(example, Path("x"))] == ["alice", "grafana"]


def test_every_step_of_a_tick_has_its_row() -> None:
    page = (DOCS / "metrics.md").read_text().split("## Traces")[1]
    told = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    rooms = [DOCS.parent / "controller" / f"{n}.py" for n in ("loop", "decision", "deciding")]
    marked = {m for p in rooms for m in re.findall(r"mark\(\"(\w+)\"\)", p.read_text())}
    assert len(told) == len(set(told))
    assert set(told) == marked
