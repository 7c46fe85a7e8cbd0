"""Times of a log as whole milliseconds since 1970, UTC."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl

from efficientids.errors import UserError

_UNITS = (("s", 1, 10**11), ("ms", 10**3, 10**14), ("µs", 10**6, 10**17), ("ns", 10**9, 10**20))
"""Name, units a second, and the number from which on it is the next unit: the year 5138 in seconds."""

_BASIC_DATE = r"^(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])$"
_ISO = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_ISO_ZONE = ("%Y-%m-%d %H:%M:%S%.f%:z", "%Y-%m-%d %H:%M%:z")


@dataclasses.dataclass(frozen=True)
class Clock:
    """How the times of a file are written: one form for all of its rows.

    `form`: "number", "date" (20140723) or "iso" (2014-07-23, 2014-07-23T10:11:12.5+02:00; without a zone UTC);
    `unit`: of numbers.
    """

    form: str
    unit: str = "s"

    @staticmethod
    def of(sample: pl.Series, path: Path, column: str) -> Clock:
        """Chosen by the size of the first times, `sample` (String). Raises UserError where they are no times."""
        text = sample.str.strip_chars().replace("", None).drop_nulls()
        if text.str.contains(_BASIC_DATE).sum() * 2 > len(text):
            return Clock("date")
        numbers = text.cast(pl.Float64, strict=False).drop_nulls()
        if len(numbers) * 2 > len(text):
            middle = abs(float(np.median(numbers.to_numpy())))
            unit = next((name for name, _, end in _UNITS if middle < end), None)
            if unit is not None:
                return Clock("number", unit)
        clock = Clock("iso")
        if len(text.to_frame("time").select(clock.milliseconds("time").drop_nulls())) * 2 > len(text):
            return clock
        shown = ", ".join(repr(value) for value in text.head(3)) or "nothing"
        raise UserError(
            f"{path}: column {column} holds {shown}; expected seconds, ms, µs or ns since 1970, or dates as "
            "2014-07-23 or 2014-07-23T10:11:12. Name another column with --time_column"
        )

    def milliseconds(self, column: str) -> pl.Expr:
        """The String column as Int64 milliseconds, rounded down; null where it is not of this form and unit."""
        text = pl.col(column).str.strip_chars()
        if self.form == "number":
            index = [name for name, _, _ in _UNITS].index(self.unit)
            _, per_second, end = _UNITS[index]
            least = _UNITS[index - 1][2] if index else 0
            # Whole numbers by themselves: a float64 would lose the last digits of ns.
            whole = text.cast(pl.Int64, strict=False)
            number = text.cast(pl.Float64, strict=False)
            fits = (number.abs() < end) & (number.abs() >= least)
            exact = whole * (1000 // per_second) if per_second <= 1000 else whole.floordiv(per_second // 1000)
            rounded = (number * (1000 / per_second)).floor().cast(pl.Int64, strict=False)
            # `exact` may overflow where it does not fit; it is not taken then.
            return pl.when(fits).then(pl.coalesce(exact, rounded))
        if self.form == "date":
            return text.str.to_date("%Y%m%d", strict=False).dt.epoch("ms").cast(pl.Int64)
        plain = text.str.replace("T", " ", literal=True).str.replace("Z$", "")
        zone = text.str.replace("T", " ", literal=True).str.replace(r"([+-][0-9]{2})([0-9]{2})$", "${1}:${2}")
        forms = [plain.str.to_datetime(form, strict=False, time_unit="us") for form in _ISO[:2]]
        forms.append(plain.str.to_date(_ISO[2], strict=False).cast(pl.Datetime("us")))
        zoned = [zone.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC") for form in _ISO_ZONE]
        times = pl.coalesce(*forms, *(time.dt.replace_time_zone(None) for time in zoned))
        return times.dt.epoch("us").floordiv(1000)

    def describe(self) -> str:
        """In words, for the report."""
        if self.form == "number":
            return f"numbers of {self.unit} since 1970"
        return "dates as 20140723" if self.form == "date" else "ISO dates, UTC where no zone is given"

    def expected(self) -> str:
        """What a row must hold, for a message."""
        return {"number": f"a time in {self.unit}", "date": "a date as 20140723", "iso": "an ISO date"}[self.form]
