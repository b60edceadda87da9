"""Search for hyper-parameters with Optuna: each trial is a training run, scored by validation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import InvalidRequestError
from envs.experiment_config import ExperimentConfig
from envs.fleet import Job, train_quietly
from envs.ray_tasks import RayTasks, ray_cluster
from envs.training import Run, RunOptions, run_training

SAMPLERS, PRUNERS = ("tpe", "random"), ("median", "halving", "none")
EVALUATIONS = 5  # of a trial, where the configuration says none


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How a study goes about it."""

    n_trials: int = 20  # in all; a study that has some goes on
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "halving", "none"] = "median"
    storage: str | None = None  # URL of a database; None: study.db in the run's folder
    study_name: str = "tidewright"


def optimize(
    config: ExperimentConfig, options: RunOptions, search: SearchOptions, ray_address: str | None
) -> tuple[dict[str, Any], bool]:
    """Run what is left of the trials; the best one's settings are written to best.json, to be put
    under `ppo:`. Gives a summary and whether the search was interrupted.

    With Ray, trials run beside one another and none is pruned. Raises InvalidRequestError.
    """
    study = _study(options.out, search, config.seed)
    left = search.n_trials - sum(t.state.is_finished() for t in study.trials)
    if ray_address is None:
        interrupted = _one_by_one(study, config, options, left)
    else:
        interrupted = False
        with ray_cluster(ray_address) as tasks:
            _side_by_side(study, config, options, left, tasks)
    return _summary(study, options.out), interrupted


def suggest(trial: Any, config: ExperimentConfig) -> dict[str, Any]:
    """Fields of PpoConfig. The prior's weight is sought where there is a prior."""
    found = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256, 512]),
        "n_epochs": trial.suggest_int("n_epochs", 3, 10),
        "gamma": 1.0 - trial.suggest_float("one_minus_gamma", 0.01, 0.1, log=True),
        "gae_lambda": trial.suggest_float("gae_lambda", 0.8, 0.98),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-4, 3e-2, log=True),
    }
    if config.cloning.num_decisions:
        found["kl_prior_coef"] = trial.suggest_float("kl_prior_coef", 0.01, 1.0, log=True)
    return found


def trial_job(trial: Any, config: ExperimentConfig, options: RunOptions) -> Job:
    """The run of a trial, in a folder of its own."""
    ppo = dataclasses.replace(config.ppo, **suggest(trial, config))
    section = config.evaluation
    if not section.eval_freq:
        freq = max(1, config.ppo.n_timesteps // EVALUATIONS)
        section = section.model_copy(update={"eval_freq": freq})
    out = options.out / f"trial{trial.number}"
    return (
        config.model_copy(update={"ppo": ppo, "evaluation": section}),
        dataclasses.replace(options, out=out, compare=False, resume=False),
    )


def trial_score(run: Run) -> float:
    """Of the best policy that learning came to; a cloned start is the same in every trial."""
    return max(value for at, value in run.state.validation_curve if at)


def _one_by_one(study: Any, config: ExperimentConfig, options: RunOptions, number: int) -> bool:
    from optuna.trial import TrialState

    for _ in range(number):
        trial = study.ask()

        def scored(at: int, score: float, trial: Any = trial) -> bool:
            trial.report(score, at)
            return not trial.should_prune()

        run = run_training(*trial_job(trial, config, options), scored)
        if run.interrupted:
            study.tell(trial, state=TrialState.FAIL)
            return True
        pruned = trial.should_prune()
        study.tell(
            trial, None if pruned else trial_score(run), TrialState.PRUNED if pruned else None
        )
    return False


def _side_by_side(
    study: Any, config: ExperimentConfig, options: RunOptions, number: int, tasks: RayTasks
) -> None:
    """As many trials under way as the cluster has CPUs."""
    running: dict[Any, Any] = {}
    while number or running:
        while number and len(running) < tasks.num_cpus:
            trial, number = study.ask(), number - 1
            running[tasks.start(train_quietly, *trial_job(trial, config, options))] = trial
        ended = tasks.first_of(list(running))
        (run,) = tasks.results([ended])
        study.tell(running.pop(ended), trial_score(run))


def _study(out: Path, search: SearchOptions, seed: int) -> Any:
    """Created, or gone on with. Trials that a killed process left under way are failed."""
    try:
        import optuna
    except ImportError as error:
        raise InvalidRequestError(
            "--optimize needs Optuna; install it with 'tidewright[hpo]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    storage = search.storage or f"sqlite:///{(out / 'study.db').resolve()}"
    study = optuna.create_study(
        storage=storage, study_name=search.study_name, direction="maximize", load_if_exists=True
    )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    seed += len(study.trials)  # what was drawn is not drawn again
    samplers: dict[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    pruners: dict[str, Any] = {
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=1),
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "none": optuna.pruners.NopPruner,
    }
    study.sampler, study.pruner = samplers[search.sampler](), pruners[search.pruner]()
    return study


def _summary(study: Any, out: Path) -> dict[str, Any]:
    done = [t for t in study.trials if t.value is not None and t.state.is_finished()]
    summary: dict[str, Any] = {
        "study": study.study_name,
        "trials": {t.number: [t.state.name.lower(), t.value] for t in study.trials},
    }
    if done:
        best = study.best_trial
        settings = dict(best.params)
        settings["gamma"] = 1.0 - settings.pop("one_minus_gamma")
        (out / "best.json").write_text(json.dumps(settings, indent=1) + "\n")
        summary["best"] = {"number": best.number, "score": best.value, "ppo": settings}
    return summary
