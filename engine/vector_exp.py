"""The exponential function for numba's kernels, written so that it vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

f32 = np.float32
_LOG2_E, _LN2_HIGH, _LN2_LOW = f32(1.44269504), f32(0.693359375), f32(-2.12194440e-4)


@njit(inline="always")
def vector_exp(x: Any) -> Any:
    """e^x of a float32 x <= 0, relative error below 3e-7; x below -87 counts as -87. Cephes' expf:
    x = n ln 2 + r, a polynomial in r, and n added to the exponent bits."""
    x = max(x, f32(-87.0))
    n = np.floor(x * _LOG2_E + f32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << 23).view(np.float32)
