"""Rules that no linter here knows: files, pickles, names, and paths in what decides and serves."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "policies", "controller", "envs")
DOORS = {"train", "evaluate", "demo"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".proto", ".txt", ".json", ".cfg"}
SKIPPED = {".venv", ".git", "build", "dist", "runs", ".cache"}


def sources(*rooms: str) -> Iterator[Path]:
    for room in rooms:
        yield from (p for p in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in p.name)


def pure_files() -> list[Path]:
    """The files of the modules that .importlinter's contract `pure` names."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    names = parser["importlinter:contract:pure"]["source_modules"].split()
    files: list[Path] = []
    for name in names:
        path = ROOT / name.replace(".", "/")
        files += sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return files


def called_names(tree: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        f.id if isinstance(f, ast.Name) else f.attr
        for f in calls
        if isinstance(f, ast.Name | ast.Attribute)
    }


def imported_names(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_pure_modules_exist() -> None:
    missing = [str(p.relative_to(ROOT)) for p in pure_files() if not p.is_file()]
    assert not missing


def test_pure_modules_open_no_files() -> None:
    forbidden = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "input"}
    for path in pure_files():
        found = called_names(ast.parse(path.read_text())) & forbidden
        assert not found, f"{path.relative_to(ROOT)} is pure and calls {sorted(found)}"


def test_pure_modules_take_their_randomness_as_an_argument() -> None:
    for path in pure_files():
        tree = ast.parse(path.read_text())
        assert "random" not in imported_names(tree), path
        assert not re.search(r"np\.random\.(seed|rand|randn|uniform|choice)\(", path.read_text()), (
            f"{path.relative_to(ROOT)} draws from the global generator"
        )


def test_nothing_is_unpickled() -> None:
    for path in sources(*ROOMS):
        tree = ast.parse(path.read_text())
        found = imported_names(tree) & {"pickle", "cloudpickle", "dill", "shelve"}
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"
        assert "torch.load(" not in path.read_text(), path


def test_nobody_imports_a_door() -> None:
    for path in sources(*ROOMS):
        found = imported_names(ast.parse(path.read_text())) & DOORS
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


def test_modules_and_classes_are_named_for_what_they_do() -> None:
    for path in sources(*ROOMS, "tests", "benchmarks"):
        assert path.stem not in {"utils", "util", "helpers", "common", "misc", "manager"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name != "BlockManager":
                assert not re.search(r"(Manager|Helper|Coordinator|Utils)$", node.name), (
                    f"{path.relative_to(ROOT)} has class {node.name}"
                )


def test_no_path_of_one_machine_is_written_down() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt)/\w")
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if not path.is_file() or SKIPPED & set(parts) or path.suffix not in TEXT_SUFFIXES:
            continue
        if any(part.endswith(".egg-info") or part.startswith(".") for part in parts[:-1]):
            continue
        match = pattern.search(path.read_text(errors="replace"))
        assert match is None, f"{path.relative_to(ROOT)} names {match[0] if match else ''}"


@pytest.mark.parametrize("module", ["engine.app", "engine.__main__", "engine.cluster"])
def test_engine_process_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "module", ["policies.base", "policies.artifact", "controller.app", "envs.replay"]
)
def test_torch_free_imports(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
