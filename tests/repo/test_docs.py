"""What the documentation names exists: commands, options, files, one line per module."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ROOMS = ("engine", "policies", "controller", "envs")


def commands() -> list[tuple[str, str]]:
    """(page, line) of every shell line in a fenced sh block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.split("  #")[0].strip()) for line in lines if line.strip()]
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def help_of(*door: str) -> str:
    done = subprocess.run(
        [sys.executable, *door, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_door(line: str) -> tuple[str, ...] | None:
    """("-m", module) or (script,) of a `python ...` line; None for other commands."""
    match = re.search(r"python\S* (?:(-m) (\S+)|(\S+\.py))", line)
    if match is None:
        return None
    return ("-m", match[2]) if match[1] else (match[3],)


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_exist(page: str, line: str) -> None:
    for target in re.findall(r"\bmake ([a-z-]+)", line):
        assert target in make_targets(), f"{page}: make {target}"
    door = python_door(line)
    if door is None:
        return
    if door[0] == "-m":
        base = ROOT / door[1].replace(".", "/")
        assert base.with_suffix(".py").is_file() or (base / "__main__.py").is_file(), line
    else:
        assert (ROOT / door[0]).is_file(), line
    if options := re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", line):
        word = re.search(rf"{re.escape(door[-1])} ([a-z]+)(?:\s|$)", line)
        text = help_of(*door, *([word[1]] if word else []))
        assert not [o for o in options if o not in text], f"{page}: {line}"


def test_pages_name_existing_files() -> None:
    pattern = re.compile(r"`((?:configs|benchmarks|docs|protos|policies/artifacts)/[\w./-]*\w)`")
    for page in PAGES:
        for name in pattern.findall(page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_structure_page_has_one_line_per_module() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    assert len(text.splitlines()) <= 340
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if path.name != "__init__.py":
                assert text.count(f"`{name}`") == 1, f"docs/structure.md misses {name}"
    for name in re.findall(r"^- `(\S+\.py)`", text, re.MULTILINE):
        assert (ROOT / name).is_file(), f"docs/structure.md names {name}"


def test_pre_commit_and_ci_run_what_exists() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert all(hook["language"] == "system" for repo in config["repos"] for hook in repo["hooks"])
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\S+)", script, re.MULTILINE) == ["check", "test"]
