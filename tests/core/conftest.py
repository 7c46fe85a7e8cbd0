"""All tests of `core` compile quickly: see the fixture."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compile: None) -> None:
    """Uses it."""
