"""Environments in worker processes: the same episodes as in one, and no process is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from engine.errors import InvalidRequestError, UnavailableError
from envs.experiment import Experiment, build_envs, build_venv
from envs.registered import load_experiment
from envs.serving_env import ServingEnv
from envs.vec_env import ServingVecEnv, WorkerVecEnv

STEPS, NUM_ENVS = 4, 3
SETTINGS = {
    "env.episode_s": STEPS * 15.0,
    "env.num_envs": NUM_ENVS,
    "ppo.group_size": 1,
    "workload.load": [0.3, 0.3],
}
WAIT_MS = 60_000  # for the end of a process


def experiment(num_workers: int) -> Experiment:
    return load_experiment(None, SETTINGS | {"env.num_workers": num_workers})


@pytest.fixture(scope="module")
def venv() -> Iterator[WorkerVecEnv]:
    """Two workers, one environment and two."""
    made = build_venv(experiment(2))
    assert isinstance(made, WorkerVecEnv)
    yield made
    made.close()
    made.close()


def test_seeds_give_the_same_episodes_as_in_one_process(venv: WorkerVecEnv) -> None:
    """Over the end of an episode, with switches: everything that a learner sees."""
    alone = build_venv(experiment(0))
    assert isinstance(alone, ServingVecEnv)
    for each in (venv, alone):
        each.seed(5)
    np.testing.assert_array_equal(venv.reset(), alone.reset())
    rng, switched = np.random.default_rng(0), False
    for step in range(2 * STEPS):
        masks = get_action_masks(alone)
        np.testing.assert_array_equal(get_action_masks(venv), masks)
        actions = (rng.random(masks.shape) * masks).argmax(axis=1)
        ours, theirs = venv.step(actions), alone.step(actions)
        for mine, other in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype
        for mine, other in zip(ours[3], theirs[3], strict=True):
            small = {k: v for k, v in other.items() if k not in ("decision", "traffic")}
            ends = [info.pop("terminal_observation", None) for info in (mine, small)]
            assert (ends[0] is not None) == (step % STEPS == STEPS - 1)
            np.testing.assert_array_equal(*ends)
            assert mine == small
        assert ours[2].all() == (step % STEPS == STEPS - 1)
        assert venv.reset_infos == alone.reset_infos
        switched |= any(info["ticket"] for info in theirs[3])
    assert switched
    alone.close()


def test_attributes_and_methods_are_those_of_the_chosen_environments(venv: WorkerVecEnv) -> None:
    venv.reset()
    venv.set_attr("mark", 7, indices=[2])
    venv.set_attr("mark", 3, indices=[0, 1])
    assert venv.get_attr("mark", indices=[2, 0]) == [7, 3]
    assert venv.get_attr("grid_s") == [15.0] * NUM_ENVS
    assert venv.env_method("get_wrapper_attr", "mark", indices=[1]) == [3]
    assert venv.has_attr("mark")
    assert not venv.has_attr("nothing_of_that_name")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        venv.get_attr("nothing_of_that_name")
    assert venv.env_is_wrapped(ServingEnv) == [False] * NUM_ENVS


def test_maskable_ppo_learns_on_workers(venv: WorkerVecEnv) -> None:
    assert is_masking_supported(venv)
    model = MaskablePPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=1, seed=0)
    model.learn(24)
    assert get_action_masks(venv).shape == (NUM_ENVS, venv.action_space.n)


# ---------------------------------------------------------------- processes


def build_nothing(numbers: Sequence[int]) -> list[ServingEnv]:
    raise RuntimeError(f"no environments {list(numbers)}")


def wait_until_gone(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(WAIT_MS), "a worker is left"
        os.close(descriptor)


def test_a_failure_to_build_is_told_and_leaves_no_process() -> None:
    spec = experiment(0).pipeline().observation_spec
    with pytest.raises(UnavailableError, match=r"no environments \[0, 1\]"):
        WorkerVecEnv(build_nothing, spec, 2, 1)


def test_the_end_of_a_worker_is_told() -> None:
    tried = experiment(0)
    spec = tried.pipeline().observation_spec
    venv = WorkerVecEnv(partial(build_envs, tried), spec, 1, 1)
    venv.reset()
    os.kill(venv.worker_pids[0], signal.SIGKILL)
    with pytest.raises(UnavailableError, match=r"env-worker-0 has ended with exit code -9"):
        venv.step(np.zeros(1, np.int64))
    venv.close()


OWNER = """
import sys
sys.path[:0] = {path!r}
from test_env_workers import experiment
from envs.experiment import build_venv
if __name__ == "__main__":
    venv = build_venv(experiment(2))
    venv.reset()
    print(*venv.worker_pids, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_owner(number: signal.Signals) -> None:
    """Killed, or by a Ctrl-C that all processes of the terminal get."""
    script = OWNER.format(path=[os.getcwd(), os.path.dirname(__file__)])
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        with owner.stdin, owner.stdout:
            descriptors = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
            assert len(descriptors) == 2
            if number is signal.SIGKILL:
                owner.kill()
            else:
                os.killpg(owner.pid, number)
            owner.wait(WAIT_MS / 1000)
            wait_until_gone(descriptors)
    finally:
        if owner.poll() is None:
            os.killpg(owner.pid, signal.SIGKILL)
            owner.wait()


def test_more_workers_than_environments_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"env.num_workers is 4 and env.num_envs 3"):
        build_venv(experiment(4))
