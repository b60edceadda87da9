"""Linear models for off-policy evaluation: ridge regression and fitted Q evaluation. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PENALTY = 1e-2  # of a squared coefficient of a standardised feature, per sample


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """x -> intercept + x @ coefficients."""

    intercept: float
    coefficients: Floats  # [F]

    def __call__(self, x: Floats) -> Floats:
        """[..., F] -> [...]"""
        return np.asarray(self.intercept + x @ self.coefficients)


def standardise(x: Floats) -> tuple[Floats, Floats]:
    """Mean and spread of each column, [F] each; a column that does not vary has spread 1."""
    spread = x.std(axis=0)
    return x.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)


def ridge(x: Floats, y: Floats, penalty: float = PENALTY) -> Linear:
    """Least squares with a penalty on standardised coefficients; x [N, F], y [N]. The intercept is
    free, so the mean of what is fitted is the mean of y."""
    centre, spread = standardise(x)
    z, middle = (x - centre) / spread, float(y.mean())
    gram = z.T @ z + penalty * len(y) * np.eye(x.shape[1])
    coefficients = np.linalg.solve(gram, z.T @ (y - middle)) / spread
    return Linear(middle - float(centre @ coefficients), coefficients)


def linear_fqe(
    executed: Floats, after: Floats, reward: Floats, gamma: float, penalty: float = PENALTY
) -> Linear:
    """q of the fixed point that fitted Q evaluation with least squares goes to, solved at once
    (Lagoudakis and Parr 2003, LSTD-Q).

    executed [N, F]: features of what was done; after [N, F]: of the next state, averaged over what
    the target does there; reward [N]; gamma below 1.
    """
    centre, spread = standardise(executed)
    here, then = ((x - centre) / spread for x in (executed, after))
    here, then = (np.hstack([np.ones((len(x), 1)), x]) for x in (here, then))
    shrink = penalty * len(reward) * np.eye(here.shape[1])
    shrink[0, 0] = 0.0
    solved = np.linalg.solve(here.T @ (here - gamma * then) + shrink, here.T @ reward)
    coefficients = solved[1:] / spread
    return Linear(float(solved[0] - centre @ coefficients), coefficients)
