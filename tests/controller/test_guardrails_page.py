"""docs/guardrails.md says what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from controller.breaker import BreakerConfig
from controller.decision import DecisionConfig
from controller.guardrails import RULES
from controller.oversight import OversightConfig
from controller.switch_watch import WatchConfig

PAGE = (Path(__file__).parents[2] / "docs" / "guardrails.md").read_text()


def yes(value: bool) -> str:
    return "yes" if value else "no"


def test_the_table_of_rules_is_that_of_the_code() -> None:
    section = PAGE.split("## Limits")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (\w+) \| (\w+) \|$", section, re.MULTILINE)
    assert rows == [(r.name, r.meaning, yes(r.memory), yes(r.undo_waives)) for r in RULES]


def test_every_limit_of_a_mask_is_a_decision_setting_with_that_default() -> None:
    section = PAGE.split("## Limits")[1].split("## Unknown")[0]
    rows = re.findall(r"^\| (`.+?`) \| ([\d., ]+)", section, re.MULTILINE)
    default = {f.name: f.default for f in fields(DecisionConfig)}
    found = {}
    for names, values in rows:
        numbers = [float(v) for v in values.split(",")]
        found |= dict(zip(re.findall(r"`(\w+)`", names), numbers, strict=True))
    assert len(found) == 10
    assert found == {name: default[name] for name in found}


def test_every_default_named_in_the_text_is_that_of_the_code() -> None:
    text = PAGE.split("## Unknown")[1] + PAGE.split("`controller.oversight.OversightConfig`")[1]
    configs = (OversightConfig(), WatchConfig(), BreakerConfig())
    default = {f.name: getattr(c, f.name) for c in configs for f in fields(c)}
    named = re.findall(r"`(\w+)` \((\d+(?:\.\d+)?)", text)
    assert len(named) >= 8
    assert [(n, float(v)) for n, v in named] == [(n, float(default[n])) for n, _ in named]
