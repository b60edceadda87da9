"""Logs of the engine process: text for people or one JSON object per line, and a line for each
request that ends. Prompts and answers are never logged."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from engine.live_request import EndedRequest

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
logger = logging.getLogger("engine.requests")


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message, the fields of `extra={"fields": {...}}`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(log_format: str, level: str) -> None:
    """Send everything to stderr in one format, "json" or "text"."""
    handler = logging.StreamHandler(sys.stderr)
    is_json = log_format == "json"
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLogger().level))


class RequestLog:
    """One line per ended request: ids, tokens, latencies, replica, finish reason. At info where
    machines read the log, at debug where people do."""

    def __init__(self, log_format: str) -> None:
        self._level = logging.INFO if log_format == "json" else logging.DEBUG

    def __call__(self, ended: EndedRequest) -> None:
        if logger.isEnabledFor(self._level):
            fields = _fields(ended)
            given = (f"{k}={v}" for k, v in fields.items() if v not in (None, ""))
            text = "request ended" if self._level == logging.INFO else " ".join(given)
            logger.log(self._level, text, extra={"fields": fields})


def _fields(ended: EndedRequest) -> dict[str, Any]:
    outcome = ended.outcome
    return {
        "request_id": outcome.request_id,
        "status": outcome.status.value,
        "finish_reason": ended.finish_reason,
        "replica": outcome.replica_id,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": ended.num_cached_tokens,
        "output_tokens": outcome.output_tokens,
        "ttft_s": _rounded(outcome.ttft_s),
        "tpot_s": _rounded(outcome.tpot_s),
        "latency_s": _rounded(outcome.finish_s - outcome.arrival_s),
        "longest_gap_s": _rounded(outcome.longest_gap_s),
        "preemptions": outcome.num_preemptions,
        "moves": outcome.num_moves,
        "class": outcome.request_class,
        "client": outcome.client_id,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
