"""A training run: from a fresh, cloned or trained policy to a better one, and what it leaves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from engine.errors import InvalidRequestError
from policies.base import ObservationSpec
from policies.callbacks import Curve, Interrupt, Saver, Selection
from policies.learner import CandidatePPO, frozen
from policies.networks import Network
from policies.normalized_venv import NormalizedVecEnv
from policies.normalizer import ObservationNormalizer, RunningMoments
from policies.ppo import PpoConfig, PpoPolicy

Points = tuple[tuple[int, float], ...]  # (decisions so far, value)


@dataclass(frozen=True, slots=True)
class LearningState:
    """All that training goes on from."""

    policy: PpoPolicy
    optimizer_state: dict[str, Any] | None = None  # torch.optim state_dict; None: a fresh Adam
    num_timesteps: int = 0
    returns: RunningMoments | None = None  # of the discounted return, which scales rewards
    reward_curve: Points = ()  # mean episode reward, each rollout
    validation_curve: Points = ()  # score of the deterministic policy, each evaluation

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps beside policy and optimiser."""
        return {
            "num_timesteps": self.num_timesteps,
            "returns": None if self.returns is None else self.returns.to_json(),
            "reward_curve": self.reward_curve,
            "validation_curve": self.validation_curve,
        }


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The state at the end, and how it went."""

    state: LearningState
    wall_s: float
    interrupted: bool
    stopped_early: bool

    @property
    def policy(self) -> PpoPolicy:
        return self.state.policy


@dataclass(frozen=True, slots=True)
class Watch:
    """What is done besides learning. None of it changes what is learned but for stopping."""

    validate: Callable[[PpoPolicy], float] | None = None  # the more the better
    eval_freq: int = 0  # decisions between validations; 0: none
    patience: int = 0  # validations without gain after which training stops; 0: never
    save: Callable[[str, LearningState], None] = lambda name, state: None  # "policy" or "last"
    save_freq: int = 0  # decisions between saves of "last"; 0: at the end alone
    report: Callable[[int], None] | None = None  # decisions so far, after each rollout
    scored: Callable[[int, float], bool] | None = None  # of a validation; False stops training
    log_dir: Path | None = None  # of TensorBoard
    progress: bool = False  # a bar with the time left
    num_threads: int = 1  # of torch


def train(
    venv: VecEnv,
    config: PpoConfig,
    spec: ObservationSpec,
    seed: int,
    watch: Watch | None = None,
    start: LearningState | None = None,
    prior: PpoPolicy | None = None,
) -> TrainingResult:
    """Train on `venv` (raw flat observations, `action_masks` per environment) up to
    `config.n_timesteps` decisions, those before `start` included.

    The best policy by validation is handed to `watch.save` as "policy", the state at the end as
    "last"; without validation both are the end. One interrupt (Ctrl-C) ends training after the step
    under way and keeps what was learned. Equal seeds give equal weights on one machine; a run that
    was interrupted and resumed meets other episodes than one that was not. The caller owns and
    closes `venv`. Raises InvalidRequestError.
    """
    watch = watch or Watch()
    torch.set_num_threads(watch.num_threads)
    check_start(config, spec, start, prior)
    run = _Run(venv, config, spec, seed, watch, start, prior)
    started = time.perf_counter()
    run.learn()
    return TrainingResult(
        run.state(),
        time.perf_counter() - started,
        run.interrupt.is_set,
        run.selection.stopped,
    )


def check_start(
    config: PpoConfig,
    spec: ObservationSpec,
    start: LearningState | None,
    prior: PpoPolicy | None,
) -> None:
    """Refuses a start that does not fit. Raises InvalidRequestError."""
    if start is not None and start.num_timesteps >= config.n_timesteps:
        raise InvalidRequestError(
            f"this policy was trained for {start.num_timesteps} decisions already, and n_timesteps "
            f"counts them: it is {config.n_timesteps}; give a larger --n-timesteps."
        )
    if config.kl_prior_coef > 0.0 and prior is None:
        raise InvalidRequestError(
            f"ppo.kl_prior_coef is {config.kl_prior_coef:g} and there is no prior; set "
            "cloning.num_decisions, start from a trained policy with -i, or set it to 0."
        )
    for policy in (None if start is None else start.policy, prior):
        if policy is None:
            continue
        if policy.network_config.hidden_size != config.hidden_size:
            raise InvalidRequestError(
                f"the policy to start from has hidden_size {policy.network_config.hidden_size}, "
                f"ppo.hidden_size is {config.hidden_size}; set it to the policy's."
            )
        if policy.spec != spec:
            raise InvalidRequestError(
                f"the policy to start from was trained on observation {policy.spec.hash}, this "
                f"experiment has {spec.hash}; use the same features and grid."
            )


class _Run:
    """One call of `train`: the learner, its statistics and its callbacks."""

    def __init__(
        self,
        venv: VecEnv,
        config: PpoConfig,
        spec: ObservationSpec,
        seed: int,
        watch: Watch,
        start: LearningState | None,
        prior: PpoPolicy | None,
    ) -> None:
        self.config, self.spec, self.watch = config, spec, watch
        self.normalizer = ObservationNormalizer(spec)
        if start is not None:
            self.normalizer = copy.deepcopy(start.policy.normalizer)
        returns = copy.deepcopy(start.returns) if start is not None else None
        self.venv = NormalizedVecEnv(
            VecMonitor(venv), self.normalizer, config, config.kl_prior_coef > 0.0, returns
        )
        # a resumed run must not meet the first episodes again
        passed = start.num_timesteps if start is not None else 0
        self.model = CandidatePPO(self.venv, config, spec, seed + passed, watch.log_dir)
        if start is not None:
            self._continue_from(start)
        if prior is not None and config.kl_prior_coef > 0.0:
            self.model.prior = frozen(copy.deepcopy(prior.network))
        self.interrupt = Interrupt()
        self.curve = Curve(watch.report, start.reward_curve if start is not None else ())
        scores = start.validation_curve if start is not None else ()
        self.selection = Selection(
            self._validator(),
            self._keep_best,
            watch.eval_freq,
            watch.patience,
            watch.scored,
            scores,
        )
        self.saver = Saver(lambda: watch.save("last", self.state()), watch.save_freq)

    @property
    def network(self) -> Network:
        return self.model.policy.network

    def _continue_from(self, start: LearningState) -> None:
        self.network.load_state_dict(start.policy.network.state_dict())
        if start.optimizer_state is not None:
            # Adam counts its steps in place
            self.model.policy.optimizer.load_state_dict(copy.deepcopy(start.optimizer_state))
        self.model.num_timesteps = start.num_timesteps

    def _validator(self) -> Callable[[], float] | None:
        validate = self.watch.validate
        if validate is None or not self.watch.eval_freq:
            return None
        return lambda: validate(self.policy())

    def _keep_best(self) -> None:
        self.watch.save("policy", self.state())

    def policy(self) -> PpoPolicy:
        """As it is now; a copy."""
        network, normalizer = copy.deepcopy(self.network), copy.deepcopy(self.normalizer)
        return PpoPolicy(self.spec, network, self.config.network, normalizer)

    def state(self) -> LearningState:
        """As it is now; copies."""
        return LearningState(
            policy=self.policy(),
            optimizer_state=copy.deepcopy(self.model.policy.optimizer.state_dict()),
            num_timesteps=int(self.model.num_timesteps),
            returns=copy.deepcopy(self.venv.returns),
            reward_curve=tuple(self.curve.points),
            validation_curve=tuple(self.selection.points),
        )

    def learn(self) -> None:
        passed = self.model.num_timesteps
        with self.interrupt.listening():
            try:
                self.model.learn(
                    self.config.n_timesteps - passed,
                    callback=[self.interrupt, self.curve, self.selection, self.saver],
                    tb_log_name="ppo",
                    reset_num_timesteps=passed == 0,
                    progress_bar=self.watch.progress,
                )
            except KeyboardInterrupt:
                self.interrupt.is_set = True
        if not self.interrupt.is_set:
            self.selection.finish()
        if not self.selection.points:
            self._keep_best()
        self.watch.save("last", self.state())


def state_from_json(
    policy: PpoPolicy, optimizer_state: dict[str, Any], manifest: dict[str, Any]
) -> LearningState:
    """The state that a checkpoint holds; `manifest` as `LearningState.to_json` wrote it."""
    returns = manifest.get("returns")
    return LearningState(
        policy,
        optimizer_state if optimizer_state["param_groups"] else None,
        int(manifest.get("num_timesteps", 0)),
        None if returns is None else RunningMoments.from_json(returns, 1),
        _points(manifest.get("reward_curve", ())),
        _points(manifest.get("validation_curve", ())),
    )


def _points(pairs: Iterable[Sequence[float]]) -> Points:
    return tuple((int(at), float(value)) for at, value in pairs)
