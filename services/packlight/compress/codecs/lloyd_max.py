"""The best scalar quantiser for one coordinate of a random direction.

A coordinate u of a uniformly random unit vector in d dimensions has the density

    f(u) = Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) * (1 - u^2)^((d-3)/2)        (TurboQuant, arXiv 2504.19874)

which is close to N(0, 1/d). Lloyd's iteration (Lloyd 1982, Max 1960) finds the 2^b points with the least mean squared
error: a boundary is the midpoint of its neighbours, a point is the mean of f between its boundaries.

Knows numbers. Does not know tensors of KV, rotations or bits on the wire.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GRID_POINTS = 1 << 14
MAX_ROUNDS = 5000
TOLERANCE = 1e-8
DECIMALS = 6  # the two ends of a shipment may round a sum differently: they must not differ in the points


def codebook(bits: int, dim: int) -> Floats:
    """The 2^bits points for sqrt(dim) * u, ascending and symmetric about 0. `dim` >= 2."""
    values, share, moment = _cumulative(dim)
    points = np.interp((np.arange(2**bits) + 0.5) / 2**bits, share, values)
    for _ in range(MAX_ROUNDS):
        edges = np.concatenate(([values[0]], boundaries(points), [values[-1]]))
        moved = np.diff(np.interp(edges, values, moment)) / np.diff(np.interp(edges, values, share))
        moved = (moved - moved[::-1]) / 2
        step, points = np.abs(moved - points).max(), moved
        if step < TOLERANCE:
            break
    rounded: Floats = np.round(points, DECIMALS)
    return rounded


def boundaries(points: Floats) -> Floats:
    """Where the nearest point changes."""
    return (points[1:] + points[:-1]) / 2


def _cumulative(dim: int) -> tuple[Floats, Floats, Floats]:
    """Values of sqrt(dim) * u, and up to each value the share of f and its first moment.

    On a grid of the angle u = -cos t, in which the density is sin(t)^(dim-2): smooth, where f itself has poles for
    small dimensions."""
    edges = np.linspace(0.0, np.pi, GRID_POINTS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    weight = np.sin(middle) ** (dim - 2)
    weight /= weight.sum()
    share = np.concatenate(([0.0], np.cumsum(weight)))
    moment = np.concatenate(([0.0], np.cumsum(weight * -np.cos(middle) * np.sqrt(dim))))
    return -np.cos(edges) * np.sqrt(dim), share, moment
