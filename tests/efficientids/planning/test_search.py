"""The largest number that fits, against trying them all."""

from __future__ import annotations

import pytest

from efficientids.planning.search import largest


@pytest.mark.parametrize("start", [1, 7, 8, 300, 5000])
@pytest.mark.parametrize(("base", "each"), [(100, 7), (990, 7), (0, 7), (100, 0.3), (999, 1)])
def test_it_is_the_largest(base: int, each: float, start: int) -> None:
    tried: list[int] = []

    def line(value: int) -> int:
        return int(base + each * value + value % 3 * each / 4)  # almost straight

    def peak(value: int) -> int:
        tried.append(value)
        return line(value)

    found = largest(peak, 1000, start, trials=30)
    best = max((value for value in range(1, 5000) if line(value) <= 1000), default=0)
    assert found.value == best and found.too_large == best + 1
    assert found.peak == (line(best) if best else 0)
    assert len(tried) <= 12 and len(tried) == len(set(tried))  # each is dear


def test_units_bounds_and_an_early_end() -> None:
    found = largest(lambda v: 10 * v, 1000, 5, unit=8)
    assert (found.value, found.too_large) == (96, 104)
    assert largest(lambda v: v, 1000, 4, most=64).value == 64
    assert largest(lambda v: v, 1000, 4, most=64).too_large is None
    assert largest(lambda v: 2000, 1000, 4).value == 0
    early = largest(lambda v: v * v, 10**6, 1, trials=3)
    assert 0 < early.value < 1000 and (early.too_large is None or early.too_large > 1000)
