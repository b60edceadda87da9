"""The controller process: the loop in a thread, the control service on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.build import build_pipeline, load_profiled_cluster, pipeline_from_facts
from controller.config import ControllerConfig
from controller.control_channel import ClientAccess
from controller.decision import DecisionConfig, DecisionPipeline
from controller.decision_log import DecisionLog, read_tail
from controller.heap import settle_heap
from controller.http_front import RunningFront, start_http
from controller.leadership import build_lease, lead
from controller.lease import Lease
from controller.log_records import header_record
from controller.loop import ControlLoop
from controller.operations import Operations
from controller.oversight import Oversight, OversightConfig
from controller.policy_server import PolicyServer
from controller.remote import RemoteCluster
from controller.resume import TAIL_BYTES, Keeper, resume
from controller.retraining import RetrainingTrigger, expected_from
from controller.roster import LoadedPolicy, PolicyInfo, PolicyRoster, build_rule, manifest_info
from controller.security import Security, build_security
from controller.service import start_grpc
from controller.sessions import Sessions
from controller.slo import find_slo
from controller.trials import Trials
from controller.watching import Watching
from controller.workload import default_typing
from engine.cluster import NO_SLO, SloSpec, parse_deployment_key
from engine.errors import CheckpointError, InvalidRequestError, UnavailableError
from engine.profile import ProfiledCluster, ServingProfile
from policies.artifact import is_policy, load_shipped, manifest_of
from policies.baselines import HysteresisPolicy, StaticPolicy
from policies.exploration import Exploration, ExplorationConfig
from policies.verdicts import require_passed

logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 10.0
LOOK_S = 0.2  # at whether the lease is lost


@dataclass(frozen=True, slots=True)
class Steering:
    """A loop with what is done to it by hand and beside it."""

    loop: ControlLoop
    operations: Operations
    sessions: Sessions

    def close(self) -> None:
        self.sessions.close()
        self.loop.trials.close()
        self.loop.policy_server.close()
        self.loop.log.close()


def _facts(config: ControllerConfig) -> dict[str, Any]:
    """The checkpoint's manifest; empty where a rule decides and there is none."""
    if config.rule and not is_policy(config.policy):
        return {}
    manifest = manifest_of(config.policy)
    if "cluster" not in manifest:
        raise CheckpointError(f"{config.policy} was not written by train.py: it has no cluster.")
    return manifest


def _cluster(
    remote: RemoteCluster, profile: Path | None, manifest: dict[str, Any]
) -> ProfiledCluster:
    """The engine's own facts, with step times from a file, from the engine, or as trained on."""
    if profile is not None:
        times = load_profiled_cluster(profile).profile
    elif remote.profile_json is not None:
        times = ServingProfile.from_json(remote.profile_json)
    elif manifest:
        times = ProfiledCluster.from_json(manifest["cluster"]).profile
    else:
        raise InvalidRequestError(
            "the engine serves no profile and there is no checkpoint; give step times with "
            "--profile, or start the engine with its --profile."
        )
    return ProfiledCluster(remote.spec, times)


def _pipeline(manifest: dict[str, Any], cluster: ProfiledCluster) -> DecisionPipeline:
    if manifest:
        return pipeline_from_facts(manifest, cluster)
    typing = default_typing(cluster.spec.model.max_model_len)
    return build_pipeline(cluster, typing, DecisionConfig())


def _policy(
    config: ControllerConfig, manifest: dict[str, Any], pipeline: DecisionPipeline
) -> LoadedPolicy:
    if config.rule:
        return LoadedPolicy(PolicyInfo(config.rule, "rule"), build_rule(config.rule, pipeline))
    if config.require_gate is not None:
        require_passed(config.require_gate, config.policy)
    expected = pipeline.observation_spec.hash
    policy = load_shipped(config.policy, expected)
    name = config.policy.resolve().name
    return LoadedPolicy(manifest_info(name, manifest, pipeline), policy, expected_from(manifest))


def _slo(device: str) -> SloSpec:
    """Targets of interactive requests; none where the pool is not among those of configs/slo.yaml:
    requests are then compared with how they were served before."""
    try:
        return find_slo("interactive", device)
    except InvalidRequestError:
        return NO_SLO


def build_steering(config: ControllerConfig, remote: RemoteCluster) -> Steering:
    """Everything between the remote engine and the control service. Raises TidewrightErrors."""
    manifest = _facts(config)
    pipeline = _pipeline(manifest, _cluster(remote, config.profile, manifest))
    if config.safe:
        pipeline.planner.standing += (parse_deployment_key(config.safe),)
    safe_key = config.safe or manifest.get("default_deployment", "")
    active = _policy(config, manifest, pipeline)
    explored = ExplorationConfig(config.explore)
    exploration = Exploration(pipeline.observation_spec, explored) if config.explore else None
    server = PolicyServer(
        active.policy,
        HysteresisPolicy(pipeline.observation_spec),
        config.policy_deadline_s,
        config.deterministic,
        StaticPolicy(safe_key) if safe_key else None,
        exploration,
    )
    facts = {
        "policy": active.policy.name,
        "policy_digest": active.info.digest,
        "checkpoint": str(config.policy) if manifest else "",
        "git_revision": manifest.get("git_revision", ""),
        "deterministic": config.deterministic,
        "explore": config.explore,
        "seed": config.seed,
    }
    past = read_tail(config.log, TAIL_BYTES) if config.log and config.resume else ()
    header = header_record(pipeline, facts)
    log = DecisionLog(config.log, header, config.log_mb * 10**6, config.log_files)
    seeds = (config.seed, int(log.life, 16))  # no two lives draw alike
    oversight = Oversight(OversightConfig(), _slo(pipeline.cluster.profile.device))
    roster = PolicyRoster(pipeline, config.policies, (config.policy,), config.require_gate)
    rule = HysteresisPolicy(pipeline.observation_spec)
    trials = Trials(rule, config.policy_deadline_s, config.deterministic, seeds, exploration)
    for name in filter(None, config.shadows.split(",")):
        trials.add_shadow(roster.load(name.strip(), decides=False))
    loop = ControlLoop(remote, pipeline, server, log, config.mode, seeds, oversight, trials=trials)
    loop.active, loop.retraining = active.info, RetrainingTrigger(active.expected)
    sessions = Sessions(pipeline, config.policy_deadline_s)
    operations = Operations(loop, roster)
    keeper = Keeper(loop, operations, _arguments(config))
    if resume(keeper, past):
        logger.info("goes on from tick %d of %s", loop.next_seq - 1, config.log)
    loop.keep, operations.idempotency.on_answer = keeper.keep, keeper.answer
    return Steering(loop, operations, sessions)


def _arguments(config: ControllerConfig) -> dict[str, str]:
    """Those that operators may say otherwise of, which holds until the arguments are others."""
    return {"mode": config.mode, "policy": config.rule or str(config.policy.resolve())}


async def serve(config: ControllerConfig) -> None:
    """Run until SIGINT or SIGTERM; the engine serves on without it."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    lease = build_lease(config)
    with (
        contextlib.closing(build_security(config)) as security,
        _remote(config, lease) as remote,
    ):
        await _warm(config, remote)
        while not stop.is_set() and await lead(lease, remote, stop):
            try:
                steering = await asyncio.to_thread(build_steering, config, remote)
                if lease is not None:
                    steering.loop.may_act = steering.loop.log.may_write = lambda: lease.is_held
                try:
                    await _serve(config, steering, security, lease, stop)
                finally:
                    steering.close()
            finally:
                if lease is not None:
                    await asyncio.to_thread(lease.release)


def _remote(config: ControllerConfig, lease: Lease | None) -> RemoteCluster:
    access = ClientAccess(
        *(config.engine_tls_ca, config.engine_tls_cert, config.engine_tls_key),
        config.engine_token_file,
        prefix="engine-",
    )
    return RemoteCluster(config.engine, config.engine_timeout_s, access, leader=lease)


async def _warm(config: ControllerConfig, remote: RemoteCluster) -> None:
    """Everything that takes time, once, so that who stands by takes over at once. Raises."""

    def warm() -> None:
        manifest = _facts(config)
        _policy(config, manifest, _pipeline(manifest, _cluster(remote, config.profile, manifest)))

    try:
        await asyncio.to_thread(warm)
    except UnavailableError as error:
        raise UnavailableError(
            f"no engine answers at {config.engine}: {error} Start one with "
            "`python -m engine`, or name it with --engine."
        ) from error


async def _dashboard(
    config: ControllerConfig, steering: Steering, security: Security
) -> RunningFront | None:
    """None when its port cannot be had: an engine is steered without being watched, too."""
    names = tuple(name.strip() for name in config.http_names.split(","))
    loop, operations, sessions = steering.loop, steering.operations, steering.sessions
    try:
        return await start_http(
            *(loop, operations, sessions, config.host, config.http_port, names),
            *(security.gate, security.certificates),
        )
    except UnavailableError as error:
        logger.warning("there is no dashboard: %s", error)
        return None


async def _serve(
    config: ControllerConfig,
    steering: Steering,
    security: Security,
    lease: Lease | None,
    stop: asyncio.Event,
) -> None:
    """Until `stop`, or until the lease is lost."""
    loop, halt = steering.loop, threading.Event()
    thread = threading.Thread(target=loop.run, args=(halt,), name="control-loop", daemon=True)
    server, port = await start_grpc(
        *(loop, steering.operations, steering.sessions),
        *(config.host, config.grpc_port, security),
    )
    watching = Watching(config, loop, security)
    front = await _dashboard(config, steering, security)
    scheme = "https" if security.certificates is not None else "http"
    shown = f"{scheme}://{config.host}:{front.port}" if front is not None else "none"
    try:
        watching.start()
        settle_heap()
        thread.start()
        print(
            f"tidewright controller ready: grpc {config.host}:{port} dashboard {shown} "
            f"engine {config.engine} "
            f"policy {loop.policy_server.policy.name} mode {loop.mode} "
            f"grid {loop.pipeline.config.grid_s:g} s{watching.told}",
            flush=True,
        )
        while not stop.is_set() and not (lease is not None and lease.lost.is_set()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_S)
    finally:
        halt.set()
        if front is not None:
            await front.close()
        await server.stop(grace=0.5)
        await asyncio.to_thread(thread.join, STOP_TIMEOUT_S)
        await asyncio.to_thread(watching.close)
    counters = loop.counters
    print(
        f"controller stopped: {counters.num_ticks} ticks, {counters.num_decisions} decisions, "
        f"{counters.num_switches_done} switches done, {counters.num_switches_failed} failed",
        flush=True,
    )
