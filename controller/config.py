"""ControllerConfig: every option of `python -m controller`, with its meaning, unit and default."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from controller.records import Mode


class ControllerConfig(BaseModel):
    """What a controller is started with; nothing is written back after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str = Field("127.0.0.1:50051", description="host:port of the engine's gRPC service")
    engine_tls_ca: Path | None = Field(
        None, description="PEM authority of the engine's certificate; none: without TLS"
    )
    engine_tls_cert: Path | None = Field(
        None,
        description="PEM certificate of the controller's own (the engine's authority of it: "
        "--control-client-ca)",
    )
    engine_tls_key: Path | None = Field(None, description="its private key")
    engine_token_file: Path | None = Field(
        None, description="file of a bearer token that the engine takes (its --control-tokens)"
    )
    policy: Path = Field(
        Path("policies/artifacts/demo"), description="checkpoint folder that train.py wrote"
    )
    rule: str = Field(
        "", description="decide by this rule instead of the policy: keep, myopic or hysteresis"
    )
    policies: Path = Field(
        Path("policies/artifacts"), description="folder of checkpoints that may be loaded later"
    )
    require_gate: Path | None = Field(
        None,
        description="folder of verdicts (evaluate.py --gate RULE --json FILE); no policy but the "
        "rules decides without a passed one of exactly its files",
    )
    shadows: str = Field(
        "", description="policies that are asked at each tick and decide nothing, with commas"
    )
    safe: str = Field(
        "",
        description="deployment to go to and stay at when policy and rule fail, such as 4xtp1pp1; "
        "default: the checkpoint's",
    )
    profile: Path | None = Field(
        None, description="measured cluster JSON; default: the engine's, else the checkpoint's"
    )
    mode: Mode = Field(Mode.ACTIVE, description="active, advisory (log only) or off")
    deterministic: bool = Field(
        True, description="take the most probable candidate; false: draw, for off-line evaluation"
    )
    explore: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="probability shared by the chosen candidate and those about as fast, for "
        "off-line evaluation",
    )
    policy_deadline_s: float = Field(
        0.5, gt=0, description="seconds the policy gets before the hysteresis rule decides"
    )
    engine_timeout_s: float = Field(5.0, gt=0, description="deadline in seconds of engine calls")
    log: Path | None = Field(None, description="decision log to append to (JSON lines)")
    resume: bool = Field(
        True, description="go on from the log's last state: mode, holds, budgets, forecasts"
    )
    lease: str = Field(
        "",
        description="of several controllers the holder of this file acts, or of this etcd key "
        "(http://HOST:2379/KEY), or Lease of Kubernetes (kubernetes://NAMESPACE/NAME); default: "
        "beside the log, else a file per engine; off: no lease",
    )
    lease_s: float = Field(
        10.0, ge=1, description="seconds after which a holder that hangs is succeeded"
    )
    lease_account: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="folder with token and ca.crt, for a Lease of Kubernetes",
    )
    log_mb: int = Field(64, ge=1, description="megabytes at which the log is put aside as .1")
    log_files: int = Field(16, ge=1, description="files that are kept of it")
    host: str = Field("127.0.0.1", description="address of the control service")
    grpc_port: int = Field(50052, ge=0, le=65535, description="its port; 0: any free one")
    tls_cert: Path | None = Field(None, description="PEM certificate of the control service")
    tls_key: Path | None = Field(
        None, description="its private key; both are read when they change"
    )
    tls_client_ca: Path | None = Field(
        None, description="PEM authority of which clients must have a certificate"
    )
    access: Path | None = Field(
        None, description="file of names, roles and hashes of tokens; none: whoever calls may"
    )
    insecure: bool = Field(
        False, description="serve beyond this machine without TLS or without an access file"
    )
    rate_per_s: float = Field(500.0, ge=0, description="calls per second of one caller; 0: any")
    rate_burst: int = Field(1000, ge=1, description="calls that it may make at once")
    max_message_mb: int = Field(64, ge=1, le=1024, description="megabytes (1e6) of one request")
    audit: Path | None = Field(None, description="audit log to append to (JSON lines)")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of Prometheus metrics on loopback; 0: any free one"
    )
    otlp_traces_endpoint: str = Field(
        "", description="OTLP gRPC endpoint for a trace per decision, e.g. http://localhost:4317"
    )
    http_port: int = Field(50053, ge=0, le=65535, description="of the dashboard; 0: any free one")
    http_names: str = Field(
        "", description="host names that it answers to beside addresses and --host, with commas"
    )
    seed: int = Field(0, ge=0, description="of the draws when not deterministic")
