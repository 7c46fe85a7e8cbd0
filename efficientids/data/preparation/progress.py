"""Lines on stderr that say how far a long preparation is."""

from __future__ import annotations

import sys
import time

_SECONDS = 5.0  # between lines; what is done sooner says nothing


class Progress:
    """Says what is going on, at most one line every few seconds; nothing at all where `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._began = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """A line on stderr with the seconds since the start, unless one came just before."""
        now = time.monotonic()
        if self._quiet or now - self._last < _SECONDS:
            return
        self._last = now
        print(f"[{now - self._began:5.0f} s] {text}", file=sys.stderr, flush=True)
