"""Which column is which: by the name a user gives, else by usual names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from efficientids.errors import UserError

_Tiers = Sequence[frozenset[str]]


def _tiers(*names: str) -> _Tiers:
    return tuple(frozenset(tier.split()) for tier in names)


# Small letters without "_", "-", "." and spaces. An earlier group wins over a later one; two of a group are ambiguous.
USER = _tiers("userid user", "reviewerid uid customerid visitorid sessionid accountid memberid buyerid username")
ITEM = _tiers(
    "itemid item",
    "parentasin",
    "asin movieid productid iid trackid songid bookid businessid articleid newsid videoid gameid animeid sku isbn",
)
TIME = _tiers("timestamp", "time unixreviewtime unixtime datetime date ts eventtime createdat ratedat unix")
RATING = _tiers("rating", "overall stars star score ratings")
SPLIT = _tiers("split")
HISTORY = _tiers("historyitemid itemidlist historyitemids")
SEQUENCE = _tiers("items", "sequence itemids itemidlist history seq")
TITLE = _tiers("title", "name itemtitle movietitle producttitle booktitle itemname productname")
(TEXTS,) = _tiers(
    "description brand store categories category maincat maincategory genres genre tags tag features feature author "
    "artist city year releaseyear"
)


def normal(name: str) -> str:
    """A column's name as the groups have it."""
    return re.sub(r"[\s_.-]", "", name).lower()


def recognised(columns: Sequence[str], tiers: _Tiers) -> list[str]:
    """The columns of the first group that has any."""
    for tier in tiers:
        if found := [name for name in columns if normal(name) in tier]:
            return found
    return []


def find_column(
    path: Path, columns: Sequence[str], tiers: _Tiers, given: str | None, flag: str, meaning: str
) -> str | None:
    """The column that `given` names, else the one with a usual name, else None.

    Raises UserError when the file has no column `given`, and when several columns have a usual name.
    """
    if given is not None:
        if given not in columns:
            raise UserError(f"--{flag} {given}: {path} has no such column; it has {listed(columns)}")
        return given
    found = recognised(columns, tiers)
    if len(found) > 1:
        raise UserError(f"{path}: {listed(found)} may each hold {meaning}; name one with --{flag}")
    return found[0] if found else None


def need_column(path: Path, columns: Sequence[str], tiers: _Tiers, given: str | None, flag: str, meaning: str) -> str:
    """As `find_column`, and raises UserError where there is none."""
    found = find_column(path, columns, tiers, given, flag, meaning)
    if found is None:
        hint = "" if known(columns) else '; a file without a header has the columns "1", "2", … (--header False)'
        raise UserError(
            f"{path}: no column is known to hold {meaning}; it has {listed(columns)}. Name it with --{flag}{hint}"
        )
    return found


def listed(columns: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")


def known(columns: Sequence[str]) -> bool:
    """Whether any of the names is a usual one."""
    return any(recognised(columns, tiers) for tiers in (USER, ITEM, TIME, RATING, TITLE))
