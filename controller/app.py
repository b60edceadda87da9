"""The controller process: the loop in a thread, the control service on an event loop."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

from controller.build import load_profiled_cluster, pipeline_from_facts
from controller.config import ControllerConfig
from controller.decision import DecisionPipeline
from controller.decision_log import DecisionLog
from controller.log_records import header_record
from controller.loop import ControlLoop
from controller.policy_server import PolicyServer
from controller.remote import RemoteCluster
from controller.service import start_grpc
from engine.errors import CheckpointError, InvalidRequestError, UnavailableError
from engine.profile import ProfiledCluster, ServingProfile
from policies.base import Policy
from policies.baselines import HysteresisPolicy, KeepPolicy, MyopicPolicy
from policies.checkpoint import load_manifest, load_policy

STOP_TIMEOUT_S = 10.0


def build_rule(name: str, pipeline: DecisionPipeline) -> Policy:
    """A rule by name. Raises InvalidRequestError."""
    match name:
        case "keep":
            return KeepPolicy()
        case "myopic":
            return MyopicPolicy(pipeline.observation_spec)
        case "hysteresis":
            return HysteresisPolicy(pipeline.observation_spec)
    raise InvalidRequestError(f"rule {name!r} is not known; expected keep, myopic or hysteresis.")


def _cluster(
    remote: RemoteCluster, profile: Path | None, manifest: dict[str, Any]
) -> ProfiledCluster:
    """The engine's own facts, with step times from a file, from the engine, or as trained on."""
    if profile is not None:
        times = load_profiled_cluster(profile).profile
    elif remote.profile_json is not None:
        times = ServingProfile.from_json(remote.profile_json)
    else:
        times = ProfiledCluster.from_json(manifest["cluster"]).profile
    return ProfiledCluster(remote.spec, times)


def build_loop(config: ControllerConfig, remote: RemoteCluster) -> ControlLoop:
    """Everything between the remote engine and the control service. Raises TidewrightErrors."""
    manifest = load_manifest(config.policy)
    if "cluster" not in manifest:
        raise CheckpointError(f"{config.policy} was not written by train.py: it has no cluster.")
    pipeline = pipeline_from_facts(manifest, _cluster(remote, config.profile, manifest))
    spec_hash = pipeline.observation_spec.hash
    policy: Policy = (
        build_rule(config.rule, pipeline)
        if config.rule
        else load_policy(config.policy, expected_spec_hash=spec_hash)
    )
    server = PolicyServer(
        policy,
        HysteresisPolicy(pipeline.observation_spec),
        config.policy_deadline_s,
        config.deterministic,
    )
    facts = {
        "policy": policy.name,
        "checkpoint": str(config.policy),
        "git_revision": manifest.get("git_revision", ""),
        "deterministic": config.deterministic,
        "seed": config.seed,
    }
    header = header_record(pipeline, facts)
    log = DecisionLog(config.log, header, config.log_mb * 10**6, config.log_files)
    seeds = (config.seed, int(log.life, 16))  # no two lives draw alike
    return ControlLoop(remote, pipeline, server, log, config.mode, seeds)


async def serve(config: ControllerConfig) -> None:
    """Run until SIGINT or SIGTERM; the engine serves on without it."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with RemoteCluster(config.engine, config.engine_timeout_s) as remote:
        try:
            loop = await asyncio.to_thread(build_loop, config, remote)
        except UnavailableError as error:
            raise UnavailableError(
                f"no engine answers at {config.engine}: {error} Start one with "
                "`python -m engine`, or name it with --engine."
            ) from error
        try:
            await _serve(config, loop, stop)
        finally:
            loop.policy_server.close()
            loop.log.close()


async def _serve(config: ControllerConfig, loop: ControlLoop, stop: asyncio.Event) -> None:
    halt = threading.Event()
    thread = threading.Thread(target=loop.run, args=(halt,), name="control-loop", daemon=True)
    server, port = await start_grpc(loop, config.host, config.grpc_port)
    try:
        thread.start()
        print(
            f"tidewright controller ready: grpc {config.host}:{port} engine {config.engine} "
            f"policy {loop.policy_server.policy.name} mode {loop.mode} "
            f"grid {loop.pipeline.config.grid_s:g} s",
            flush=True,
        )
        await stop.wait()
    finally:
        halt.set()
        await server.stop(grace=0.5)
        await asyncio.to_thread(thread.join, STOP_TIMEOUT_S)
    counters = loop.counters
    print(
        f"controller stopped: {counters.num_ticks} ticks, {counters.num_decisions} decisions, "
        f"{counters.num_switches_done} switches done, {counters.num_switches_failed} failed",
        flush=True,
    )
