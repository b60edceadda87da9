"""The control API, method by method, over a loop that the test steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import GRID_S, TYPING, Served

from controller.build import build_pipeline, pipeline_facts
from controller.decision import DecisionConfig
from controller.guardrails import RULES
from controller.service import SERVICE_NAME
from controller.sessions import Sessions
from engine.cluster import ClusterEvent, ClusterSnapshot, SwitchPlan
from engine.errors import (
    CheckpointError,
    InvalidRequestError,
    NotFoundError,
    StaleEpochError,
    TidewrightError,
    UngatedPolicyError,
)
from engine.profile import ProfiledCluster
from engine.wire import error_of, from_proto, to_proto
from policies.baselines import HysteresisPolicy, KeepPolicy
from policies.checkpoint import save_checkpoint
from policies.inference import NetworkConfig
from policies.networks import CandidateNetwork
from policies.normalizer import ObservationNormalizer
from policies.ppo import PpoPolicy
from policies.verdicts import policy_digest, sealed
from protos import control_pb2 as pb

WAIT_S = 20.0


def save(folder: Path, cluster: ProfiledCluster, config: DecisionConfig, seed: int) -> None:
    """An untrained checkpoint."""
    spec = build_pipeline(cluster, TYPING, config).observation_spec
    torch.manual_seed(seed)
    network_config = NetworkConfig(hidden_size=8)
    network = CandidateNetwork(spec, network_config)
    policy = PpoPolicy(spec, network, network_config, ObservationNormalizer(spec))
    adam = torch.optim.Adam(network.parameters())
    save_checkpoint(
        folder, policy, adam.state_dict(), pipeline_facts(cluster, TYPING, config, "ewma4")
    )


@pytest.fixture(scope="module")
def policies(synthetic_cluster: ProfiledCluster, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("policies")
    config = DecisionConfig(grid_s=GRID_S, min_dwell_s=5.0)
    save(folder / "first", synthetic_cluster, config, 1)
    save(folder / "second", synthetic_cluster, DecisionConfig(grid_s=GRID_S), 2)
    save(folder / "other_grid", synthetic_cluster, DecisionConfig(grid_s=60.0), 3)
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text("{")
    return folder


@pytest.fixture
def served(synthetic_cluster: ProfiledCluster, policies: Path) -> Iterator[Served]:
    found = Served(synthetic_cluster, policies)
    try:
        yield found
    finally:
        found.close()


def call(served: Served, method: str, /, **fields: Any) -> Any:
    request = getattr(pb, f"{method}Request")(**fields)
    return getattr(served.stub, method)(request, timeout=WAIT_S)


def refusal(run: Callable[[], Any]) -> tuple[TidewrightError, grpc.RpcError]:
    with pytest.raises(grpc.RpcError) as error:
        run()
    return error_of(error.value), error.value


# ---------------------------------------------------------------- conventions


@pytest.mark.parametrize("name", ["GetState", "Hold", "WatchDecisions", "WatchState"])
def test_a_call_without_a_deadline_is_refused(served: Served, name: str) -> None:
    request = getattr(pb, f"{name}Request")()

    def run() -> None:
        answer = getattr(served.stub, name)(request)
        if name.startswith("Watch"):
            next(answer)

    error, _ = refusal(run)
    assert isinstance(error, InvalidRequestError)
    assert "no deadline" in str(error)


def test_health_needs_no_deadline(served: Served) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_errors_come_with_rich_details(served: Served) -> None:
    _, raised = refusal(lambda: call(served, "LoadPolicy", name="nobody"))
    rich = status_pb2.Status.FromString(dict(raised.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("NOT_FOUND", "tidewright")
    assert (rich.code, rich.message) == (grpc.StatusCode.NOT_FOUND.value[0], raised.details())
    _, raised = refusal(lambda: call(served, "SetMode"))
    rich = status_pb2.Status.FromString(dict(raised.trailing_metadata())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    assert rich.details[1].Unpack(bad)
    assert [v.field for v in bad.field_violations] == ["mode"]


METHODS = pb.DESCRIPTOR.services_by_name["ControlService"].methods_by_name


@pytest.mark.parametrize("method", sorted(METHODS))
def test_names_follow_the_conventions(method: str) -> None:
    found = METHODS[method]
    assert found.input_type.name == f"{method}Request"
    assert found.output_type.name == f"{method}Response"


# ---------------------------------------------------------------- watching


def test_decisions_go_on_from_a_resume_token(served: Served) -> None:
    for _ in range(3):
        served.step()
    watch = served.stub.WatchDecisions
    stream = watch(pb.WatchDecisionsRequest(from_seq=1), timeout=WAIT_S)
    first, second = next(stream), next(stream)
    stream.cancel()
    again = watch(pb.WatchDecisionsRequest(resume_token=second.resume_token), timeout=WAIT_S)
    assert [first.record.seq, second.record.seq, next(again).record.seq] == [1, 2, 3]
    served.step()
    assert next(again).record.seq == 4
    again.cancel()


@pytest.mark.parametrize("name", ["WatchDecisions", "WatchState"])
@pytest.mark.parametrize("token", ["x:1", "1", "another-life:12", ":"])
def test_a_token_of_another_life_is_refused(served: Served, name: str, token: str) -> None:
    request = getattr(pb, f"{name}Request")(resume_token=token)
    error, _ = refusal(lambda: next(getattr(served.stub, name)(request, timeout=WAIT_S)))
    assert isinstance(error, InvalidRequestError)


def test_the_state_is_told_whenever_something_changes(served: Served) -> None:
    stream = served.stub.WatchState(pb.WatchStateRequest(), timeout=WAIT_S)
    first = next(stream)
    assert (first.state.mode, first.state.next_seq) == (pb.MODE_ACTIVE, 1)
    served.step()
    assert next(stream).state.next_seq == 2
    call(served, "Hold", duration_s=60.0, reason="upgrade")
    held = next(stream)
    assert [(h.rule, h.reason) for h in held.state.holds] == [("hold", "upgrade")]
    call(served, "SetMode", mode=pb.MODE_ADVISORY)
    assert next(stream).state.mode == pb.MODE_ADVISORY
    stream.cancel()
    again = served.stub.WatchState(
        pb.WatchStateRequest(resume_token=held.resume_token), timeout=WAIT_S
    )
    assert next(again).state.mode == pb.MODE_ADVISORY
    again.cancel()


def test_many_watchers_wait_at_once(served: Served) -> None:
    """More than there are threads on the event loop."""
    request = pb.WatchDecisionsRequest(from_seq=1)
    streams = [served.stub.WatchDecisions(request, timeout=WAIT_S) for _ in range(60)]
    served.step()
    assert {next(stream).record.seq for stream in streams} == {1}
    assert served.state().next_seq == 2
    for stream in streams:
        stream.cancel()


# ---------------------------------------------------------------- explain


def test_a_decision_is_explained_by_name_and_by_rule(served: Served) -> None:
    served.step()
    call(served, "Hold", duration_s=600.0, reason="x")
    served.step()
    reply = call(served, "Explain")
    record = served.loop.records[-1]
    assert reply.record.seq == 2
    assert reply.summary.startswith("keep decided to keep 4xtp1pp1 (probability 1.00)")
    spec = served.loop.pipeline.observation_spec
    assert set(reply.state_features) == set(spec.state_features)
    keep, *others = reply.candidates
    assert (keep.is_chosen, keep.is_executed) == (True, True)
    assert keep.features["is_keep"] == 1.0
    assert [c.candidate.key for c in reply.candidates] == [c.key for c in record.candidates]
    assert others
    hold = next(rule for rule in RULES if rule.name == "hold")
    assert {c.why for c in others} == {f"not legal, hold: {hold.meaning}"}
    one = call(served, "Explain", seq=1, candidate_key=others[0].candidate.key)
    assert [c.candidate.key for c in one.candidates] == [others[0].candidate.key]
    assert one.candidates[0].why.startswith("legal, with probability 0.000; the highest is 1.000")
    by_id = call(served, "Explain", decision_id=reply.record.decision_id)
    assert by_id.record.seq == 2


def test_in_mode_off_it_is_said_that_nothing_was_decided(served: Served) -> None:
    call(served, "SetMode", mode=pb.MODE_OFF)
    served.step()
    reply = call(served, "Explain")
    assert reply.summary == "nothing was decided (observed): the mode is off"
    assert len(reply.candidates) > 1
    assert not any(c.candidate.HasField("probability") for c in reply.candidates)
    legal = {c.why for c in reply.candidates if c.candidate.legal}
    assert legal == {"legal; nothing was decided, so no policy was asked about it"}
    call(served, "SetMode", mode=pb.MODE_ADVISORY)
    served.step()
    decided = call(served, "Explain").candidates
    assert sum(c.candidate.probability for c in decided) == pytest.approx(1.0)
    assert all(c.candidate.HasField("probability") for c in decided)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seq": 9}, "tick 9 cannot be explained; those kept are 1 to 1"),
        ({"decision_id": "d"}, "tick d cannot"),
        ({"candidate_key": "3xtp9pp9"}, "'3xtp9pp9' was no candidate at tick 1"),
    ],
)
def test_what_is_not_known_is_not_found(served: Served, fields: dict[str, Any], said: str) -> None:
    served.step()
    error, _ = refusal(lambda: call(served, "Explain", **fields))
    assert isinstance(error, NotFoundError)
    assert said in str(error)


# ---------------------------------------------------------------- switches by hand


def test_a_switch_is_applied_once_per_key_and_fenced_by_the_epoch(served: Served) -> None:
    served.step()
    fields = {"target_key": "2xtp2pp1", "expected_epoch": 0, "idempotency_key": "k1"}
    first, again = call(served, "ApplySwitch", **fields), call(served, "ApplySwitch", **fields)
    assert first.applied
    assert first == again
    assert served.loop.counters.num_switches_started == 1
    error, _ = refusal(lambda: call(served, "ApplySwitch", **fields | {"target_key": "1xtp4pp1"}))
    assert "was used for another request" in str(error)
    for _ in range(3):
        served.step()
    assert served.state().epoch == 1
    late = fields | {"target_key": "4xtp1pp1", "idempotency_key": "k2"}
    error, raised = refusal(lambda: call(served, "ApplySwitch", **late))
    assert isinstance(error, StaleEpochError)
    assert raised.code() is grpc.StatusCode.ABORTED
    assert "the engine is at epoch 1 (2xtp2pp1)" in str(error)
    assert call(served, "ApplySwitch", **late | {"expected_epoch": 1}).applied  # it had failed


def test_a_key_used_by_two_callers_at_once_acts_once(served: Served) -> None:
    served.step()
    fields = {"target_key": "2xtp2pp1", "expected_epoch": 0, "idempotency_key": "k"}
    replies: list[Any] = []
    threads = [
        threading.Thread(target=lambda: replies.append(call(served, "ApplySwitch", **fields)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(replies) == 4
    assert all(r == replies[0] for r in replies)
    assert served.loop.counters.num_switches_started == 1


@pytest.mark.parametrize("lacking", ["expected_epoch", "idempotency_key", "target_key"])
def test_a_switch_by_hand_needs_all_of_it(served: Served, lacking: str) -> None:
    served.step()
    fields = {"target_key": "2xtp2pp1", "expected_epoch": 0, "idempotency_key": "k"}
    del fields[lacking]
    error, _ = refusal(lambda: call(served, "ApplySwitch", **fields))
    assert isinstance(error, InvalidRequestError)
    assert lacking in str(error)


def test_guardrails_and_mode_are_against_switches_by_hand_too(served: Served) -> None:
    served.step()
    fields = {"target_key": "2xtp2pp1", "expected_epoch": 0}
    call(served, "Hold", duration_s=600.0, reason="x")
    held = call(served, "ApplySwitch", **fields, idempotency_key="a")
    assert (held.applied, list(held.vetoes)) == (False, ["hold"])
    call(served, "Resume")
    call(served, "SetMode", mode=pb.MODE_ADVISORY)
    told = call(served, "ApplySwitch", **fields, idempotency_key="b")
    assert (told.applied, list(told.vetoes)) == (False, ["mode_advisory"])


def test_a_switch_in_flight_is_cancelled(served: Served) -> None:
    served.step()
    error, _ = refusal(lambda: call(served, "CancelSwitch", idempotency_key="c"))
    assert isinstance(error, NotFoundError)
    applied = call(
        served, "ApplySwitch", target_key="2xtp2pp1", expected_epoch=0, idempotency_key="a"
    )
    ticket = call(served, "CancelSwitch", idempotency_key="c").ticket
    assert ticket.ticket_id == applied.ticket.ticket_id
    served.step()
    assert served.state().deployment_key == "4xtp1pp1"
    assert served.loop.oversight.breaker.state == "closed"


# ---------------------------------------------------------------- holds


def test_a_hold_is_told_with_what_is_left_of_it_and_is_ended(served: Served) -> None:
    reply = call(served, "Hold", duration_s=300.0, reason="black friday", idempotency_key="h")
    assert 299.0 < reply.hold.remaining_s <= 300.0
    assert [h.reason for h in served.state().holds] == ["black friday"]
    assert [h.reason for h in call(served, "Resume").ended] == ["black friday"]
    assert not served.state().holds
    assert not call(served, "Resume").ended


@pytest.mark.parametrize("duration_s", [0.0, -5.0, float("nan"), 1e9])
def test_a_hold_needs_a_length(served: Served, duration_s: float) -> None:
    error, _ = refusal(lambda: call(served, "Hold", duration_s=duration_s))
    assert isinstance(error, InvalidRequestError)


# ---------------------------------------------------------------- what if


def test_the_forecast_is_that_of_the_pipeline(served: Served) -> None:
    for _ in range(3):
        served.step()
    reply = call(served, "GetForecast")
    expected = served.loop.pipeline.predictor.forecast()
    assert [h.ahead for h in reply.horizons] == list(served.loop.pipeline.predictor.horizons)
    assert tuple(t.mean_per_s for t in reply.horizons[0].types) == expected.mean
    assert tuple(t.p90_per_s for t in reply.horizons[0].types) == expected.q90
    assert [t.type for t in reply.horizons[0].types] == ["short", "long"]


def test_a_plan_for_a_given_mix_is_the_planners(served: Served) -> None:
    served.step()
    many, few = (
        call(served, "GetPlan", demand=[pb.TypeDemand(type="long", rate_per_s=rate)])
        for rate in (4.0, 1.0)
    )
    assert many.deployment_key == many.deployments[0].key == "4xtp1pp1"
    assert many.deployments[0].switch_s == 0.0
    for one, other in zip(many.deployments, few.deployments, strict=False):
        if one.key == other.key:  # capacity does not change; it is in multiples of the demand
            assert 4.0 * one.headroom == pytest.approx(other.headroom, rel=0.03)
    best = max(many.deployments, key=lambda d: d.headroom)
    assert "optimum" in best.origin
    assert served.loop.counters.num_switches_started == 0
    present = call(served, "GetPlan").deployments[0]
    assert present.headroom == pytest.approx(served.loop.records[-1].candidates[0].headroom)


@pytest.mark.parametrize(
    "demand", [{"middling": 1.0}, {"short": -1.0}, {"short": float("nan")}, {"short": 0.0}]
)
def test_a_demand_that_makes_no_sense_is_refused(served: Served, demand: dict[str, float]) -> None:
    served.step()
    rates = [pb.TypeDemand(type=name, rate_per_s=rate) for name, rate in demand.items()]
    error, _ = refusal(lambda: call(served, "GetPlan", demand=rates))
    assert isinstance(error, InvalidRequestError)


# ---------------------------------------------------------------- policies


def test_policies_are_listed_with_what_is_against_them(served: Served) -> None:
    found = {p.name: p for p in call(served, "ListPolicies").policies}
    assert list(found) == [
        *("keep", "myopic", "hysteresis"),
        *("broken", "first", "other_grid", "second"),
    ]
    assert [name for name, p in found.items() if p.is_active] == ["keep"]
    compatible = {name for name, p in found.items() if p.is_compatible}
    assert compatible == set(found) - {"broken", "other_grid"}
    assert "trained on features" in found["other_grid"].problem
    assert "not valid JSON" in found["broken"].problem
    assert found["first"].problem == ""
    assert found["second"].problem == "trained with another min_dwell_s"
    assert len({found["first"].digest, found["second"].digest}) == 2


def test_a_policy_is_exchanged_while_running_and_taken_back(served: Served) -> None:
    served.step()
    loaded = call(served, "LoadPolicy", name="first")
    assert (loaded.policy.name, loaded.policy.is_active, loaded.previous.name) == (
        *("first", True),
        "keep",
    )
    served.step()
    assert served.loop.records[-1].policy == "ppo"
    assert served.state().policy == "first"
    assert served.state().policy_digest == loaded.policy.digest
    call(served, "LoadPolicy", name="second")
    assert call(served, "Rollback").policy.name == "first"
    assert call(served, "Rollback").policy.name == "keep"
    served.step()
    assert served.loop.records[-1].policy == "keep"
    error, _ = refusal(lambda: call(served, "Rollback"))
    assert isinstance(error, NotFoundError)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("other_grid", CheckpointError),
        ("broken", CheckpointError),
        ("nobody", NotFoundError),
        ("../first", NotFoundError),
        ("", NotFoundError),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_and_the_old_one_stays(
    served: Served, name: str, kind: type[TidewrightError]
) -> None:
    error, _ = refusal(lambda: call(served, "LoadPolicy", name=name))
    assert isinstance(error, kind)
    served.step()
    assert served.loop.records[-1].policy == "keep"


def test_a_canary_is_set_shown_and_ended(served: Served) -> None:
    served.step()
    reply = call(served, "SetCanary", name="first", fraction=0.25)
    assert (reply.canary.name, reply.canary.fraction) == ("first", 0.25)
    assert reply.canary.arm in ("active", "canary")
    assert not reply.canary.HasField("active_goodput")  # no block is over
    served.step()
    assert served.loop.records[-1].arm == reply.canary.arm
    assert served.state().canary.name == "first"
    assert served.state().policy == "keep"
    assert not call(served, "SetCanary").HasField("canary")
    assert not served.state().HasField("canary")
    served.step()
    assert served.loop.records[-1].arm == ""


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"name": "first"}, InvalidRequestError),
        ({"name": "first", "fraction": 1.0}, InvalidRequestError),
        ({"name": "other_grid", "fraction": 0.5}, CheckpointError),
        ({"name": "nobody", "fraction": 0.5}, NotFoundError),
    ],
)
def test_a_canary_that_cannot_be_is_refused(
    served: Served, fields: dict[str, Any], kind: type[TidewrightError]
) -> None:
    error, _ = refusal(lambda: call(served, "SetCanary", **fields))
    assert isinstance(error, kind)
    assert not served.state().HasField("canary")


def _verdict(verdicts: Path, policy: Path, passed: bool) -> None:
    reasons = [{"rule": "margin", "passed": passed, "text": "J is -0.1 from the active policy's"}]
    told = {"digest": policy_digest(policy), "passed": passed, "reasons": reasons, "made_at": ""}
    (verdicts / f"{policy.name}.gate.json").write_text(json.dumps(sealed(told)))


def test_with_a_gate_only_what_passed_it_decides(
    synthetic_cluster: ProfiledCluster, policies: Path, tmp_path: Path
) -> None:
    served = Served(synthetic_cluster, policies, verdicts=tmp_path)
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("LoadPolicy", {"name": "first"}),
        ("SetCanary", {"name": "first", "fraction": 0.5}),
    )
    try:
        served.step()
        for passed, why in ((None, "0 verdicts"), (False, "J is -0.1 from the active policy's")):
            if passed is not None:
                _verdict(tmp_path, policies / "first", passed)
            for method, fields in calls:
                error, raised = refusal(lambda m=method, f=fields: call(served, m, **f))
                assert isinstance(error, UngatedPolicyError)
                assert why in str(error)
                assert "evaluate.py ope LOG --policy" in str(error)
                assert raised.code() is grpc.StatusCode.FAILED_PRECONDITION
        _verdict(tmp_path, policies / "first", True)
        (tmp_path / "second.gate.json").write_text((tmp_path / "first.gate.json").read_text())
        for method, fields in calls:
            call(served, method, **fields)
            error, _ = refusal(lambda m=method, f=fields: call(served, m, **f | {"name": "second"}))
            assert "2 verdicts in" in str(error)  # of other files
        call(served, "LoadPolicy", name="hysteresis")  # a rule
        listed = call(served, "ListPolicies").policies
        problems = {p.name: p.problem for p in listed if p.is_compatible}
        assert problems["first"] == problems["keep"] == ""
        assert "with another min_dwell_s; policy" in problems["second"]
        assert "may not decide" in problems["second"]
        served.operations.roster.load("second", decides=False)  # as a shadow
    finally:
        served.close()


# ---------------------------------------------------------------- other engines


def _asked(snapshot: ClusterSnapshot, events: tuple[ClusterEvent, ...], session: str = "a") -> Any:
    request = pb.DecideRequest(session=session)
    to_proto(snapshot, request.snapshot)
    for event in events:
        to_proto(event, request.events.add())
    return request


@pytest.mark.parametrize("is_pushed", [False, True])
def test_decide_does_what_the_loop_does(
    served: Served, is_pushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own snapshots and events, told to Decide: the same candidates, masks, choice. With
    the events pushed before, all but the first decision are brief."""
    loop, worker, handed_over = served.loop, served.sessions.worker, []
    submit = worker.submit
    monkeypatch.setattr(worker, "submit", lambda *a: handed_over.append(a) or submit(*a))
    loop.policy_server.policy = HysteresisPolicy(loop.pipeline.observation_spec)
    loop.pipeline.reset(0.0)
    cursor = 0
    for _ in range(12):
        served.step(30)
        batch = served.cluster.events(cursor)
        cursor = batch.next_cursor
        assert loop.snapshot is not None
        events = batch.events
        if is_pushed:
            report = pb.ReportMetricsRequest(session="a")
            for event in events:
                to_proto(event, report.events.add())
            served.stub.ReportMetrics(report, timeout=WAIT_S)
            events = ()
        reply = served.stub.Decide(_asked(loop.snapshot, events), timeout=WAIT_S)
        record = loop.records[-1]
        assert (reply.executed_key, reply.chosen_key) == (record.executed_key, record.chosen_key)
        told = [(c.key, c.probability, c.mask_reason, c.headroom) for c in reply.candidates]
        known = [(c.key, c.probability, c.mask_reason, c.headroom) for c in record.candidates]
        assert told == known
        assert reply.propensity == record.propensity
        assert reply.HasField("plan") == (record.ticket is not None)
        if reply.HasField("plan"):
            plan = from_proto(SwitchPlan, reply.plan)
            assert plan.target.key == record.executed_key
            assert plan.expected_epoch == record.epoch
    assert loop.counters.num_switches_started > 0
    assert len(handed_over) == (1 if is_pushed else 12)


def test_only_brief_decisions_are_made_on_the_event_loop(served: Served) -> None:
    served.step()
    sessions, snapshot = served.sessions, served.cluster.snapshot()
    rule, other = HysteresisPolicy(served.loop.pipeline.observation_spec), KeepPolicy()
    assert not sessions.is_brief("a", rule, snapshot, 0), "nothing is known of the session"
    sessions.report("a", rule, (), 0)
    assert not sessions.is_brief("a", rule, snapshot, 0), "its deployments are not listed yet"
    sessions.decide("a", rule, snapshot, (), 0, None)
    assert sessions.is_brief("a", rule, snapshot, 0)
    assert not sessions.is_brief("a", other, snapshot, 0), "it may take up to its deadline"
    assert not sessions.is_brief("a", rule, snapshot, 1000), "events are many"
    lost = replace(snapshot, dead_devices=(0,))
    assert not sessions.is_brief("a", rule, lost, 0), "another list of deployments"
    with sessions._sessions["a"].lock:
        assert not sessions.is_brief("a", rule, snapshot, 0), "its turn comes later"


def test_sessions_have_histories_of_their_own(served: Served) -> None:
    served.step()
    batch, snapshot = served.cluster.events(0), served.cluster.snapshot()
    busy = served.stub.Decide(_asked(snapshot, batch.events, "busy"), timeout=WAIT_S)
    idle = served.stub.Decide(_asked(snapshot, (), "idle"), timeout=WAIT_S)
    assert sum(r.forecast_p50_per_s for r in busy.rates) > 0
    assert sum(r.forecast_p50_per_s for r in idle.rates) == 0
    assert served.loop.counters.num_decisions == 1  # the loop's own went on undisturbed


def test_metrics_may_be_pushed_between_decisions(served: Served) -> None:
    served.step()
    batch, snapshot = served.cluster.events(0), served.cluster.snapshot()
    half = len(batch.events) // 2
    report = pb.ReportMetricsRequest(session="pushed")
    for event in batch.events[:half]:
        to_proto(event, report.events.add())
    assert served.stub.ReportMetrics(report, timeout=WAIT_S).num_events == half
    pushed = served.stub.Decide(_asked(snapshot, batch.events[half:], "pushed"), timeout=WAIT_S)
    whole = served.stub.Decide(_asked(snapshot, batch.events, "whole"), timeout=WAIT_S)
    assert pushed.executed_key == whole.executed_key
    one, other = (sum(r.forecast_p50_per_s for r in reply.rates) for reply in (pushed, whole))
    assert one == pytest.approx(other, rel=0.02)  # of which type they are is learnt in batches


def test_a_draw_by_seed_can_be_repeated(served: Served) -> None:
    served.step()
    snapshot, events = served.cluster.snapshot(), served.cluster.events(0).events

    def drawn(session: str, seed: int) -> str:
        request = _asked(snapshot, events, session)
        request.seed = seed
        return str(served.stub.Decide(request, timeout=WAIT_S).chosen_key)

    call(served, "LoadPolicy", name="first")
    choices = [drawn(f"s{seed}", seed) for seed in range(6)]
    assert choices == [drawn(f"t{seed}", seed) for seed in range(6)]


def test_a_decision_of_nothing_or_of_no_session_is_refused(served: Served) -> None:
    served.step()
    snapshot = served.cluster.snapshot()
    for request, said in (
        (pb.DecideRequest(session="a"), "snapshot is missing"),
        (_asked(snapshot, (), ""), "name has 0 characters"),
        (_asked(snapshot, (), "x" * 201), "name has 201 characters"),
    ):
        error, _ = refusal(lambda request=request: served.stub.Decide(request, timeout=WAIT_S))
        assert isinstance(error, InvalidRequestError)
        assert said in str(error)
    served.stub.Decide(_asked(snapshot, (), "back"), timeout=WAIT_S)
    earlier = _asked(snapshot, (), "back")
    earlier.snapshot.now_s -= 1.0
    error, _ = refusal(lambda: served.stub.Decide(earlier, timeout=WAIT_S))
    assert "send them in order" in str(error)


def test_the_longest_unused_session_is_forgotten(
    synthetic_cluster: ProfiledCluster,
) -> None:
    pipeline = build_pipeline(synthetic_cluster, TYPING, DecisionConfig(grid_s=GRID_S))
    sessions, keep = Sessions(pipeline, 10.0, max_sessions=2), KeepPolicy()
    event = ClusterEvent(0, 1.0, "arrived")  # type: ignore[arg-type]
    for name, number in (("a", 1), ("b", 1), ("a", 2), ("c", 1), ("a", 3), ("b", 1)):
        assert sessions.report(name, keep, (event,), 0) == number
    sessions.close()
