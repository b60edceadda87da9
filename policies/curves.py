"""Learning curves as a picture: one line of a run, or the mean and spread of several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]  # (decisions so far, value)


def band(curves: Sequence[Points]) -> tuple[NDArray[np.float64], ...]:
    """Decisions, mean and standard deviation over curves, where all of them have values: [N] each.
    Curves are taken as straight between their points."""
    arrays = [np.asarray(curve, np.float64) for curve in curves]
    first, last = max(a[0, 0] for a in arrays), min(a[-1, 0] for a in arrays)
    at = np.unique(np.concatenate([a[:, 0] for a in arrays]))
    at = at[(first <= at) & (at <= last)]
    values = np.stack([np.interp(at, a[:, 0], a[:, 1]) for a in arrays])
    return at, values.mean(axis=0), values.std(axis=0)


def plot_curves(path: Path, curves: Mapping[str, Sequence[Points]]) -> None:
    """A PNG with one panel per name; each holds a curve per seed. Empty curves are left out."""
    shown = {name: [c for c in several if len(c)] for name, several in curves.items()}
    shown = {name: several for name, several in shown.items() if several}
    if not shown:
        return
    figure = Figure(figsize=(5 * len(shown), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, several) in zip(panels, shown.items(), strict=True):
        _draw(axes, several)
        axes.set(title=name, xlabel="decisions")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, several: Sequence[Points]) -> None:
    at, mean, spread = band(several)
    axes.plot(at, mean, marker="." if len(at) < 50 else "")
    if len(several) > 1:
        axes.fill_between(at, mean - spread, mean + spread, alpha=0.25)
        for curve in several:
            axes.plot(*np.asarray(curve, np.float64).T, color="gray", alpha=0.3, linewidth=0.7)
