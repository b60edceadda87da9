"""From trained seeds and their verdict to a shipped policy: files, default, curves, card."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.study.config import StudyConfig
from envs.study.report import run_of, table
from envs.study.verdict import gains, interval, main_cells, seeds_of
from policies.artifact import GUARDED, HYSTERESIS, Artifact, read_artifact, write_artifact
from policies.baselines import HysteresisConfig
from policies.curves import plot_curves
from policies.guarded import GuardedConfig
from policies.manifest import MANIFEST, WEIGHTS, load_manifest

Result = Mapping[str, Any]
CARD, CURVES = "README.md", "learning_curve.png"
LIMITS = """**Limits.** It has met simulated engines only: step times are fitted to published
operator timings, no GPU engine was measured. It knows pools of the size and kind it was trained on;
of others it only knows that the features mean the same. Loads beyond what any deployment holds are
an overload for it as for every rule. Where traffic is unlike the training families' the members may
disagree; then the rule decides."""


def ship_seeds(runs: Mapping[str, Path], folder: Path, study: StudyConfig) -> Artifact:
    """Copies the chosen checkpoint of each run, without its optimiser, and plots all runs' curves;
    until there is a verdict hysteresis is the default. Raises CheckpointError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, checkpoint in runs.items():
        target = folder / name
        target.mkdir(exist_ok=True)
        for file in (MANIFEST, WEIGHTS):
            shutil.copyfile(checkpoint / file, target / file)
    manifests = [load_manifest(folder / name) for name in runs]
    curves = {
        "episode reward": [m["reward_curve"] for m in manifests],
        "validation": [m.get("validation_curve", ()) for m in manifests],
    }
    plot_curves(folder / CURVES, curves)
    artifact = Artifact(HYSTERESIS, tuple(runs), HysteresisConfig(), study.guarded)
    write_artifact(folder, artifact)
    return artifact


def cells_of(results: Sequence[Result], name: str) -> list[Result]:
    """The cells in which the policies of that artifact were scored."""
    return [r for r in results if r["cell"]["policy"] == name]


def decide_default(results: Sequence[Result], folder: Path) -> Artifact:
    """The stop rule: the trained policies decide only where the lower end of the interval of their
    gain over hysteresis is above zero. Both are set as they were tuned most often."""
    before = read_artifact(folder)
    cells = main_cells(cells_of(results, folder.name))
    default, rule, guard = HYSTERESIS, before.hysteresis, before.guarded
    if cells:
        _, low, _ = interval([gains(c, [GUARDED]) for c in cells])
        default = GUARDED if low > 0.0 else HYSTERESIS
        rule = HysteresisConfig(**_most_often(c["hysteresis"] for c in cells))
        guard = GuardedConfig(**_most_often(c["guarded"] for c in cells))
    artifact = Artifact(default, before.members, rule, guard)
    write_artifact(folder, artifact)
    return artifact


def _most_often(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(Counter(tuple(s.items()) for s in settings).most_common(1)[0][0])


# --------------------------------------------------------------------------------------
# The card


def write_card(folder: Path, verdict: str, how: str, limits: str = LIMITS) -> None:
    """What it was trained on, what it is good for, its limits, and how to make it again."""
    artifact, manifest = read_artifact(folder), load_manifest(folder / _first(folder))
    parts = [*_training(folder, artifact, manifest), f"**Make it again:** {how}", verdict, limits]
    (folder / CARD).write_text("\n\n".join(parts) + "\n")


def _first(folder: Path) -> str:
    return read_artifact(folder).members[0]


def _chosen_at(manifest: Mapping[str, Any]) -> str:
    """After how many decisions validation liked the policy best; without any, at the end."""
    curve = manifest.get("validation_curve") or [[manifest["num_timesteps"], 0.0]]
    return str(max(curve, key=lambda point: float(point[1]))[0])


def _training(folder: Path, artifact: Artifact, manifest: Mapping[str, Any]) -> list[str]:
    config, cluster = manifest["config"], manifest["cluster"]
    spec, workload = cluster["spec"], config["workload"]
    chosen = [_chosen_at(load_manifest(folder / m)) for m in artifact.members]
    traffic = ", ".join(map(str, workload.get("traces", ()))) or str(
        workload["trace"] or "the generator"
    )
    days = f", days {workload['days'][0]} to {workload['days'][1]}" if workload["days"] else ""
    low, high = workload["load"]
    shown = config.get("cloning", {}).get("num_decisions", 0)
    start = f"{shown} demonstrations, then " if shown else ""
    return [
        f"# {folder.name}",
        f"""Decides when {spec["num_devices"]} devices ({cluster["profile"]["device"]}) that serve
{spec["model"]["name"]} switch, and to what. {len(artifact.members)} policies that differ in their
seed, guarded by hysteresis; by default **{artifact.default}** decides (`artifact.json`).""",
        f"""**Trained on** {traffic}{days}, at mean loads of {low:g} to {high:g} of the best static
capacity, on the surrogate: {start}PPO over {config["ppo"]["n_timesteps"]} decisions. Validation,
on traffic of its own, chose what the seeds were after {", ".join(chosen)} of them.""",
        f"![Learning curves]({CURVES})",
    ]


def verdict_of_cells(folder: Path, results: Sequence[Result]) -> str:
    """A line for each cell that the artifact was scored in, and what they say together."""
    artifact, cells = read_artifact(folder), cells_of(results, folder.name)
    if not cells:
        return "**Not scored yet**: hysteresis decides until it is."
    rows = []
    for cell in cells:
        gain, low, high = interval([gains(cell, [GUARDED])])
        alone, _, _ = interval([gains(cell, seeds_of(cell))])
        guarded, rule = run_of(cell, GUARDED), run_of(cell, HYSTERESIS)
        assert guarded is not None
        assert rule is not None
        rows.append(
            [
                str(cell["cell"]["name"]),
                str(cell["cell"]["role"]),
                f"{rule['utility']:.4f}",
                f"{gain:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{alone:+.4f}",
            ]
        )
    header = ("cell", "traffic", "J hysteresis", "guarded over it", "95 %", "seeds alone over it")
    main = main_cells(cells)
    said = "No cell of the means has been run."
    if main:
        gain, low, high = interval([gains(c, [GUARDED]) for c in main])
        said = (
            f"Over the cells of the means the gain in J is {gain:+.4f} ({low:+.4f} to {high:+.4f}, "
            f"95 %), so **{artifact.default}** is the default."
        )
    return f"**What it is worth** (docs/policy.md says how it was scored). {said}\n\n" + table(
        rows, header
    )
