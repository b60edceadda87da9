"""What lets others watch a controller process: the metrics server and the export of traces."""

from __future__ import annotations

from typing import Any

from controller.config import ControllerConfig
from controller.loop import ControlLoop
from controller.metrics import HOST, ControlMetrics, start_metrics_server
from controller.security import Security
from controller.tracing import DecisionTracing, start_tracing


class Watching:
    """Owns both, as far as the configuration asks for them; `close` blocks for a moment."""

    def __init__(self, config: ControllerConfig, loop: ControlLoop, security: Security) -> None:
        self._config, self._loop = config, loop
        self.metrics = ControlMetrics(loop, security)
        self._server: Any = None
        self._tracing: DecisionTracing | None = None
        self.told = ""  # for the line that says the controller is ready

    def start(self) -> None:
        """Raises UnavailableError (the port) and InvalidRequestError (packages missing)."""
        if self._config.otlp_traces_endpoint:
            self._tracing = start_tracing(self._loop, self._config.otlp_traces_endpoint)
        if self._config.metrics_port is not None:
            self._server, port = start_metrics_server(self.metrics, self._config.metrics_port)
            self.told = f" metrics {HOST}:{port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._tracing is not None:
            self._tracing.close()
