"""Dashboard and alert rules: they load, parse, and name only what the controller serves.

Expressions are parsed by promql-parser, which has the grammar of Prometheus; where promtool is
installed, the rules and their unit tests are run by it too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from controller.metric_table import METRICS

FOLDER = Path(__file__).parents[2] / "configs" / "observability"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "grafana_dashboard.json").read_text())
INTERVALS = {"$__rate_interval": "1m", "$__range": "1h"}
DURATION = re.compile(r"(\d+(ms|[smhdwy]))+")
LABELS = {
    f"{m.name}{suffix}": {*m.labels, *(["le"] if suffix == "_bucket" else [])}
    for m in METRICS
    for suffix in (("_bucket", "_sum", "_count") if m.kind == "histogram" else ("",))
}


def panel_queries() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]


QUERIES = [*panel_queries(), *((f"alert {rule['alert']}", rule["expr"]) for rule in RULES)]


def selectors(expr: Any) -> Iterator[Any]:
    """Every selector of time series in a parsed expression."""
    if isinstance(expr, promql_parser.VectorSelector):
        yield expr
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (inner := getattr(expr, name, None)) is not None:
            yield from selectors(inner)
    for inner in getattr(expr, "args", ()):
        yield from selectors(inner)


def problems(query: str) -> list[str]:
    for name, length in INTERVALS.items():
        query = query.replace(name, length)
    found = list(selectors(promql_parser.parse(query)))
    unknown = [s.name for s in found if s.name not in LABELS]
    labels = [
        f"{s.name}{{{matcher.name}}}"
        for s in found
        for matcher in s.matchers.matchers
        if s.name in LABELS and matcher.name not in LABELS[s.name]
    ]
    grouped = {
        label.strip() for by in re.findall(r"by \((.+?)\)", query) for label in by.split(",")
    }
    missing = [
        f"by ({label})"
        for label in grouped
        if not any(label in LABELS.get(s.name, ()) for s in found)
    ]
    return [*unknown, *labels, *missing] if found else ["no time series"]


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_a_query_parses_and_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    assert problems(query) == [], where


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("tidewright_headroom", ["tidewright_headroom"]),
        ("tidewright_tick_duration_seconds", ["tidewright_tick_duration_seconds"]),
        ('tidewright_mode{state="x"}', ["tidewright_mode{state}"]),
        ("sum by (phase) (tidewright_mode)", ["by (phase)"]),
        ("1 + 1", ["no time series"]),
    ],
)
def test_the_check_itself_finds_what_is_wrong(query: str, expected: list[str]) -> None:
    assert problems(query) == expected


def test_a_query_that_is_none_is_found() -> None:
    with pytest.raises(ValueError, match=r".+"):
        problems("rate(tidewright_ticks_total[5m)")


def test_every_alert_says_what_it_is_and_how_bad() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 20
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert DURATION.fullmatch(rule.get("for", "0s")), rule["alert"]


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0
            sources = [panel["datasource"], *(t["datasource"] for t in panel["targets"])]
            assert {s["uid"] for s in sources} == {"${datasource}"}  # whatever it is called there
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("command", [["check", "rules"], ["test", "rules"]])
def test_promtool_takes_them(command: list[str]) -> None:
    file = "alerts.yaml" if command[0] == "check" else "alerts_test.yaml"
    done = subprocess.run(
        ["promtool", *command, file], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
