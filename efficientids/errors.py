"""The error that a person can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: a file, a flag, a value.

    The message names the file or flag, the field, the value found and what to do. The command line prints it without a
    traceback and exits with code 2.
    """
