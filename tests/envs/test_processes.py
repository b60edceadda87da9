from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engine.errors import UnavailableError
from envs.processes import start_server

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready:", child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except OSError:
        return False


def test_a_server_is_awaited_and_ended(tmp_path: Path) -> None:
    server = start_server("server", ["http.server", "0", "--bind", "127.0.0.1"], tmp_path / "log")
    try:
        port = server.wait_ready(r"port (\d+)", 30.0)[1]
    finally:
        server.stop()
    assert int(port) > 0
    assert server.process.returncode is not None
    assert server.group_is_empty()


def test_one_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = start_server("stubborn server", ["stubborn"], tmp_path / "log")
    child = int(server.wait_ready(r"ready: (\d+)", 30.0)[1])
    assert alive(child)
    start_s = time.monotonic()
    server.stop(timeout_s=0.2)
    assert time.monotonic() - start_s < 5
    assert not alive(child)
    assert not alive(server.process.pid)


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = start_server("engine", ["engine", "--deployment", "9xtp1pp1"], tmp_path / "log")
    with pytest.raises(UnavailableError, match=r"the engine ended at its start: error: .*devices"):
        server.wait_ready("ready", 30.0)
    server.stop()
    assert server.group_is_empty()


def test_one_that_never_gets_ready_is_not_awaited_for_ever(tmp_path: Path) -> None:
    server = start_server("server", ["http.server", "0", "--bind", "127.0.0.1"], tmp_path / "log")
    try:
        with pytest.raises(UnavailableError, match="not ready within 0 s"):
            server.wait_ready("never printed", 0.3)
    finally:
        server.stop()
    assert not os.path.exists(f"/proc/{server.process.pid}")
