"""Server processes that a run starts, waits for and leaves no trace of.

Each gets its own process group (session), so that a Ctrl-C in the terminal reaches the one who
started them first, who then ends them in order.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UnavailableError


@dataclass(slots=True)
class ServerProcess:
    """A started server and its process group. Whoever starts it stops it."""

    name: str
    process: subprocess.Popen[str]
    log_path: Path
    lines: queue.SimpleQueue[str | None]  # of stdout; None at its end
    reader: threading.Thread

    def wait_ready(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first line of stdout that matches. Raises UnavailableError with the last words."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise UnavailableError(
                    f"the {self.name} was not ready within {timeout_s:.0f} s; see {self.log_path}."
                ) from None
            if line is None:
                raise UnavailableError(f"the {self.name} ended at its start: {self.last_words()}")
            match = re.search(pattern, line)
            if match is not None:
                return match

    def last_words(self) -> str:
        """The last line it logged."""
        text = self.log_path.read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else f"nothing was logged in {self.log_path}."

    def signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # empty, or only zombies left (macOS)
            return

    def group_is_empty(self) -> bool:
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return True
        return False

    def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM to the server, SIGKILL to all of its group at the deadline; then none is left."""
        if self.process.poll() is None:
            self.process.terminate()
        if not self._wait_empty(timeout_s):
            self.signal_group(signal.SIGKILL)
            if not self._wait_empty(5.0):
                raise UnavailableError(f"processes of the {self.name} outlived SIGKILL.")
        self.reader.join(timeout=5.0)

    def _wait_empty(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not self.group_is_empty():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True


def start_server(name: str, arguments: Sequence[str], log_path: Path) -> ServerProcess:
    """Start `python -m <arguments>` with stderr and stdout in `log_path`."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = log_path.open("w", buffering=1)
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with log, process.stdout:
            for line in process.stdout:
                log.write(line)
                lines.put(line.rstrip("\n"))
        lines.put(None)

    reader = threading.Thread(target=read, name=f"{name}-stdout", daemon=True)
    reader.start()
    return ServerProcess(name, process, log_path, lines, reader)
