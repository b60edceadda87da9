"""`evaluate.py switchback` from plan to verdict, over a log that a controller wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import evaluate


def test_a_plan_is_written_and_sized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    given = ["switchback", "plan", "--out", str(out), "--difference", "0.5", "--spread", "1"]
    assert evaluate.main(given) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["blocks"] == len(json.loads(out.read_text())["blocks"]) == 126
    assert facts["detectable"] <= 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plan", "--out", "{}/p", "--blocks", "5"], "an even number of at least 6 blocks, got 5"),
        (["plan", "--out", "{}/none/p"], "cannot be written"),
        (["plan", "--out", "{}/p", "--difference", "1"], "--difference needs --spread"),
        (["analyse", "--plan", "{}/none", "--log", "{}/log"], "none cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["switchback", *(g.format(tmp_path) for g in given)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p").exists()
