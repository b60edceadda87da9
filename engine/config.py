"""EngineConfig: every option of `python -m engine`, with its meaning, unit and default."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.cluster import HEAL_TIMEOUT_S
from engine.errors import InvalidRequestError

Model = TypeVar("Model", bound=BaseModel)


class EngineConfig(BaseModel):
    """What an engine is started with; nothing is written back after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "tiny",
        description="checkpoint folder (Hugging Face format), 'tiny', or 'smollm2' (make model)",
    )
    served_model_name: str = Field("", description="name in the API; none: the folder's own")
    num_workers: int = Field(4, ge=1, le=64, description="worker processes, one per device")
    deployment: str = Field("4xtp1pp1", description="initial replicas, e.g. 1xtp2pp1+2xtp1pp1")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and KV cache"
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads that a worker computes with")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where ranks compute: cpu, or cuda (workers share GPUs in turn)"
    )
    device_memory_mb: float = Field(
        40.0,
        gt=0,
        description="megabytes (1e6) per worker for weights and KV cache, also of GPU memory",
    )
    gpu_memory_utilization: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of device_memory_mb that weights and KV cache may take; the rest is "
        "for activations (which on the CPU come from elsewhere, hence all of it)",
    )
    switch_headroom_mb: float | None = Field(
        None,
        ge=0,
        description="megabytes (1e6) that a worker may take beside device_memory_mb while it "
        "switches; null: on the CPU as much again, on a GPU none. What does not fit switches in "
        "place, with a pause",
    )
    link_gb_per_s: float = Field(
        1.0, gt=0, description="gigabytes (1e9) per second between two workers, for planning"
    )
    block_size: int = Field(16, ge=1, description="tokens per KV block")
    max_model_len: int | None = Field(
        512, ge=2, description="tokens of prompt and output together; null: the model's own"
    )
    max_num_seqs: int = Field(32, ge=1, description="sequences a replica runs at once")
    max_num_batched_tokens: int = Field(256, ge=1, description="tokens of one step of a replica")
    enable_prefix_caching: bool = Field(
        True, description="keep KV blocks of finished requests for prompts that begin alike"
    )
    switch_bandwidth_mb_per_s: float = Field(
        0.0, ge=0, description="MB/s that each worker may send during a switch; 0: no limit"
    )
    max_queue: int = Field(1000, ge=1, description="requests in the engine before it says 429")
    host: str = Field("127.0.0.1", description="address of both servers")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0: any free one")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0: any free one")
    tls_cert: Path | None = Field(None, description="PEM certificate of both servers")
    tls_key: Path | None = Field(
        None, description="its private key; both are read when they change"
    )
    control_client_ca: Path | None = Field(
        None, description="PEM authority of which gRPC clients must have a certificate"
    )
    control_tokens: Path | None = Field(
        None,
        description="file of bearer tokens, one a line, that gRPC calls need; `read` behind one: "
        "it may only look; none: any may",
    )
    api_keys: Path | None = Field(
        None, description="file of bearer tokens, one a line, that HTTP calls of /v1 need"
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="where workers run: local processes, or ray for several machines"
    )
    ray_address: str = Field(
        "",
        description="Ray cluster: host:port, auto for this machine's, empty starts one here",
    )
    devices_per_node: int | None = Field(
        None, ge=1, description="workers per machine, with ray; null: all on one"
    )
    channel_host: str = Field(
        "127.0.0.1",
        description="address of this machine that workers on others reach, with ray",
    )
    trusted_network: bool = Field(
        False, description="with ray: no CURVE keys between engine and workers (true or false)"
    )
    heartbeat_timeout_s: float = Field(
        10.0, gt=0, description="seconds of silence after which a worker is killed"
    )
    heal_timeout_s: float = Field(
        HEAL_TIMEOUT_S,
        ge=0,
        description="seconds that requests wait at most for lost workers when no replica is left",
    )
    profile: Path | None = Field(None, description="ServingProfile JSON to hand to controllers")
    seed: int = Field(0, ge=0, description="of the tiny model's random weights")
    drain_timeout_s: float = Field(
        10.0, ge=0, description="seconds that running requests get at shutdown"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="of stderr: text, or json, which also has a line per ended request"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log lines to show: debug, info, warning or error"
    )
    otlp_traces_endpoint: str = Field(
        "", description="OTLP gRPC endpoint for one span per request, e.g. http://localhost:4317"
    )


def load_config(kind: type[Model], path: Path | None, overrides: Mapping[str, Any]) -> Model:
    """A config from a YAML or JSON file and overriding values; None overrides nothing.

    Raises InvalidRequestError in one sentence that names the key and what to change.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except OSError as error:
            raise InvalidRequestError(
                f"config file {path} cannot be read: {error.strerror}."
            ) from error
        except yaml.YAMLError as error:
            raise InvalidRequestError(f"config file {path} is not YAML or JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise InvalidRequestError(f"config file {path} must hold keys and values.")
        values = loaded
    values |= {key: value for key, value in overrides.items() if value is not None}
    return validate(kind, values, str(path) if path is not None else "the command line")


def validate(kind: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Validate, turning pydantic's report into one sentence."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = list(kind.model_fields)
            near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}."
            raise InvalidRequestError(f"unknown key {key!r} in {where}; {hint}") from None
        raise InvalidRequestError(
            f"{key or 'config'} in {where} is {first.get('input')!r}: {first['msg']}."
        ) from None


def add_arguments(parser: argparse.ArgumentParser, kind: type[BaseModel]) -> None:
    """One `--flag` per field, with its meaning and default, plus `--config FILE`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML or JSON with any of these"
    )
    for name, field in kind.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        text = f"{field.description} (default: {_shown(field.default)})".replace("%", "%%")
        if field.annotation is bool:  # --x and --no-x
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, dest=name, action=action, help=text)
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            parser.add_argument(flag, dest=name, metavar=metavar, help=text)


def _shown(default: Any) -> str:
    return "none" if default in (None, "") else str(default)


def parse_config(parser: argparse.ArgumentParser, kind: type[Model], argv: list[str]) -> Model:
    """Flags over file over defaults. Raises InvalidRequestError."""
    values = vars(parser.parse_args(argv))
    known = {name: values[name] for name in kind.model_fields}
    return load_config(kind, values["config"], known)
