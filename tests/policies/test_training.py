"""What goes on around learning: the best is kept, runs stop, go on and are logged."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pick_the_best import SPEC, PickTheBest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.errors import InvalidRequestError
from policies.curves import band, plot_curves
from policies.ppo import PpoConfig, PpoPolicy
from policies.training import LearningState, TrainingResult, Watch, state_from_json, train

CONFIG = PpoConfig(n_timesteps=2048, n_steps=16, batch_size=64, n_epochs=2, hidden_size=8)
ROLLOUT = 256  # 16 environments, 16 steps


def run(
    watch: Watch | None = None,
    config: PpoConfig = CONFIG,
    start: LearningState | None = None,
    prior: PpoPolicy | None = None,
) -> TrainingResult:
    return train(PickTheBest(16, 0), config, SPEC, 0, watch, start, prior)


def weights(state: LearningState) -> dict[str, torch.Tensor]:
    return dict(state.policy.network.state_dict())


class Kept:
    """What training asked to save."""

    def __init__(self) -> None:
        self.states: list[tuple[str, LearningState]] = []

    def __call__(self, name: str, state: LearningState) -> None:
        self.states.append((name, state))

    def at(self, name: str) -> list[int]:
        return [state.num_timesteps for kept, state in self.states if kept == name]


def test_the_best_by_validation_is_kept_and_choosing_changes_nothing() -> None:
    scores, kept = iter([1.0, 3.0, 2.0, 3.0, 4.0]), Kept()
    result = run(Watch(lambda policy: next(scores), 512, save=kept))
    assert result.state.validation_curve == (
        (0, 1.0), (512, 3.0), (1024, 2.0), (1536, 3.0), (2048, 4.0),
    )  # fmt: skip
    assert kept.at("policy") == [0, 512, 1536, 2048]  # on a tie the one that has learned more
    assert kept.at("last") == [2048]
    assert not result.stopped_early
    plain = weights(run().state)
    assert all(torch.equal(plain[k], w) for k, w in weights(result.state).items())


def test_it_stops_when_patience_is_over_or_when_told() -> None:
    scores, kept = iter([5.0, 1.0, 2.0, 3.0]), Kept()
    result = run(Watch(lambda policy: next(scores), ROLLOUT, patience=2, save=kept))
    assert result.stopped_early
    assert not result.interrupted
    assert [at for at, _ in result.state.validation_curve] == [0, 256, 512]
    assert kept.at("policy") == [0]
    told: list[tuple[int, float]] = []

    def scored(at: int, score: float) -> bool:
        told.append((at, score))
        return len(told) < 2

    assert run(Watch(lambda policy: 7.0, ROLLOUT, scored=scored)).stopped_early
    assert told == [(0, 7.0), (256, 7.0)]


def test_without_validation_the_last_policy_is_the_policy() -> None:
    kept = Kept()
    run(Watch(save=kept, save_freq=1024))
    assert kept.at("policy") == [2048]
    assert kept.at("last") == [1024, 2048]


def test_ctrl_c_ends_it_after_a_decision_and_it_goes_on_from_there() -> None:
    def interrupt(num_timesteps: int) -> None:
        if num_timesteps == 1024:
            os.kill(os.getpid(), signal.SIGINT)

    kept, before = Kept(), signal.getsignal(signal.SIGINT)
    first = run(Watch(report=interrupt, save=kept))
    assert signal.getsignal(signal.SIGINT) is before
    assert first.interrupted
    assert 1024 <= first.state.num_timesteps < 1024 + ROLLOUT
    assert kept.at("last") == [first.state.num_timesteps]
    assert first.state.optimizer_state is not None
    steps = first.state.optimizer_state["state"][0]["step"]

    saved = first.state.to_json()
    start = state_from_json(first.policy, first.state.optimizer_state, saved)
    assert start.returns is not None
    assert start.returns.count == 1024 + 16  # the decision under way was carried out
    second = run(start=start).state
    assert second.num_timesteps >= 2048
    assert second.optimizer_state is not None
    assert second.optimizer_state["state"][0]["step"] > steps
    assert second.reward_curve[: len(start.reward_curve)] == start.reward_curve
    assert [at for at, _ in second.reward_curve] == sorted(at for at, _ in second.reward_curve)
    rate = second.optimizer_state["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.0, abs=1e-9)  # has fallen to zero over both parts together


def test_starts_that_do_not_fit_are_refused() -> None:
    done = run().state
    with pytest.raises(InvalidRequestError, match="trained for 2048 decisions already"):
        run(start=done)
    with pytest.raises(InvalidRequestError, match="there is no prior"):
        run(config=replace(CONFIG, kl_prior_coef=0.1))
    longer = replace(CONFIG, n_timesteps=4096)
    with pytest.raises(InvalidRequestError, match="has hidden_size 8"):
        run(config=replace(longer, hidden_size=16), start=done)
    more_rows = replace(done, policy=done.policy.with_max_candidates(9))
    with pytest.raises(InvalidRequestError, match="was trained on observation"):
        run(config=longer, start=more_rows)


def test_a_strong_prior_keeps_the_policy_where_it_was() -> None:
    """And its statistics too: the prior must see what it was trained on."""
    start = LearningState(run(config=replace(CONFIG, n_timesteps=ROLLOUT)).policy)
    moved = []
    for coefficient in (0.0, 100.0):
        config = replace(CONFIG, kl_prior_coef=coefficient, kl_prior_decay=False, target_kl=None)
        end = run(config=config, start=start, prior=start.policy).state.policy
        exam = PickTheBest(200, seed=9)
        exam.reset()
        pairs = [(end.probabilities(o), start.policy.probabilities(o)) for o in exam.now]
        moved.append(float(np.mean([np.abs(p - q).sum() for p, q in pairs])))
    assert moved[1] < 0.2 * moved[0]
    assert end.normalizer.to_json() == start.policy.normalizer.to_json()


class WithTerms(PickTheBest):
    def step_wait(self):  # type: ignore[no-untyped-def]
        observations, rewards, dones, infos = super().step_wait()
        for info in infos:
            info["reward_terms"] = {"latency": -2.0, "switching": 0.5}
        return observations, rewards, dones, infos


def test_tags_are_those_of_stable_baselines3_and_of_cleanrl(tmp_path: Path) -> None:
    watch = Watch(lambda policy: 0.5, 1024, log_dir=tmp_path)
    train(WithTerms(16, 0), CONFIG, SPEC, 0, watch)
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        *(f"losses/{n}" for n in ("approx_kl", "clipfrac", "explained_variance", "policy_loss")),
        *(f"losses/{n}" for n in ("value_loss", "entropy")),
        *(f"charts/{n}" for n in ("episodic_return", "episodic_length", "SPS", "learning_rate")),
        *(f"train/{n}" for n in ("approx_kl", "clip_fraction", "entropy_loss", "value_loss")),
        *(f"train/{n}" for n in ("explained_variance", "policy_gradient_loss", "learning_rate")),
        *("rollout/ep_rew_mean", "time/fps", "eval/mean_reward", "reward/latency"),
    }
    assert {event.value for event in events.Scalars("reward/switching")} == {0.5}
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [0, 1024, 2048]


def test_bands_by_hand(tmp_path: Path) -> None:
    at, mean, spread = band([[(0, 0.0), (10, 10.0)], [(5, 1.0), (10, 4.0), (20, 9.0)]])
    assert at.tolist() == [5, 10]
    assert mean.tolist() == [3.0, 7.0]
    assert spread.tolist() == [2.0, 3.0]
    plot_curves(tmp_path / "none.png", {"reward": [[]]})
    assert not (tmp_path / "none.png").exists()
    plot_curves(tmp_path / "two.png", {"reward": [[(0, 1.0), (1, 2.0)]], "validation": [[]]})
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
