"""User ids replaced by keyed hashes, so that a data set can be shared without naming anybody."""

from __future__ import annotations

import hmac
import os

import polars as pl

from efficientids.errors import UserError

SALT_VARIABLE = "EFFICIENTIDS_USER_SALT"
SHORTEST_SALT = 16  # bytes; a short one could be guessed from a known user's hash
_DIGITS = 32


def salt_from_environment() -> bytes:
    """The secret of `EFFICIENTIDS_USER_SALT`. Raises UserError where it is not set or short; never shows it."""
    salt = os.environ.get(SALT_VARIABLE, "").encode()
    if len(salt) < SHORTEST_SALT:
        found = f"has {len(salt)} bytes" if salt else "is not set"
        raise UserError(
            f"--hash_users: the environment variable {SALT_VARIABLE} {found}; set it to a secret of at least "
            f"{SHORTEST_SALT} bytes (and keep it: the same salt gives the same ids)"
        )
    return salt


def hash_ids(ids: pl.Series, salt: bytes) -> pl.Series:
    """Each id's HMAC-SHA256 under `salt`, its first 32 hexadecimal digits; a String series of the same length."""
    distinct = ids.unique()
    hashed = [hmac.digest(salt, user.encode(), "sha256").hex()[:_DIGITS] for user in distinct.to_list()]
    return ids.replace_strict(distinct, pl.Series(hashed, dtype=pl.String), return_dtype=pl.String)
