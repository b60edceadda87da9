"""docs/environment.md names every field of observation, reward and info, in their order."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import gymnasium
import pytest

import envs  # noqa: F401 (registers the environments)
from controller.observation import (
    CANDIDATE_NAMES,
    FEATURE_LIMIT,
    STATE_NAMES,
    TYPE_NAMES,
    observation_spec,
)
from envs.reward import RewardConfig
from envs.serving_env import ServingEnv

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text()


def table(heading: str) -> list[tuple[str, str, str]]:
    """(name, unit, meaning) of the rows under a heading."""
    _, _, rest = PAGE.partition(f"\n{heading}\n")
    section = re.split(r"\n##+ ", rest)[0]
    found = re.findall(r"^\| `([^`]+)` \|([^|]*)\|([^|]*)\|$", section, re.MULTILINE)
    return [(name, unit.strip(), meaning.strip()) for name, unit, meaning in found]


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("### State", STATE_NAMES),
        ("### Per workload type", TYPE_NAMES),
        ("### Per candidate", CANDIDATE_NAMES),
        ("## Reward", tuple(field.name for field in fields(RewardConfig))),
    ],
)
def test_every_field_has_its_row_with_a_unit(heading: str, names: tuple[str, ...]) -> None:
    rows = table(heading)
    assert tuple(name for name, _, _ in rows) == names
    assert all(unit and meaning for _, unit, meaning in rows)


def test_the_observation_is_what_the_page_adds_up_to() -> None:
    state, per_type, row = (
        len(table(h)) for h in ("### State", "### Per workload type", "### Per candidate")
    )
    spec = observation_spec(4, 12, 15.0)
    assert spec.flat_size == state + 4 * per_type + 12 * (row + 1)
    assert f"`Box(-{FEATURE_LIMIT:g}, {FEATURE_LIMIT:g})`" in PAGE


def test_info_has_the_keys_of_the_page() -> None:
    env = gymnasium.make("tidewright/Surrogate-v0").unwrapped
    assert isinstance(env, ServingEnv)
    env.reset(seed=0)
    assert set(env.step(0)[4]) == {name for name, _, _ in table("## Info")}
    env.close()
