"""The bootstrap over users: how far a mean would move with other users of the same kind (Efron and Tibshirani, 1993).

Users are drawn, not examples: several examples of one user are no independent evidence.

Legend: M examples, U users, m metrics, C kinds of users, R resamples.
"""

from __future__ import annotations

import statistics

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS = 1 << 22
"""Numbers drawn at a time: 32 MB."""


def resampled_means(
    values_Mm: np.ndarray, users_M: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means over examples of `values_Mm`, in resamples of the users: float64 [R, m]; the same for the same arguments.

    Users with the same values are interchangeable, so what is drawn is how many users of each kind there are: with one
    example a user, the ranks up to the cut-off and the misses are all the kinds, and a million users cost no more than
    a thousand. Exactly the law of drawing U users with replacement.

    Raises:
        ValueError: no examples.
    """
    if len(users_M) == 0:
        raise ValueError("no users to resample")
    _, user_M = np.unique(users_M, return_inverse=True)
    columns = [np.bincount(user_M, column) for column in values_Mm.T]
    sums_Um = np.stack([np.bincount(user_M).astype(np.float64), *columns], axis=1)
    kinds_Cm, number_C = np.unique(sums_Um, axis=0, return_counts=True)
    users, rng = len(sums_Um), np.random.default_rng(seed)
    at_once, means = max(1, _DRAWS // len(number_C)), []
    for first in range(0, resamples, at_once):
        draws = rng.multinomial(users, number_C / users, size=min(at_once, resamples - first))
        totals = draws @ kinds_Cm
        means.append(totals[:, 1:] / totals[:, :1])
    return np.concatenate(means)


def intervals(means_Rm: np.ndarray) -> np.ndarray:
    """The percentile interval of each column that holds 95% of the resamples, float64 [m, 2]."""
    tail = (1 - LEVEL) / 2
    return np.quantile(means_Rm, [tail, 1 - tail], axis=0).T


def wilson(share: float, users: int) -> tuple[float, float]:
    """The 95% score interval of a share of `users` independent users (Wilson, 1927).

    For shares of exactly 0 or 1, where every resample is the same and the bootstrap's interval has no width.
    """
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * users)) / (1 + z * z / users)
    half = z / (1 + z * z / users) * (share * (1 - share) / users + z * z / (4 * users * users)) ** 0.5
    # At the ends one side is 0 or 1 exactly; rounding must not put the share itself outside.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def two_sided_p(means_Rm: np.ndarray) -> np.ndarray:
    """How easily a resample crosses 0, float64 [m]: twice the share of the rarer side, 0 on both; at most 1.

    The p value that goes with `intervals`: below 5% where the interval leaves 0 out. One resample is added on each
    side, for no finite number of resamples shows that something never happens.
    """
    resamples = len(means_Rm)
    below = (means_Rm <= 0).sum(axis=0) + 1
    above = (means_Rm >= 0).sum(axis=0) + 1
    return np.minimum(1.0, 2 * np.minimum(below, above) / (resamples + 1))


def holm(p_K: np.ndarray) -> np.ndarray:
    """p values adjusted for being K together (Holm, 1979): each stays valid for the whole family, float64 [K]."""
    order = np.argsort(p_K, kind="stable")
    stepped = np.maximum.accumulate((len(p_K) - np.arange(len(p_K))) * p_K[order])
    adjusted = np.empty(len(p_K))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
