"""The largest number that fits, in few trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Largest:
    """A search's end.

    Attributes:
        value: the largest that was tried and fits; 0 where not even one unit does.
        peak: its bytes; 0 with `value` 0.
        too_large: the smallest that was tried and does not fit; None: none was found up to the search's end.
    """

    value: int
    peak: int
    too_large: int | None


def largest(
    peak: Callable[[int], int], limit: int, start: int, *, unit: int = 1, most: int = 2**20, trials: int = 8
) -> Largest:
    """The largest multiple of `unit` whose peak is at most `limit`.

    Peaks are taken to grow with the value, and nearly in a straight line: each trial is where the line through the last
    two points meets the limit, but always inside what is still open.

    Args:
        peak: value → bytes; dear.
        start: the first value to try, rounded up to a multiple of `unit`.
        most: no value above it is tried.
        trials: calls of `peak` at most; fewer where the answer is exact before.
    """
    most = max(1, most // unit)
    trying = min(max(1, -(-start // unit)), most)
    fits, fits_peak, over = 0, 0, most + 1
    points: list[tuple[int, int]] = []
    for _ in range(trials):
        found = peak(trying * unit)
        points.append((trying, found))
        if found <= limit:
            fits, fits_peak = trying, found
        else:
            over = trying
        if over - fits <= 1:
            break
        trying = _next(points, limit, fits, over)
    return Largest(fits * unit, fits_peak, None if over > most else over * unit)


def _next(points: list[tuple[int, int]], limit: int, fits: int, over: int) -> int:
    """Where the limit is likely to be, strictly between `fits` and `over`."""
    if len(points) == 1:
        guess = 2 * points[0][0] if fits else points[0][0] // 2
    else:
        (x0, y0), (x1, y1) = points[-2:]
        slope = (y1 - y0) / (x1 - x0)
        # The whole number below the crossing: if it fits, the next trial is the one above it.
        guess = int(x1 + (limit - y1) / slope) if slope > 0 else 2 * max(x0, x1)
        if points[-1][0] == fits and guess <= fits:
            guess = fits + 1
    return min(max(guess, fits + 1), over - 1)
