from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from controller.slo import CLASSES, DEFAULT_SLO, find_slo, read_slo
from engine.cluster import RequestOutcome, RequestStatus, SloSpec
from engine.errors import InvalidRequestError
from envs.reward import slo_met
from policies.base import TrafficColumns


def test_shipped_targets() -> None:
    slo = read_slo()
    assert slo.spec("cpu x86_64", "interactive") == SloSpec(2.0, 0.2)
    assert slo.spec("NVIDIA H100 SXM 80GB, fitted", "interactive") == SloSpec(0.45, 0.04, 0.0005)
    assert find_slo("batch", "cpu x86_64") == slo.spec("cpu x86_64", "batch")
    assert find_slo(SloSpec(1.0, 0.1), "anything") == SloSpec(1.0, 0.1)


@pytest.mark.parametrize(
    ("device", "name", "message"),
    [
        ("tpu v5", "batch", "no service levels for device 'tpu v5', only for cpu, nvidia"),
        ("cpu", "bulk", "service level 'bulk' is not known; expected interactive or batch"),
    ],
)
def test_what_has_no_targets_is_refused(device: str, name: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_slo().spec(device, name)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("attainment",), 1.5, "attainment .* is 1.5: Input should be less than or equal to 1"),
        (("attainment",), None, "attainment .* is None: Input should be a valid number"),
        (("unfinished",), 0.0, "unfinished .* is 0.0: Input should be 'worst'"),
        (("pools", "cpu", "interactive", "tpot_s"), 0, "pools.cpu.interactive.tpot_s .* is 0"),
        (("pools", "cpu", "interactive", "tbt_s"), 1, "unknown key 'pools.cpu.interactive.tbt_s'"),
        (("pools", "cpu", "batch"), "", "pools.cpu.batch .* is ''"),
        (
            ("pools", "gpu"),
            {"batch": {"ttft_s": 1, "tpot_s": 1}},
            "pool 'gpu' has targets for batch",
        ),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    content = yaml.safe_load(DEFAULT_SLO.read_text())
    section = content
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    wrong = tmp_path / "slo.yaml"
    wrong.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidRequestError, match=message):
        read_slo(wrong)


def test_both_forms_of_the_objective_agree() -> None:
    """Requests at random around the targets, one by one and as columns; a long prompt may wait
    longer for its first token."""
    rng, number = np.random.default_rng(0), 400
    arrival_s, prompt = rng.uniform(0, 9, number), rng.integers(1, 900, number)
    output, finished = rng.integers(1, 5, number), rng.random(number) < 0.9
    first_s = arrival_s + rng.uniform(0, 1.5, number)
    finish_s = first_s + (output - 1) * rng.uniform(0, 0.1, number)
    index = np.arange(number)
    columns = TrafficColumns(
        arrival_s, prompt, index, finished, arrival_s, first_s, finish_s, prompt, output
    )
    for slo in (
        SloSpec(),
        SloSpec(0.5, 0.05),
        SloSpec(0.5, 0.05, 0.001),
        SloSpec(0.0, 0.05, 0.001),
    ):
        one_by_one = [
            slo.is_met_by(
                RequestOutcome(
                    str(i),
                    RequestStatus.FINISHED if finished[i] else RequestStatus.REJECTED,
                    arrival_s[i],
                    first_s[i],
                    finish_s[i],
                    int(prompt[i]),
                    int(output[i]),
                    0,
                ),
            )
            for i in index
        ]
        assert slo_met(slo, columns).tolist() == one_by_one
    assert slo_met(SloSpec(0.5), columns).sum() < slo_met(SloSpec(0.5, 0.0, 0.001), columns).sum()


def test_experiments_name_a_class() -> None:
    for name in ("demo", "quick", "scenarios"):
        content = yaml.safe_load((DEFAULT_SLO.parent / f"{name}.yaml").read_text())
        assert content["slo"] in CLASSES, "targets in seconds belong into configs/slo.yaml"
